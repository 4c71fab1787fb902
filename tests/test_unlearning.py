"""Removing clients from a finished run: exact where it can be, and beside a run without them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor

from clients import local
from clients.work import Work
from fedsim import simulation
from fedsim.cli import main
from fedsim.core.errors import ClientFailed, ConfigError, RunDirError
from fedsim.core.messages import Tensors
from fedsim.core.tensors import LORA_A, LORA_B, lora_layers
from fedsim.simulation import run
from fedsim.unlearning import measure as measuring
from fedsim.unlearning.finished import FinishedRun
from fedsim.unlearning.measure import measure, membership_auc
from fedsim.unlearning.remove import remove
from tests.tiny import plain_vit, tiny

KEEP = "server.unlearning=true"
PROMPTS = ("adapter={name: prefix, length: 2}",)
ONE_ROUND = ("server.rounds=1", "server.aggregator=fedavg")


def finished(path: Path, *overrides: str, **sections: Any) -> FinishedRun:
    config = tiny("partition.min_samples=3", *overrides, output=path, **sections)
    results = run(config)
    assert results.path is not None
    return FinishedRun(results.path)


def effect(params: Tensors) -> dict[str, Tensor]:
    """What tensors do: the product of a LoRA pair, all others as they are."""
    out = {n: t.double() for n, t in params.items() if not n.endswith((LORA_A, LORA_B))}
    return out | {p: params[p + LORA_B].double() @ params[p + LORA_A].double() for p in lora_layers(params)}


def require_close(a: Tensors, b: Tensors, atol: float = 1e-6) -> None:
    a, b = effect(a), effect(b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("consolidator", ["none", "mean"])
@pytest.mark.parametrize("rule", ["fedavg", "fairavg"])
def test_recomposing_a_run_of_one_round_is_never_having_had_the_client(rule: str, consolidator: str, tmp_path: Path) -> None:
    """The isolated vectors are the updates of the only round, so merging those who remain gives the run without the client."""
    same = (
        f"server.aggregator={rule}",
        "server.rounds=1",
        f"server.consolidator={consolidator}",
        "adapter={name: prefix, length: 2}",
    )
    found = finished(tmp_path / "with", KEEP, *same)
    without = finished(tmp_path / "without", "server.without=[1]", *same)
    if consolidator == "none":  # later tasks' clients start from what the client left in the prompts
        found = finished(tmp_path / "one", KEEP, *same, "stream.tasks=1", "data.classes=3")
        without = finished(tmp_path / "one_without", "server.without=[1]", *same, "stream.tasks=1", "data.classes=3")
    removed = remove(found, [1])
    assert removed.way == "recompose"
    require_close(removed.deployed, without.deployed)
    with pytest.raises(AssertionError):  # the client did something
        require_close(found.deployed, without.deployed, atol=1e-4)


def test_tangents_are_composed_by_client_and_task(tmp_path: Path) -> None:
    """TMC: the deployed module is the mean over clients and tasks of what each sent; one that is taken out leaves no trace."""
    same = (
        "adapter={name: tangent, rank: 2}",
        "client.learners=[{name: square}]",
        "server.aggregator=fairavg",
        "server.rounds=1",
    )
    found = finished(tmp_path / "with", KEEP, *same, "server.consolidator=mean")
    without = finished(tmp_path / "without", "server.without=[1]", *same, "server.consolidator=mean")
    assert found.affine
    for run_dir, clients in ((found, (0, 1, 2)), (found, (0, 2))):
        sent = [run_dir.vectors(t, f"client-{c}") for t in run_dir.tasks for c in clients]
        mean = {n: torch.stack([s[n].double() for s in sent]).mean(0).float() for n in sent[0] if n.startswith("adapter.")}
        deployed = run_dir.deployed if 1 in clients else remove(run_dir, [1]).deployed
        require_close({n: deployed[n] for n in mean}, mean)
    removed = remove(found, [1])
    assert removed.way == "recompose"
    require_close(removed.deployed, without.deployed)


def test_recomposing_lora_modules_that_start_anew(tmp_path: Path) -> None:
    same = (*ONE_ROUND, "server.consolidator=mean")
    found, without = finished(tmp_path / "with", KEEP, *same), finished(tmp_path / "without", "server.without=[2]", *same)
    removed = remove(found, [2])
    assert removed.way == "recompose"
    require_close(removed.deployed, without.deployed)
    with pytest.raises(ConfigError, match=r"recompose is not possible.*it takes one round per task"):
        remove(finished(tmp_path / "rounds", KEEP, "server.aggregator=fedavg", "server.consolidator=mean"), [2], way="recompose")


NOT_EXACT = {
    "later tasks begin with the module that the client helped to make": (["server.consolidator=none"], "do not start anew"),
    "tasks share their classes": (
        ["stream.name=domain_incremental", "stream.tasks=null", "data.domains=2"],
        "tasks share classes",
    ),
    "weight decay moves the rows of other tasks": (["client.weight_decay=0.5"], "rows of other tasks"),
    "the loss is over all classes": (["client.learners=[{name: square, classes: all}]"], "rows of other tasks"),
    "Grams are sums over clients": (["server.consolidator=regmean"], "sums over clients"),
    "the head was repaired": (["server.calibrator=ccvr"], "statistics of the clients"),
    "the rule weighs by statistics": (["server.aggregator=variance_weighted"], "statistics of the clients"),
    "past modules act in training": (["server.consolidator=sum"], "on top of the modules of past tasks"),
    "curvature of earlier tasks is told": (["client.learners=[tak]", "adapter.name=lora"], "by learner tak clients learn"),
    "old prototypes are told": (["client.learners=[fedproto]"], "by learner fedproto"),
}
ON_PAIRS = ("server.consolidator=regmean", "server.consolidator=sum", "adapter.name=lora")


@pytest.mark.parametrize("case", NOT_EXACT)
def test_what_is_not_exact_is_not_recomposed(case: str, tmp_path: Path) -> None:
    overrides, told = NOT_EXACT[case]
    adapter = () if set(ON_PAIRS) & set(overrides) else PROMPTS
    found = finished(tmp_path, KEEP, *ONE_ROUND, "server.consolidator=mean", *adapter, *overrides)
    assert remove(found, [1]).way == "subtract"
    with pytest.raises(ConfigError, match=f"recompose is not possible .*{told}"):
        remove(found, [1], way="recompose")


def test_a_rule_that_trains_a_part_is_not_recomposed(tmp_path: Path) -> None:
    """By themselves clients train all tensors, so their vectors are not the updates that such a rule merges."""
    (tmp_path / "half.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedsim.core.messages import RoundPlan\n"
        "from server.aggregators import fedavg\n"
        "@dataclass(frozen=True)\n"
        "class Aggregator(fedavg.Aggregator):\n"
        "    def plan(self, state, round):\n"
        "        return RoundPlan(train=('*.lora_B', 'head.*'))\n"
    )
    rule = f"server.aggregator={tmp_path / 'half.py'}"
    found = finished(tmp_path / "runs", KEEP, "server.rounds=1", rule, "server.consolidator=mean")
    assert "train a part of the tensors only" in str(found.not_exact)
    assert remove(found, [1]).way == "subtract"


@pytest.mark.parametrize("consolidator", ["none", "mean"])
def test_what_a_rule_deploys_in_place_of_its_parameters_loses_the_client_too(consolidator: str, tmp_path: Path) -> None:
    """LIVAR may evaluate Σ p_i B_i A_i: the vectors of every task are subtracted from it all the same."""
    alpha, layer = 0.5, "adapter.layers.0.mlp.fc1"
    options = (f"server.consolidator={consolidator}", "server.rounds=1", "client.epochs=3")
    found = finished(tmp_path, KEEP, "server.aggregator={name: livar, evaluated: products}", *options)
    for tasks in ([0], [1], [0, 1]):
        removed = effect(remove(found, [1], tasks=tasks, alpha=alpha).deployed)
        want = effect(found.deployed)[layer]
        for task in tasks:
            start, own = found.vectors(task, "start"), found.vectors(task, "client-1")
            change = effect({**start, **own})[layer] - effect(start)[layer]
            assert float(change.abs().max()) > 1e-4
            want = want - alpha * change * (1.0 if consolidator == "none" else 0.5)
        torch.testing.assert_close(removed[layer], want, atol=1e-6, rtol=1e-5)


def test_clients_that_failed_are_no_participants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Client 0 fails in the rounds of task 0 and contributes nothing to it; client 2 fails when it trains by itself in task 1."""
    real = local.train

    def failing(work: Work) -> Any:
        job = work.job
        in_round = job.plan.repeat == 1
        if (job.client_id, job.task, in_round) in ((0, 0, True), (2, 1, False)):
            return ClientFailed(job.client_id, job.task, job.round, "training", "made to fail")
        return real(work)

    monkeypatch.setattr(local, "train", failing)
    found = finished(tmp_path, KEEP, "server.aggregator=fedavg", "server.on_client_failure=skip")
    assert [found.participants(task) for task in found.tasks] == [[1, 2], [0, 1, 2]]
    assert sum(found.shares(0).values()) == pytest.approx(1)
    told = (found.dir.path / "failures.json").read_text()
    assert "isolated training" in told
    with pytest.raises(RunDirError, match="client-2 failed when it trained by itself in task 1"):
        remove(found, [2])
    with pytest.raises(ConfigError, match="client 0 never trained"):
        remove(found, [0], tasks=[0])
    remove(found, [1])


def test_one_task_is_measured_on_what_was_held_in_it(tmp_path: Path) -> None:
    found = finished(tmp_path, KEEP, "server.aggregator=fedavg")
    sizes, seen = found.parts.manifest.sizes, []
    real = measuring._judged
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            measuring, "_judged", lambda run, params, split, at: (seen.append(len(at)), real(run, params, split, at))[1]
        )
        measure(found, "one", found.deployed, [1], [0])
        measure(found, "all", found.deployed, [1])
    assert seen[:2] == [sizes[0, 1], sizes.sum() - sizes[0, 1]]
    assert seen[4:6] == [sizes[:, 1].sum(), sizes.sum() - sizes[:, 1].sum()]


@pytest.mark.parametrize("consolidator", ["none", "mean"])
def test_renormalised_subtraction_is_exact_for_a_mean_of_vectors(consolidator: str, tmp_path: Path) -> None:
    """τ = Σ p_i τ_i in one round of FedAvg, so (τ − p_k τ_k) / (1 − p_k) is the mean of the others."""
    same = (*ONE_ROUND, f"server.consolidator={consolidator}", *PROMPTS)
    found = finished(tmp_path / "with", KEEP, *same)
    subtracted = remove(found, [0], way="subtract", renormalise=True).deployed
    if consolidator == "mean":
        require_close(subtracted, remove(found, [0], way="recompose").deployed)
        return
    want = {n: t.double() for n, t in found.vectors(0, "start").items()}
    for task in found.tasks:  # what remains of every task, one upon the other
        shares, start = found.shares(task), found.vectors(task, "start")
        for client in (1, 2):
            own = found.vectors(task, f"client-{client}")
            want = {n: t + shares[client] / (1 - shares[0]) * (own[n].double() - start[n]) for n, t in want.items()}
    require_close(subtracted, want)


@pytest.mark.parametrize("rule", ["lorm", "fedavg"])
@pytest.mark.parametrize("consolidator", ["none", "mean", "regmean"])
def test_subtracting_nothing_changes_nothing(rule: str, consolidator: str, tmp_path: Path) -> None:
    """The replay of the consolidators from what the run kept ends where the run ended."""
    found = finished(tmp_path, KEEP, f"server.aggregator={rule}", f"server.consolidator={consolidator}")
    require_close(remove(found, [0], way="subtract", alpha=0.0).deployed, found.deployed)


@pytest.mark.parametrize("consolidator", ["sum", "dolfin", "{name: merged, rule: ties}"])
def test_modules_that_stay_side_by_side_are_replayed(consolidator: str, tmp_path: Path) -> None:
    found = finished(tmp_path, KEEP, *ONE_ROUND, f"server.consolidator={consolidator}")
    require_close(remove(found, [0], way="subtract", alpha=0.0).deployed, found.deployed)
    removed = effect(remove(found, [0], way="subtract").deployed)  # of a larger rank
    assert all(bool(t.isfinite().all()) for t in removed.values())


@pytest.mark.parametrize("consolidator", ["coma", "cofima"])
def test_averages_that_training_goes_on_from_are_refused_before_any_training(consolidator: str) -> None:
    """Task vectors of earlier tasks are in the average with a share that shrinks, and pairs of other ranks have no average."""
    config = tiny(KEEP, *ONE_ROUND, f"server.consolidator={consolidator}")
    with pytest.raises(ConfigError, match=f"consolidator {consolidator} trains on .* leave out server.unlearning"):
        simulation.prepare(config)


@pytest.mark.parametrize("consolidator", ["none", "mean"])
def test_subtraction_by_hand(consolidator: str, tmp_path: Path) -> None:
    """One LoRA layer and the head: end − Σ_t α_t (own − start), products for the pair; halved over two tasks by the mean."""
    found = finished(tmp_path, KEEP, "server.aggregator=fedavg", f"server.consolidator={consolidator}")
    alpha, layer = 0.3, lora_layers(found.state.params)[0]
    removed = effect(remove(found, [1], way="subtract", alpha=alpha).deployed)
    changes = []
    for task in found.tasks:
        start, own = found.vectors(task, "start"), found.vectors(task, "client-1")
        changes.append({n: t - effect(start)[n] for n, t in effect({**start, **own}).items()})
    share = 1.0 if consolidator == "none" else 0.5
    want = effect(found.deployed)[layer] - share * alpha * (changes[0][layer] + changes[1][layer])
    torch.testing.assert_close(removed[layer], want, atol=1e-6, rtol=1e-5)
    head = effect(found.deployed)["head.weight"] - alpha * (changes[0]["head.weight"] + changes[1]["head.weight"])
    torch.testing.assert_close(removed["head.weight"], head, atol=1e-6, rtol=1e-5)


def test_subtracting_and_adding_back_restores(tmp_path: Path) -> None:
    """What α takes away, −α of the same vectors gives back: the two changes cancel."""
    found = finished(tmp_path, KEEP, "server.aggregator=fedavg", "server.consolidator=none")
    minus, plus = (effect(remove(found, [1], way="subtract", alpha=a).deployed) for a in (0.4, -0.4))
    whole = effect(found.deployed)
    for name in whole:
        torch.testing.assert_close((minus[name] + plus[name]) / 2, whole[name], atol=1e-6, rtol=1e-5)


def test_one_task_only(tmp_path: Path) -> None:
    """The head's rows of the other task stay, those of this one move."""
    found = finished(tmp_path, KEEP, "server.aggregator=fedavg", "server.consolidator=none")
    head = remove(found, [0], tasks=[1], way="subtract").deployed["head.weight"]
    assert torch.equal(head[:3], found.deployed["head.weight"][:3])
    assert not torch.allclose(head[3:], found.deployed["head.weight"][3:])


def test_vectors_are_the_same_from_every_pool_and_after_a_stop(tmp_path: Path, warm_ray: None) -> None:
    same = (KEEP, "server.aggregator=fedavg")
    serial = finished(tmp_path / "serial", *same, model=plain_vit())
    ray = finished(tmp_path / "ray", *same, "runtime.pool=ray", "runtime.workers=2", model=plain_vit())
    stopped = tiny("partition.min_samples=3", *same, output=tmp_path / "stopped", model=plain_vit())

    class Stop(Exception): ...

    def stop(event: object) -> None:
        if type(event).__name__ == "RoundDone" and getattr(event, "task", 0) == 1:
            raise Stop

    with pytest.raises(Stop):
        run(stopped, output=tmp_path / "stopped" / "run", progress=stop)
    run(resume=tmp_path / "stopped" / "run")
    again = FinishedRun(tmp_path / "stopped" / "run")
    for task in serial.tasks:
        for name in ("start", "end", "total", "client-0", "client-1", "client-2"):
            first = serial.vectors(task, name)
            for other in (ray, again):
                second = other.vectors(task, name)
                assert first.keys() == second.keys()
                assert all(torch.equal(first[n], second[n]) for n in first), name


def test_a_run_that_keeps_vectors_gives_the_numbers_of_one_that_does_not(tmp_path: Path) -> None:
    a, b = (run(tiny(*keep, output=tmp_path / str(len(keep)))) for keep in ([], [KEEP]))
    np.testing.assert_array_equal(a.accuracy, b.accuracy)
    assert a.costs["bytes"] == b.costs["bytes"]


def test_what_cannot_be_removed_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = finished(tmp_path / "kept", KEEP, *ONE_ROUND, "server.without=[2]")
    plain = finished(tmp_path / "plain", *ONE_ROUND)
    for clients, run_dir, what in (
        ([7], found, "there is no client 7"),
        ([2], found, "client 2 never trained"),
        ([0, 1], found, "nobody else took part in task 0"),
        ([], found, "no client to remove"),
    ):
        with pytest.raises(ConfigError, match=what):
            remove(run_dir, clients)
    for alpha in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="--alpha must be a finite number"):
            remove(found, [0], alpha=alpha)
    with pytest.raises(ConfigError, match="--alpha is for --how subtract"):
        remove(found, [0], way="recompose", alpha=0.5)
    assert remove(found, [0], alpha=0.0).name == "unlearned (subtract, α = 0)"
    with pytest.raises(ConfigError, match="there is no task 5"):
        remove(found, [0], tasks=[5])
    with pytest.raises(ConfigError, match="drop is not possible"):
        remove(found, [0], way="drop")
    with pytest.raises(RunDirError, match=r"kept no vectors of its clients.*server\.unlearning=true"):
        remove(plain, [0])
    assert main(["unlearn", str(plain.dir.path), "--client", "0"]) == 2
    assert main(["unlearn", str(tmp_path / "nowhere"), "--client", "0"]) == 2
    assert main(["unlearn", str(found.dir.path), "--client", "0", "--verify", "--task", "0"]) == 2
    found.dir.vectors(0, "client-0").write_bytes(b"cut")
    with pytest.raises(RunDirError, match="damaged"):
        remove(found, [0])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("fedsim: error: ") for line in lines)
    with pytest.raises(ConfigError, match=r"server\.unlearning and stream\.online"):
        tiny(KEEP, "stream.online=true")
    with pytest.raises(ConfigError, match=r"server\.without names client 3"):
        run(tiny("server.without=[3]", output=tmp_path / "wrong"))
    with pytest.raises(ConfigError, match="nobody is left to train"):
        run(tiny("server.without=[0, 1, 2]", output=tmp_path / "wrong"))


def test_the_command_verifies_against_retraining(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = finished(tmp_path / "runs", KEEP, *ONE_ROUND, "server.consolidator=mean", *PROMPTS)
    assert main(["unlearn", str(found.dir.path), "--client", "1", "--verify"]) == 0
    printed = capsys.readouterr().out
    out = found.dir.path / "unlearned" / "client-1"
    told = json.loads((out / "unlearned.json").read_text())
    names = [row["name"] for row in told["rows"]]
    assert names == ["before", "unlearned (recompose)", "retrained without"]
    assert all(name in printed for name in names)
    _, unlearned, retrained = (list(row.values())[1:] for row in told["rows"])
    np.testing.assert_allclose(unlearned, retrained, atol=1e-6)  # recomposing is exact here
    assert (out / "deployed.safetensors").is_file()
    assert main(["unlearn", str(found.dir.path), "--client", "1", "--alpha", "0.1", "1.0"]) == 0
    printed = capsys.readouterr().out
    assert "α = 1)" in printed
    assert "--how recompose would be exact" in printed


def test_a_model_that_is_composed_drops_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apt = ("adapter={name: apt, memory: 1}", "head=mixture", "server.rounds=1")
    apt = (*apt, "server.aggregator=collect", "server.consolidator=compose")
    found, without = finished(tmp_path / "with", *apt), finished(tmp_path / "without", "server.without=[1]", *apt)
    removed = remove(found, [1])
    assert removed.way == "drop"
    assert removed.deployed.keys() == without.deployed.keys()
    assert all(torch.equal(t, without.deployed[n]) for n, t in removed.deployed.items())
    whole_task = remove(found, [0, 1, 2], tasks=[1]).deployed
    assert whole_task["source.task"].unique().tolist() == [0]
    for options, told in (({"alpha": 0.5}, "leave out --alpha"), ({"way": "subtract"}, "leave out --how")):
        with pytest.raises(ConfigError, match=told):
            remove(found, [1], **options)  # type: ignore[arg-type]
    assert main(["unlearn", str(found.dir.path), "--client", "1", "--task", "0"]) == 0
    printed = capsys.readouterr().out
    assert "unlearned (drop)" in printed
    assert "without client 1 of task 0" in " ".join(printed.split())


def test_a_source_that_was_taught_by_others_is_not_called_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LwF's teacher is the composed model, so that sources of the second task know of the client that is left out."""
    apt = ("adapter={name: apt, memory: 1}", "head=mixture", "server.rounds=1", "client.learners=[lwf]")
    apt = (*apt, "server.aggregator=collect", "server.consolidator=compose")
    found, without = finished(tmp_path / "with", *apt), finished(tmp_path / "without", "server.without=[1]", *apt)
    assert main(["unlearn", str(found.dir.path), "--client", "1"]) == 0
    assert "not exact: by learner lwf clients learn of each other" in " ".join(capsys.readouterr().out.split())
    removed, second = remove(found, [1]).deployed, without.deployed["source.task"] == 1
    same = {n: torch.equal(t[second], without.deployed[n][second]) for n, t in removed.items() if n.startswith("adapter.")}
    assert not all(same.values())


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=20),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=20),
)
def test_membership_auc_is_scikit_learns_with_balanced_classes(
    members: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]
) -> None:
    (classes_m, losses_m), (classes_o, losses_o) = (np.array(part).T for part in (members, others))
    got = membership_auc(losses_m.astype(float), classes_m, losses_o.astype(float), classes_o)
    known = np.isin(classes_m, classes_o)
    if not known.any():
        assert np.isnan(got)
        return
    weight_o = np.array([(classes_m == c).sum() / (classes_o == c).sum() for c in classes_o])
    labels = np.concatenate([np.ones(known.sum()), np.zeros(len(classes_o))])
    scores = -np.concatenate([losses_m[known], losses_o])
    weights = np.concatenate([np.ones(known.sum()), weight_o])
    assert got == pytest.approx(roc_auc_score(labels, scores, sample_weight=weights))


def test_a_memorised_client_is_told_apart_and_a_forgotten_one_less_so(tmp_path: Path) -> None:
    """Many epochs on few random samples: training losses are small, and retraining without the client raises them."""
    found = finished(tmp_path, KEEP, *ONE_ROUND, "server.consolidator=mean", "client.epochs=20")
    before = measure(found, "before", found.deployed, [0])
    after = measure(found, "after", remove(found, [0]).deployed, [0])
    assert after.forgotten <= before.forgotten
    assert after.membership_auc <= before.membership_auc
