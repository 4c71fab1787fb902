"""Quadratic discriminant analysis as the head that is deployed, in closed form from sums over clients, with covariances that are
pulled towards the one that classes share (Friedman 1989, "Regularized discriminant analysis")."""

# C classes of the stream, R of which somebody told, D inputs of the head's last map, T = D(D+1)/2

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core.contracts import Traits
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import ClientUpdate, RoundPlan, State, Tensors
from fedsim.core.names import HEAD_OFFSET, HEAD_PRECISION, HEAD_WEIGHT
from fedsim.core.tensors import from_upper_triangle
from server.calibrators._class_sums import COPIES, SumsCalibrator, asking, lifted


@dataclass(frozen=True)
class Calibrator(SumsCalibrator):
    """At a task's end, over all samples x of all tasks under the model that is deployed, with S_c the scatter within a class and
    S = Σ_c S_c:

        Σ_c = ((1 − s) S_c + s S) / ((1 − s) n_c + s n),   Σ̃_c = (1 − r) Σ_c + r · tr(Σ_c)/D · I
        z_c = −½ (x − μ_c)ᵀ Σ̃_c⁻¹ (x − μ_c) − ½ log |Σ̃_c| + log π_c

    s = 0, r = 0 is scikit-learn's `QuadraticDiscriminantAnalysis` (1.8 and later, which divide by n_c), s = 1 is `lda` with
    shrinkage r. A class of few samples leans on the common covariance by itself.

    Sums as those of `lda`, but Σ x xᵀ class by class: exact whatever the split, and a client can leave (`SumsCalibrator`). Asks
    for `class_moments` with covariances: T numbers for every class of which a client has two samples, which is what it costs over
    `lda`. State: `count` (C,), `sum` (C, D), `square` (C, T), float64. Features should not move.

    shared: s; shrinkage: r, both in [0, 1]. With shrinkage 0, eigenvalues below float32's rounding of the largest are taken for
    that rounding. priors: data (π_c = n_c / n) | uniform.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"shared": 1.0, "shrinkage": 0.0},
        {"shared": 0.0, "priors": "uniform"},
    )
    shared: float = 0.3
    shrinkage: float = 0.01
    priors: str = "data"

    def __post_init__(self) -> None:
        require_choice("priors", self.priors, ("data", "uniform"))
        for name in ("shared", "shrinkage"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    @property
    def traits(self) -> Traits:
        why = "solves for a covariance of every class, for which {head} has no place: use head: quadratic"
        return Traits(super().traits.gives, needs={"a quadratic head": why})

    def closing(self, state: State, classes: Sequence[Sequence[int]]) -> RoundPlan:
        return asking("covariance", classes[-1])

    def lift(self, update: ClientUpdate) -> Tensors:
        return lifted(update, "covariance")

    def room(self, width: int, classes: int) -> int:
        return 8 * COPIES * classes * width * (width + 1) // 2

    def head(self, state: State, rows_R: Tensor, mean_RD: Tensor) -> Tensors:
        count_R = state["count"][rows_R]
        covariance_RDD = self.covariances(count_R, mean_RD, state["square"][rows_R])
        precision_RDD, log_det_R = inverse(covariance_RDD, regular=self.shrinkage > 0)
        prior_R = (count_R / count_R.sum()).log() if self.priors == "data" else torch.zeros_like(count_R)
        return {HEAD_WEIGHT: mean_RD, HEAD_PRECISION: precision_RDD, HEAD_OFFSET: prior_R - 0.5 * log_det_R}

    def covariances(self, count_R: Tensor, mean_RD: Tensor, square_RT: Tensor) -> Tensor:
        """Σ̃_c, (R, D, D)."""
        grams = torch.stack([from_upper_triangle(square_T) for square_T in square_RT])
        scatter_RDD = grams - count_R[:, None, None] * mean_RD[:, :, None] * mean_RD[:, None, :]
        weight_R = (1 - self.shared) * count_R + self.shared * count_R.sum()
        pooled_DD = self.shared * scatter_RDD.sum(dim=0)
        covariance_RDD = scatter_RDD.mul_(1 - self.shared).add_(pooled_DD).div_(weight_R[:, None, None])
        diagonal_RD = covariance_RDD.diagonal(dim1=1, dim2=2)
        scale_R1 = diagonal_RD.mean(dim=1, keepdim=True)
        covariance_RDD.mul_(1 - self.shrinkage)
        diagonal_RD.add_(self.shrinkage * scale_R1)
        return covariance_RDD


def inverse(covariance_RDD: Tensor, regular: bool) -> tuple[Tensor, Tensor]:
    """Inverses (R, D, D) and log-determinants (R,). regular: no eigenvalue is near zero, so that Cholesky will do."""
    factor_RDD, failed_R = torch.linalg.cholesky_ex(covariance_RDD)
    if regular and not bool(failed_R.any()):
        return torch.cholesky_inverse(factor_RDD), 2 * factor_RDD.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    values_RD, vectors_RDD = torch.linalg.eigh(covariance_RDD)
    smallest_R1 = values_RD[:, -1:].abs() * values_RD.shape[1] * torch.finfo(torch.float32).eps
    values_RD = values_RD.clamp_min(smallest_R1.clamp_min(torch.finfo(torch.float32).tiny))
    return (vectors_RDD / values_RD[:, None, :]) @ vectors_RDD.mT, values_RD.log().sum(dim=1)
