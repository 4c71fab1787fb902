"""Clients taken out of a head that is a closed form of sums: against runs that never had them, and against sums by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fedsim.cli import main
from fedsim.core.errors import ConfigError
from fedsim.core.messages import State
from fedsim.core.rng import torch_stream
from fedsim.core.sums import summed
from fedsim.unlearning.finished import FinishedRun
from fedsim.unlearning.remove import remove
from fedsim.unlearning.sums import heard_again, state_without
from tests.test_unlearning import finished

FROZEN = ("adapter=none", "server.aggregator=frozen", "server.rounds=1", "server.consolidator=none")
RANDOM = "head={name: random_features, size: 20}"
CALIBRATORS = {
    "nearest_mean": ("server.calibrator=nearest_mean",),
    "teen": ("server.calibrator=teen",),
    "lda": ("server.calibrator=lda",),
    "qda": ("server.calibrator=qda", "head=quadratic"),
    "fedran": ("server.calibrator={name: ridge, penalties: [1], rank: 3, precision: bfloat16}", RANDOM),
    "ridge": ("server.calibrator={name: ridge, penalties: [0.1, 1, 10]}", RANDOM),
}


def require_same(got: State, want: State, tolerance: float = 1e-9) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def joined(run: FinishedRun, state: State, clients: Sequence[int], asked: FinishedRun) -> State:
    """The state with what clients tell later. asked: a run in which they are registered."""
    assert run.calibrator is not None
    for task, updates in heard_again(asked, clients, asked.tasks):
        total, draw = summed(map(run.calibrator.lift, updates)), torch_stream(0, "late", task)
        state = run.calibrator.end_task(state, asked.before_repair, total, asked.classes(task), draw)
    return state


@pytest.mark.parametrize("name", CALIBRATORS)
def test_a_client_that_leaves_and_one_that_joins_late(name: str, tmp_path: Path) -> None:
    """One subtraction, one addition: the state is that of a run that never had the client, and of one that always had it."""
    found = finished(tmp_path / "with", *FROZEN, *CALIBRATORS[name])
    without = finished(tmp_path / "without", *FROZEN, *CALIBRATORS[name], "server.without=[1]")
    removed = remove(found, [1])
    assert removed.way == "sums"
    require_same(state_without(found, [1], found.tasks), without.state.calibrator)
    torch.testing.assert_close(removed.deployed["head.weight"], without.deployed["head.weight"], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found.deployed["head.weight"], without.deployed["head.weight"], rtol=1e-4, atol=1e-5)
    require_same(joined(without, without.state.calibrator, [1], found), found.state.calibrator)


def test_several_clients_of_one_task(tmp_path: Path) -> None:
    """What remains are the sums of the others, measured by hand."""
    found = finished(tmp_path, *FROZEN, *CALIBRATORS["lda"])
    got, want = state_without(found, [0, 2], [1]), None
    for task, updates in heard_again(found, [0, 1, 2], found.tasks):
        kept = [u for u in updates if task == 0 or u.client_id == 1]
        total, draw = summed(map(found.calibrator.lift, kept)), torch_stream(0, "by hand", task)  # type: ignore[union-attr]
        want = found.calibrator.end_task(want, found.before_repair, total, found.classes(task), draw)  # type: ignore[union-attr]
    require_same(got, want)


def test_who_was_heard_and_never_drawn_can_leave(tmp_path: Path) -> None:
    """Half of the clients are drawn for a round, and all for the pass at a task's end: it is the pass that counts."""
    drawn = ("partition={name: iid, clients: 5}", "server.participation=0.4", "server.pass_participation=all")
    few = (*FROZEN, *CALIBRATORS["lda"], *drawn)
    found = finished(tmp_path / "with", *few)
    client = next(c for c in range(5) if c not in found.participants(0))
    assert all(client in found.told(t) for t in found.tasks)
    without = finished(tmp_path / "without", *few, f"server.without=[{client}]")
    assert remove(found, [client], [0]).way == "sums"
    require_same(state_without(found, [client], found.tasks), without.state.calibrator)


FSA = ("server.aggregator=fedavg", "server.consolidator=first_session", "server.calibrator=lda")


def test_after_a_first_session_only_the_head_can_be_taken_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Features hold what all clients did in task 0; later tasks are sums alone."""
    found = finished(tmp_path / "one", *FSA)
    told = r"sums is not possible .* client 1 helped to train in task 0 what features are made of \(adapter.*leave that task out"
    for way in (None, "sums"):
        with pytest.raises(ConfigError, match=told):
            remove(found, [1], way=way)
    assert main(["unlearn", str(found.dir.path), "--client", "1"]) == 2
    assert "run it again with server.unlearning=true" in capsys.readouterr().err
    assert remove(found, [1], [1]).way == "sums"
    with pytest.raises(ConfigError, match="--alpha is for --how subtract: sums have no coefficients"):
        remove(found, [1], [1], way="sums", alpha=0.5)
    kept = finished(tmp_path / "kept", *FSA, "server.unlearning=true")
    assert remove(kept, [1]).way == "subtract"


REFUSED = {
    "features go on moving": (("server.aggregator=fedavg", "server.consolidator=none"), "helped to train"),
    "nobody sums": ((*FROZEN, "server.calibrator=ccvr", "adapter=lora", "server.aggregator=fedavg"), "no calibrator that makes"),
    "modules start anew": (
        ("server.aggregator=frozen", "server.rounds=1", "adapter={name: vpt, length: 2}", "server.consolidator=mean"),
        "features of task 0 .* not those of the end",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_exact_is_refused(case: str, tmp_path: Path) -> None:
    overrides, told = REFUSED[case]
    calibrator = () if any("calibrator" in o for o in overrides) else ("server.calibrator=lda",)
    found = finished(tmp_path, *overrides, *calibrator)
    with pytest.raises(ConfigError, match=f"--how sums is not possible .*{told}"):
        remove(found, [1], way="sums")


def test_a_head_that_was_trained_is_solved_over(tmp_path: Path) -> None:
    """The bare backbone's features under a head trained by FedAvg: what is deployed is the solved one, so it is exact."""
    head_only = ("adapter=none", "server.aggregator=fedavg", "server.consolidator=none", "server.calibrator=lda")
    found = finished(tmp_path / "with", *head_only)
    without = finished(tmp_path / "without", *head_only, "server.without=[0]")
    removed = remove(found, [0])
    assert removed.way == "sums"
    torch.testing.assert_close(removed.deployed["head.weight"], without.deployed["head.weight"], rtol=1e-5, atol=1e-6)


def test_the_command_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = finished(tmp_path, *FROZEN, *CALIBRATORS["ridge"])
    assert main(["unlearn", str(found.dir.path), "--client", "1", "--verify"]) == 0
    assert "Exact: the clients sent their sums once more" in capsys.readouterr().out
    told = json.loads((found.dir.path / "unlearned" / "client-1" / "unlearned.json").read_text())
    assert [row["name"] for row in told["rows"]] == ["before", "unlearned (sums)", "retrained without"]
    assert list(told["rows"][1].values())[1:] == pytest.approx(list(told["rows"][2].values())[1:], abs=1e-6)


def test_a_class_of_which_nobody_is_left_is_no_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Client 0 alone holds class 0: without it the row is as the run began, and a row of zeros would win samples of others."""
    found = finished(
        tmp_path, *FROZEN, "server.calibrator=lda", "partition.alpha=0.1", "partition.min_samples=1", "data.test_per_class=20"
    )
    assert [int(c) for c in found.parts.manifest.histograms[0][:, 0].nonzero()[0]] == [0]
    assert main(["unlearn", str(found.dir.path), "--client", "0"]) == 0
    assert "Nobody is left who held samples of 1 class (class0)." in " ".join(capsys.readouterr().out.split())
    deployed, spec = remove(found, [0]).deployed, found.parts.spec
    assert deployed["head.unknown"].tolist() == [True, False, False, False, False, False]
    model, left = found.parts.model, [1, 2, 3, 4, 5]
    own = {n: t[left] for n, t in deployed.items() if n in ("head.weight", "head.bias")}
    features = model.features(found.samples(spec.test).batch(spec.test_of(0))[0])
    want = torch.tensor(left)[model.head.logits(features, own).argmax(dim=1)]
    assert torch.equal(model.logits(features, deployed).argmax(dim=1), want)
    assert bool((model.logits(features, deployed)[:, 0] == torch.finfo(torch.float32).min).all())
    assert found.orphans([0], [1]) == []
