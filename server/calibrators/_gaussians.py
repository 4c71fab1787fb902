"""Gaussians of class features on the server, and retraining of the head on features that are drawn from them.

What the calibrators that draw features share: HGP, CCVR, SLCA. A class is known by a mixture of Gaussians: in every task, one
for each client that told of it, or a single one for all of them. The state holds, for every task and every class (a row of the
head) of which somebody told in it,

    {"gaussians": {task: {row: {"count": (M,), "mean": (M, D), "variance": (M, D)}}}}

as the clients sent it, or "covariance" (M, D(D+1)/2), upper triangles, in the place of the variance. It stays from round to round
and from task to task; only what is of the current task is replaced. Where tasks share classes (domains), a class keeps the
Gaussians of every task that it came in.

Shapes: M Gaussians, K classes that are trained on, D features, n features drawn, b of a batch.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import IntArray, Traits
from fedsim.core.errors import AggregationError, ConfigError, require_choice
from fedsim.core.messages import ClientUpdate, RoundPlan, State, StatisticRequest, Tensors
from fedsim.core.names import HEAD_BIAS, HEAD_WEIGHT
from fedsim.core.tensors import from_upper_triangle
from fedsim.core.work import seen_classes
from server.calibrators._class_sums import asking, lifted, moments, with_rows

SENT = {  # covariance: -> form of `class_moments` that is asked for, and what it calls the second moments
    "diagonal": ("full", "variance"),
    "full": ("covariance", "covariance"),
}
SHORTEST = 1e-12  # logits that have a direction are longer
RIDGES = 8  # tried: from float32's rounding of the mean variance, ten times larger each, up to the mean variance itself


@dataclass(frozen=True)
class GaussianCalibrator(contracts.Calibrator):
    """Trains rows of the head by SGD on features drawn from class Gaussians; a calibrator says which rows, and which Gaussians.

        every epoch anew: samples_per_class · K draws of   c ~ uniform,   i ~ n_ic / Σ_j n_jc,   x ~ N(μ_ic, f Σ_ic)
        every batch:      z = W_K x + b_K,   z̃ = z / ‖z‖₂ / temperature,   (W_K, b_K) ← SGD on the cross-entropy of z̃ and c

    i runs over the clients of all tasks that the class came in. Logits of the K classes alone enter the norm and the softmax, so
    that no other row has a gradient; a class that nobody told of is none of them. Both draws are made for every sample by itself,
    which has the distribution of the reference's counts per class and component followed by a shuffle. Arithmetic is in the
    head's own type (float32 in a run); a full covariance is factored in float64 by Cholesky, with a ridge where it has fewer
    samples than features.
    """

    exempt: ClassVar[Mapping[str, str]] = {"float64": "in float32 other features are drawn than in float64"}
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"epochs": 1},
        {"epochs": 1, "covariance": "full"},
        {"epochs": 2, "normalise": False},
    )
    covariance: str = "diagonal"
    samples_per_class: int = 256
    epochs: int = 5
    batch_size: int = 256
    normalise: bool = True
    temperature: float = 0.1
    lr: float = 0.01
    momentum: float = 0.9
    schedule: str = "cosine"
    clip_norm: float | None = 20.0

    def can_be_told(self, held_KC: IntArray) -> NDArray[np.bool_]:
        """One sample has no spread of its own, but counts in a sum over clients."""
        enough: NDArray[np.bool_] = (held_KC.sum(axis=0) if self.additive else held_KC.max(axis=0)) >= 2
        return enough

    def __post_init__(self) -> None:
        require_choice("covariance", self.covariance, tuple(SENT))
        require_choice("schedule", self.schedule, ("cosine", "constant"))
        for name, value, least in (
            ("samples_per_class", self.samples_per_class, 1),
            ("epochs", self.epochs, 0),
            ("batch_size", self.batch_size, 1),
        ):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        for name, number in (("temperature", self.temperature), ("lr", self.lr)):
            if not number > 0:
                raise ConfigError(f"{name} must be positive, got {number}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm must be positive, or null, got {self.clip_norm}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must be in [0, 1), got {self.momentum}")

    @property
    def repairs_old_rows(self) -> bool:
        """Whether it trains the rows of classes of past tasks too."""
        return True

    @property
    def traits(self) -> Traits:
        why = "draws features and trains the head's linear map on them, which {head} has not: use head: linear"
        return Traits(super().traits.gives if self.repairs_old_rows else (), needs={"an affine head": why})

    @property
    @abstractmethod
    def inflation(self) -> float:
        """f, by which covariances are multiplied when features are drawn."""

    def mean_scale(self, task: int, now: int) -> float:
        """By what means that were measured in a task are multiplied when features are drawn in the task `now`."""
        return 1.0

    def normed_together(self, rows: Sequence[int], classes: Sequence[Sequence[int]]) -> list[int]:
        """How many of the rows, in their order, share a norm of their logits: see `head_gradient`."""
        return [len(rows)]

    def plan(self, state: State, round: int, last: bool, classes: Sequence[Sequence[int]]) -> RoundPlan | None:
        request = StatisticRequest("class_moments", (HEAD_WEIGHT,), {"form": SENT[self.covariance][0]}, blended=True)
        return RoundPlan(train=(), statistics=(request,))

    def init(self) -> State:
        return {"gaussians": {}}

    def calibrate(
        self,
        state: State,
        params: Tensors,
        updates: Sequence[ClientUpdate],
        classes: Sequence[Sequence[int]],
        draw: torch.Generator,
    ) -> tuple[State, Tensors]:
        """Raises AggregationError for an update without the statistics, and for what is no covariance."""
        if self.additive:
            return super().calibrate(state, params, updates, classes, draw)
        return self.retrained(state, params, gather(updates, classes[-1], SENT[self.covariance][1]), classes, draw)

    def retrained(
        self,
        state: State,
        params: Tensors,
        told: Mapping[int, Mapping[str, Tensor]],
        classes: Sequence[Sequence[int]],
        draw: torch.Generator,
    ) -> tuple[State, Tensors]:
        """The state with what was told of the current task's classes, and the parameters with the head's rows repaired."""
        state = remembering(state, len(classes) - 1, told)
        rows, weight_KD, bias_K = self.repaired(state, params, classes, draw)
        at_K = torch.tensor(rows, dtype=torch.long)
        head = {
            HEAD_WEIGHT: params[HEAD_WEIGHT].index_copy(0, at_K, weight_KD),
            HEAD_BIAS: params[HEAD_BIAS].index_copy(0, at_K, bias_K),
        }
        return state, {**params, **head} if rows and self.epochs else params

    def repaired(
        self, state: State, params: Tensors, classes: Sequence[Sequence[int]], draw: torch.Generator
    ) -> tuple[list[int], Tensor, Tensor]:
        """Which rows of the head are repaired, ascending, and what becomes of them: weight (K, D) and bias (K,)."""
        known: Mapping[int, Mapping[int, Mapping[str, Tensor]]] = state["gaussians"]
        wanted = seen_classes(classes, len(classes) - 1) if self.repairs_old_rows else sorted(classes[-1])
        scale = {task: self.mean_scale(task, len(classes) - 1) for task in known}
        of_row = {c: [_scaled(told[c], scale[task]) for task, told in known.items() if c in told] for c in wanted}
        rows = [c for c in wanted if of_row[c]]
        at_K = torch.tensor(rows, dtype=torch.long)
        weight_KD, bias_K = params[HEAD_WEIGHT][at_K], params[HEAD_BIAS][at_K]
        if not rows or not self.epochs:
            return rows, weight_KD, bias_K
        mixture = Mixture.of([_side_by_side(of_row[c]) for c in rows], self.inflation, params[HEAD_WEIGHT].dtype)
        return rows, *self._retrain(weight_KD, bias_K, mixture, self.normed_together(rows, classes), draw)

    def _retrain(
        self, weight_KD: Tensor, bias_K: Tensor, mixture: Mixture, sizes: Sequence[int], draw: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """SGD with momentum as torch.optim has it, on copies; the gradient of a linear map needs no autograd."""
        velocity_KD, velocity_K = torch.zeros_like(weight_KD), torch.zeros_like(bias_K)
        temperature = self.temperature if self.normalise else None
        for epoch in range(self.epochs):
            lr = self.lr * (0.5 + 0.5 * math.cos(math.pi * epoch / self.epochs) if self.schedule == "cosine" else 1.0)
            x_nD, place_n = mixture.draw(self.samples_per_class * len(bias_K), draw)
            for x_bD, place_b in zip(*(torch.split(t, self.batch_size) for t in (x_nD, place_n)), strict=True):
                gradient_KD, gradient_K = head_gradient(weight_KD, bias_K, x_bD, place_b, temperature, sizes)
                if self.clip_norm is not None:
                    clip(gradient_KD, gradient_K, self.clip_norm)
                weight_KD.sub_(velocity_KD.mul_(self.momentum).add_(gradient_KD), alpha=lr)
                bias_K.sub_(velocity_K.mul_(self.momentum).add_(gradient_K), alpha=lr)
        return weight_KD, bias_K


@dataclass(frozen=True)
class PooledCalibrator(GaussianCalibrator):
    """Once, at a task's end, from the moments of all clients' samples of every class of the task: the repaired head is deployed,
    and training goes on from the head as it was."""

    @property
    def additive(self) -> bool:
        return True

    @property
    def inflation(self) -> float:
        return 1.0

    def init(self) -> State:
        """`head`: the rows that are deployed in the place of those that are trained."""
        return {**super().init(), "head": {}}

    def plan(self, state: State, round: int, last: bool, classes: Sequence[Sequence[int]]) -> RoundPlan | None:
        return None

    def closing(self, state: State, classes: Sequence[Sequence[int]]) -> RoundPlan | None:
        return asking(SENT[self.covariance][0], classes[-1])

    def lift(self, update: ClientUpdate) -> Tensors:
        return lifted(update, SENT[self.covariance][1])

    def end_task(
        self, state: State, params: Tensors, total: Tensors, classes: Sequence[Sequence[int]], draw: torch.Generator
    ) -> State:
        state = remembering(state, len(classes) - 1, self.pooled(params, total, classes[-1]))
        if not self.epochs:
            return state
        rows, weight_KD, bias_K = self.repaired(state, params, classes, draw)
        new = {c: {HEAD_WEIGHT: weight_KD[k], HEAD_BIAS: bias_K[k]} for k, c in enumerate(rows)}
        return {**state, "head": {**state["head"], **new}}

    def pooled(self, params: Tensors, total: Tensors, classes: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        """The Gaussians of the classes with two samples or more, of all clients together."""
        dtype, second = params[HEAD_WEIGHT].dtype, SENT[self.covariance][1]
        n_K, mean_KD, spread = (t.to(dtype) for t in moments(total))
        return {
            c: {"count": n_K[k : k + 1], "mean": mean_KD[k : k + 1], second: spread[k : k + 1]}
            for k, c in enumerate(classes)
            if n_K[k] >= 2
        }

    def deployed(self, state: State, params: Tensors) -> Tensors:
        head = state["head"]
        if not head:
            return params
        weight_RD, bias_R = (torch.stack([row[name] for row in head.values()]) for name in (HEAD_WEIGHT, HEAD_BIAS))
        return with_rows(params, list(head), {HEAD_WEIGHT: weight_RD, HEAD_BIAS: bias_R})


# ---------------------------------------------------------------- what clients told


def remembering(state: State, task: int, told: Mapping[int, Mapping[str, Tensor]]) -> State:
    """The state with these Gaussians of classes in a task, in the place of those that it had."""
    before: Mapping[int, Mapping[int, Mapping[str, Tensor]]] = state["gaussians"]
    return {**state, "gaussians": {**before, task: {**before.get(task, {}), **told}}}


def _scaled(one: Mapping[str, Tensor], scale: float) -> Mapping[str, Tensor]:
    return one if scale == 1 else {**one, "mean": one["mean"] * scale}


def _side_by_side(parts: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """The Gaussians of a class from several tasks as one mixture."""
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def gather(updates: Sequence[ClientUpdate], classes: Sequence[int], second: str) -> dict[int, dict[str, Tensor]]:
    """The Gaussians of those of `classes` that somebody told of, one for each client. `second`: variance | covariance.

    A client that holds a single sample of a class has no Gaussian of it.
    """
    told: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {c: [] for c in classes}
    for update in updates:
        count_C, mean_HD, spread = (_sent(update, form) for form in ("count", "mean", second))
        mean_row = {c: row for row, c in enumerate((count_C > 0).nonzero().flatten().tolist())}
        spread_row = {c: row for row, c in enumerate((count_C > 1).nonzero().flatten().tolist())}
        if second == "variance":
            spread_row = mean_row  # that of a single sample is sent, as zeros
        for c in classes:
            if count_C[c] >= 2:
                told[c].append((count_C[c], mean_HD[mean_row[c]], spread[spread_row[c]]))
    columns = {c: [torch.stack(column) for column in zip(*found, strict=True)] for c, found in told.items() if found}
    return {c: dict(zip(("count", "mean", second), found, strict=True)) for c, found in columns.items()}


def _sent(update: ClientUpdate, form: str) -> Tensor:
    return contracts.statistic(update, f"class_moments.{form}/{HEAD_WEIGHT}")


# ---------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Mixture:
    """The Gaussians of K classes side by side: classes have equal weight, those of one class weigh as their counts.

    place_M: which of the K classes; deviation_MD: √(f σ²) of every feature, or factor_MDD: √f L with L Lᵀ = Σ.
    """

    weight_M: Tensor
    place_M: Tensor
    mean_MD: Tensor
    deviation_MD: Tensor | None = None
    factor_MDD: Tensor | None = None

    @classmethod
    def of(cls, known: Sequence[Mapping[str, Tensor]], inflation: float, dtype: torch.dtype) -> Mixture:
        """Raises AggregationError for what is no covariance."""
        weight_M = torch.cat([one["count"].double() / one["count"].double().sum() for one in known])
        place_M = torch.cat([torch.full((len(one["count"]),), place) for place, one in enumerate(known)])
        mean_MD = torch.cat([one["mean"] for one in known]).to(dtype)
        if "variance" in known[0]:
            variance_MD = torch.cat([one["variance"] for one in known]).double()
            return cls(weight_M, place_M, mean_MD, deviation_MD=(inflation * variance_MD).sqrt().to(dtype))
        factor_MDD = mean_MD.new_empty(*mean_MD.shape, mean_MD.shape[1])
        for row, triangle in enumerate(triangle for one in known for triangle in one["covariance"]):
            factor_MDD[row] = math.sqrt(inflation) * cholesky(triangle)
        return cls(weight_M, place_M, mean_MD, factor_MDD=factor_MDD)

    def draw(self, n: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """n features (n, D) in random order, and which of the K classes each is of, (n,)."""
        component_n = torch.multinomial(self.weight_M, n, replacement=True, generator=draw)
        x_nD = torch.randn(n, self.mean_MD.shape[1], dtype=self.mean_MD.dtype, generator=draw)
        if self.deviation_MD is not None:
            x_nD.mul_(self.deviation_MD[component_n])
        if self.factor_MDD is not None:
            sizes = component_n.bincount(minlength=len(self.weight_M)).tolist()
            for factor_DD, at in zip(self.factor_MDD, torch.split(component_n.argsort(stable=True), sizes), strict=True):
                x_nD[at] = x_nD[at] @ factor_DD.T
        return x_nD.add_(self.mean_MD[component_n]), self.place_M[component_n]


def cholesky(triangle: Tensor) -> Tensor:
    """L with L Lᵀ = Σ, float64, from Σ's upper triangle.

    Where Σ is singular (fewer samples than features, or rounding on the wire) a ridge is added to its diagonal: the smallest
    that will do of 1.2e-7, 1.2e-6, … times the mean variance. Raises AggregationError when none does.
    """
    covariance_DD = from_upper_triangle(triangle.double())
    mean_variance = float(covariance_DD.diagonal().mean())
    if mean_variance == 0:
        return torch.zeros_like(covariance_DD)
    failed: Tensor
    factor_DD: Tensor
    factor_DD, failed = torch.linalg.cholesky_ex(covariance_DD)
    for power in range(RIDGES):
        if not int(failed):
            return factor_DD
        ridge = mean_variance * torch.finfo(torch.float32).eps * 10.0**power
        factor_DD, failed = torch.linalg.cholesky_ex(covariance_DD + ridge * torch.eye(len(covariance_DD), dtype=torch.float64))
    if int(failed):
        raise AggregationError("a covariance that clients sent has large negative eigenvalues: it is none")
    return factor_DD


# ---------------------------------------------------------------- the loss


def head_gradient(
    weight_KD: Tensor,
    bias_K: Tensor,
    x_bD: Tensor,
    place_b: Tensor,
    temperature: float | None,
    sizes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """∂/∂(W, b) of the batch's mean cross-entropy, logits z = W x + b being taken as z / m / temperature (None: as they are).

        m = 1/S Σ_s ‖z_s‖,   ∂m/∂z_j = z_j / (S ‖z_s‖), j in s

    sizes: of the S parts that z is cut into (None: a single one, so that m = ‖z‖). A sample whose m is shorter than `SHORTEST`
    has no direction (a head that nothing trained yet): its logits are divided by 1, where the references' ‖z‖ + 1e-12 would make
    the step 1e12 times as long.
    """
    z_bK = torch.addmm(bias_K, x_bD, weight_KD.T)
    if temperature is None:
        error_bK = _error(z_bK, place_b)
        return error_bK.T @ x_bD, error_bK.sum(0)
    parts = torch.split(z_bK, list(sizes or [len(bias_K)]), dim=1)
    norm_bS = torch.cat([torch.linalg.vector_norm(part, dim=1, keepdim=True) for part in parts], dim=1)
    mean_b1 = _lengths(norm_bS.mean(1, keepdim=True))
    norm_bS = _lengths(norm_bS).mul_(len(parts))
    slope_bK = torch.cat([part / norm_bS[:, s : s + 1] for s, part in enumerate(parts)], dim=1)
    z_bK.div_(mean_b1)
    error_bK = _error(z_bK / temperature, place_b)
    along_b1 = (error_bK * z_bK).sum(1, keepdim=True)  # the loss does not see how long z is
    error_bK.addcmul_(slope_bK, along_b1, value=-1).div_(mean_b1 * temperature)
    return error_bK.T @ x_bD, error_bK.sum(0)


def _lengths(norms: Tensor) -> Tensor:
    """Norms to divide by: 1 in the place of those of nothing."""
    return norms.masked_fill(norms < SHORTEST, 1.0)


def _error(z_bK: Tensor, place_b: Tensor) -> Tensor:
    """∂/∂z of the batch's mean cross-entropy."""
    error_bK = z_bK.softmax(1)
    error_bK[torch.arange(len(place_b)), place_b] -= 1
    return error_bK.div_(len(place_b))


def clip(gradient_KD: Tensor, gradient_K: Tensor, most: float) -> None:
    """Shorten both, in place, so that together they are no longer than `most`; shorter ones keep their bits."""
    length = math.sqrt(float(gradient_KD.double().square().sum() + gradient_K.double().square().sum()))
    if length > most:
        gradient_KD.mul_(most / length)
        gradient_K.mul_(most / length)
