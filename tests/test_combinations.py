"""Adapters, streams, rules and client options in company: each runs, and does what sets it apart."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim import matrix
from fedsim.core import config as configs
from fedsim.core import plugins
from fedsim.core.config import SimConfig
from fedsim.core.errors import ConfigError
from fedsim.data.partitions import iid
from fedsim.simulation import prepare, run
from fedsim.suitable import chosen_parts, obstacle, run_words
from tests.tiny import TINY, final_state, plain_vit, same_bits, tiny

FEDAVG = ("server.aggregator=fedavg", "server.consolidator=none")


@pytest.mark.parametrize("consolidator", ["none", "mean"])
@pytest.mark.parametrize("adapter", plugins.names("adapters"))
def test_every_adapter_runs_with_fedavg(adapter: str, consolidator: str, tmp_path: Path) -> None:
    section = {"name": adapter, **matrix.SMALL.get(("adapters", adapter), {})}
    config = tiny("server.aggregator=fedavg", f"server.consolidator={consolidator}", output=tmp_path, adapter=section)
    grows = "one module goes on" in plugins.load("adapters", adapter).usual_traits().needs
    if grows and consolidator == "mean":
        with pytest.raises(ConfigError, match="use consolidator: none"):
            run(config)
        return
    results = run(config)
    assert np.isfinite(results.accuracy[1]).all()
    trained = [n for n in final_state(results.path, config).params if n.startswith("adapter.")]
    assert bool(trained) == (adapter != "none")


def test_domain_incremental_keeps_all_classes_in_every_task(tmp_path: Path) -> None:
    config = tiny(*FEDAVG, "stream.name=domain_incremental", "stream.tasks=null", "data.domains=2", output=tmp_path)
    results = run(config)
    assert results.accuracy.shape == (2, 2)
    np.testing.assert_array_equal(results.accuracy, results.accuracy_task_incremental)


def test_task_incremental_reports_the_argmax_inside_the_task(tmp_path: Path) -> None:
    told = run(tiny("stream.name=task_incremental", output=tmp_path))
    untold = run(tiny(output=tmp_path))
    np.testing.assert_array_equal(told.accuracy, untold.accuracy_task_incremental)
    assert (told.accuracy[1] >= untold.accuracy[1]).all()


SMALL = "steps: 2, batch: 4, latent: 4, width: 2"
REWRITING = [  # learners that train rows of old classes
    *(f"{{name: {name}, size: 6}}" for name in ("er", "derpp", "xder", "icarl", "glfc")),
    "lwf", "{name: lwf, form: sigmoids}", "{name: square, classes: all}", f"{{name: mfcl, {SMALL}}}",
    f"{{name: target, images: 6, warmup: 0, {SMALL}}}", str(Path(__file__).parents[1] / "examples/replay.py"),
]  # fmt: skip
KEEPING = ["", "square", "pip", "feature_distillation"]


@pytest.mark.parametrize("learner", [*KEEPING, *REWRITING])
def test_classes_of_old_tasks_keep_their_rows_but_where_a_learner_trains_them(learner: str, tmp_path: Path) -> None:
    """Training masks the loss to the task's classes: rows of other classes do not move, neither does their bias."""
    config = tiny(*FEDAVG, "server.rounds=1", f"client.learners=[{learner}]", output=tmp_path)
    seen: list[Any] = []
    from server import checkpoint

    real = checkpoint.save
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "save", lambda path, state, *rest: (seen.append(state), real(path, state, *rest)))
        run(config)
    before, after = seen[1].params, seen[-1].params  # after task 0, after task 1
    moved = {not torch.equal(before[n][:3], after[n][:3]) for n in ("head.weight", "head.bias")}
    assert moved == {learner in REWRITING}
    assert not torch.equal(before["head.weight"][3:], after["head.weight"][3:])


@pytest.mark.parametrize("learner", [*KEEPING, *REWRITING, "aer", "abs", "{name: lwf, alpha: 0.0}"])
@pytest.mark.parametrize("keeper", ["dolfin", "{name: sum, keep_old_rows: true}"])
def test_who_trains_rows_of_old_classes_is_refused_where_they_are_kept(learner: str, keeper: str) -> None:
    """What such a learner makes of them would be undone after every merge."""
    config = tiny("server.aggregator=fedavg", f"server.consolidator={keeper}", f"client.learners=[{learner}]")
    parts = chosen_parts(config, configs.build_aggregator(config.server.aggregator))
    line = obstacle(parts, run_words(config), config)
    assert (line is not None) == (learner in [*REWRITING, "aer", "abs"])
    assert line is None or "keeps the head's rows of old tasks as they are, which learner " in line
    assert line is None or line.endswith(
        "keep_old_rows to false" if "sum" in keeper else "or use another consolidator, such as sum"
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ["client.schedule=CosineAnnealingLR", "client.schedule_options={T_max: steps}"],
        ["client.clip_norm=0.01"],
        ["client.optimizer=sgd", "client.optimizer_options={momentum: 0.9}"],
        ["client.learners=[{name: proximal, mu: 10.0}]"],
        ["client.weight_decay=0.5"],
        ["transform.augment=crop_flip"],
        ["adapter.dropout=0.5"],
        ["adapter.alpha=16"],
    ],
    ids=lambda o: o[0].partition("=")[0],
)
def test_every_option_of_a_client_reaches_it(overrides: list[str], tmp_path: Path) -> None:
    """An option that changes nothing would be an option that is lost on the way."""
    short = ("stream.tasks=1", "server.rounds=2", *FEDAVG)
    plain, other = tiny(*short, output=tmp_path), tiny(*short, *overrides, output=tmp_path)
    a, b = (final_state(run(c).path, c).params["head.weight"] for c in (plain, other))
    assert not torch.equal(a, b)
    assert bool(torch.isfinite(b).all())


def test_a_strong_proximal_term_keeps_clients_at_home(tmp_path: Path) -> None:
    short = ("stream.tasks=1", "server.rounds=1", "client.epochs=5", *FEDAVG)
    free, held = tiny(*short, output=tmp_path), tiny(*short, "client.learners=[{name: proximal, mu: 1000.0}]", output=tmp_path)
    a, b = (final_state(run(c).path, c).params["head.weight"].norm() for c in (free, held))
    assert b < a


def test_a_calibrator_of_the_users_own(tmp_path: Path) -> None:
    """It is asked for its statistics, sees them, and may change the head; a checkpoint holds its state."""
    (tmp_path / "shrink.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedsim.core import contracts\n"
        "from fedsim.core.messages import RoundPlan, StatisticRequest\n"
        "@dataclass(frozen=True)\n"
        "class Calibrator(contracts.Calibrator):\n"
        "    factor: float = 0.0\n"
        "    def init(self):\n"
        "        return {'calls': 0}\n"
        "    def plan(self, state, round, last, classes):\n"
        "        assert last == (round == 1)\n"
        "        return RoundPlan(train=(), statistics=(StatisticRequest('class_moments', ('head.weight',)),))\n"
        "    def calibrate(self, state, params, updates, classes, draw):\n"
        "        assert all('class_moments.count/head.weight' in u.statistics for u in updates)\n"
        "        assert list(classes) == [(0, 1, 2), (3, 4, 5)][: len(classes)]\n"
        "        return {'calls': state['calls'] + 1}, {**params, 'head.bias': params['head.bias'] * self.factor}\n"
    )
    config = tiny(f"server.calibrator.name={tmp_path / 'shrink.py'}", *FEDAVG, output=tmp_path / "runs")
    state = final_state(run(config).path, run(config).config)
    assert state.calibrator == {"calls": 4}
    assert not state.params["head.bias"].any()


@pytest.mark.parametrize("consolidator", ["regmean", "dolfin"])
def test_passes_between_tasks_are_over_all_clients_or_those_drawn(consolidator: str, tmp_path: Path) -> None:
    """Nothing is trained, so that a pass depends on who takes part alone: with one of four clients drawn a round it has the bits
    of full participation, unless it is asked to go by the draw; who is left out is left out of it. Bytes and counts say so."""
    alone = "server.participation=0.25"
    small = ("server.aggregator=frozen", f"server.consolidator.name={consolidator}", "server.rounds=1", "partition={clients: 4}")
    found = {}
    for name, overrides in {
        "full": (),
        "all": (alone,),
        "drawn": (alone, "server.pass_participation=drawn"),
        "without": ("server.without=[2]",),
    }.items():
        config = tiny(*small, *overrides, output=tmp_path / name)
        results = run(config)
        found[name] = final_state(Path(str(results.path)), config).consolidator, results.costs
    passes = 2 * (2 if consolidator == "dolfin" else 1)  # a start and an end in each of two tasks
    assert same_bits(found["all"][0], found["full"][0])
    assert not same_bits(found["drawn"][0], found["full"][0])
    assert not same_bits(found["without"][0], found["full"][0])
    participants = {"full": (4, 4), "all": (1, 4), "drawn": (1, 1), "without": (3, 3)}
    for name, (in_rounds, in_passes) in participants.items():
        costs = found[name][1]
        assert costs["client_rounds"] == 2 * in_rounds + passes * in_passes
        assert costs["bytes"]["up"]["statistics"] * 4 == found["full"][1]["bytes"]["up"]["statistics"] * in_passes


def test_a_manifest_repeats_a_split_elsewhere(tmp_path: Path) -> None:
    first = run(tiny("seed=3", output=tmp_path))
    assert first.path is not None
    again = run(tiny("seed=3", f"manifest={first.path / 'manifest.json'}", output=tmp_path))
    np.testing.assert_array_equal(first.accuracy, again.accuracy)
    assert first.manifest_hash == again.manifest_hash
    with pytest.raises(ConfigError, match="clients"):
        run(tiny("partition.clients=2", f"manifest={first.path / 'manifest.json'}", output=tmp_path))


def test_a_config_says_what_its_manifest_was_made_with(tmp_path: Path) -> None:
    """Whatever preset lies beneath it; what is set beside it or later must agree, but for what does not decide the split."""
    preset = {**TINY, "stream": {"tasks": 3, "noise": {"share": 0.4}, "online": True}, "partition": {"name": "iid", "clients": 5}}
    made = prepare(tiny("partition.alpha=0.7", "stream.order=shuffle", model=plain_vit()))
    path = tmp_path / "m.json"
    made.manifest.save(path)

    def composed(*overrides: str, **told: Any) -> SimConfig:
        layers = [preset, {"model": plain_vit(), "manifest": str(path), **told}, configs.parse_overrides(overrides)]
        return configs.compose(layers)

    found = composed("seed=9")
    assert found.partition == made.config.partition
    assert found.stream == replace(made.config.stream, online=True), "how the stream is played, the manifest does not say"
    assert prepare(found).manifest == made.manifest
    assert composed("stream.name=task_incremental").stream.name == "task_incremental", "it has the same splits"
    assert composed("manifest=null").partition["name"] == "iid"
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text), indent=1, sort_keys=False))
    assert composed("seed=9").partition == made.config.partition, "whoever wrote the file"
    path.write_text(text)
    for wrong, line in {
        "partition.alpha=100.0": r"partition.alpha is 100.0, but the manifest .*m.json was made with 0.7: leave the key out, or",
        "partition=iid": r'partition.name is "iid", but the manifest .* was made with "dirichlet"',
        "stream.noise.share=0.4": r"stream.noise.share is 0.4, but the manifest .* was made with 0.0",
        "stream.tasks=3": r"stream.tasks is 3, but the manifest .* was made with 2",
        "stream.validation=0.1": r"stream.validation is 0.1, but the manifest",
    }.items():
        with pytest.raises(ConfigError, match=f"^{line}"):
            prepare(composed(wrong))
    with pytest.raises(ConfigError, match=r"^partition.alpha is 0.5, but the manifest"):
        prepare(composed(**{"partition.alpha": 0.5}))


def test_a_manifest_of_domains_is_no_stream_of_classes(tmp_path: Path) -> None:
    domains = ("stream.name=domain_incremental", "stream.tasks=null")
    options = ("server.aggregator=fedavg", "server.consolidator=none", "data.domains=2")
    path = tmp_path / "m.json"
    prepare(tiny(*options, *domains, model=plain_vit())).manifest.save(path)
    with pytest.raises(ConfigError, match=r'^stream.name is "class_incremental", but the manifest .* "domain_incremental"'):
        prepare(tiny(*options, f"manifest={path}", model=plain_vit()))
    layers = [TINY, configs.parse_overrides(options), {"model": plain_vit(), "manifest": str(path)}]
    assert configs.compose(layers).stream == tiny(*domains).stream
    with pytest.raises(ConfigError, match=r"^learner xder"):  # which cannot learn what it has learned before
        prepare(configs.compose([*layers, {"client": {"learners": [{"name": "xder", "size": 8}]}}]))


def test_a_manifest_by_a_partition_of_ones_own_goes_with_the_copies(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(inspect.getsource(iid))
    first = run(tiny(f"partition={tmp_path / 'mine.py'}", output=tmp_path))
    assert first.path is not None
    manifest = first.path / "manifest.json"
    second = run(tiny(f"partition={tmp_path / 'mine.py'}", f"manifest={manifest}", output=tmp_path))
    assert second.path is not None and second.manifest_hash == first.manifest_hash
    (tmp_path / "mine.py").unlink()
    again = prepare(configs.load(second.path / "config.yaml"))  # names the copies
    assert again.manifest.hash == first.manifest_hash


def test_more_heterogeneity_means_a_smaller_alpha_that_came_out(tmp_path: Path) -> None:
    from fedsim.simulation import prepare_data

    alphas = [prepare_data(tiny(f"partition.alpha={a}", "data.train_per_class=200"))[0].overall_alpha for a in (0.1, 1.0, 10.0)]
    assert alphas == sorted(alphas)
