"""Experience replay (ER): samples of old tasks join every batch (Chaudhry et al. 2019, "On tiny episodic memories in continual
learning"; as in mammoth and fed-mammoth, where clients keep a buffer each).

Shapes: b rows of a batch, m samples replayed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from clients.learners import _buffers
from clients.learners._buffers import replays, rows_of
from fedsim.core.contracts import BUFFER, CROSS_ENTROPY, REWRITES, ClientWork, Ending, LocalState, Step, Traits
from fedsim.core.messages import Tensors
from fedsim.models.logits import masked_cross_entropy


@dataclass(frozen=True)
class Learner(_buffers.Rehearsal):
    """The cross-entropy over the client's own batch and samples of its buffer together, over the classes of all tasks so far.

        L = 1/(b + m) Σ −log softmax(z over classes seen)[y],   m = min(batch_size, samples in the buffer), drawn without
        replacement

    Where nothing is replayed yet it is the plain cross-entropy over the task's own classes. A sample is offered to the buffer
    once, at the end of the first round in which the client trains on it [ours: the references offer what passes by in every
    epoch, so that a sample may be in it several times]. So within a task, from its second round on, samples of the task itself
    are replayed too, as in the references, whose buffer is a reservoir.

    Nothing travels. Memory: `positions` of the samples (n ≤ size,), how many were `offered`, and the last `task` of which some
    were; a balanced buffer also the `counts` of every class. A device stores n samples with their labels, and two numbers.

    size: of a client's buffer, in samples (200 where neither is given); total: of all clients' buffers together, shared evenly.
    batch_size: samples replayed in a step; null: as many as `client.batch_size`. buffer: reservoir | balanced | herding.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"size": 4},
        {"size": 3, "batch_size": 1, "buffer": "balanced"},
        {"total": 12, "buffer": "herding"},
    )

    @property
    def traits(self) -> Traits:
        return Traits({REWRITES}, {CROSS_ENTROPY, BUFFER})

    def loss(self, state: LocalState, step: Step) -> Tensor:
        rows = rows_of(step)
        return masked_cross_entropy(step.logits[rows], step.labels[rows], step.seen if replays(step) else step.classes)

    def end(self, state: LocalState, work: ClientWork, params: Tensors, draw: torch.Generator) -> Ending:
        return Ending(self.filled(state["buffer"], work, params, draw).memory())
