"""eXtended dark experience replay (X-DER): logits of replayed samples are brought up to date, and heads of classes to come are
prepared (Boschini et al. 2022, "Class-incremental continual learning into the extended DER-verse"; as in mammoth)."""

# n samples in the buffer, m replayed in a draw, b own samples, V views, C classes (head rows), P F of past and future tasks

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clients.learners import _buffers
from clients.learners._buffers import Buffer
from fedsim.core.config import SimConfig
from fedsim.core.contracts import BUFFER, REWRITES, ClientWork, Context, Ending, IntArray, LocalState, Step, Traits
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.core.names import HEAD_WEIGHT
from fedsim.models.logits import columns, masked_cross_entropy

LOGITS = "logits"
TIE = 1e-5


@dataclass(frozen=True)
class Learner(_buffers.Rehearsal):
    """Head rows fall into those of past tasks, of the present one and of future ones. To the cross-entropy of the client's own
    batch over the task's classes (present) come two independent draws from the buffer, samples x with stored logits h and samples
    x' with labels y', and views of own and replayed samples:

        L = CE_present + α · mean over m and C of (z(x) − h)² + β · CE_past(z(x'), y') + λ · contrast + η · (future + past)

        contrast   supervised contrastive loss (Khosla et al. 2020, temperature τ) of the future logits of all views, task by
        task,
                   each brought to length 1; mean over views and future tasks
        future     over own samples and x: mean of max z_future + margin − max z_(its task), where that is positive
        past       over own samples, as probabilities p over classes seen: mean of max p_past + margin − max p_present, where
                   that is positive; p_past gives no gradient

    At a task's end, through the model that is deployed then, the client
        1. transplants, for every sample in its buffer, what the model says now of the task's and of future classes, scaled down
           to γ · h_y where its largest would be above that;
        2. fills the buffer with samples of the task, as many of every class as can be, with their logits; those of past classes
        are
           limited in the same way by γ times that of the label.

    So within a task nothing of the task itself is replayed. The final number of classes must be known: it is that of the head's
    rows. What the paper has and a client here has not: strong augmentations for the contrast (views are of `transform.augment`,
    the first being what is in the batch anyway; without augmentation all are alike, and one is taken); the division of future
    classes into tasks (as many as the present task has, in the order of the head's rows); which classes were a replayed sample's
    task (all past classes are taken). Ours, too: the future margin looks at x, where mammoth takes both draws, every sample once;
    logits are brought up to date at a task's end alone, not at every step too; they are limited wherever the largest is above
    γ · h_y, where mammoth leaves one between γ · h_y and h_y as it is; a label's stored logit below 0 limits by a shift, since
    scaling would turn signs. The constraint on past logits is in mammoth's code.

    A head that starts at zero has no future logits to contrast, and no gradient of it: the preset takes head: cosine.

    Nothing travels. Memory: `positions` (n,), `logits` (n, C), the `counts` of every class that were offered, and two numbers. A
    device stores n samples with labels, n C floats and the numbers. Refused with domain_incremental, which has no past classes.

    alpha, beta: α, β; gamma: γ, 0 … 1; contrast: λ; temperature: τ; constraint: η; margin: as above;
    views: V, of every sample that is contrasted; contrasted: own and replayed samples, so many of each at most. Defaults are
    mammoth's for CIFAR-100 with 500 samples.
    size: of a client's buffer, in samples (200 where neither is given); total: of all clients' buffers together, shared evenly.
    batch_size: m, of each draw; null: as many as `client.batch_size`. buffer: balanced | reservoir | herding.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"size": 4},
        {"size": 3, "batch_size": 1, "alpha": 0.0, "contrast": 0.0},
        {"total": 12, "beta": 0.0, "constraint": 0.0, "buffer": "herding"},
    )
    buffer: str = "balanced"
    alpha: float = 0.3
    beta: float = 0.8
    gamma: float = 0.85
    contrast: float = 0.05
    temperature: float = 5.0
    constraint: float = 0.1
    margin: float = 0.3
    views: int = 4
    contrasted: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("alpha", "beta", "contrast", "constraint", "margin"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"{key} must not be negative, got {getattr(self, key)}")
        if not 0 <= self.gamma <= 1:
            raise ConfigError(f"gamma must be in [0, 1], got {self.gamma}")
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be positive, got {self.temperature}")
        for key in ("views", "contrasted"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be at least 1, got {getattr(self, key)}")

    @property
    def traits(self) -> Traits:
        composed = (
            "keeps logits of the deployed model, but what {other} deploys are the clients' models, which say nothing of classes "
            "to come: use another aggregator"
        )
        return Traits({REWRITES}, {BUFFER}, refuses={"a module per client": composed})

    def suits(self, config: SimConfig, sizes_TK: IntArray) -> tuple[str, ...]:
        if config.stream.name == "domain_incremental":
            raise ConfigError(
                "learner xder divides the head's rows into past, present and future classes, which a "
                "domain_incremental stream has not: use learner derpp"
            )
        told = super().suits(config, sizes_TK)
        if not self.contrast or config.head["name"] != "linear":
            return told
        return (
            *told,
            "learner xder contrasts logits of classes to come, which a linear head that starts at 0 has not: use head: cosine",
        )

    # ------------------------------------------------ training

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        future = later_classes(work)
        views = self.views if self.contrast and future and work.config.transform.augment != "none" else 1
        return {**super().begin(work, memory, context, draw), "future": future, "more": views - 1}

    def replay(self, state: LocalState, positions: IntArray, draw: torch.Generator) -> IntArray:
        """The draw for logits, and the draw for labels."""
        stored, nothing = state["buffer"].positions, np.zeros(0, dtype=np.int64)
        wanted = (self.alpha or self.contrast or self.constraint, self.beta)
        state["drawn"] = [self.drawn(state, draw) if weight else nothing for weight in wanted]
        return np.concatenate([stored[places] for places in state["drawn"]])

    def again(self, state: LocalState, positions: IntArray, draw: torch.Generator) -> IntArray:
        """Further views of own samples, and of those that are replayed for their logits."""
        first = state["buffer"].positions[state["drawn"][0]]
        return np.tile(np.concatenate([positions[: self.contrasted], first[: self.contrasted]]), state["more"])

    def loss(self, state: LocalState, step: Step) -> Tensor | None:
        with_logits, with_labels = state["drawn"]
        middle = step.replayed.start + len(with_logits)
        first, second = slice(step.replayed.start, middle), slice(middle, step.replayed.stop)
        past = [c for c in step.seen if c not in set(step.classes)]
        terms = []
        if len(with_logits) and self.alpha:
            stored_mC = state["buffer"].beside[LOGITS][torch.from_numpy(with_logits)]
            terms.append(self.alpha * F.mse_loss(step.logits[first], stored_mC))
        if len(with_labels):
            terms.append(self.beta * masked_cross_entropy(step.logits[second], step.labels[second], past))
        if self.contrast and state["future"]:
            terms.append(self.contrast * self._contrast(state["future"], step, first))
        if self.constraint:
            terms += [self.constraint * term for term in self._constraints(state["future"], past, step, first)]
        return torch.stack(terms).sum() if terms else None

    def _contrast(self, future: Sequence[int], step: Step, first: slice) -> Tensor:
        """The mean over future tasks of the contrastive loss of their logits, of all views."""
        shown = [slice(step.own.start, min(step.own.stop, step.own.start + self.contrasted)),
                 slice(first.start, min(first.stop, first.start + self.contrasted)), step.again]  # fmt: skip
        labels = torch.cat([step.labels[rows] for rows in shown])
        logits_NF = columns(torch.cat([step.logits[rows] for rows in shown]), future)
        tasks = logits_NF.split_with_sizes(_sizes(len(future), len(step.classes)), dim=1)
        return torch.stack([contrastive(F.normalize(z, dim=1), labels, self.temperature) for z in tasks]).mean()

    def _constraints(self, future: Sequence[int], past: Sequence[int], step: Step, first: slice) -> list[Tensor]:
        """Of future logits, over own samples and the first draw, and of past ones, over own samples."""
        own_bC, found = step.logits[step.own], list[Tensor]()
        if future:
            rows = [(own_bC, step.classes)] + ([(step.logits[first], past)] if first.stop > first.start else [])
            excess = [largest(columns(z, future)) + self.margin - largest(columns(z, good)) for z, good in rows]
            found.append(mean_of_positive(torch.cat(excess)))
        if past:
            p_bS = columns(own_bC, step.seen).softmax(1)
            new = torch.tensor([c in set(step.classes) for c in step.seen], device=p_bS.device)
            found.append(mean_of_positive(largest(p_bS[:, ~new]).detach() + self.margin - largest(p_bS[:, new])))
        return found

    # ------------------------------------------------ at a task's end

    def review(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> Ending:
        buffer = Buffer.of(memory)
        if len(buffer.positions):
            now_nC = work.outputs(buffer.positions, work.params).logits
            stored_nC, later = buffer.beside[LOGITS].clone(), [*work.classes, *later_classes(work)]
            true_n = _of_labels(stored_nC, work.labels(buffer.positions))
            stored_nC[:, later] = transplanted(now_nC[:, later], true_n, self.gamma)
            buffer = buffer._replace(beside={LOGITS: stored_nC})
        return Ending(self.filled(buffer, work, work.params, draw).memory())

    def beside(self, work: ClientWork, positions: IntArray, params: Tensors) -> Tensors:
        logits_nC = work.outputs(positions, params).logits
        past = [c for c in work.seen if c not in set(work.classes)]
        if past:
            true_n = _of_labels(logits_nC, work.labels(positions))
            logits_nC[:, past] = transplanted(logits_nC[:, past], true_n, self.gamma)
        return {LOGITS: logits_nC}


def later_classes(work: ClientWork) -> list[int]:
    """Head rows of tasks to come."""
    return [c for c in range(len(work.params[HEAD_WEIGHT])) if c not in set(work.seen)]


def transplanted(logits_nK: Tensor, true_n: Tensor, gamma: float) -> Tensor:
    """Logits of classes that are not a sample's own, none above γ times that of its own, `true`: scaled down until the largest is
    just that, or, where that is below 0, shifted down. (Mammoth scales where the largest is above `true` itself.)"""
    limit_n, top_n = gamma * true_n, logits_nK.amax(1)
    scale_n = torch.where((top_n > limit_n) & (limit_n >= 0), limit_n / top_n, 1.0)
    shift_n = torch.where((top_n > limit_n) & (limit_n < 0), top_n - limit_n, 0.0)
    return torch.minimum(
        logits_nK * scale_n[:, None] - shift_n[:, None], torch.where(top_n > limit_n, limit_n, torch.inf)[:, None]
    )


def contrastive(z_NH: Tensor, labels_N: Tensor, temperature: float) -> Tensor:
    """The mean over rows i that share their label with others, P(i), of   −1/|P(i)| Σ_{p ∈ P(i)} log softmax_{a ≠ i}(z_i · z_a /
    τ)_p; 0 where there is none."""
    other_NN = ~torch.eye(len(z_NH), dtype=torch.bool, device=z_NH.device)
    same_NN = (labels_N[:, None] == labels_N) & other_NN
    log_NN = (z_NH @ z_NH.T / temperature).masked_fill(~other_NN, -torch.inf).log_softmax(1)
    count_N = same_NN.sum(1)
    each_N = -log_NN.masked_fill(~same_NN, 0.0).sum(1) / count_N.clamp(min=1)
    return each_N.sum() / (count_N > 0).sum().clamp(min=1)


def largest(values_nK: Tensor) -> Tensor:
    """Of every row; of those that are equal up to rounding, as rows of the head are at their start, the mean: none is singled
    out."""
    near_nK = values_nK >= values_nK.detach().amax(1, keepdim=True) - TIE
    return (values_nK * near_nK).sum(1) / near_nK.sum(1)


def mean_of_positive(excess: Tensor) -> Tensor:
    """The mean of those that are above 0; 0 where there are none."""
    return excess.clamp(min=0).sum() / (excess > 0).sum().clamp(min=1)


def _sizes(total: int, each: int) -> list[int]:
    """As many parts of this size as there are, and the rest."""
    return [min(each, total - start) for start in range(0, total, each)]


def _of_labels(logits_nC: Tensor, labels_n: Tensor) -> Tensor:
    return logits_nC.gather(1, labels_n.long()[:, None])[:, 0]
