"""Linear discriminant analysis as the head that is deployed, in closed form from sums over clients (the head of first-session
adaptation, FSA, Panos et al. 2023, "First session adaptation: a strong replay-free baseline for class-incremental learning")."""

# C classes of the stream, K of the task, R of which somebody told, D inputs of the head's last map, T = D(D+1)/2

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core.contracts import Traits
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import State, Tensors
from fedsim.core.names import HEAD_BIAS, HEAD_WEIGHT
from fedsim.core.tensors import from_upper_triangle
from server.calibrators._class_sums import ScatterCalibrator
from server.linalg import solve_gram


@dataclass(frozen=True)
class Calibrator(ScatterCalibrator):
    """At a task's end, over all samples x of all tasks under the model that is deployed:

        μ_c = Σ x / n_c,   Σ = (Σ x xᵀ − Σ_c n_c μ_c μ_cᵀ) / n,   Σ̃ = (1 − s) Σ + s · tr(Σ)/D · I
        w_c = Σ̃⁻¹ μ_c,   b_c = −½ μ_cᵀ Σ̃⁻¹ μ_c + log π_c

    Counts, Σ x of every class and Σ x xᵀ are sums: the head is that of all data in one place and depends neither on the split nor
    on the order of tasks, and a client that joins later is one more addition. Equal to scikit-learn's
    `LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s)` on the same data. Sums of old tasks stay as they were measured, so
    features should not move: `consolidator: first_session`, or `aggregator: frozen`. The head that clients train is not touched.

    shrinkage: s in [0, 1], of the covariance towards a multiple of I. The paper adds λ I (λ = 1); s does not depend on the scale
    of the features. With 0, a covariance without full rank (fewer samples than features) is inverted where it has one.
    priors: data (π_c = n_c / n) | uniform (every class as likely: b_c alone changes, as the covariance is that of the data in
    any case,
    where scikit-learn weighs those of the classes by the priors).

    Asks for `class_moments` in the form within, in a pass at the task's end: count and mean of every class that a client has, and
    the scatter within its classes (upper triangle, T numbers; precision, rank: see `ScatterCalibrator`). State: `count` (C,),
    `sum` (C, D), `gram` (T,), float64.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"shrinkage": 0.5, "priors": "uniform"},
        {"precision": "bfloat16", "rank": 2},
    )
    shrinkage: float = 0.01
    priors: str = "data"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("priors", self.priors, ("data", "uniform"))
        if not 0 <= self.shrinkage <= 1:
            raise ConfigError(f"shrinkage must be in [0, 1], got {self.shrinkage}")

    @property
    def traits(self) -> Traits:
        why = "solves for the head's linear map, which {head} has not: use head: linear"
        return Traits(super().traits.gives, needs={"an affine head": why})

    def head(self, state: State, rows_R: Tensor, mean_RD: Tensor) -> Tensors:
        count_R = state["count"][rows_R]
        weight_RD = solve_gram(mean_RD, self._covariance(count_R, mean_RD, state["gram"]), precision=torch.float32)
        bias_R = -0.5 * (weight_RD * mean_RD).sum(dim=1)
        prior_R = (count_R / count_R.sum()).log() if self.priors == "data" else torch.zeros_like(bias_R)
        return {HEAD_WEIGHT: weight_RD, HEAD_BIAS: bias_R + prior_R}

    def _covariance(self, count_R: Tensor, mean_RD: Tensor, triangle_T: Tensor) -> Tensor:
        """Σ̃ (D, D)."""
        scatter_DD = from_upper_triangle(triangle_T) - (count_R[:, None] * mean_RD).T @ mean_RD
        covariance_DD = scatter_DD / count_R.sum()
        scale = covariance_DD.diagonal().mean()
        covariance_DD.mul_(1 - self.shrinkage).diagonal().add_(self.shrinkage * scale)
        return covariance_DD
