"""Dark experience replay, DER++ and DER: replayed samples keep their labels and the logits that the model once gave them (Buzzega
et al. 2020, "Dark experience for general continual learning: a strong, simple baseline"; as in mammoth and fed-mammoth)."""

# n samples in the buffer, m replayed in a draw, C classes (head rows), S classes seen so far

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clients.learners import _buffers
from fedsim.core.contracts import ClientWork, Ending, IntArray, LocalState, Step
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.models.logits import columns, masked_cross_entropy

LOGITS = "logits"


@dataclass(frozen=True)
class Learner(_buffers.Rehearsal):
    """To the cross-entropy of the client's own batch over the task's classes come two draws from its buffer, independent of each
    other: samples x with the logits h that were stored with them, and samples x' with their labels y'.

        L = CE_task + α · mean over m and S of (z(x) − h)² + β · CE(z(x'), y'),   both over the S classes of all tasks so far,
        as in fed-mammoth; mammoth takes all classes

    DER is β = 0. α = 0 or β = 0 leaves its draw out; both: nothing is replayed. While the buffer is empty it is the cross-entropy
    of the batch alone. Logits are stored when a sample enters the buffer, at the end of the first round in which the client
    trains on it: those of its model after the last step, of the sample as it is [ours: the references offer every batch of every
    epoch, with the logits of its augmented views before the step].

    Nothing travels. Memory: `positions` (n,), `logits` (n, C) for α > 0, how many samples were `offered`, the last `task`; a
    balanced buffer also the `counts` of every class. A device stores n samples with labels, n C floats and two numbers.

    alpha, beta: α, β, 0 or more; 0.5 and 0.5 are fed-mammoth's, mammoth has 0.3 and 0.5 on CIFAR-100 with 500 samples.
    size: of a client's buffer, in samples (200 where neither is given); total: of all clients' buffers together, shared evenly.
    batch_size: m, of each draw; null: as many as `client.batch_size`. buffer: reservoir | balanced | herding.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"size": 4},
        {"size": 3, "batch_size": 1, "beta": 0.0, "buffer": "balanced"},
        {"total": 12, "alpha": 0.0, "buffer": "herding"},
    )
    alpha: float = 0.5
    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("alpha", "beta"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"{key} must not be negative, got {getattr(self, key)}")

    def replay(self, state: LocalState, positions: IntArray, draw: torch.Generator) -> IntArray:
        nothing = np.zeros(0, dtype=np.int64)
        state["drawn"] = [self.drawn(state, draw) if weight else nothing for weight in (self.alpha, self.beta)]
        chosen: IntArray = state["buffer"].positions[np.concatenate(state["drawn"])]
        return chosen

    def loss(self, state: LocalState, step: Step) -> Tensor | None:
        with_logits, with_labels = state["drawn"]
        logits, labels, middle, terms = step.logits[step.replayed], step.labels[step.replayed], len(with_logits), list[Tensor]()
        if len(with_logits):
            stored = state["buffer"].beside[LOGITS][torch.from_numpy(with_logits)]
            terms.append(self.alpha * F.mse_loss(columns(logits[:middle], step.seen), columns(stored, step.seen)))
        if len(with_labels):
            terms.append(self.beta * masked_cross_entropy(logits[middle:], labels[middle:], step.seen))
        return torch.stack(terms).sum() if terms else None

    def end(self, state: LocalState, work: ClientWork, params: Tensors, draw: torch.Generator) -> Ending:
        return Ending(self.filled(state["buffer"], work, params, draw).memory())

    def beside(self, work: ClientWork, positions: IntArray, params: Tensors) -> Tensors:
        return {LOGITS: work.outputs(positions, params).logits} if self.alpha else {}
