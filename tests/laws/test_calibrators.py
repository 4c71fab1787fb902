"""Calibrators that are broken on purpose are caught, each by the law that it breaks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim import laws
from fedsim.core import contracts
from fedsim.core.contracts import IntArray, Traits
from fedsim.core.messages import ClientUpdate, RoundPlan, State, Tensors
from server.calibrators.nearest_mean import Calibrator as NearestMean
from tests.laws.one import against


@dataclass(frozen=True)
class Changed(NearestMean):
    """The nearest mean, but for one thing."""

    what: str = ""

    @property
    def traits(self) -> Traits:
        return Traits() if self.what == "old rows" else super().traits

    def can_be_told(self, held_KC: IntArray) -> NDArray[np.bool_]:
        told = super().can_be_told(held_KC)
        return {"blind": ~told, "few": told[:1]}.get(self.what, told)

    def closing(self, state: State, classes: Sequence[Sequence[int]]) -> RoundPlan | None:
        return None if self.what == "idle" else super().closing(state, classes)

    def lift(self, update: ClientUpdate) -> Tensors:
        lifted = super().lift(update)
        if self.what == "ragged":
            return {n if update.client_id else f"{n}0": t for n, t in lifted.items()}
        if self.what == "narrow lift":
            return {n: t.float() for n, t in lifted.items()}
        return lifted

    def end_task(
        self, state: State, params: Tensors, total: Tensors, classes: Sequence[Sequence[int]], draw: torch.Generator
    ) -> State:
        if self.what == "in place":
            next(iter(total.values())).zero_()
        return super().end_task(state, params, total, classes, draw) | ({"me": Changed} if self.what == "unsavable" else {})

    def without(self, state: State, total: Tensors, classes: Sequence[Sequence[int]]) -> State:
        left = super().without(state, total, classes)
        return {**left, "sum": state["sum"]} if self.what == "kept" else left

    def deployed(self, state: State, params: Tensors) -> Tensors:
        out: dict[str, Tensor] = dict(super().deployed(state, params))
        if self.what == "old rows":
            return {n: t * int((state["count"] > 0).sum()) if n == "head.weight" else t for n, t in out.items()}
        if self.what == "adapter":
            return {n: t + 1 for n, t in out.items()}
        if self.what == "lost":
            return {n: t for n, t in out.items() if n != "head.bias"}
        if self.what == "nan":
            return {n: t * float("nan") if n == "head.weight" else t for n, t in out.items()}
        if self.what == "noisy":
            return {n: t + 1e-12 * torch.rand_like(t) if n == "head.weight" else t for n, t in out.items()}
        if self.what == "coarse":
            return {n: t.half().to(t.dtype) if t.dtype == torch.float32 and n == "head.weight" else t for n, t in out.items()}
        return out


@dataclass(frozen=True)
class FirstWins(contracts.Calibrator):
    """Sums that depend on which client comes first."""

    def closing(self, state: State, classes: Sequence[Sequence[int]]) -> RoundPlan | None:
        return RoundPlan(train=())

    def lift(self, update: ClientUpdate) -> Tensors:
        return {"first": torch.tensor(float(update.client_id), dtype=torch.float64)}

    def end_task(
        self, state: State, params: Tensors, total: Tensors, classes: Sequence[Sequence[int]], draw: torch.Generator
    ) -> State:
        return {"shift": total["first"]}

    def deployed(self, state: State, params: Tensors) -> Tensors:
        return {**params, "head.bias": params["head.bias"] + state["shift"].to(params["head.bias"].dtype)}


def broken(rule: contracts.Calibrator) -> dict[str, str]:
    return {r.name: r.explanation for r in laws.check("calibrators", rule) if not r.ok}


def test_good_ones_keep_all() -> None:
    assert broken(Changed()) == {}
    assert broken(FirstWins()) == {}


@pytest.mark.parametrize(
    ("what", "law", "says"),
    [
        ("idle", "works", "it asks for nothing"),
        ("adapter", "head_only", "task 0, its end, tensors of no head: 'adapter"),
        ("lost", "head_only", r"lost \['head.bias'\]"),
        ("old rows", "old_rows", "rows of old classes of 'head"),
        ("nan", "finite", "task 0, its end: .* of 'head.weight' are NaN or infinite"),
        ("blind", "told", "refuses classes of which every client has 1000 samples"),
        ("few", "told", "not one bool per class"),
        ("in place", "no_mutation", "task 0, its end: the total that it was given changed"),
        ("noisy", "deterministic", "twice with the same generator"),
        ("unsavable", "state_file", "a file cannot hold the state"),
        ("ragged", "additive", "different names or shapes"),
        ("narrow lift", "additive", "torch.float32: sums are kept in float64"),
        ("kept", "without", "two clients taken out again against never in"),
        ("coarse", "float64", "float32 against float64"),
    ],
)
def test_broken_one_is_caught_by_its_law(what: str, law: str, says: str) -> None:
    told = against("calibrators", Changed(what=what), law)
    assert re.search(says, told), told


def test_an_order_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum that the contract forbids: what is lifted depends on how often it was asked."""
    calls: list[int] = []

    def lift(self: FirstWins, update: ClientUpdate) -> Tensors:
        calls.append(update.client_id)
        return {"first": torch.tensor(float(len(calls) % 6 * update.client_id), dtype=torch.float64)}

    monkeypatch.setattr(FirstWins, "lift", lift)
    assert "updates reversed: 'head.bias'" in broken(FirstWins())["order"]


@dataclass(frozen=True)
class TwoWays(FirstWins):
    """Makes another head of a sum than of updates."""

    @property
    def additive(self) -> bool:
        return True

    def calibrate(
        self,
        state: State,
        params: Tensors,
        updates: Sequence[ClientUpdate],
        classes: Sequence[Sequence[int]],
        draw: torch.Generator,
    ) -> tuple[State, Tensors]:
        return state, {**params, "head.bias": params["head.bias"] + 1}

    def finish(
        self, state: State, params: Tensors, total: Tensors, classes: Sequence[Sequence[int]], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        return state, {**params, "head.bias": params["head.bias"] + 2}


def test_a_sum_that_does_something_else_than_updates() -> None:
    assert "from a sum of 1 bundles against whole updates: 'head.bias'" in broken(TwoWays())["additive"]
