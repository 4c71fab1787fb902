"""The whole run through its one door, on a tiny stream: what it returns, and what must never change its bits."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from clients.channels import topk
from clients.learners import er
from clients.pools.ray import to_numpy, with_tensors
from clients.worker import Worker
from fedsim import simulation
from fedsim.cli.printing import console
from fedsim.cli.run import show_results
from fedsim.core.config import SimConfig, load
from fedsim.core.contracts import lifts_of
from fedsim.core.errors import AggregationError, ClientFailed, ConfigError, DataError, RunDirError
from fedsim.core.events import ClientDone, ClientSkipped, Note, RoundDone, RunDirOpened, RunStarted, TaskDone
from fedsim.core.messages import Bundle
from fedsim.exports.deployed import load_model
from fedsim.runs.directory import RunDir
from fedsim.runs.results import Results
from fedsim.simulation import prepare_again, prepare_data, run
from fedsim.watch.progress import ProgressDisplay
from server import checkpoint, gather, loop
from server.aggregators import fedavg
from tests.pages import median_rule
from tests.tiny import final_state, kept, learned, plain_vit, same_bits, stopping, tiny

IMAGES = {"name": "target", "images": 8, "batch": 4, "steps": 2, "warmup": 0, "latent": 4, "width": 2}  # the server makes them
METHODS: dict[str, dict[str, Any]] = {
    "lorm": {},
    "groups": {
        "server": {
            "aggregator": [{"match": "head.*", "name": "variance_weighted"}, {"match": "*", "name": "fedavg"}],
            "consolidator": {"name": "merged", "rule": {"name": "dare", "then": "fisher"}},  # draws, and statistics of products
            # a pass over all clients through the merged model, summed where they run; bfloat16 and shapes of their own travel
            "calibrator": {"name": "lda", "precision": "bfloat16", "rank": 2},
            "participation": 0.67,
        },
        "adapter": {"name": "lora", "rank": 2, "targets": "all-linear", "dropout": 0.2},
        "transform": {"augment": "affine"},
    },
    "every hook": {  # passes before and after a task, past modules in training, statistics of it, frozen heads, repair, vectors
        "server": {
            "aggregator": {"name": "livar", "cumulative": True, "evaluated": "products"},
            "consolidator": {"name": "dolfin", "tasks": 2},
            "calibrator": {"name": "ccvr", "when": "round", "classes": "task"},
            "participation": 0.67,
            "unlearning": True,
        },
        "client": {"weight_decay": 0.1, "learners": [{"name": "square", "kappa": 5.0}, {"name": "proximal"}]},
    },
    "channels": {  # memory of clients, draws of clients and of the server; a module that grows, a teacher that has not grown; a
        # rule whose state goes on over tasks
        "adapter": {"name": "codaprompt", "length": 2, "blocks": "all", "components": 2, "mu": 0.1},
        "client": {"learners": ["fedcprompt"]},
        "server": {
            "channel": [
                {"name": "topk", "share": 0.2},
                {"name": "quantise", "bits": 4},
                {"name": "clip_noise", "clip": 0.5, "noise": 0.1},
            ],
            "aggregator": {"name": "fedadam", "weights": "uniform", "reset_on_task": False},
            "consolidator": "none",
            "participation": 0.67,
        },
    },
    "learners": {  # both halves, context, teachers, memory, replay, images made up, corrected gradients, passes, changed tensors
        "server": {"aggregator": "fairavg", "consolidator": "none", "participation": 0.67},
        "client": {
            "optimizer": "sgd",
            "lr": 0.05,
            "learners": [
                {"name": "abs", "size": 8},
                *("scaffold", "lwf", "moon", "si", "ewc", "feddyn", "fedproto"),
                {"name": "gpm", "threshold": 0.3, "columns": 4},  # a pass that draws
                IMAGES,
            ],
        },
    },
    "looks": {  # several passes before a merge, each client with its own tensors in them; layers' inputs and gradients
        "server": {"aggregator": {"name": "merged", "rule": "chain_of_merges"}, "consolidator": "mean", "rounds": 1},
        "client": {"learners": ["tak"]},
    },
    "pairs": {  # a stack beneath one block's pairs, B of the other with its client, ranks that differ, one module that goes on
        "server": {
            "aggregator": [
                {"match": "*.layers.0.*", "name": "flora"},
                {"match": "adapter.*", "name": "fedsa"},
                {"match": "*", "name": "fedavg"},
            ],
            "consolidator": "none",
            "participation": 0.67,
        },
        "client": {"ranks": {"law": "turns", "of": [2, 1]}, "weight_decay": 0.1, "learners": ["lwf"]},
    },
    "composed": {
        "server": {"aggregator": "collect", "consolidator": "compose", "rounds": 1},
        "adapter": {"name": "apt", "memory": 1},
        "head": "mixture",
    },
}
# Flower starts Ray anew for every run, which takes longest: the messages of the others are in tests/clients/test_flower_pool.py
ON_FLOWERS_ENGINE = "every hook"


def test_results_hold_what_a_researcher_wants(tmp_path: Path) -> None:
    events: list[Any] = []
    results = run(tiny(output=tmp_path), progress=events.append)
    assert results.accuracy.shape == (2, 2)
    assert math.isnan(results.accuracy[0, 1])
    assert ((results.accuracy[np.tril_indices(2)] >= 0) & (results.accuracy[np.tril_indices(2)] <= 100)).all()
    assert results.metrics["final_average_accuracy"] == pytest.approx(results.accuracy[1].mean())
    frame = results.frame()
    # task 0: 2 rounds x 1 task tested + its end; task 1: 2 rounds x 2 + its end x 2
    assert len(frame) == 2 + 1 + 4 + 2
    assert frame["total"].eq(12).all()
    assert [type(e) for e in events[:5]] == [RunDirOpened, RunStarted, ClientDone, ClientDone, ClientDone]
    assert sum(isinstance(e, RoundDone) for e in events) == 4
    assert sum(isinstance(e, TaskDone) for e in events) == 2
    again = Results.load(results.path)
    np.testing.assert_array_equal(again.accuracy, results.accuracy)
    assert again.metrics == results.metrics
    assert again.manifest_hash == results.manifest_hash


def test_training_learns(tmp_path: Path) -> None:
    """Clusters that can be told apart are told apart, far above the chance of 1/6 over all classes."""
    joint = tiny("stream.tasks=1", "server.aggregator=fedavg", "server.consolidator=none", "client.epochs=10", output=tmp_path)
    assert run(joint).accuracy[0, 0] > 50


def test_bytes_of_fedavg_are_what_the_formula_says(tmp_path: Path) -> None:
    """Down and up = clients x rounds x tasks x parameters x 4 bytes (shared/methods/metrics.md, section 3)."""
    config = tiny("server.aggregator=fedavg", "server.consolidator=none", output=tmp_path)
    results = run(config)
    params = final_state(results.path, config).params
    one_way = 3 * 2 * 2 * sum(t.numel() for t in params.values()) * 4
    assert sum(results.costs["bytes"]["down"].values()) == one_way
    assert sum(results.costs["bytes"]["up"].values()) == one_way


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[SimConfig, Results]]:
    """A method's run in the serial pool, made once."""
    folder = tmp_path_factory.mktemp("serial")

    @cache
    def of(method: str) -> tuple[SimConfig, Results]:
        config = tiny(output=folder, model=plain_vit(), **METHODS[method])
        return config, run(config)

    return of


@pytest.mark.parametrize(
    ("method", "workers"),
    [pytest.param(method, n, marks=[pytest.mark.always] * ((method, n) == ("lorm", 2))) for method in METHODS for n in (1, 2)],
)
def test_ray_gives_the_same_bits(method: str, workers: int, tmp_path: Path, whole: Any, warm_ray: None) -> None:
    gives_the_same_bits(
        tiny("runtime.pool=ray", f"runtime.workers={workers}", output=tmp_path, model=plain_vit(), **METHODS[method]),
        whole(method),
    )


def gives_the_same_bits(config: SimConfig, whole: tuple[SimConfig, Results]) -> None:
    serial, results = whole
    path = run(config).path
    assert serial.identity() == config.identity()
    assert same_bits(learned(final_state(results.path, serial)), learned(final_state(path, config)))  # type: ignore[arg-type]
    assert same_bits(kept(results.path), kept(path))  # type: ignore[arg-type]


@pytest.mark.parametrize(("fused", "workers"), [("false", (1, 2)), ("true", (2,))])
def test_many_clients_in_blocks_have_the_bits_of_one_by_one(
    fused: str, workers: tuple[int, ...], tmp_path: Path, warm_ray: None
) -> None:
    """45 clients, enough for blocks on two workers: alone in the serial pool (in bundles if they are fused), and in blocks that
    Ray workers sum."""
    overrides = [
        f"runtime.fused={fused}",
        "partition.clients=45",
        "partition.min_samples=1",
        "partition.alpha=5",
        "stream.tasks=1",
    ]
    where = [("runtime.pool=serial",), *(("runtime.pool=ray", f"runtime.workers={w}") for w in workers)]
    states = []
    for k, pool in enumerate(where):
        config = tiny(
            *overrides, *pool, "server.rounds=1", "data.train_per_class=30", output=tmp_path / str(k), model=plain_vit()
        )
        states.append(learned(final_state(run(config).path, config)))  # type: ignore[arg-type]
    assert all(same_bits(states[0], other) for other in states[1:])


def test_fused_clients_learn_what_single_ones_learn(tmp_path: Path) -> None:
    found = []
    for fused in ("false", "true"):
        config = tiny(f"runtime.fused={fused}", output=tmp_path / fused)
        found.append(final_state(run(config).path, config).params)  # type: ignore[arg-type]
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-4)


def test_a_rule_that_is_not_summed_is_watched_within_the_same_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "MOST_OBSERVED", 2)
    median = tmp_path / "median.py"
    median.write_text(median_rule())
    watched = run(tiny(f"server.aggregator.name={median}", "server.consolidator=none", output=tmp_path / "a"))
    assert {row.clients for row in watched.drifts} == {2}
    left_out = tiny(f"server.aggregator.name={median}", "server.consolidator=none", "server.drift=false", output=tmp_path / "b")
    assert not run(left_out).drifts


ODD_MEAN = """
from dataclasses import dataclass
from server.aggregators import fedavg

@dataclass(frozen=True)
class Aggregator(fedavg.Aggregator):
    def combine(self, state, params, updates, draw):
        state, merged = super().combine(state, params, updates, draw)
        return state, {n: t + 1 for n, t in merged.items()}
"""


def test_a_combine_of_its_own_is_not_passed_by(tmp_path: Path) -> None:
    """A rule that inherits from an additive one and does more than a sum."""
    (tmp_path / "odd.py").write_text(ODD_MEAN)
    short = ("server.consolidator=none", "server.rounds=1", "stream.tasks=1")
    configs = [tiny(f"server.aggregator.name={name}", *short, output=tmp_path) for name in (tmp_path / "odd.py", "fedavg")]
    odd, usual = (final_state(run(c).path, c).params for c in configs)  # type: ignore[arg-type]
    for name, tensor in usual.items():
        torch.testing.assert_close(odd[name], tensor + 1)


def test_workers_do_not_sum_with_a_rule_that_was_edited_since(tmp_path: Path) -> None:
    rule = tmp_path / "rule.py"
    rule.write_text(ODD_MEAN.split("    def combine")[0] + "    pass\n")
    spec = prepare_data(tiny(f"server.aggregator.name={rule}"))[1]
    assert lifts_of(("rule",), Worker(spec)._known_rule(), None, {}) is not None
    rule.write_text(rule.read_text() + "# edited\n")
    assert lifts_of(("rule",), Worker(spec)._known_rule(), None, {}) is None


def test_drift_can_be_left_out_and_moves_no_bit(tmp_path: Path) -> None:
    with_drift, without = tiny(output=tmp_path / "a"), tiny("server.drift=false", output=tmp_path / "b")
    a, b = run(with_drift), run(without)
    assert a.drifts and not b.drifts
    states = [learned(final_state(r.path, c)) for r, c in ((a, with_drift), (b, without))]  # type: ignore[arg-type]
    for state in states:
        del state["drifts"]
    assert same_bits(*states)


@pytest.mark.parametrize("method", ["lorm", "groups", "every hook", "channels", "learners", "pairs"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    """Stopped within a task, between tasks and in the last task, and resumed every time = never stopped."""
    config, never = whole(method)
    stopped = tmp_path / "stopped"
    for number, steps in enumerate((1, 2, 2)):  # a step is a round or a task's end
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "save", stopping(steps))
            with pytest.raises(KeyboardInterrupt):
                run(resume=stopped) if number else run(config, output=stopped)
    resumed = run(resume=stopped)
    assert same_bits(learned(final_state(never.path, config)), learned(final_state(stopped, config)))
    assert same_bits(kept(never.path), kept(stopped))
    np.testing.assert_array_equal(resumed.accuracy, never.accuracy)


def test_a_run_with_plug_in_files_of_ones_own_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory, server state and draws go by the files' names, which copies keep, two files of one name too."""
    files = {"learner": tmp_path / "b" / "mine.py", "channel": tmp_path / "c" / "mine.py", "rule": tmp_path / "a_rule.py"}
    for plugin, path in zip((er, topk, fedavg), files.values(), strict=True):
        path.parent.mkdir(exist_ok=True)
        path.write_text(inspect.getsource(plugin))
    server = {"aggregator": str(files["rule"]), "consolidator": "none", "rounds": 1, "channel": [str(files["channel"])]}
    client = {"learners": [{"name": str(files["learner"]), "size": 6, "batch_size": 3}], "epochs": 4}
    config = tiny(server=server, client=client, model=plain_vit())
    whole, stopped = run(config, output=tmp_path / "whole"), tmp_path / "stopped"
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", stopping(2))
        with pytest.raises(KeyboardInterrupt):
            run(config, output=stopped)
    run(resume=stopped)
    state = final_state(stopped, config)
    assert same_bits(learned(final_state(tmp_path / "whole", config)), learned(state))
    assert same_bits(kept(tmp_path / "whole"), kept(stopped))
    assert {name.partition("/")[0] for name in kept(stopped)["memory"][0]} == {"learner.mine", "channel.0.mine"}
    assert same_bits(dict(load_model(str(whole.path)).params), dict(state.params))


def test_a_run_whose_data_have_moved_goes_on_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    y = np.repeat(np.arange(4), 6)
    arrays = {f"{s}_{k}": v for s in ("train", "test") for k, v in
              (("images", np.random.default_rng(0).integers(0, 256, (24, 8, 8)).astype(np.uint8)), ("labels", y))}  # fmt: skip
    old, new, other, folder = tmp_path / "old.npz", tmp_path / "new.npz", tmp_path / "other.npz", tmp_path / "run"
    np.savez(old, **arrays)
    np.savez(other, **{**arrays, "train_labels": y[::-1]})
    config = tiny(data={"source": "npz", "path": str(old)})
    whole = run(config, output=tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", stopping(1))
        with pytest.raises(KeyboardInterrupt):
            run(config, output=folder)
    old.rename(new)

    def moved(path: Path, *overrides: str) -> SimConfig:
        return load(folder / "config.yaml", [f"data.path={path}", *overrides])

    with pytest.raises(DataError, match=r"no .npz file at .*have the data moved\? fedsim run --resume .*run data.path=NEW\)$"):
        run(resume=folder)
    with pytest.raises(RunDirError, match="the data give another split than the run began with"):
        run(moved(other), resume=folder)
    with pytest.raises(RunDirError, match="another config"):
        run(moved(new, "seed=1"), resume=folder)
    assert not (folder / "data.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", stopping(1))
        with pytest.raises(KeyboardInterrupt):
            run(moved(new), resume=folder)
    resumed = run(resume=folder)  # it was told once
    assert same_bits(learned(final_state(tmp_path / "whole", config)), learned(final_state(folder, config)))
    np.testing.assert_array_equal(resumed.accuracy, whole.accuracy)
    newest = new.rename(tmp_path / "newest.npz")
    run(moved(newest), resume=folder)
    assert prepare_again(RunDir.open(folder)).manifest.hash == resumed.manifest_hash, "also of a run that is finished"


def test_a_run_is_never_gone_on_with_on_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is its module put on them: the identity holds the backbone's path alone."""
    folder = tmp_path / "vit"
    shutil.copytree(plain_vit()["backbone"], folder)
    weights = load_file(folder / "model.safetensors")
    config = tiny(model={"backbone": str(folder), "config": None})
    whole, stopped = run(config, output=tmp_path / "whole"), tmp_path / "stopped"
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", stopping(3))
        with pytest.raises(KeyboardInterrupt):
            run(config, output=stopped)
    save_file({n: t.flip(0).contiguous() for n, t in weights.items()}, folder / "model.safetensors")
    for gone_on in (
        lambda: run(resume=stopped),
        lambda: load_model(tmp_path / "whole"),
        lambda: prepare_again(RunDir.open(tmp_path / "whole")),
    ):
        with pytest.raises(RunDirError, match=r"^[^\n]*: the weights of the backbone '.*vit' are not those that the run began"):
            gone_on()
    status = json.loads((tmp_path / "whole" / "status.json").read_text())
    (tmp_path / "whole" / "status.json").write_text(json.dumps({k: v for k, v in status.items() if k != "backbone"}))
    assert prepare_again(RunDir.open(tmp_path / "whole")).config == config, "nothing was noted when it began"
    save_file(weights, folder / "model.safetensors")
    np.testing.assert_array_equal(run(resume=stopped).accuracy, whole.accuracy)


def test_resume_refuses_another_config(tmp_path: Path) -> None:
    results = run(tiny("server.rounds=1", "stream.tasks=1", output=tmp_path))
    with pytest.raises(RunDirError, match="another config"):
        run(tiny("seed=5", "server.rounds=1", "stream.tasks=1"), resume=results.path)


def test_resuming_a_finished_run_returns_its_results(tmp_path: Path) -> None:
    results = run(tiny("server.rounds=1", output=tmp_path))
    again = run(resume=results.path)
    np.testing.assert_array_equal(again.accuracy, results.accuracy)


@pytest.mark.parametrize("pool", ["serial", "ray"])
def test_a_loss_that_is_not_finite_names_the_client(pool: str, tmp_path: Path, warm_ray: None) -> None:
    words = ("client.optimizer=sgd", "client.lr=1e30", "client.epochs=3", f"runtime.pool={pool}", "runtime.workers=2")
    config = tiny(*words, output=tmp_path)
    with pytest.raises(ClientFailed, match=r"client 0 failed in task 0, round 0, stage (training|update): .*") as failed:
        run(config)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(("clients", "unlearning"), [({0, 2}, "false"), ({1}, "false"), ({2}, "true")])
def test_a_failure_of_some_clients_names_the_first(
    clients: set[int], unlearning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch, clients)
    with pytest.raises(
        ClientFailed, match=r"failed in task 0, round 0, stage (isolated )?training: RuntimeError: poisoned .*skip"
    ):
        run(tiny(f"server.unlearning={unlearning}", "server.rounds=1", output=tmp_path))


def test_skip_goes_on_without_failing_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _poison(monkeypatch, {1})
    events: list[Any] = []
    results = run(tiny("server.on_client_failure=skip", output=tmp_path), progress=events.append)
    skipped = [e.failure for e in events if isinstance(e, ClientSkipped)]
    assert {f.client_id for f in skipped} == {1}
    assert {f.stage for f in skipped} == {"training"}
    assert len(results.failures) == len(skipped) == 4  # the statistics pass at a task's end trains nobody
    assert np.isfinite(results.accuracy[1]).all()


def test_notes_are_said_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, prepared = Worker.train, simulation._prepared
    noting = lambda *args: replace(whole(*args), notes=("slower than asked",))  # noqa: E731
    monkeypatch.setattr(Worker, "train", noting)
    monkeypatch.setattr(simulation, "_prepared", lambda *args: replace(prepared(*args), notes=("known before",)))
    config, events = tiny("server.aggregator=fedavg", "server.consolidator=none", output=tmp_path), list[Any]()
    with monkeypatch.context() as stopped:
        stopped.setattr(checkpoint, "save", stopping(after=1))
        with pytest.raises(KeyboardInterrupt):
            run(config, output=tmp_path / "run", progress=events.append)
    assert [e for e in events if isinstance(e, Note)] == [Note("known before"), Note("slower than asked")]
    events.clear()
    with ProgressDisplay() as display:
        results = run(config, resume=tmp_path / "run", progress=lambda e: (events.append(e), display(e))[1])
    assert [e for e in events if isinstance(e, Note)] == [Note("known before")], "another process says it again, once"
    assert results.notes == Results.load(tmp_path / "run").notes == ("known before", "slower than asked")
    assert "note: known before" in capsys.readouterr().out
    show_results(results, console())
    assert "Note: slower than asked" in capsys.readouterr().out


def test_a_note_survives_the_way_through_a_pool() -> None:
    bundle = Bundle(3, (), {"rule": {"x": torch.ones(1)}}, ("slower than asked",))
    assert with_tensors(bundle, to_numpy).notes == bundle.notes


def test_a_round_in_which_nobody_is_left_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _poison(monkeypatch, {0, 1, 2})
    for policy in ("skip", "fail"):
        with pytest.raises(AggregationError, match=r"all 3 clients failed, for the same reason in stage training: .*poisoned$"):
            run(tiny(f"server.on_client_failure={policy}", output=tmp_path / policy))


def _poison(monkeypatch: pytest.MonkeyPatch, clients: set[int]) -> None:
    from clients import local

    real = local.fit

    def fit(*args: Any) -> float:
        if args[0].client_id in clients:
            raise RuntimeError("poisoned")
        return real(*args)

    monkeypatch.setattr(local, "fit", fit)


def test_participation_is_drawn_afresh_every_round(tmp_path: Path) -> None:
    config = tiny(
        "server.participation=0.34", "server.rounds=8", "server.evaluate=task", "server.aggregator=fedavg", output=tmp_path
    )
    events: list[Any] = []
    run(config, progress=events.append)
    drawn = [e.client_id for e in events if isinstance(e, ClientDone) and e.round < 8]
    assert len(drawn) == 16
    assert len(set(drawn)) == 3


def test_online_sees_every_sample_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clients import local

    seen: dict[tuple[int, int], list[int]] = {}
    real = local.fit

    def fit(*args: Any) -> float:
        work = args[0]
        seen.setdefault((work.client_id, work.task), []).extend(int(i) for i in work.shard)
        return real(*args)

    monkeypatch.setattr(local, "fit", fit)
    config = tiny(
        "stream.online=true", "server.rounds=3", "server.aggregator=fedavg", "server.consolidator=none", output=tmp_path
    )
    run(config)
    everything = [i for positions in seen.values() for i in positions]
    assert sorted(everything) == list(range(72))


def test_a_rule_object_from_python(tmp_path: Path) -> None:
    from server.aggregators.fedavg import Aggregator

    by_name = run(tiny("server.aggregator=fedavg", output=tmp_path))
    by_object = run(tiny(output=tmp_path), aggregator=Aggregator())
    np.testing.assert_array_equal(by_name.accuracy, by_object.accuracy)
    assert "python:" in by_object.config.server.aggregator["name"]


def test_equal_configs_have_one_identity_and_different_ones_two() -> None:
    same: list[SimConfig] = [tiny(), tiny("runtime.pool=ray"), tiny("runtime.workers=2"), tiny("name=other")]
    assert len({c.identity() for c in same}) == 1
    assert len({c.identity() for c in [tiny(), tiny("seed=1"), tiny("partition.alpha=0.1"), tiny("runtime.threads=2")]}) == 4


def test_the_loop_is_short_enough_to_be_read_first() -> None:
    assert len(Path(loop.__file__).read_text().splitlines()) <= 150


def test_a_run_directory_that_is_in_the_way(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    run(tiny("server.rounds=1", "stream.tasks=1"), output=taken)
    with pytest.raises(RunDirError):
        run(tiny("seed=1", "server.rounds=1", "stream.tasks=1"), output=taken)


def test_nothing_to_run() -> None:
    with pytest.raises(ConfigError, match="nothing to run"):
        run()


def test_threads_of_the_caller_are_given_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    run(tiny("runtime.threads=2", "server.rounds=1", "stream.tasks=1", output=tmp_path))
    assert torch.get_num_threads() == before


def test_a_rule_file_that_is_edited_during_a_run_does_not_spoil_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on with the rule that it began with, and can be resumed: the run directory holds a copy of the file."""
    rule = tmp_path / "my_rule.py"
    rule.write_text(median_rule())
    config = tiny(f"server.aggregator.name={rule}", "server.consolidator=none", output=tmp_path)
    whole = run(config)
    real, saved = checkpoint.save, []

    def edited_then_stopped(*args: Any) -> None:
        rule.write_text(median_rule() + "\n# edited while it runs\n")
        real(*args)
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", edited_then_stopped)
        with pytest.raises(KeyboardInterrupt):
            run(config, output=tmp_path / "stopped")
    resumed = run(resume=tmp_path / "stopped")
    np.testing.assert_array_equal(resumed.accuracy, whole.accuracy)
    np.testing.assert_array_equal(Results.load(tmp_path / "stopped").accuracy, whole.accuracy)
    assert run(resume=tmp_path / "stopped").finished


def test_flowers_engine_gives_the_same_bits(tmp_path: Path, whole: Any, no_ray: None) -> None:
    pytest.importorskip("flwr", reason="Flower needs Python 3.11")
    method = ON_FLOWERS_ENGINE
    config = tiny("runtime.pool=flower", "runtime.workers=1", output=tmp_path, model=plain_vit(), **METHODS[method])
    gives_the_same_bits(config, whole(method))
