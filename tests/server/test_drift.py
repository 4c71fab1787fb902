"""Drift between clients against brute force: every client's change as one long vector in numpy float64, products formed densely.

The oracle of two orthogonal changes of length 3 and 4 from weights of length 5:
  relative norm   (3 + 4) / 2 / 5                       = 0.7
  cosine          0, to the mean (3/5 + 4/5) / 2         = 0.7
  diversity       (9 + 16) / |(3, 4)|² = 25 / 25         = 1
  effective rank  σ = 4, 3: exp(−4/7 ln 4/7 − 3/7 ln 3/7) = 1.97962…
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedsim.core.messages import ClientUpdate
from server import drift
from server.drift import measure_drift

Params = Mapping[str, torch.Tensor]
FloatArray = NDArray[np.float64]
SHAPES = {
    "adapter.0.q.lora_A": (2, 5), "adapter.0.q.lora_B": (4, 2), "adapter.1.v.lora_A": (3, 6), "adapter.1.v.lora_B": (7, 3),
    "head.weight": (3, 4), "head.bias": (3,),
}  # fmt: skip


def draw(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return {n: torch.tensor(scale * rng.normal(size=shape), dtype=torch.float32) for n, shape in SHAPES.items()}


def moved(params: Params, client: int, scale: float = 0.3, samples: int = 1) -> ClientUpdate:
    return ClientUpdate(client, samples, {n: params[n] + t for n, t in draw(client + 100, scale).items()})


def vector(params: Params, group: str) -> FloatArray:
    return np.concatenate([t.double().numpy().ravel() for n, t in params.items() if n.startswith(f"{group}.")])


def brute(params: Params, updates: Sequence[ClientUpdate], group: str) -> dict[str, float]:
    """Every measure from its definition."""
    w = vector(params, group)
    changes = [vector(u.params, group) - w for u in updates]
    mean = np.mean(changes, axis=0)

    def cosine(a: FloatArray, b: FloatArray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    pairs = [cosine(a, b) for a, b in itertools.combinations(changes, 2)]
    share = np.linalg.svd(np.stack(changes), compute_uv=False)
    share = share / share.sum()
    return {
        "relative_norm": float(np.mean([np.linalg.norm(d) for d in changes]) / np.linalg.norm(w)),
        "cosine": float(np.mean(pairs)),
        "cosine_min": min(pairs),
        "cosine_to_mean": float(np.mean([cosine(d, mean) for d in changes])),
        "diversity": float(sum(d @ d for d in changes) / np.square(np.sum(changes, axis=0)).sum()),
        "effective_rank": float(np.exp(-(share * np.log(share)).sum())),
    }


def measured(params: Params, updates: Sequence[ClientUpdate], group: str = "adapter") -> drift.DriftRow:
    (row,) = [r for r in measure_drift(1, 2, params, updates) if r.group == group]
    return row


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(2, 6), st.sampled_from([1e-3, 0.3, 10.0]))
def test_measures_are_what_they_are_defined_to_be(seed: int, clients: int, scale: float) -> None:
    params = draw(seed)
    updates = [moved(params, seed + k, scale) for k in range(clients)]
    rows = measure_drift(1, 2, params, updates)
    assert [(r.task, r.round, r.group, r.clients) for r in rows] == [(1, 2, "adapter", clients), (1, 2, "head", clients)]
    for row in rows:
        for name, value in brute(params, updates, row.group).items():
            assert getattr(row, name) == pytest.approx(value, rel=1e-6, abs=1e-9), name


@settings(max_examples=25)
@given(st.integers(0, 1000), st.lists(st.integers(1, 50), min_size=2, max_size=5))
def test_what_averaging_the_factors_loses(seed: int, samples: list[int]) -> None:
    """Dense O×I products in float64, all layers in one Frobenius norm."""
    params = draw(seed)
    updates = [moved(params, seed + k, samples=n) for k, n in enumerate(samples)]
    share = np.array(samples) / sum(samples)
    lost = kept = 0.0
    for layer in ("adapter.0.q", "adapter.1.v"):
        A, B = ([u.params[f"{layer}.lora_{f}"].double().numpy() for u in updates] for f in "AB")
        mean = sum(p * b @ a for p, a, b in zip(share, A, B, strict=True))
        lost += np.square(np.tensordot(share, B, 1) @ np.tensordot(share, A, 1) - mean).sum()
        kept += np.square(mean).sum()
    assert measured(params, updates).product_error == pytest.approx(math.sqrt(lost / kept), rel=1e-6)
    assert measured(params, updates, "head").product_error is None


def test_products_are_compared_where_both_factors_are_trained() -> None:
    params = draw(0)
    only_b = [ClientUpdate(k, 1, {n: t for n, t in moved(params, k).params.items() if "lora_A" not in n}) for k in range(3)]
    assert measured(params, only_b).product_error is None
    assert measured(params, only_b).cosine is not None


def test_product_error_of_clients_that_agree_on_a_factor() -> None:
    """Σ p_k B_k A = (Σ p_k B_k) A: nothing is lost."""
    params = draw(0)
    same_a = {n: t for n, t in draw(7).items() if "lora_A" in n}
    updates = [ClientUpdate(k, k + 1, {**moved(params, k).params, **same_a}) for k in range(4)]
    assert measured(params, updates).product_error == pytest.approx(0, abs=1e-6)


def test_two_orthogonal_changes_by_hand() -> None:
    params = {"head.weight": torch.tensor([5.0, 0.0])}
    updates = [ClientUpdate(k, 1, {"head.weight": torch.tensor(w)}) for k, w in enumerate([[8.0, 0.0], [5.0, 4.0]])]
    row = measured(params, updates, "head")
    assert (row.relative_norm, row.cosine, row.cosine_min, row.diversity) == pytest.approx((0.7, 0, 0, 1))
    assert row.cosine_to_mean == pytest.approx(0.7)
    assert row.effective_rank == pytest.approx(math.exp(-(4 / 7) * math.log(4 / 7) - (3 / 7) * math.log(3 / 7)))


@pytest.mark.parametrize("clients", [2, 5])
def test_equal_clients(clients: int) -> None:
    """cos = 1, diversity 1/K, one direction."""
    params = draw(0)
    row = measured(params, [ClientUpdate(k, 3, moved(params, 9).params) for k in range(clients)])
    assert (row.cosine, row.cosine_min, row.cosine_to_mean) == pytest.approx((1, 1, 1))
    assert row.diversity == pytest.approx(1 / clients)
    assert row.effective_rank == pytest.approx(1)


def test_one_client_agrees_with_nobody() -> None:
    row = measured(draw(0), [moved(draw(0), 1)])
    assert (row.clients, row.cosine, row.cosine_min, row.diversity) == (1, None, None, None)
    assert (row.cosine_to_mean, row.effective_rank) == pytest.approx((1, 1))
    assert row.relative_norm == pytest.approx(
        np.linalg.norm(vector(draw(101, 0.3), "adapter")) / np.linalg.norm(vector(draw(0), "adapter"))
    )


def test_who_does_not_move_has_no_direction() -> None:
    params = draw(0)
    still = [ClientUpdate(k, 1, dict(params)) for k in (0, 1)]
    row = measured(params, still)
    assert row.relative_norm == 0
    assert {row.cosine, row.cosine_min, row.cosine_to_mean, row.diversity, row.effective_rank} == {None}
    both = [moved(params, 3), moved(params, 4)]
    with_still, without = measured(params, [*both, still[0]]), measured(params, both)
    assert (with_still.cosine, with_still.cosine_min, with_still.effective_rank) == pytest.approx(
        (without.cosine, without.cosine_min, without.effective_rank)
    )
    assert (with_still.clients, with_still.relative_norm) == (3, pytest.approx(without.relative_norm * 2 / 3))


def test_changes_that_cancel() -> None:
    """Δ and −Δ: opposite, and the mean is nowhere. With thirds the sum is not exactly 0."""
    params = {"head.weight": torch.zeros(4)}
    for delta in (torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1 / 3, 0.1, 0.7, 1e-3])):
        row = measured(params, [ClientUpdate(0, 1, {"head.weight": delta}), ClientUpdate(1, 1, {"head.weight": -delta})], "head")
        assert (row.cosine, row.cosine_min) == pytest.approx((-1, -1))
        assert (row.relative_norm, row.cosine_to_mean, row.diversity) == (None, None, None)  # the head starts at zero
    thirds = [torch.tensor([math.cos(a), math.sin(a)]) for a in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)]
    row = measured(
        {"head.weight": torch.zeros(2)}, [ClientUpdate(k, 1, {"head.weight": t}) for k, t in enumerate(thirds)], "head"
    )
    assert row.cosine == pytest.approx(-0.5, abs=1e-6)
    assert row.effective_rank == pytest.approx(2, abs=1e-3)


def test_who_has_no_samples_or_trains_nothing_is_left_out() -> None:
    params = draw(0)
    some = [moved(params, 1), moved(params, 2)]
    empty = [moved(params, 3, samples=0), ClientUpdate(4, 9, {})]
    assert measure_drift(0, 0, params, [empty[0], some[0], empty[1], some[1]]) == measure_drift(0, 0, params, some)
    assert measure_drift(0, 0, params, empty) == ()
    assert measure_drift(0, 0, params, []) == ()


def test_the_products_of_many_clients_are_left_out() -> None:
    params = {n: torch.zeros(shape) for n, shape in SHAPES.items()}
    updates = [moved(params, k) for k in range(drift.MOST_PRODUCTS + 1)]
    row = measured(params, updates)
    assert row.clients == len(updates)
    assert row.cosine == pytest.approx(_cosine(updates))
    assert row.product_error is None
    assert measured(params, updates[: drift.MOST_PRODUCTS]).product_error is not None


def _cosine(updates: Sequence[ClientUpdate]) -> float:
    """Mean over pairs of changes from zero."""
    changes = [vector(u.params, "adapter") for u in updates]
    unit = np.stack([c / np.linalg.norm(c) for c in changes])
    gram = unit @ unit.T
    return float((gram.sum() - np.trace(gram)) / len(gram) / (len(gram) - 1))


def test_inputs_are_left_alone() -> None:
    params = draw(0)
    updates = [moved(params, 1), moved(params, 2)]
    copies = [{n: t.clone() for n, t in p.items()} for p in (params, updates[0].params, updates[1].params)]
    measure_drift(0, 0, params, updates)
    for before, after in zip(copies, (params, updates[0].params, updates[1].params), strict=True):
        assert all(torch.equal(before[n], after[n]) for n in before)
