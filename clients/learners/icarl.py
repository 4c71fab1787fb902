"""iCaRL: herded exemplars, sigmoids that the last task's model teaches, and the nearest mean of exemplars as classifier (Rebuffi
et al. 2017, "iCaRL: Incremental classifier and representation learning"; the loss as in mammoth)."""

# b rows of a batch, C classes (head rows), D features

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
from fedsim.core.messages import State, Tensors
from fedsim.core.names import HEAD_BIAS, HEAD_WEIGHT

SUM, COUNT = "sum", "count"
NEVER = -1e9  # the logit of a class of which there is no exemplar


@dataclass(frozen=True)
class Learner(_buffers.Rehearsal):
    """In place of the cross-entropy, over the b rows of the client's own batch and those that it replays, and the S classes of
    all tasks so far:

        L = 1/(b S) Σ BCE(σ(z_c), target_c),   target_c = [c = y] for the task's own classes, σ(t_c) for those of earlier tasks

    t are the logits of the teacher, the model that the last task's end deployed. At a task's end every client looks at its
    samples through the model that is deployed then, and picks exemplars of the task's classes by herding, as many of every class
    that it holds as there is room for; those of older classes give way, the last ones picked first. Of all its exemplars it sends
    the sum of features of length 1, and their number, for every class. What is deployed is

        argmax_c μ_c · f,   μ_c = Σ f / ‖f‖ over all clients' exemplars of c, brought to length 1

    which is the nearest mean by Euclidean distance between features of length 1. Training goes on from the head that was trained,
    which is what is evaluated within a task, and which teaches. [Ours: rows are replayed beside the client's own, `batch_size` in
    a step, where the paper puts exemplars among the task's samples; room is shared over the classes that the client has held, not
    over all seen; means of several clients are joined by their sums. mammoth adds a weight decay of 1e-5, as the preset does.]

    Up, once a task: `sum` (C, D) and `count` (C,), of clients without samples in the task too. Down: the teacher, once per task
    to a client that does not have it. Memory: `positions` (n,), how many samples were `offered`, the last `task`. With
    `stream.online` a client still has the last part of a task at its end, and picks from that.

    size: of a client's buffer, in samples (200 where neither is given); total: of all clients' buffers together, shared evenly.
    batch_size: samples replayed in a step; null: as many as `client.batch_size`. buffer: herding | balanced | reservoir.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"size": 4}, {"total": 12, "batch_size": 1, "buffer": "reservoir"})
    buffer: str = "herding"

    @property
    def traits(self) -> Traits:
        head = {"an affine head": "deploys means of exemplars as rows of the head, but {head} is no linear map: use head: linear"}
        refused = {
            "calibrator": "deploys means of exemplars as the head, whatever {other} makes of it: set server.calibrator to null",
            "head random_features": "deploys means of exemplars' features as rows of the head, but {other} makes others of them "
            "first: use head: linear",
            "a module per client": "takes means of one model's features, but what {other} deploys are the clients' models: use "
            "another aggregator",
        }
        return Traits({ONE_CLASS, REWRITES}, {CROSS_ENTROPY, BUFFER}, needs={**_teacher.NEEDS, **head}, refuses=refused)

    def suits(self, config: SimConfig, sizes_TK: IntArray) -> tuple[str, ...]:
        return (*super().suits(config, sizes_TK), *_buffers.picked_at_the_end("icarl", config))

    # ------------------------------------------------ on the client

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        return {**super().begin(work, memory, context, draw), "teacher": _teacher.teacher(context)}

    def loss(self, state: LocalState, step: Step) -> Tensor:
        rows, teacher = rows_of(step), state["teacher"]
        taught_bC = None if teacher is None else step.model(teacher).logits[rows]
        return _teacher.sigmoid_distillation(step.logits[rows], step.labels[rows], taught_bC, step.classes, step.seen)

    def review(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> Ending:
        buffer = self.filled(Buffer.of(memory), work, work.params, draw)
        weight_CD = work.params[HEAD_WEIGHT]
        sums = {SUM: torch.zeros_like(weight_CD), COUNT: weight_CD.new_zeros(len(weight_CD))}
        if len(buffer.positions):
            features_nD = F.normalize(work.outputs(buffer.positions, work.params).features, dim=1)
            labels = work.labels(buffer.positions).long()
            sums[SUM].index_add_(0, labels, features_nD.to(weight_CD))
            sums[COUNT].index_add_(0, labels, torch.ones_like(labels, dtype=weight_CD.dtype))
        return Ending(buffer.memory(), sums)

    # ------------------------------------------------ on the server

    def opened(self, state: State, params: Tensors, task: int) -> State:
        like_CD = params[HEAD_WEIGHT].double()
        return state or {SUM: torch.zeros_like(like_CD), COUNT: like_CD.new_zeros(len(like_CD))}

    def closed(self, state: State, params: Tensors, total: Tensors) -> State:
        """Of a class that nobody tells of now, what was known stays."""
        told = total[COUNT] > 0
        return {SUM: torch.where(told[:, None], total[SUM], state[SUM]), COUNT: torch.where(told, total[COUNT], state[COUNT])}

    def deployed(self, state: State, params: Tensors) -> Tensors:
        weight_CD = F.normalize(state[SUM], dim=1)
        bias_C = torch.where(state[COUNT] > 0, 0.0, NEVER)
        return {**params, HEAD_WEIGHT: weight_CD.to(params[HEAD_WEIGHT]), HEAD_BIAS: bias_C.to(params[HEAD_BIAS])}
