"""Ridge regression as the head that is deployed, in closed form from sums over clients (RanPAC, McDonnell et al. 2023,
arXiv:2307.02251; analytic federated learning).

Shapes: C classes of the stream, K of the task, M inputs of the head's last map, T = M(M+1)/2, L penalties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core.contracts import Traits, statistic
from fedsim.core.errors import AggregationError, ConfigError
from fedsim.core.messages import ClientUpdate, RoundPlan, State, StatisticRequest, Tensors
from fedsim.core.names import HEAD_BIAS, HEAD_WEIGHT
from fedsim.core.numbers import IntArray
from fedsim.core.tensors import from_upper_triangle
from server.calibrators._class_sums import ScatterCalibrator, SumsCalibrator, asking
from server.linalg import solve_gram

HELD_OUT = 5  # samples, of which a client holds out one
GRAM, SQUARES = f"gram.full/{HEAD_WEIGHT}", f"ridge_errors.squares/{HEAD_WEIGHT}"


@dataclass(frozen=True)
class Calibrator(ScatterCalibrator):
    """At a task's end: W = Q (G + λ I)⁻¹ and b = 0, with G = Σ h hᵀ (M, M) and Q = Σ onehot(y) hᵀ (C, M) over all samples of all
    tasks, h what the head's last map is given under the model that is deployed.

    Both are sums: the head is that of all data in one place, and depends neither on the split nor on the order of tasks (see
    `SumsCalibrator`). Sums of old tasks stay as they were measured, so features should not move: with `aggregator: frozen` and
    `adapter: none` nothing is trained, with `consolidator: first_session` only the first task trains. With `head:
    random_features` this is RanPAC, without and with its adaptation to the first task; `head: linear` is ridge regression on the
    features.

    penalties: λ, or several, of which the one with the smallest error is taken: clients fit 80 % of their own samples of the task
    and send the squared errors on the rest (`ridge_errors`); the sum over clients and over tasks so far decides. The reference
    chooses so on one machine, from 10⁻⁸ to 10⁸, by the current task alone; a client's share of one is too little [ours].

    precision, rank: of what a client sends of G (`ScatterCalibrator`). By default G itself travels, float32. With either of them
    it is the scatter within the client's classes; the part between, Σ n μ μᵀ, is in the means that travel anyway, exact in any
    case [ours]. FedRAN sends r = 512 of M = 2048 directions of G, the diagonal remainder is a reconstruction. rank 0 is
    in the place of STSA's variant that estimates G from class means, whose paper was not at hand: G ≈ Σ_ic n_ic μ_ic μ_icᵀ over
    clients and classes + diag(variances) [ours]. It alone does depend on the split: fewer samples to a client, more means.

    Asks for `class_moments` (count and mean) and `gram` (upper triangle, T numbers a client) in a pass at the task's end, both
    seen in one go. The solution is Cholesky's in float64, the pseudo-inverse's where G + λI is singular up to the float32 in
    which Grams travel: a factorisation anew after every task. To update the last one by the k samples of a task takes longer (one
    core, M = 1 000, 2 000: Cholesky 0.02 s, 0.12 s; update by 50 samples 0.07 s, 0.47 s, by 800 0.13 s, 0.71 s; an
    eigendecomposition, which would do for all λ, 0.28 s, 2.4 s), and does not know of another λ.

    State: `count` (C,), `sum` Q (C, M), `gram` (T,), `squares` (L,), float64; T is 16 MB for M = 2000. Raises AggregationError
    when several penalties are given and no client could hold out a sample yet.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"penalties": [1.0], "rank": 2},
        {"penalties": [0.1, 10.0], "precision": "bfloat16"},
    )
    penalties: list[float] = field(default_factory=lambda: [10.0**power for power in range(-8, 9)])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.penalties or not all(p > 0 for p in self.penalties):
            raise ConfigError(f"penalties must be positive numbers, one at least, got {self.penalties}")

    @property
    def traits(self) -> Traits:
        why = "solves for the head's linear map, which {head} has not: use head: random_features"
        return Traits(super().traits.gives, needs={"an affine head": why})

    def can_be_told(self, held_KC: IntArray) -> NDArray[np.bool_]:
        return super().can_be_told(held_KC) & (len(self.penalties) == 1 or bool(held_KC.sum(axis=1).max(initial=0) >= HELD_OUT))

    @property
    def plain(self) -> bool:
        """Whether Σ h hᵀ travels as it is."""
        return self.precision == "float32" and self.rank is None

    def closing(self, state: State, classes: Sequence[Sequence[int]]) -> RoundPlan:
        gram = StatisticRequest("gram", (HEAD_WEIGHT,), {"form": "full", "decay": 1.0})
        plan = asking("mean", classes[-1]) if self.plain else super().closing(state, classes)
        errors = StatisticRequest("ridge_errors", (HEAD_WEIGHT,), {"penalties": self.penalties})
        more = (*([gram] if self.plain else []), *([errors] if len(self.penalties) > 1 else []))
        return replace(plan, statistics=plan.statistics + more)

    def lift(self, update: ClientUpdate) -> Tensors:
        """`count` (K,), `sum` (K, M), `gram` (T,) and `squares` (L,), zero where there is nothing to choose."""
        squares_L = statistic(update, SQUARES).double() if len(self.penalties) > 1 else torch.zeros(1, dtype=torch.float64)
        plain = {**SumsCalibrator.lift(self, update), "gram": statistic(update, GRAM).double()} if self.plain else None
        return {**(plain or super().lift(update)), "squares": squares_L}

    def head(self, state: State, rows_R: Tensor, mean_RM: Tensor) -> Tensors:
        weight_RM = solved(state["sum"][rows_R], state["gram"], self._penalty(state["squares"]))
        return {HEAD_WEIGHT: weight_RM, HEAD_BIAS: weight_RM.new_zeros(len(weight_RM))}

    def _penalty(self, squares_L: Tensor) -> float:
        if len(self.penalties) > 1 and not bool(squares_L.any()):
            raise AggregationError("no client of the pass holds the five samples of which one is held out: give a single penalty")
        return self.penalties[int(squares_L.argmin())]


def solved(sum_CM: Tensor, triangle: Tensor, penalty: float) -> Tensor:
    """Q (G + λ I)⁻¹, (C, M), float64, from Q and G's upper triangle."""
    gram_MM = from_upper_triangle(triangle)
    gram_MM.diagonal().add_(penalty)
    return solve_gram(sum_CM, gram_MM, precision=torch.float32)
