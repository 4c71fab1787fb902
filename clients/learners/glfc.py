"""GLFC, global-local forgetting compensation, without its proxy server: rehearsal in which old and new classes pull with the same
strength, and the last task's model teaches (Dong, Wang, Fang, Sun, Xu, Wang, Zhu 2022, "Federated class-incremental learning",
CVPR; the losses as in the authors' code)."""

# b rows of a batch, C classes (head rows), S classes seen

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clients.learners import _buffers, _teacher
from clients.learners._buffers import Buffer, rows_of
from fedsim.core.config import SimConfig
from fedsim.core.contracts import (
    BUFFER,
    CROSS_ENTROPY,
    ONE_CLASS,
    REWRITES,
    ClientWork,
    Context,
    Ending,
    IntArray,
    LocalState,
    Step,
    Traits,
)
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors


@dataclass(frozen=True)
class Learner(_buffers.Rehearsal):
    """In place of the cross-entropy, over the b rows of the client's own batch and those that it replays, and the S classes of
    all tasks so far:

        L_GC = 1/(b S) Σ_i w_i Σ_c BCE(σ(z_ic), [c = y_i]),   w_i = g_i / mean of g over i's group,   g_i = 1 − σ(z_i,y_i)
        L_RD = 1/(b S) Σ_i Σ_c BCE(σ(z_ic), target_ic),   target_ic = [c = y_i] for the task's own classes, σ(t_ic) for older ones
        L    = relation · L_RD + (1 − relation) · L_GC,   L_GC alone where nobody teaches yet

    Rows whose label is of an earlier task are one group, the others another: so weights are 1 on average in both, and a row that
    is far from its label counts more (class-aware gradient compensation). In the first task, where no class is old, w is 1 and
    L_GC the plain binary cross-entropy. No gradient flows through w. t are the logits of the teacher, the model that the last
    task's end deployed (class-semantic relation distillation). At a task's end every client looks at its samples through the
    model that is deployed then, and picks exemplars by herding, as `icarl` does; what is deployed is the head that was trained.

    Left out: the paper's proxy server, to which clients send gradients of perturbed prototypes, which it turns back into images,
    to judge by them which of the last models is the best teacher. Here it is the last task's, as it is in theirs where the last
    round's model is the best; nothing of a sample leaves a client. Left out too: finding out by a jump of the entropy that a new
    task has begun, which the simulator knows. [Ours: rows are replayed beside the client's own, `batch_size` in a step, where
    the paper puts exemplars among the task's samples; classes of earlier tasks are all that were seen, not those of this client
    alone; a group whose rows are all learned to the last bit keeps weights 1, where theirs is 0 / 0. The paper trains by SGD, at
    2.0.]

    Up: nothing. Down: the teacher, once per task to a client that does not have it. Memory: `positions` (n,), how many samples
    were `offered`, the last `task`. With `stream.online` a client still has the last part of a task at its end, and picks from
    that. Refused with domain_incremental, which has no old classes.

    relation: the weight of L_RD, from 0 to 1; published 0.5; 0: no teacher is sent.
    size: of a client's buffer, in samples (200 where neither is given); total: of all clients' buffers together, shared evenly.
    batch_size: samples replayed in a step; null: as many as `client.batch_size`. buffer: herding | balanced | reservoir.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"size": 4},
        {"total": 12, "batch_size": 1, "relation": 1.0},
        {"size": 4, "relation": 0.0},
    )
    buffer: str = "herding"
    relation: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.relation <= 1:
            raise ConfigError(f"relation must be between 0 and 1, got {self.relation}")

    @property
    def traits(self) -> Traits:
        composed = (
            "picks exemplars by one model's features, but what {other} deploys are the clients' models: use another aggregator"
        )
        needs = _teacher.NEEDS if self.relation else {}
        return Traits({ONE_CLASS, REWRITES}, {CROSS_ENTROPY, BUFFER}, needs=needs, refuses={"a module per client": composed})

    def suits(self, config: SimConfig, sizes_TK: IntArray) -> tuple[str, ...]:
        if config.stream.name == "domain_incremental":
            raise ConfigError(
                "learner glfc weighs old classes against new ones, and with domain_incremental a task brings no new one: "
                "use learner er or derpp"
            )
        return (*super().suits(config, sizes_TK), *_buffers.picked_at_the_end("glfc", config))

    # ------------------------------------------------ on the client

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        return {**super().begin(work, memory, context, draw), "teacher": _teacher.teacher(context) if self.relation else None}

    def loss(self, state: LocalState, step: Step) -> Tensor:
        rows, teacher = rows_of(step), state["teacher"]
        logits_bC, labels_b = step.logits[rows], step.labels[rows]
        compensated = self.compensated(logits_bC, labels_b, step)
        if teacher is None:
            return compensated
        taught_bC = step.model(teacher).logits[rows]
        distilled = _teacher.sigmoid_distillation(logits_bC, labels_b, taught_bC, step.classes, step.seen)
        return self.relation * distilled + (1 - self.relation) * compensated

    def compensated(self, logits_bC: Tensor, labels_b: Tensor, step: Step) -> Tensor:
        """L_GC."""
        logits_bS, targets_bS = _teacher.sigmoids(logits_bC, labels_b, step.seen)
        each_b = F.binary_cross_entropy_with_logits(logits_bS, targets_bS, reduction="none").mean(dim=1)
        if set(step.seen) <= set(step.classes):
            return each_b.mean()
        new_b = torch.isin(labels_b.long(), torch.as_tensor(step.classes, device=labels_b.device))
        far_b = 1 - (logits_bS * targets_bS).sum(dim=1).sigmoid()
        return (weights(far_b.detach(), new_b) * each_b).mean()

    def review(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> Ending:
        return Ending(self.filled(Buffer.of(memory), work, work.params, draw).memory())


def weights(far_b: Tensor, new_b: Tensor) -> Tensor:
    """Every number over the mean of its group, new or not new; 1 in a group of zeros."""
    found_b = torch.ones_like(far_b)
    for group_b in (new_b, ~new_b):
        mean = (far_b * group_b).sum() / group_b.sum().clamp(min=1)
        found_b = torch.where(group_b & (mean > 0), far_b / mean, found_b)
    return found_b
