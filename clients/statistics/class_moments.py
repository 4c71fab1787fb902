"""Count, mean and variance of the features of every class, for rules and calibrators that look at the head class by class.

Shapes: N samples of a batch, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.errors import ConfigError, did_you_mean
from fedsim.core.messages import Tensors

SUBJECT = "head.weight"
FORMS = ("full", "scalar")


@dataclass(frozen=True)
class Statistic(contracts.Statistic):
    """Moments of the features f(x), class by class: n_c, μ_c = mean, σ²_c = Σ (f − μ_c)² / (n_c − 1) per feature.

    form full: `count/head.weight` (C,), `mean/head.weight` (C, D), `variance/head.weight` (C, D).
    form scalar: `count/head.weight` (C,), `spread/head.weight` (C,), v_c = mean over the D features of σ²_c.
    Zero for classes without samples; variance and spread are zero with fewer than 2 samples. Batches are merged by the
    update of Chan, Golub & LeVeque (1979) in float64, so that features far from zero lose no digits; float32 on the CPU.
    """

    form: str = "full"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ConfigError(f"form '{self.form}' is unknown.{did_you_mean(self.form, FORMS)} Choose from: {', '.join(FORMS)}.")

    @contextmanager
    def collect(self, model: contracts.ModelLike, params: Tensors, subjects: Sequence[str]) -> Iterator[_Moments]:
        """Raises ConfigError for subjects other than `head.weight`."""
        wrong = [s for s in subjects if s != SUBJECT]
        if wrong:
            raise ConfigError(
                f"class_moments describes the inputs of '{SUBJECT}', not of '{wrong[0]}': request it with match ('{SUBJECT}',)"
            )
        yield _Moments(self.form, model.num_classes, params[SUBJECT].shape[1])


class _Moments:
    """n_c, μ_c and Σ (f − μ_c)², batch by batch."""

    def __init__(self, form: str, num_classes: int, width: int) -> None:
        self.form = form
        self.count_C = torch.zeros(num_classes, dtype=torch.float64)
        self.mean_CD = torch.zeros(num_classes, width, dtype=torch.float64)
        self.squares_CD = torch.zeros(num_classes, width, dtype=torch.float64)

    def update(self, features: Tensor, labels: Tensor) -> None:
        x_ND, labels = features.detach().cpu().double(), labels.cpu()
        count_C = torch.zeros_like(self.count_C).index_add(0, labels, torch.ones(len(labels), dtype=torch.float64))
        mean_CD = torch.zeros_like(self.mean_CD).index_add(0, labels, x_ND) / count_C.clamp_min(1)[:, None]
        squares_CD = torch.zeros_like(self.squares_CD).index_add(0, labels, (x_ND - mean_CD[labels]).square())
        total_C = self.count_C + count_C
        share_C1 = (count_C / total_C.clamp_min(1))[:, None]
        shift_CD = mean_CD - self.mean_CD
        self.squares_CD += squares_CD + shift_CD.square() * self.count_C[:, None] * share_C1
        self.mean_CD += shift_CD * share_C1
        self.count_C = total_C

    def result(self) -> dict[str, Tensor]:
        # One sample has squares of exactly zero, so the clamp gives zero there.
        variance_CD = self.squares_CD / (self.count_C - 1).clamp_min(1)[:, None]
        if self.form == "scalar":
            named = {"count": self.count_C, "spread": variance_CD.mean(1)}
        else:
            named = {"count": self.count_C, "mean": self.mean_CD, "variance": variance_CD}
        return {f"{form}/{SUBJECT}": t.float() for form, t in named.items()}
