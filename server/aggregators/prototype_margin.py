"""Clients weighted by the margins between their class prototypes (after Michieli & Ozay 2021, "Prototype guided federated
learning of visual feature representations", arXiv 2105.08982; the formula is ours).

Shapes: K clients with samples, C classes, H classes that are there, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import ClientUpdate, RoundPlan, State, StatisticRequest, Tensors
from fedsim.core.names import HEAD_WEIGHT
from fedsim.core.tensors import sum_in_order, weighted

CHOICES = {"deviation": ("ratio", "difference"), "distance": ("euclidean", "cosine")}


@dataclass(frozen=True)
class Aggregator(contracts.Aggregator):
    """w⁺ = Σ_i a_i w_i for every tensor, a_i ∝ n_i^gamma · exp(d_i / temperature), d_i = m_i / m_g: wider margins count more.

    m_i, the margin of client i: mean distance between the prototypes (mean features) of its classes, over all pairs, divided by
    the mean spread √(Σ_D σ²) of its classes with two samples or more, the typical distance of a sample from its prototype. m_g:
    the same of all clients' samples together, from their pooled counts, means and variances. Features are those of the client's
    own trained model.
    The paper tells of deviation scores from margins between prototypes, an attention over them, and of larger margins being
    better; the formula above is our reading of that, not a reproduction.

    temperature: of the attention; a small one lets a single client win. gamma: 0 | 1, whether numbers of samples count too.
    deviation: ratio m_i / m_g | difference m_i − m_g. distance: euclidean | cosine (1 − cos, not divided by any spread: it has
    no scale). Both margins stay the same when all features are scaled.
    A client whose margin cannot be told (a single class; or, with euclidean, no class with two samples or no spread at all) gets
    m_i = m_g; if m_g cannot be told, or is 0 under a ratio, all clients get the same d. Clients without samples are left out.
    Asks for `class_moments` in full form: a mean and a variance for every class that a client holds. All updates are needed at
    once: the rule is not additive. Raises ConfigError when its tensors do not hold the head's weight, whose inputs these are, and
    AggregationError when nobody sent an update or nobody holds samples.
    """

    exempt: ClassVar[Mapping[str, str]] = {"weights": "clients are weighted by the margins between their prototypes"}
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"gamma": 1, "deviation": "difference", "temperature": 0.5},
        {"distance": "cosine"},
    )

    temperature: float = 1.0
    gamma: int = 0
    deviation: str = "ratio"
    distance: str = "euclidean"

    def __post_init__(self) -> None:
        for key, known in CHOICES.items():
            require_choice(key, getattr(self, key), known)
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be positive, got {self.temperature}")
        if self.gamma not in (0, 1):
            raise ConfigError(f"gamma must be 0 (samples do not count) or 1 (they do), got {self.gamma}")

    def init(self, params: Tensors, task: int = 0) -> State:
        if HEAD_WEIGHT not in params:
            raise ConfigError(
                f"prototype_margin looks at the inputs of '{HEAD_WEIGHT}', which is not among its tensors: match \"*\" with it"
            )
        return {}

    def plan(self, state: State, round: int) -> RoundPlan:
        return RoundPlan(statistics=(StatisticRequest("class_moments", (HEAD_WEIGHT,), {"form": "full"}),))

    def combine(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        updates = contracts.require_updates(updates)
        weights_K = self.weights(updates)
        out = dict(params)
        for name in updates[0].params:
            merged = sum_in_order([weighted(u.params[name], a) for u, a in zip(updates, weights_K, strict=True)])
            out[name] = merged.to(params[name].dtype)
        return state, out

    def weights(self, updates: Sequence[ClientUpdate]) -> Tensor:
        """a (K,), summing to 1, of clients that hold samples."""
        moments = [received_moments(u) for u in updates]
        common = margin(pooled(moments), self.distance)
        if common is None or (common == 0 and self.deviation == "ratio"):
            deviations = [0.0] * len(moments)
        else:
            margins = [margin(m, self.distance) for m in moments]
            told = [common if m is None else m for m in margins]
            deviations = [m / common if self.deviation == "ratio" else m - common for m in told]
        deviation_K = torch.tensor(deviations, dtype=torch.float64)
        samples_K = torch.tensor([float(u.num_samples) for u in updates], dtype=torch.float64)
        return torch.softmax(deviation_K / self.temperature + self.gamma * samples_K.log(), dim=0)


@dataclass(frozen=True)
class Moments:
    """Of the classes that are there, float64: their head rows and counts (H,), means (H, D) and Σ_D σ² (H,), the mean square of a
    sample's distance from its prototype (unbiased; 0 for a single sample)."""

    classes_H: Tensor
    count_H: Tensor
    mean_HD: Tensor
    square_H: Tensor


def received_moments(update: ClientUpdate) -> Moments:
    """What a client sent of its classes. Raises AggregationError when that is missing."""
    keys = [f"class_moments.{form}/{HEAD_WEIGHT}" for form in ("count", "mean", "variance")]
    count_C, mean_HD, variance_HD = (contracts.statistic(update, key).double() for key in keys)
    classes_H = count_C.nonzero()[:, 0]
    return Moments(classes_H, count_C[classes_H], mean_HD, variance_HD.sum(dim=1))


def pooled(moments: Sequence[Moments]) -> Moments:
    """The moments of all samples together, exactly."""
    size, width = 1 + max(int(m.classes_H.max()) for m in moments), moments[0].mean_HD.shape[1]
    count_C, square_C = torch.zeros(2, size, dtype=torch.float64)
    mean_CD = torch.zeros(size, width, dtype=torch.float64)
    for m in moments:
        count_C.index_add_(0, m.classes_H, m.count_H)
        mean_CD.index_add_(0, m.classes_H, m.count_H[:, None] * m.mean_HD)
    mean_CD /= count_C.clamp_min(1)[:, None]
    for m in moments:
        shift_H = (m.mean_HD - mean_CD[m.classes_H]).square().sum(dim=1)
        square_C.index_add_(0, m.classes_H, (m.count_H - 1) * m.square_H + m.count_H * shift_H)
    classes_H = count_C.nonzero()[:, 0]
    count_H = count_C[classes_H]
    return Moments(classes_H, count_H, mean_CD[classes_H], square_C[classes_H] / (count_H - 1).clamp_min(1))


def margin(moments: Moments, distance: str) -> float | None:
    """Mean distance between prototypes over all pairs, for euclidean in units of the classes' mean spread; None if it cannot be
    told."""
    if len(moments.classes_H) < 2:
        return None
    if distance == "cosine":
        unit_HD = torch.nn.functional.normalize(moments.mean_HD)
        rows, columns = torch.triu_indices(len(unit_HD), len(unit_HD), offset=1)
        return float((1 - (unit_HD @ unit_HD.T)[rows, columns]).mean())
    spread = moments.square_H[moments.count_H > 1].sqrt()
    if not bool((spread > 0).any()):
        return None
    return float(torch.pdist(moments.mean_HD).mean() / spread.mean())
