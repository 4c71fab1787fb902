"""Experience replay (ER): samples of old tasks join every batch (Chaudhry et al. 2019, "On tiny episodic memories in continual
learning"; as in mammoth and fed-mammoth, where clients keep a buffer each).

Shapes: b rows of a batch, m samples replayed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.config import SimConfig
from fedsim.core.contracts import ClientWork, Context, Ending, IntArray, LocalState, Step, Traits
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.models.logits import masked_cross_entropy

POSITIONS, OFFERED, TASK = "positions", "offered", "task"


@dataclass(frozen=True)
class Learner(contracts.Learner):
    """The cross-entropy over the client's own batch and samples of its buffer together, over the classes of all tasks so far.

        L = 1/(b + m) Σ −log softmax(z over classes seen)[y],   m = min(batch_size, samples in the buffer), drawn without
        replacement

    Where nothing is replayed yet it is the plain cross-entropy over the task's own classes. The buffer is the client's own and
    never travels; it stays over the tasks, also while the client is not drawn. It is filled by reservoir sampling: of the N
    samples offered so far, each is in it with probability size / N. A sample is offered once, at the end of the first round in
    which the client trains on it [ours: the references offer what passes by in every epoch, so that a sample may be in it several
    times]. So within a task, from its second round on, samples of the task itself are replayed too, as in the references.

    Memory: `positions` of samples in the training split, (≤ size,), which the simulator has anyway (a device would store the
    samples; the ledger counts them so), how many were `offered`, and the last `task` of which some were. Replayed samples are
    augmented anew.

    size: of a client's buffer, in samples. batch_size: samples replayed in a step; null: as many as `client.batch_size`.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"size": 4}, {"size": 3, "batch_size": 1})
    size: int = 200
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"size must be at least 1, got {self.size}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")

    @property
    def traits(self) -> Traits:
        return Traits(takes={contracts.CROSS_ENTROPY, "the buffer"})

    def suits(self, config: SimConfig, sizes_TK: IntArray) -> tuple[str, ...]:
        most = int(sizes_TK.sum(axis=0).max())
        if self.size < most:
            return ()
        return (
            f"learner er: a buffer of {self.size} holds all samples that any client ever has (at most {most}): nothing is left "
            "out, which is joint training of each client's own data; published buffers are smaller",
        )

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        stored = memory.get(POSITIONS, torch.zeros(0, dtype=torch.int64))
        return {
            POSITIONS: stored.cpu().numpy(),
            OFFERED: int(memory.get(OFFERED, torch.tensor(0))),
            TASK: int(memory.get(TASK, torch.tensor(-1))),
            "count": self.batch_size or work.config.client.batch_size,
        }

    def replay(self, state: LocalState, positions: IntArray, draw: torch.Generator) -> IntArray:
        stored: IntArray = state[POSITIONS]
        chosen: IntArray = stored[torch.randperm(len(stored), generator=draw)[: state["count"]].numpy()]
        return chosen

    def loss(self, state: LocalState, step: Step) -> Tensor:
        own, replayed = (range(len(step.labels))[rows] for rows in (step.own, step.replayed))
        if not replayed:
            return masked_cross_entropy(step.logits[step.own], step.labels[step.own], step.classes)
        rows = [*own, *replayed]  # other learners may have added samples of their own
        return masked_cross_entropy(step.logits[rows], step.labels[rows], step.seen)

    def end(self, state: LocalState, work: ClientWork, params: Tensors, draw: torch.Generator) -> Ending:
        stored, offered = state[POSITIONS], state[OFFERED]
        if work.task != state[TASK] or work.config.stream.online:  # else the same samples as in an earlier round
            stored, offered = reservoir(stored, offered, work.shard, self.size, draw)
        numbers = {OFFERED: torch.tensor(offered), TASK: torch.tensor(work.task)}
        return Ending({POSITIONS: torch.from_numpy(stored), **numbers})


def reservoir(stored: IntArray, offered: int, new: IntArray, size: int, draw: torch.Generator) -> tuple[IntArray, int]:
    """The buffer after it was offered new samples one by one, and how many it was offered in all (Vitter 1985, algorithm R):
    item n (from 0) fills a free place, or takes place j, uniform in 0 … n, if there is one."""
    places = list(stored)
    for n, position in enumerate(new.tolist(), offered):
        if len(places) < size:
            places.append(position)
            continue
        j = int(torch.randint(n + 1, (), generator=draw))
        if j < size:
            places[j] = position
    return np.array(places, dtype=np.int64), offered + len(new)
