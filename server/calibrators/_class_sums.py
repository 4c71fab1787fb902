"""Sums over all samples of a class, from moments that clients send of it, and head rows that are deployed but not trained on.

What the calibrators share that work at a task's end. Sums add up where the clients run, so that the server's memory and its
traffic do not grow with the number of clients.

Shapes: C classes of the stream, K of the task, H of them that a client holds, P of these with 2 samples or more, D features,
R rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import IntArray
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import ClientUpdate, RoundPlan, State, StatisticRequest, Tensors
from fedsim.core.names import HEAD_WEIGHT
from fedsim.core.tensors import upper_triangle

COPIES = 9  # of a triangle in float64: sums before, of the pass and after; a square matrix, scaled, and its factor (2 each)
PER_CLASS = ("count", "sum", "square")  # sums with a row for every class


@dataclass(frozen=True)
class SumsCalibrator(contracts.Calibrator):
    """A head in closed form from sums over all samples of a class, as they were measured at its task's end under the model that
    was deployed then; a calibrator says what `head` it makes of them.

    Summed over clients, they depend neither on the split nor on who is drawn, unless `server.pass_participation` says so. Classes
    of old tasks keep their sums; a class that comes again (domains) adds to its own. The head that clients train is not touched:
    training goes on from it, and within a task it is what is evaluated. Asks for `class_moments`: count and mean of every class
    that a client has.

    Rows of classes of which nobody told stay as they are. Those that nobody trained either are no answer, see `server.heads`;
    trained ones stand beside solved rows, whose logits are of another scale.

    State: `count` (C,) and `sum` (C, D), float64, of all classes, and what else is lifted, as one sum.
    """

    def can_be_told(self, held_KC: IntArray) -> NDArray[np.bool_]:
        told: NDArray[np.bool_] = held_KC.sum(axis=0) >= 1
        return told

    @abstractmethod
    def head(self, state: State, rows_R: Tensor, mean_RD: Tensor) -> Tensors:
        """Rows (R, …) of the head's tensors, by name, of the classes of which somebody told, from their means (R, D)."""

    def closing(self, state: State, classes: Sequence[Sequence[int]]) -> RoundPlan | None:
        return asking("mean", classes[-1])

    def lift(self, update: ClientUpdate) -> Tensors:
        return lifted(update)

    def end_task(
        self, state: State, params: Tensors, total: Tensors, classes: Sequence[Sequence[int]], draw: torch.Generator
    ) -> State:
        return {**(state or {}), **_added(state or {}, total, classes[-1], len(params[HEAD_WEIGHT]), 1.0)}

    def without(self, state: State, total: Tensors, classes: Sequence[Sequence[int]]) -> State:
        """Sums without some of their terms: exact up to the last digits of float64."""
        return {**state, **_added(state, total, classes[-1], len(state["count"]), -1.0)}

    def deployed(self, state: State, params: Tensors) -> Tensors:
        if not state or not bool(state["count"].any()):
            return params
        rows_R = (state["count"] > 0).nonzero()[:, 0]
        mean_RD = state["sum"][rows_R] / state["count"][rows_R][:, None]
        return with_rows(params, rows_R.tolist(), self.head(state, rows_R, mean_RD))


def _added(state: State, total: Tensors, classes: Sequence[int], rows: int, sign: float) -> dict[str, Tensor]:
    """The sums with another one added or subtracted, whose rows are of these classes where it has rows of classes."""
    at_K, out = torch.tensor(classes, dtype=torch.long), dict[str, Tensor]()
    for name, t in total.items():
        before = state.get(name, t.new_zeros(rows, *t.shape[1:]) if name in PER_CLASS else torch.zeros_like(t))
        out[name] = before.index_add(0, at_K, t, alpha=sign) if name in PER_CLASS else before.add(t, alpha=sign)
    return out


@dataclass(frozen=True, kw_only=True)
class ScatterCalibrator(SumsCalibrator):
    """One that takes Σ x xᵀ over all samples too, as the scatter within a client's classes and, in float64, that of their means:
    no digits are lost where features are far from zero. State: beside the others' `gram` (T,), T = D(D+1)/2, float64.

    precision: float32 | bfloat16, in which the scatter travels. It is the centred scatter that is rounded, not Σ x xᵀ, whose
    rounding is of the size of the means: on 1 000 random ReLU features of Fashion-MNIST, 50 uploads, ridge with λ = 10 falls from
    78.4 to 35.4 with Σ x xᵀ in bfloat16, to 77.0 with the scatter, and not at all where λ is as it should be (10⁴: 79.9 and 79.7,
    ‖ΔW‖/‖W‖ 0.07; 10⁵: 78.6 and 78.6, 0.01).
    rank: of the scatter as each client sends it (null: whole, T numbers): so many largest eigenpairs, D numbers each, and D for
    the diagonal of the rest; they are multiplied out where clients are summed. No less than all of it arrives where a client has
    no more samples than the rank and classes together, and never more rows than that travel. 0: means and variances alone.
    """

    precision: str = "float32"
    rank: int | None = None

    def __post_init__(self) -> None:
        require_choice("precision", self.precision, ("float32", "bfloat16"))
        if self.rank is not None and self.rank < 0:
            raise ConfigError(f"rank must be at least 0 (null: the whole scatter), got {self.rank}")

    def closing(self, state: State, classes: Sequence[Sequence[int]]) -> RoundPlan:
        told: dict[str, Any] = {} if self.precision == "float32" else {"precision": self.precision}
        return asking("within", classes[-1], **(told if self.rank is None else {**told, "rank": self.rank}))

    def lift(self, update: ClientUpdate) -> Tensors:
        return lifted_within(update)

    def room(self, width: int, classes: int) -> int:
        return 8 * COPIES * width * (width + 1) // 2


def asking(form: str, classes: Sequence[int], blended: bool = False, **options: Any) -> RoundPlan:
    """For `class_moments` of a task's classes."""
    told = {"form": form, "classes": list(classes), **options}
    return RoundPlan(train=(), statistics=(StatisticRequest("class_moments", (HEAD_WEIGHT,), told, blended),))


def lifted(update: ClientUpdate, second: str | None = None) -> dict[str, Tensor]:
    """`count` n (K,), `sum` Σ x (K, D) and, for second variance or covariance, `square` Σ x² (K, D) or the upper triangles of
    Σ x xᵀ (K, D(D+1)/2): float64, zero for classes that the client does not hold.

    From n, μ and Σ of its classes: Σ x = n μ, Σ x xᵀ = (n − 1) Σ + n μ μᵀ. Raises AggregationError when they are missing.
    """
    count_K, mean_HD = _sent(update, "count"), _sent(update, "mean")
    held = count_K > 0
    n_H1 = count_K[held][:, None]
    out = {"count": count_K, "sum": _placed(n_H1 * mean_HD, held)}
    if second is not None:
        spread = _sent(update, second)
        told = held if second == "variance" else count_K > 1  # the variance of a single sample is sent, as zeros
        square = _placed(n_H1 * _square(mean_HD, second), held)
        square[told] += (count_K[told][:, None] - 1) * spread
        out["square"] = square
    return out


def lifted_within(update: ClientUpdate) -> dict[str, Tensor]:
    """`count` n (K,), `sum` Σ x (K, D) and `gram`, the upper triangle of Σ x xᵀ over all samples, from the form within, whole or
    of low rank."""
    count_K, mean_HD = _sent(update, "count"), _sent(update, "mean")
    n_H1 = count_K[count_K > 0][:, None]
    gram_DD = (n_H1 * mean_HD).T @ mean_HD
    if _named("directions") in update.statistics:
        directions_rD = _sent(update, "directions")
        gram_DD.addmm_(directions_rD.T, directions_rD).diagonal().add_(_sent(update, "rest"))
        gram_T = upper_triangle(gram_DD)
    else:
        gram_T = upper_triangle(gram_DD).add_(_sent(update, "within"))
    return {"count": count_K, "sum": _placed(n_H1 * mean_HD, count_K > 0), "gram": gram_T}


def moments(total: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """n (K,), the mean (K, D) and the unbiased variance (K, D) or covariance (K, D(D+1)/2) of all samples of a class, from their
    sums, float64; zeros where there are no samples, and no spread of a single one."""
    n_K1 = total["count"][:, None]
    mean_KD = total["sum"] / n_K1.clamp_min(1)
    second = "variance" if total["square"].shape == mean_KD.shape else "covariance"
    spread = (total["square"] - n_K1 * _square(mean_KD, second)) / (n_K1 - 1).clamp_min(1)
    if second == "variance":
        spread.clamp_min_(0.0)  # rounding
    return total["count"], mean_KD, spread


def with_rows(params: Tensors, rows: Sequence[int], head: Tensors) -> dict[str, Tensor]:
    """The parameters with these rows of the head's tensors in the place of their own."""
    at_R = torch.tensor(rows, dtype=torch.long)
    return {n: t.index_copy(0, at_R, head[n].to(t.dtype)) if n in head else t for n, t in params.items()}


def _square(x_KD: Tensor, second: str) -> Tensor:
    """x² or the upper triangle of x xᵀ, row by row."""
    if second == "variance":
        return x_KD.square()
    rows, columns = torch.triu_indices(x_KD.shape[1], x_KD.shape[1])
    return x_KD[:, rows] * x_KD[:, columns]


def _placed(values_H: Tensor, held_K: Tensor) -> Tensor:
    """Rows where their classes are, zeros elsewhere."""
    out = values_H.new_zeros(len(held_K), *values_H.shape[1:])
    out[held_K] = values_H
    return out


def _sent(update: ClientUpdate, form: str) -> Tensor:
    return contracts.statistic(update, _named(form)).double()


def _named(form: str) -> str:
    return f"class_moments.{form}/{HEAD_WEIGHT}"
