"""DOLFIN: the span against the published rule in plain numpy, and what it promises about old inputs.

Shapes: D inputs, O outputs, R rank, K directions kept, N rows.
"""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from clients.pools.serial import Pool as SerialPool
from fedsim.core.config import SimConfig
from fedsim.core.contracts import lift_statistics
from fedsim.core.errors import AggregationError, ConfigError
from fedsim.core.messages import ClientJob, ClientUpdate, RoundPlan, State
from fedsim.core.rng import torch_stream
from fedsim.core.sums import BlockSum
from fedsim.core.tensors import matching, stack_modules, upper_triangle, with_prefix
from fedsim.models.logits import masked_cross_entropy
from fedsim.simulation import run
from server import checkpoint, gpm
from server.aggregators.fedavg import Aggregator as FedAvg
from server.consolidators.dolfin import Consolidator as Dolfin
from server.gpm import InputSpan
from server.state import ServerState
from tests.clients.test_local import CLASSES, EVERYWHERE, client
from tests.tiny import final_state, learned, same_bits, stopping, tiny

Array = NDArray[np.float64]
D, O, R = 9, 5, 2  # noqa: E741
K_PROJ, V_PROJ, OUT = ("adapter.layers.0.attention." + n for n in ("k_proj", "v_proj", "o_proj"))
A, B = ".lora_A", ".lora_B"


def draw(*shape: int, address: object) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch_stream(4, "dolfin", str(address)))


def gram_of(address: object, size: int = D, rank: int | None = None, decay: float = 0.6) -> Tensor:
    """Second moments whose energies fall by `decay` from direction to direction, `rank` of them above zero."""
    q = torch.linalg.qr(draw(size, size, address=address))[0]
    values = decay ** torch.arange(size, dtype=torch.float64)
    values[size if rank is None else rank :] = 0
    return (q * values) @ q.T


def projector(basis: Tensor) -> Tensor:
    return basis @ basis.T


grams = st.builds(
    lambda seeds, size, decay: [gram_of(s, size, decay=decay) for s in seeds],
    st.lists(st.integers(0, 10**6), min_size=1, max_size=5, unique=True),
    st.integers(2, 10),
    st.floats(0.3, 0.9),
)
thresholds = st.floats(0.3, 0.995)


# ---------------------------------------------------------------- the memory


def published(basis: Array | None, mode: str, gram: Array, eps: float, guarantee: bool) -> tuple[Array, str, float]:
    """DualGPM as published, in plain numpy, with the complement where the first task retains; and how near a decision was."""
    total = (gram**2).sum()
    size, near = len(gram), 1.0
    if basis is None:
        u, s, _ = np.linalg.svd(gram)
        shares = np.cumsum(s**2) / total
        near = float(np.abs(shares - eps).min())
        k = max(1, int((shares < eps).sum()) + (1 if guarantee else 0))
        basis, mode = (u[:, :k], "remove") if k < size / 2 else (u[:, k:], "retain")
    elif mode == "remove":
        rest = gram - basis @ basis.T @ gram
        u, s, _ = np.linalg.svd(rest)
        held, k = 1 - (s**2).sum() / total, 0
        while held < eps and k < size:
            near = min(near, abs(held - eps))
            held += s[k] ** 2 / total
            k += 1
        near = min(near, abs(held - eps))
        basis = np.hstack([basis, u[:, :k]])
    else:
        u, s, _ = np.linalg.svd(basis @ basis.T @ gram)
        free, k = (s**2).sum() / total, 0
        while free >= 1 - eps and k < basis.shape[1]:
            near = min(near, abs(free - 1 + eps))
            free -= s[k] ** 2 / total
            k += 1
        near = min(near, abs(free - 1 + eps))
        left = np.linalg.svd(basis - u[:, :k] @ u[:, :k].T @ basis)[0]
        basis = left[:, : basis.shape[1] - k]
    if mode == "remove" and basis.shape[1] > size / 2:
        basis, mode = np.linalg.svd(basis)[0][:, basis.shape[1] :], "retain"
    return basis, mode, near


@settings(max_examples=150)
@given(grams, thresholds, st.booleans())
def test_memory_is_the_published_rule(tasks: list[Tensor], eps: float, guarantee: bool) -> None:
    size = len(tasks[0])
    span, basis, mode = gpm.empty(size), None, "remove"
    for gram in tasks:
        span = gpm.updated(span, gram, eps, guarantee)
        basis, mode, near = published(basis, mode, gram.numpy(), eps, guarantee)
        assume(near > 1e-9)
        want = torch.from_numpy(basis @ basis.T)
        want = want if mode == "retain" else torch.eye(size, dtype=torch.float64) - want
        torch.testing.assert_close(projector(span.free), want, rtol=0, atol=1e-7)
        assert span.mode == mode or 2 * basis.shape[1] == size  # at exactly a half, both modes are right


@settings(max_examples=100)
@given(grams, thresholds)
def test_memory_stays_orthonormal_small_and_only_grows(tasks: list[Tensor], eps: float) -> None:
    size = len(tasks[0])
    span, identity = gpm.empty(size), torch.eye(size, dtype=torch.float64)
    for gram in tasks:
        old, span = projector(span.kept), gpm.updated(span, gram, eps)
        columns = span.basis.shape[1]
        assert 2 * columns <= size
        torch.testing.assert_close(span.basis.T @ span.basis, identity[:columns, :columns], rtol=0, atol=1e-12)
        kept, free = projector(span.kept), projector(span.free)
        torch.testing.assert_close(kept + free, identity, rtol=0, atol=1e-12)
        torch.testing.assert_close(free @ free, free, rtol=0, atol=1e-12)
        torch.testing.assert_close(kept @ old, old, rtol=0, atol=1e-9)
        assert float((kept @ gram).square().sum() / gram.square().sum()) >= eps - 1e-12


@settings(max_examples=100)
@given(grams, thresholds)
def test_both_modes_are_one_memory(tasks: list[Tensor], eps: float) -> None:
    span = gpm.updated(gpm.empty(len(tasks[0])), tasks[0], eps)
    remove, retain = InputSpan(span.kept, "remove"), InputSpan(span.free, "retain")
    for gram in tasks:
        energies = [gpm.free_directions(m, gram)[1] for m in (remove, retain)]
        torch.testing.assert_close(energies[0], energies[1], rtol=0, atol=1e-12)
        a, b = gpm.updated(remove, gram, eps), gpm.updated(retain, gram, eps)
        torch.testing.assert_close(projector(a.free), projector(b.free), rtol=0, atol=1e-7)


def test_switching_keeps_the_subspace() -> None:
    gram = gram_of("switch")
    small, large = gpm.updated(gpm.empty(D), gram, 0.7), gpm.updated(gpm.empty(D), gram, 0.9999)
    assert (small.mode, large.mode) == ("remove", "retain")
    u, s, _ = np.linalg.svd(gram.numpy())
    count = int(np.sum(np.cumsum(s**2) / np.sum(s**2) < 0.9999)) + 1
    assert count > D / 2
    torch.testing.assert_close(projector(large.kept), torch.from_numpy(u[:, :count] @ u[:, :count].T), rtol=0, atol=1e-10)
    assert large.basis.shape == (D, D - count)


def test_without_the_guarantee_less_is_held() -> None:
    gram = gram_of("less")
    shares = [
        float((projector(gpm.updated(gpm.empty(D), gram, 0.95, g).kept) @ gram).square().sum() / gram.square().sum())
        for g in (True, False)
    ]
    assert shares[0] >= 0.95 > shares[1] > 0
    only_one = gpm.updated(gpm.empty(D), gram_of("one", rank=1), 0.95, guarantee=False)
    assert only_one.basis.shape == (D, 1)


def test_free_directions_without_energy_end_the_list() -> None:
    span = gpm.updated(gpm.empty(D), gram_of("first"), 0.6)
    free = span.free.shape[1]
    directions, energies = gpm.free_directions(span, gram_of("second", rank=2))
    assert directions.shape == (D, free)
    assert energies[:2].min() > 1e-4
    assert energies[2:].max() < 1e-20
    torch.testing.assert_close(directions.T @ directions, torch.eye(free, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(span.kept.T @ directions, torch.zeros_like(span.kept.T @ directions), rtol=0, atol=1e-12)
    assert bool((directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)) > 0).all())


def test_inputs_without_energy_and_a_full_memory() -> None:
    silent = torch.zeros(D, D, dtype=torch.float64)
    for guarantee in (True, False):
        assert gpm.updated(gpm.empty(D), silent, 0.95, guarantee).basis.shape == (D, 0)
    full = gpm.updated(gpm.empty(D), torch.eye(D, dtype=torch.float64), 1.0)
    assert (full.mode, full.basis.shape) == ("retain", (D, 0))
    assert gpm.updated(full, gram_of("more"), 0.95).basis.shape == (D, 0)
    assert gpm.free_directions(full, gram_of("more"))[0].shape == (D, 0)


# ---------------------------------------------------------------- the consolidator


def module(address: object, layers: tuple[str, ...] = (K_PROJ, V_PROJ), dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    drawn = {p + A: draw(R, D, address=f"{address} {p} A") for p in layers}
    drawn |= {p + B: draw(O, R, address=f"{address} {p} B") for p in layers}
    return {n: drawn[n].to(dtype) for n in sorted(drawn)}


def sent(rule: Dolfin, params: dict[str, Tensor], address: object, opening: bool = False, **options: Any) -> dict[str, Tensor]:
    """The sum of what clients answer: the same Gram for layers of one group, one of its own for each of the others."""
    plan = rule.opening(rule.init(), params).plan if opening else rule.plan(rule.init(), params)
    (request,) = plan.statistics
    return {f"gram.full/{n}": upper_triangle(gram_of(f"{address} {n}", **options)) for n in matching(params, request.match)}


def test_a_stream_that_names_no_number_of_tasks_has_the_usual_one() -> None:
    grams = [torch.eye(4).double().index_fill(0, torch.tensor(range(k + 1, 4)), 0.1) for k in range(3)]
    bases = []
    for rule in (Dolfin(0.5, 0.9), Dolfin(0.5, 0.9, tasks=None)):
        state = rule.init()
        for gram in grams:
            module = {"adapter.fc.lora_A": torch.ones(1, 4), "adapter.fc.lora_B": torch.ones(2, 1)}
            total = {"gram.full/adapter.fc.lora_A": upper_triangle((gram + gram.T) / 2)}
            state = rule.end_task(state, module, total, torch_stream(0, "draw"))
        bases.append(state["spans"]["adapter.fc"]["basis"])
    assert torch.equal(*bases)


def play(rule: Dolfin, tasks: int, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[State, dict[str, Tensor]]:
    """After these tasks, every one of which trains another B."""
    state, params = rule.init(), {"head.weight": draw(4, 3, address="head").to(dtype), **module("first", dtype=dtype)}
    for task in range(tasks):
        params = begin(rule, state, params, task, dtype, **options)
        params = {**params, **{n: t for n, t in module(task, dtype=dtype).items() if n.endswith(B)}}
        state = rule.end_task(state, params, sent(rule, params, f"end {task}", **options), torch.Generator())
    return state, params


def begin(
    rule: Dolfin, state: State, params: dict[str, Tensor], task: int, dtype: torch.dtype = torch.float64, **options: Any
) -> dict[str, Tensor]:
    asked = sent(rule, params, f"start {task}", opening=True, **options)
    return dict(rule.start_task(state, params, module("fresh", dtype=dtype), asked).params)


def span_of(state: State, layer: str = K_PROJ) -> InputSpan:
    return InputSpan(**state["spans"][layer])


def delta(tensors: Any, layer: str) -> Tensor:
    out: Tensor = tensors[layer + B].double() @ tensors[layer + A].double()
    return out


@pytest.mark.parametrize(
    ("threshold", "decay", "tasks", "mode"),
    [(0.7, 0.3, 1, "remove"), (0.7, 0.3, 2, "remove"), (0.99, 0.6, 1, "retain"), (0.999, 0.3, 2, "retain")],
)
def test_old_inputs_are_answered_as_before_whatever_is_trained(threshold: float, decay: float, tasks: int, mode: str) -> None:
    rule = Dolfin(threshold=threshold, threshold_end=threshold)
    state, params = play(rule, tasks, decay=decay)
    span = span_of(state)
    assert span.mode == mode
    started = begin(rule, state, params, tasks)
    assert float((started[K_PROJ + A] @ span.kept).norm()) <= 1e-8
    x_DN = span.kept @ draw(span.kept.shape[1], 20, address="old inputs")
    trained = {**started, **{n: t for n, t in module("trained").items() if n.endswith(B)}}
    before, after = rule.deployed(state, params, finished=True), rule.deployed(state, trained, finished=False)
    for layer in (K_PROJ, V_PROJ):
        assert float(delta(trained, layer).norm()) > 1
        torch.testing.assert_close(delta(after, layer) @ x_DN, delta(before, layer) @ x_DN, rtol=0, atol=1e-12)


def test_what_float32_leaves() -> None:
    """Every number of D_t is rounded by 2⁻²⁴ of its size at most, and ‖D_t‖_F = √(r/3): so ‖D_t M‖_F ≤ 2⁻²⁴ √(r/3)."""
    rule = Dolfin(threshold=0.7)
    state, params = play(rule, 1, torch.float32)
    d_RD = begin(rule, state, params, 1, torch.float32)[K_PROJ + A]
    assert d_RD.dtype == torch.float32
    left = float((d_RD.double() @ span_of(state).kept).norm())
    assert 0 < left <= 2**-24 * math.sqrt(R / 3) + 1e-12


def test_design_is_the_leading_singular_vectors_of_what_is_free() -> None:
    rule = Dolfin(threshold=0.7)
    state, params = play(rule, 1)
    started = begin(rule, state, params, 1)
    h, m = gram_of(f"start 1 {K_PROJ}{A}").numpy(), span_of(state).kept.numpy()
    u = np.linalg.svd(h - m @ m.T @ h)[0][:, :R]
    got = started[K_PROJ + A].numpy() * math.sqrt(3)
    np.testing.assert_allclose(np.abs(got @ u), np.eye(R), atol=1e-9)
    np.testing.assert_allclose(got @ got.T, np.eye(R), atol=1e-12)
    first = begin(rule, rule.init(), params, 0)
    u = np.linalg.svd(gram_of(f"start 0 {K_PROJ}{A}").numpy())[0][:, :R]
    np.testing.assert_allclose(np.abs(first[K_PROJ + A].numpy() @ u) * math.sqrt(3), np.eye(R), atol=1e-9)


def test_a_scale_of_the_sum_changes_nothing() -> None:
    """Sums of rows, not means: how many tokens there are plays no part."""
    rule = Dolfin(threshold=0.7)
    state, params = play(rule, 1)
    total = sent(rule, params, "start", opening=True)
    a, b = (rule.start_task(state, params, {}, {n: scale * t for n, t in total.items()}).params for scale in (1.0, 1024.0))
    torch.testing.assert_close(a[K_PROJ + A], b[K_PROJ + A], rtol=0, atol=1e-12)


def test_a_task_starts_without_changing_anything() -> None:
    rule = Dolfin(threshold=0.7)
    state, params = play(rule, 2)
    started = begin(rule, state, params, 2)
    assert torch.equal(started["head.weight"], params["head.weight"])
    before, after = rule.deployed(state, params, finished=True), rule.deployed(state, started, finished=False)
    for layer in (K_PROJ, V_PROJ):
        assert torch.equal(delta(before, layer), delta(after, layer))
        assert after[layer + A].shape == (3 * R, D)


def test_directions_are_filled_up_where_inputs_are_of_low_rank() -> None:
    rule = Dolfin(threshold=0.95)
    state, params = play(rule, 1, rank=1)
    d_RD = begin(rule, state, params, 1, rank=1)[K_PROJ + A]
    torch.testing.assert_close(d_RD @ d_RD.T, torch.eye(R, dtype=torch.float64) / 3, rtol=0, atol=1e-12)
    assert float((d_RD @ span_of(state).kept).norm()) <= 1e-8


def test_average_of_B_is_the_average_of_the_products() -> None:
    rule = Dolfin(threshold=0.7)
    started = begin(rule, *play(rule, 1), 1)
    clients = [{n: t for n, t in module(f"client {k}").items() if n.endswith(B)} for k in range(3)]
    updates = [ClientUpdate(k, n, c) for k, (n, c) in enumerate(zip((3, 5, 8), clients, strict=True))]
    _, merged = FedAvg().combine({}, started, updates, torch.Generator())
    for layer in (K_PROJ, V_PROJ):
        want = sum(n / 16 * delta({**started, **c}, layer) for n, c in zip((3, 5, 8), clients, strict=True))
        torch.testing.assert_close(delta(merged, layer), want, rtol=0, atol=1e-12)


def test_modules_of_all_tasks_act_at_full_weight() -> None:
    rule = Dolfin(threshold=0.6)
    state, params, want = rule.init(), module("first"), torch.zeros(O, D, dtype=torch.float64)
    for task in range(3):
        past = rule.start_task(state, params, module("fresh"), {}).past
        assert past.share == 1.0
        if task:
            torch.testing.assert_close(delta(past.together(), V_PROJ), want, rtol=0, atol=1e-12)
        params = {**begin(rule, state, params, task), **{n: t for n, t in module(task).items() if n.endswith(B)}}
        want += delta(params, V_PROJ)
        torch.testing.assert_close(delta(rule.deployed(state, params, finished=False), V_PROJ), want, rtol=0, atol=1e-12)
        state = rule.end_task(state, params, sent(rule, params, f"end {task}"), torch.Generator())
        torch.testing.assert_close(delta(rule.deployed(state, params, finished=True), V_PROJ), want, rtol=0, atol=1e-12)


def test_statistics_go_through_the_model_of_past_tasks_and_then_the_trained_one() -> None:
    """`params` holds the last task's module still when the next one opens: it must not count twice."""
    rule = Dolfin(threshold=0.6)
    state, params = play(rule, 2)
    opening, start = rule.opening(state, params), rule.start_task(state, params, module("fresh"), {})
    blends = []
    for plan, past in ((opening.plan, opening.past), (rule.plan(state, params), start.past)):
        assert plan.train == ()
        assert all(request.blended for request in plan.statistics)
        blends.append(delta(stack_modules([past.together(), with_prefix(params, "adapter.")], [1.0, past.share]), K_PROJ))
    before = delta(start.past.together(), K_PROJ)
    torch.testing.assert_close(blends[0], before, rtol=0, atol=1e-12)
    torch.testing.assert_close(blends[1], before + delta(params, K_PROJ), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("task", "eps"), [(0, 0.6), (1, 0.68), (4, 0.92), (5, 1.0), (9, 1.0)])
def test_threshold_rises_with_the_tasks(task: int, eps: float) -> None:
    rule = Dolfin(threshold=0.6, threshold_end=1.0, tasks=5)
    params = module("any")
    total = sent(rule, params, "end")
    got = rule.end_task({"task": task, "past": {}, "spans": {}}, params, total, torch.Generator())
    want = gpm.updated(gpm.empty(D), gram_of(f"end {K_PROJ}{A}"), eps)
    torch.testing.assert_close(projector(span_of(got).free), projector(want.free), rtol=0, atol=1e-9)


def test_layers_that_share_their_inputs_cost_one_gram_and_get_one_design() -> None:
    rule, layers = Dolfin(), (K_PROJ, V_PROJ, OUT, "adapter.layers.1.attention.v_proj")
    params = module("any", layers)
    for plan in (rule.opening(rule.init(), params).plan, rule.plan(rule.init(), params)):
        assert plan.statistics[0].match == (K_PROJ + A, OUT + A, "adapter.layers.1.attention.v_proj" + A)
        assert plan.statistics[0].options == {"form": "full", "decay": 1.0}
    started = rule.start_task(rule.init(), params, {}, sent(rule, params, "start", opening=True)).params
    assert torch.equal(started[K_PROJ + A], started[V_PROJ + A])
    assert not torch.allclose(started[K_PROJ + A], started[OUT + A])
    apart = Dolfin(shared_inputs=[])
    assert len(apart.plan(apart.init(), params).statistics[0].match) == 4
    globs = Dolfin(shared_inputs=[["[kv]_proj"], ["o_*"]])
    assert globs.plan(globs.init(), params).statistics[0].match == rule.plan(rule.init(), params).statistics[0].match


def test_layers_of_one_group_must_have_inputs_of_one_size() -> None:
    params = module("any") | {V_PROJ + A: torch.zeros(R, D + 1)}
    with pytest.raises(ConfigError, match=r"'layers\.0\.attention\.k_proj' and '.*v_proj' have inputs of different sizes"):
        Dolfin().start_task(Dolfin().init(), params, {}, {})


def test_sum_over_clients_is_the_second_moment_of_all_data() -> None:
    """What the clients send adds up to H of the pooled rows, so D_t and M are those of data in one place (up to float32)."""
    rule, params = Dolfin(threshold=0.7), module("any")
    rows = [(1 + k) * draw(20 + k, D, address=f"rows {k}") + k for k in range(3)]
    key = f"gram.full/{K_PROJ}{A}"
    total = BlockSum()
    for k, x_ND in enumerate(rows):
        total.add(k, 1, lift_statistics(ClientUpdate(k, len(x_ND), {}, {key: upper_triangle(x_ND.T @ x_ND).float()})))
    pooled = torch.cat(rows)
    together, apart = {key: upper_triangle(pooled.T @ pooled)}, total.result() or {}
    a, b = (rule.start_task(rule.init(), params, {}, t).params[K_PROJ + A] for t in (together, apart))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    bases = [projector(span_of(rule.end_task(rule.init(), params, t, torch.Generator())).free) for t in (together, apart)]
    torch.testing.assert_close(bases[0], bases[1], rtol=0, atol=1e-5)


def filled(columns: int) -> State:
    basis = torch.eye(D, dtype=torch.float64)[:, :columns]
    mode = "remove" if 2 * columns <= D else "retain"
    held = basis if mode == "remove" else gpm.complement(basis)
    return {"task": 3, "past": {}, "spans": {K_PROJ: {"basis": held, "mode": mode}}}


def test_no_room_for_the_rank() -> None:
    params = module("any")
    for rule in (Dolfin(), Dolfin(when_full="shrink")):
        assert torch.linalg.matrix_rank(begin(rule, filled(D - R), params, 3)[K_PROJ + A]) == R
        with pytest.raises(ConfigError, match=r"has 0 of 9 input directions left.*: lower server\.consolidator\.threshold$"):
            begin(rule, filled(D), params, 3)
    with pytest.raises(
        ConfigError,
        match=r"task 3: layer 'layers\.0\.attention\.k_proj' has 1 of 9 input directions left, fewer than adapter\.rank 2: "
        r"lower server\.consolidator\.threshold or adapter\.rank, or set server\.consolidator\.when_full: shrink",
    ):
        begin(Dolfin(), filled(D - 1), params, 3)
    shrunk = begin(Dolfin(when_full="shrink"), filled(D - 1), params, 3)[K_PROJ + A]
    torch.testing.assert_close(shrunk[0].abs(), torch.eye(D, dtype=torch.float64)[D - 1] / math.sqrt(3))
    assert not shrunk[1].any()


def test_without_statistics() -> None:
    rule, params = Dolfin(), module("any")
    started = rule.start_task(rule.init(), params, {}, {}).params  # the look before any training
    assert {n: t.shape for n, t in started.items()} == {n: t.shape for n, t in params.items()}
    for columns in (3, D - R):  # even then nothing of the span is touched
        d_RD = rule.start_task(filled(columns), params, {}, {}).params[K_PROJ + A]
        assert not d_RD[:, :columns].any()
        assert float(d_RD.norm()) == pytest.approx(math.sqrt(R / 3))
    with pytest.raises(AggregationError, match=r"no client sent 'gram\.full/adapter\.layers\.0\.attention\.k_proj\.lora_A'"):
        rule.start_task(rule.init(), params, {}, {"num_samples": torch.tensor(3.0)})
    with pytest.raises(AggregationError, match="no client sent"):
        rule.end_task(rule.init(), params, {}, torch.Generator())


def test_adapters_that_it_cannot_design() -> None:
    rule = Dolfin()
    for params, what in (
        ({"adapter.0.keys": torch.zeros(2, 2)}, r"'adapter\.0\.keys' is none"),
        ({"head.weight": torch.zeros(2, 2)}, "there are none"),
        ({K_PROJ + A: torch.zeros(R, D)}, r"'.*lora_A' is none"),
    ):
        with pytest.raises(ConfigError, match=rf"{what}: use adapter: lora, or consolidator: mean"):
            rule.start_task(rule.init(), {}, params, {})
    with pytest.raises(
        ConfigError, match=r"adapter\.rank 10 is larger than the 9 inputs of layer 'layers\.0\.attention\.k_proj'"
    ):
        rule.start_task(rule.init(), {}, {K_PROJ + A: torch.zeros(10, D), K_PROJ + B: torch.zeros(O, 10)}, {})


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"threshold": 0.0}, r"threshold and threshold_end must be in \(0, 1\]"),
        ({"threshold": 0.9, "threshold_end": 0.8}, "the end not below the start, got 0.9 and 0.8"),
        ({"threshold_end": 1.5}, "got 0.95 and 1.5"),
        ({"tasks": 0}, "tasks must be at least 1, got 0"),
        ({"when_full": "shrnk"}, r"when_full 'shrnk' is unknown\. Did you mean 'shrink'"),
    ],
)
def test_bad_options(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        Dolfin(**options)


def test_state_survives_a_file() -> None:
    rule = Dolfin(threshold=0.7)
    state, params = play(rule, 2)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert same_bits(loaded, state)
    assert same_bits(begin(rule, loaded, params, 2), begin(rule, state, params, 2))


# ---------------------------------------------------------------- whole runs

DOLFIN = (
    "server.aggregator=fedavg",
    "server.consolidator={name: dolfin, threshold: 0.9, tasks: 3}",
    "adapter.targets=[k_proj, v_proj]",
)
THREE = ("stream.tasks=3",)
LAYER = "adapter.layers.0.attention.k_proj"


def states_of(config: SimConfig) -> list[ServerState]:
    """What was written after every round and task."""
    seen: list[ServerState] = []
    real = checkpoint.save
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "save", lambda path, state, *rest: (seen.append(state), real(path, state, *rest)))
        run(config)
    return seen


def test_a_run_keeps_what_it_promises(tmp_path: Path) -> None:
    """Of every task: D_t orthogonal to what was kept before it, the same for keys and values and through all rounds; deployed
    modules answer old inputs as those of the task before; the head's rows of old classes keep their bits, decay or not."""
    config = tiny(*DOLFIN, *THREE, "client.weight_decay=0.1", output=tmp_path)
    states, rule = states_of(config), Dolfin()
    for task in (1, 2):
        before = next(s for s in states if (s.task, s.round) == (task, 0))
        after = next(s for s in states if (s.task, s.round) == (task + 1, 0))
        during = [s for s in states if s.task == task and s.round > 0]
        layers = list(before.consolidator["spans"])
        assert len(layers) == 2
        for layer in layers:
            kept_DK = span_of(before.consolidator, layer).kept
            assert kept_DK.shape[1] > 0
            for sibling in (layer, layer.replace("k_proj", "v_proj")):
                new, old = rule.deployed(after.consolidator, {}, True), rule.deployed(before.consolidator, {}, True)
                change = delta(new, sibling) - delta(old, sibling)
                assert float(change.norm()) > 1e-3
                assert float((change @ kept_DK).norm()) <= 1e-6 * float(change.norm())
                assert torch.equal(after.params[sibling + A], after.params[layer + A])
                assert all(torch.equal(s.params[sibling + A], after.params[layer + A]) for s in during)
        for name in ("head.weight", "head.bias"):
            rows = 2 * task
            assert all(torch.equal(s.params[name][:rows], before.params[name][:rows]) for s in [*during, after])
            assert not torch.equal(after.params[name][rows : rows + 2], before.params[name][rows : rows + 2])


def test_clients_train_on_top_of_all_past_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[ClientJob] = []
    real = SerialPool.train
    monkeypatch.setattr(SerialPool, "train", lambda pool, given: (jobs.extend(given), real(pool, given))[1])
    states, rule = states_of(tiny(*DOLFIN, *THREE, "server.rounds=1", output=tmp_path)), Dolfin()
    for task in (0, 1, 2):
        (training,) = {id(job.plan): job.plan for job in jobs if job.task == task and job.plan.train}.values()
        assert training.beside
        assert not [n for n in training.train if n.endswith(A)]
        if task == 0:
            assert not training.background
            continue
        ended = next(s for s in states if (s.task, s.round) == (task, 0))
        assert same_bits(dict(training.background), dict(rule.deployed(ended.consolidator, {}, finished=True)))
        assert training.share == 1.0


def test_split_data_start_as_data_in_one_place(tmp_path: Path) -> None:
    """The first design depends on no training: three clients' sums give the singular vectors of one client with all the data."""
    designs = []
    for clients in (1, 3):
        config = tiny(*DOLFIN, "stream.tasks=1", "server.rounds=1", f"partition.clients={clients}", output=tmp_path)
        designs.append(final_state(run(config).path, config).params[LAYER + A])
    torch.testing.assert_close(designs[0], designs[1], rtol=0, atol=1e-4)
    assert float(designs[0].norm()) == pytest.approx(math.sqrt(2 / 3), rel=1e-5)


def test_shared_inputs_save_memory_and_change_nothing(tmp_path: Path) -> None:
    apart = tiny(*DOLFIN, "server.consolidator.shared_inputs=[]", output=tmp_path)
    shared = tiny(*DOLFIN, output=tmp_path)
    results = [run(config) for config in (apart, shared)]
    np.testing.assert_array_equal(results[0].accuracy, results[1].accuracy)
    a, b = (final_state(r.path, c) for r, c in zip(results, (apart, shared), strict=True))
    assert same_bits(dict(a.params), dict(b.params))
    assert len(a.consolidator["spans"]) == 2 * len(b.consolidator["spans"])
    assert a.bytes == b.bytes  # equal Grams travel once, asked for twice or not
    full = 16 * 17 // 2 * 4  # float32 numbers of a layer's upper triangle
    assert b.bytes["up"]["statistics"] == full * 2 * 2 * 2 * 3  # layers, start and end, tasks, clients


@pytest.mark.parametrize("stop_after", [2, 3, 4], ids=["within a task", "between tasks", "after an opening"])
def test_stopped_and_gone_on_is_never_stopped(stop_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(*DOLFIN, output=tmp_path)
    whole = run(config)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", stopping(stop_after))
        with pytest.raises(KeyboardInterrupt):
            run(config, output=tmp_path / "stopped")
    run(resume=tmp_path / "stopped")
    assert same_bits(learned(final_state(whole.path, config)), learned(final_state(tmp_path / "stopped", config)))


@pytest.mark.parametrize(
    "options", [("runtime.fused=true",), ("runtime.fused=true", "adapter.dropout=0.3")], ids=["plain", "dropout"]
)
def test_clients_that_train_together_train_beside_the_same_past(options: tuple[str, ...], tmp_path: Path) -> None:
    """D_t is common to all clients of a bundle and stays; only B_t has an axis of clients."""
    together = tiny(*DOLFIN, *options, output=tmp_path)
    apart = tiny(*DOLFIN, *options[1:], output=tmp_path)
    a, b = (final_state(run(c).path, c) for c in (together, apart))
    assert float(b.params[LAYER + B].norm()) > 1e-3
    for name, want in b.params.items():
        torch.testing.assert_close(a.params[name], want, rtol=0, atol=1e-4)


def test_a_step_beside_past_modules_is_a_step_of_the_stack() -> None:
    """One SGD step on the whole shard, against the gradient of the past's and the client's LoRA as one of twice the rank."""
    one = client(EVERYWHERE, "client.optimizer=sgd", "client.lr=0.5", "client.epochs=1", "client.batch_size=64")
    past = {n: t.flip(0) for n, t in one.params.items() if n.startswith("adapter.")}
    plan = RoundPlan(train=("*.lora_B", "head.*"), context={"background": past}, beside=True)
    update = one.train(plan)
    leaves = {n: one.params[n].clone().requires_grad_() for n in update.params}
    own = {n: leaves.get(n, t) for n, t in one.params.items()}
    stacked = stack_modules([past, with_prefix(own, "adapter.")], [1.0, 1.0])
    inputs, labels = one.samples.batch(one.shard)
    with one.model.applied(stacked):
        loss = masked_cross_entropy(one.model.logits(one.model.features(inputs), own), labels, CLASSES)
    loss.backward()  # type: ignore[no-untyped-call]
    assert update.metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    alone = one.train(replace(plan, beside=False)).params
    for name, leaf in leaves.items():
        step = update.params[name] - one.params[name]
        assert leaf.grad is not None
        torch.testing.assert_close(step, -0.5 * leaf.grad, rtol=1e-3, atol=1e-5)
        assert float((update.params[name] - alone[name]).norm()) > 0.01 * float(step.norm())
