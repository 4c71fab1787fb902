"""Calibrates the head on virtual features, drawn from the Gaussians of its classes (CCVR, Luo et al. 2021, arXiv:2106.05001)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import RoundPlan, State, Tensors
from server.calibrators._class_sums import asking
from server.calibrators._gaussians import SENT, GaussianCalibrator, PooledCalibrator


@dataclass(frozen=True)
class Calibrator(PooledCalibrator):
    """Once, at a task's end: n_c, μ_c, Σ_c of all clients' samples of class c under the model that is then deployed, and SGD of
    the head's rows on the cross-entropy of z = W x + b, class c uniform, x ~ N(μ_c, Σ_c).

        n_c = Σ n_ic,  μ_c = Σ n_ic μ_ic / n_c,  Σ_c = [Σ (n_ic − 1) Σ_ic + Σ n_ic μ_ic μ_icᵀ − n_c μ_c μ_cᵀ] / (n_c − 1)

    These are the moments of the concatenated data, exactly, clients with a single sample included, as sums that are made where
    clients run. Who takes part in the pass is said by `server.pass_participation`, by default all. The repaired head is what is
    deployed and evaluated at the task's end; training goes on from the head as it was.

    when: task_end (the paper) | round (fed-mammoth): after every round, on moments that the round's participants send with their
    updates, under each client's own module (in a blend with those of past tasks, where that is deployed); training goes on from
    the repaired head.
    gaussian: with `when: round`: pooled, as above, of the round's participants, summed | mixture (fed-mammoth): one of
    clients i ~ n_ic / n_c, x ~ N(μ_ic, Σ_ic), those with a single sample left out; every update is needed for that.
    classes: seen, the rows of all tasks so far, on the Gaussians that were sent in each of them (of a class that comes again, of
    all its tasks) | task, the rows of the current task's classes alone; older ones are deployed as they were at their task's end.
    The paper has one task, so both are readings of it [ours]; task is fed-mammoth's, and goes with consolidators that keep old
    rows as they are.

    Defaults are the published procedure as FL-bench's code has it: full covariances, 200 samples a class, one pass of plain SGD,
    logits not normalised. Ours: its lr and batch_size are the clients' own, here they are options; c is drawn for every sample by
    itself. fed-mammoth: when round, gaussian mixture, classes task, covariance diagonal, 256 samples, 5 epochs in batches of 256,
    momentum 0.9, schedule cosine, normalise.

    Asks for `class_moments`: n, mean and the upper triangle of the covariance, D(D+1)/2 numbers, of every class that a client
    holds; with covariance diagonal the variance, D numbers.
    covariance: diagonal | full. samples_per_class: drawn anew in every epoch; epochs: passes over as many; batch_size: of them.
    normalise: divide logits by their norm over the classes and by the temperature (fed-mammoth); else the plain cross-entropy.
    temperature: with normalise. lr, momentum: of SGD
    without weight decay; schedule: of lr over the epochs, cosine (to zero) | constant; clip_norm: of gradients, null: none.
    A class with fewer than two samples is left out. With epochs 0 it is the merge alone. Raises AggregationError when an update
    lacks the statistics.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"covariance": "diagonal", "classes": "task"},
        {"when": "round", "gaussian": "mixture", "epochs": 2, "normalise": True},
    )
    covariance: str = "full"
    samples_per_class: int = 200
    epochs: int = 1
    batch_size: int = 32
    normalise: bool = False
    momentum: float = 0.0
    schedule: str = "constant"
    clip_norm: float | None = None
    gaussian: str = "pooled"
    classes: str = "seen"
    when: str = "task_end"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("gaussian", self.gaussian, ("pooled", "mixture"))
        require_choice("classes", self.classes, ("task", "seen"))
        require_choice("when", self.when, ("round", "task_end"))
        if self.gaussian == "mixture" and self.when == "task_end":
            raise ConfigError("gaussian mixture goes with when: round only: at a task's end clients are summed, so use pooled")

    @property
    def repairs_old_rows(self) -> bool:
        return self.classes == "seen"

    @property
    def additive(self) -> bool:
        return self.gaussian == "pooled"

    def plan(self, state: State, round: int, last: bool, classes: Sequence[Sequence[int]]) -> RoundPlan | None:
        if self.when == "task_end":
            return None
        if self.additive:
            return asking(SENT[self.covariance][0], classes[-1], blended=True)
        return GaussianCalibrator.plan(self, state, round, last, classes)

    def closing(self, state: State, classes: Sequence[Sequence[int]]) -> RoundPlan | None:
        return super().closing(state, classes) if self.when == "task_end" else None

    def end_task(
        self, state: State, params: Tensors, total: Tensors, classes: Sequence[Sequence[int]], draw: torch.Generator
    ) -> State:
        return state if self.when == "round" else super().end_task(state, params, total, classes, draw)

    def finish(
        self, state: State, params: Tensors, total: Tensors, classes: Sequence[Sequence[int]], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        return self.retrained(state, params, self.pooled(params, total, classes[-1]), classes, draw)
