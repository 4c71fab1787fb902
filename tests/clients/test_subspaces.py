"""Subspaces of old inputs: bases against plain linear algebra, and what FOT and GPM do with them.

Shapes: D inputs, K directions kept, N samples, q columns of a sketch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clients.learners import fot, gpm
from clients.statistics.sketch import Statistic as Sketch
from fedsim.core import contracts
from fedsim.core.config import SimConfig
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.core.rng import torch_stream
from fedsim.core.subspace import complement, extended, left_over, outside, root, sketched
from fedsim.core.tensors import from_upper_triangle
from fedsim.simulation import prepare, run
from server import loop
from server.state import ServerState
from tests.tiny import final_state, same_bits, tiny

D, N, RANK = 12, 40, 4
NONE = torch.zeros(D, 0, dtype=torch.float64)


def inputs(*address: int, rank: int = RANK) -> Tensor:
    """(D, N), of exactly this rank, energies far apart."""
    draw = torch_stream(1, "inputs", *address)
    left, right = (torch.randn(size, rank, dtype=torch.float64, generator=draw) for size in (D, N))
    return left * torch.tensor([2.0**-k for k in range(rank)], dtype=torch.float64) @ right.T


def largest_angle(a_DK: Tensor, b_DK: Tensor) -> float:
    """Sine of the largest principal angle between two spans of one dimension."""
    assert a_DK.shape == b_DK.shape
    return float(torch.linalg.matrix_norm(outside(a_DK.T, b_DK), ord=2))


@pytest.mark.parametrize("form", ["samples", "gram", "sketch"])
def test_the_span_of_low_rank_inputs_is_found(form: str) -> None:
    """By numpy's SVD; the sketch is a sum of three clients' with their own Ω, with the energy beside it."""
    x = inputs(0)
    parts = torch.split(x, 15, dim=1)
    sketch = sum(sketched(p.T, 7, torch_stream(2, "omega", k)) for k, p in enumerate(parts))
    columns = {"samples": x, "gram": root(x @ x.T), "sketch": sketch}[form]
    assert isinstance(columns, Tensor)
    got = extended(NONE, columns, 1.0, x.square().sum() if form == "sketch" else None)
    want = torch.from_numpy(np.linalg.svd(x.numpy())[0][:, :RANK].copy())
    assert largest_angle(got, want) < 1e-6
    torch.testing.assert_close(got.T @ got, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_as_many_directions_as_the_energy_takes_and_no_more(share: float) -> None:
    """Over three tasks. In the paper's words: of the residual, ε' = (r − (1 − ε)) / r of its energy."""
    basis = NONE
    for task in range(3):
        x, before = inputs(task, rank=6), basis
        basis = extended(basis, x, share)
        new, held = basis.shape[1] - before.shape[1], float((basis.T @ x).square().sum() / x.square().sum())
        assert held >= share - 1e-12
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), rtol=0, atol=1e-12)
        assert largest_angle(basis[:, : before.shape[1]], before) < 1e-9
        rest = outside(x.T, before).T
        r = float(rest.square().sum() / x.square().sum())
        energies = np.linalg.svd(rest.numpy(), compute_uv=False) ** 2
        wanted = (r - (1 - share)) / r
        assert new == (0 if wanted <= 0 else int(np.searchsorted(np.cumsum(energies) / energies.sum(), wanted)) + 1)
        assert extended(basis, x, share).shape == basis.shape  # the same inputs again bring nothing


SPECTRA = {
    "flat": lambda i: i**0.0,
    "i^-0.5": lambda i: i**-0.5,
    "i^-1": lambda i: i**-1.0,
    "i^-2": lambda i: i**-2.0,
    "low rank": lambda i: i**-0.5 * (i <= 20),
}


@pytest.mark.parametrize("share", [0.9, 0.97])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_sketch_holds_the_share_of_the_inputs_themselves(spectrum: str, share: float) -> None:
    """Two tasks of 300 inputs with these singular values, in bases of their own. What is held of them is what was asked for,
    within two points, and with one direction less not more than two points above it; or all columns of the sketch are taken."""
    columns, basis = 64, torch.zeros(300, 0, dtype=torch.float64)
    for task in range(2):
        draw = torch_stream(5, "spectrum", task)
        left, right = (torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64, generator=draw))[0] for _ in range(2))
        x = left * SPECTRA[spectrum](torch.arange(1, 301, dtype=torch.float64)) @ right.T

        def held(basis: Tensor, x: Tensor = x) -> float:
            return float((basis.T @ x).square().sum() / x.square().sum())

        before = basis.shape[1]
        basis = extended(basis, sketched(x.T, columns, draw), share, x.square().sum())
        all_taken = basis.shape[1] == before + columns
        assert all_taken == (spectrum in ("flat", "i^-0.5"))
        assert all_taken or held(basis) > share - 0.02
        assert held(basis[:, :-1]) < share + 0.02


def test_what_a_sketch_leaves_over_is_estimated_without_bias() -> None:
    """The mean over many Ω, where each column is left out by itself: ‖X − U_k U_kᵀ X‖² of the leading U_k of one column less."""
    x, columns, draw = inputs(0, rank=10), 6, torch_stream(6, "omega")
    found, want = [], []
    for _ in range(400):
        sketch = sketched(x.T, columns, draw)
        found.append(left_over(sketch))
        left = torch.linalg.svd(sketch[:, 1:], full_matrices=False)[0]
        rests = [(x - left[:, :k] @ (left[:, :k].T @ x)).square().sum() for k in range(columns)]
        want.append(torch.stack(rests))
    torch.testing.assert_close(torch.stack(found).mean(0), torch.stack(want).mean(0), rtol=0.1, atol=0)


@pytest.mark.parametrize("columns", [1, 3, D])
def test_a_sketch_of_any_width(columns: int) -> None:
    x = inputs(0, rank=D)
    assert extended(NONE, sketched(x.T, columns, torch_stream(2, "omega")), 1.0, x.square().sum()).shape == (D, columns)


def test_nothing_is_kept_of_nothing_and_no_share() -> None:
    assert extended(NONE, torch.zeros(D, N), 0.9).shape == (D, 0)
    assert extended(NONE, torch.zeros(D, 3), 0.9, torch.tensor(0.0)).shape == (D, 0)
    assert extended(NONE, inputs(0), 0.0).shape == (D, 0)
    assert extended(NONE, sketched(inputs(0).T, 3, torch_stream(2, "omega")), 0.0, torch.tensor(1e-3)).shape == (D, 0)
    assert extended(complement(NONE), inputs(0), 1.0).shape == (D, D)


MAP, NORM = "adapter.layer.weight", "adapter.norm.bias"


def tensors(*address: int) -> Tensors:
    draw = torch_stream(3, "tensors", *address)
    return {n: torch.randn(s, generator=draw) for n, s in ((MAP, (5, D)), (NORM, (5,)), ("head.weight", (4, 5)))}


def state_of(rule: contracts.Learner, x: Tensor) -> Any:
    """After a first task with these inputs."""
    total = {f"sketch.range/{MAP}": sketched(x.T, 9, torch_stream(4, "o")), f"sketch.energy/{MAP}": x.square().sum()}
    state = rule.closed(rule.opened(None, tensors(), 0), tensors(), total)
    return rule.opened(state, tensors(), 1)


def test_the_server_of_fot_takes_out_what_old_inputs_would_notice() -> None:
    x, before, after = inputs(0), tensors(0), tensors(1)
    rule = fot.Learner(threshold=1.0)
    fresh = rule.opened(None, before, 0)
    assert rule.merged(fresh, before, after, 3, 3) == (fresh, after)
    _, got = rule.merged(state_of(rule, x), before, after, 3, 3)
    torch.testing.assert_close(got[MAP] @ x.float(), before[MAP] @ x.float(), rtol=0, atol=1e-4)
    other = complement(extended(NONE, x, 1.0)).float()
    torch.testing.assert_close(got[MAP] @ other, after[MAP] @ other, rtol=0, atol=1e-5)  # all else is as it was merged
    assert torch.equal(got[NORM], before[NORM])
    assert torch.equal(got["head.weight"], after["head.weight"])
    _, again = rule.merged(state_of(rule, x), before, got, 3, 3)
    torch.testing.assert_close(again, got, rtol=0, atol=1e-6)


@pytest.mark.parametrize("project", [gpm.GRADIENTS, gpm.STEPS])
def test_clients_of_gpm_keep_to_the_free_directions(project: str) -> None:
    """Five steps of SGD, or of AdamW with weight decay."""
    x, start = inputs(0), tensors(0)
    rule = gpm.Learner(threshold=1.0, project=project)
    work: Any = type("Work", (), {"params": start})
    state = rule.begin(work, {}, {"own": rule.context(state_of(rule, x))}, torch.Generator())
    params = {n: t.clone().requires_grad_() for n, t in start.items()}
    sgd = torch.optim.SGD(params.values(), lr=0.1)
    optimizer = sgd if project == gpm.GRADIENTS else torch.optim.AdamW(params.values(), lr=0.1, weight_decay=0.1)
    for step in range(5):
        gradients = rule.corrected(state, tensors(7, step), params)
        for n, p in params.items():
            p.grad = gradients[n]
        optimizer.step()
        rule.stepped(state, params)
    torch.testing.assert_close(params[MAP] @ x.float(), start[MAP] @ x.float(), rtol=0, atol=1e-4)
    assert float((params[MAP].detach() - start[MAP]).norm()) > 0.1
    assert torch.equal(params[NORM], start[NORM])
    assert not torch.equal(params["head.weight"], start["head.weight"])


def test_every_client_draws_its_own_sketch() -> None:
    draws = [Sketch().for_client(torch_stream(0, "client", k)) for k in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


# ---------------------------------------------------------------- in a run

SMALL = ("server.aggregator=fedavg", "server.consolidator=none", "server.rounds=1", "server.evaluate=task")


def ends(config: SimConfig, monkeypatch: pytest.MonkeyPatch) -> list[ServerState]:
    """The state at every task's end, before anything is done."""
    found, real = list[ServerState](), loop.end_task

    def end_task(sim: Any, state: Any) -> Any:
        found.append(state)
        return (yield from real(sim, state))

    monkeypatch.setattr(loop, "end_task", end_task)
    run(config)
    return found


@pytest.mark.parametrize("learner", ["fot, form: gram", "gpm, form: gram, project: steps"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_second_task_leaves_what_the_first_ones_inputs_hear(
    learner: str, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With inputs of 16 numbers and a share of 0.8: every map changed, and no kept direction hears of it."""
    options = (f"client.learners=[{{name: {learner}, threshold: 0.8}}]", f"adapter={adapter}", "client.weight_decay=0.1")
    config = tiny(*SMALL, *options, output=tmp_path)
    states = ends(config, monkeypatch)
    first, second = (state.params for state in states)
    bases = states[1].learners[learner.partition(",")[0]]["bases"]
    assert bases
    moved = 0
    for key, basis in bases.items():
        change = second[key] - first[key]
        assert 0 < basis.shape[1] <= len(basis)
        assert float((change @ basis).abs().max()) < 1e-5
        moved += bool(change.any())
    assert moved
    others = [n for n in first if n.startswith("adapter.") and n not in bases]
    assert all(torch.equal(first[n], second[n]) for n in others)
    assert bool(others) == (adapter == "full")


@pytest.mark.parametrize(
    ("overrides", "leaves"),
    [
        (["server.aggregator=fedavg"], ""),
        (["server.aggregator=fairavg", "server.channel=[{name: clip_noise, clip: 0.1}]"], ""),
        (["server.aggregator=fedavgm"], ""),
        (["server.aggregator=fedatt"], ""),
        (["server.aggregator={name: merged, rule: task_arithmetic}"], ""),
        (["server.aggregator=lorm", "server.rounds=2"], "aggregator lorm"),
        (["server.aggregator=fedadam"], "aggregator fedadam"),
        (["server.aggregator={name: fedavgm, reset_on_task: false}"], "aggregator fedavgm"),
        (["server.aggregator={name: merged, rule: {name: ties, density: 0.5}}"], "aggregator merged"),
        (["server.channel=[{name: quantise, bits: 4}]"], "channel quantise"),
        (["server.channel=[{name: topk, share: 0.5}]"], "channel topk"),
    ],
)  # fmt: skip
def test_a_run_says_what_leaves_the_free_directions(
    overrides: list[str], leaves: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A note, where the second task's change is heard by the first one's inputs, and none where it is not."""
    gpm_exact = "client.learners=[{name: gpm, form: gram, project: steps, threshold: 0.8}]"
    config = tiny(*SMALL, gpm_exact, *overrides, output=tmp_path)
    first, second = ends(config, monkeypatch)
    bases = second.learners["gpm"]["bases"]
    change = {n: (second.params[n] - first.params[n]).double() for n in bases}
    heard = sum(float((change[n] @ basis.double()).square().sum()) for n, basis in bases.items()) ** 0.5
    all_of_it = sum(float(t.square().sum()) for t in change.values()) ** 0.5
    notes = [note for note in prepare(config).notes if "free directions" in note]
    if leaves:
        assert heard > 1e-3 * all_of_it
        why = f"which {leaves} leaves: use fot, which projects on the server"
        assert notes == [f"learner gpm keeps clients' steps to the free directions, {why}"]
    else:
        assert all_of_it > 0 and heard < 1e-5 * all_of_it and not notes


def test_bytes_and_the_null_option(tmp_path: Path) -> None:
    """Up: D · q + 1 numbers of every map, client and task, or D (D + 1) / 2 where D < 2 q. Down: bases, of GPM alone. Without a
    share it is FedAvg."""
    nothing, five = "threshold: 0, growth: 0", "columns: 5"
    learners = ("", f"{{name: fot, {nothing}}}", f"{{name: gpm, {nothing}}}", f"{{name: fot, {five}}}")
    learners = (*learners, f"{{name: gpm, {five}, project: steps}}")
    configs = [tiny(*SMALL, f"client.learners=[{names}]", output=tmp_path) for names in learners]
    results = [run(config) for config in configs]
    states = [final_state(Path(str(r.path)), config) for r, config in zip(results, configs, strict=True)]
    for r, s in zip(results[1:3], states[1:3], strict=True):
        assert same_bits(s.params, states[0].params)
        assert r.costs["bytes"] == results[0].costs["bytes"]
    maps = {n: t for n, t in states[0].params.items() if n.startswith("adapter.")}
    widths = [t.shape[1] for t in maps.values()]
    assert {2, 16} <= set(widths)
    sent = sum(4 * (d * (d + 1) // 2 if d < 10 else 5 * d) for d in widths)
    energies = 4 * sum(d >= 10 for d in widths)  # at most: equal ones travel once, such as those of what a norm gives
    for r in results[3:]:
        assert 2 * 3 * sent < r.costs["bytes"]["up"]["statistics"] <= 2 * 3 * (sent + energies)
    assert "context" not in results[3].costs["bytes"]["down"]
    assert 0 < results[4].costs["bytes"]["down"]["context"] <= 3 * 4 * sum(d * min(d, 5) for d in widths)
    assert "stored" not in results[4].costs


def test_a_run_knows_the_energy_beside_the_sketch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first task, which is the same in both forms: Σ ‖x‖² is the trace of Σ x xᵀ, and small maps send that."""
    totals, real = list[Tensors](), fot.Learner.closed

    def closed(self: fot.Learner, state: Any, params: Tensors, total: Tensors) -> Any:
        totals.append(total)
        return real(self, state, params, total)

    monkeypatch.setattr(fot.Learner, "closed", closed)
    for form in ("sketch", "gram"):
        run(tiny(*SMALL, f"client.learners=[{{name: fot, columns: 5, form: {form}}}]", output=tmp_path))
    sketches, grams = totals[0], totals[2]
    assert {n for n in sketches if n.startswith("gram")} == {n for n in grams if n.endswith("lora_B")}
    for name in (n.partition("/")[2] for n in grams if n.endswith("lora_A")):
        trace = from_upper_triangle(grams[f"gram.full/{name}"]).trace()
        torch.testing.assert_close(sketches[f"sketch.energy/{name}"], trace, rtol=1e-5, atol=0)
        assert sketches[f"sketch.range/{name}"].shape[1] == 5


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"threshold must be in \[0, 1\], got 1.5"):
        fot.Learner(threshold=1.5)
    with pytest.raises(ConfigError, match="growth must not be negative"):
        gpm.Learner(growth=-0.1)
    with pytest.raises(ConfigError, match="Choose from: sketch, gram"):
        fot.Learner(form="grams")
    with pytest.raises(ConfigError, match="keeps what linear layers say to old inputs, and adapter prefix trains none"):
        prepare(tiny(*SMALL, "client.learners=[fot]", "adapter=prefix"))
    with pytest.raises(ConfigError, match="consolidator mean does not leave it as it was trained: use consolidator: none"):
        prepare(tiny(*SMALL, "client.learners=[gpm]", "server.consolidator=mean"))
    for project in (gpm.GRADIENTS, gpm.STEPS):  # a projection mixes the ranks that a client has with those that it has not
        with pytest.raises(ConfigError, match=r"learner gpm keeps numbers for every tensor .* leave that out"):
            prepare(tiny(*SMALL, f"client.learners=[{{name: gpm, project: {project}}}]", "client.ranks=[1, 2, 2]"))
    sgd, decay = "client.optimizer=sgd", "client.groups=[{match: 'head.*', lr: 0.1}, {match: '*', weight_decay: 0.1}]"
    for options, why in (((), "client.optimizer is adamw"), ((sgd, decay), "there is weight decay"), ((sgd,), "")):
        notes = [n for n in prepare(tiny(*SMALL, "client.learners=[gpm]", *options)).notes if "free directions" in n]
        assert len(notes) == bool(why) and all(n.startswith(f"learner gpm projects gradients, but {why}") for n in notes)
