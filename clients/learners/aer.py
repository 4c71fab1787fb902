"""AER, alternate experience replay, for labels that may be wrong: epochs that learn the buffer, and epochs that forget it
(Millunzi, Bonicelli, Porrello, Credi, Kolm, Calderara 2024, "May the forgetting be with you: alternate replay for learning with
noisy labels", BMVC)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from clients.learners import _buffers
from clients.learners._buffers import replays
from fedsim.core.contracts import ClientWork, Context, Ending, IntArray, LocalState, Step
from fedsim.core.messages import Tensors
from fedsim.models.logits import masked_cross_entropy


@dataclass(frozen=True)
class Learner(_buffers.Rehearsal):
    """In every second epoch of a task, counted back from its last one, samples of the buffer are replayed:

        learning epoch     L = CE_task + CE(z(x'), y'), x' from the buffer, over the classes of all tasks so far
        forgetting epoch   L = CE_task

    CE_task is the cross-entropy of the client's own batch over the task's classes, so that with the first line alone (forget:
    false) this is ER-ACE (Caccia et al. 2022). What is forgotten fastest is what was only learned by heart: in epochs without
    replay the losses of samples with wrong labels rise above those of the others. Who chooses samples by loss sees them apart
    then (learner `abs`, which with this one makes up the paper's method).

    Reconstructed from the abstract, beside mammoth's er_ace_aer_abs; the paper was not read. Ours: rounds are part of the count,
    epoch e of round r being the (r · epochs + e)-th of rounds · epochs of the task, and the last one learns. There is no fitting
    of the buffer by MixMatch at a task's end. In mammoth

        a learning epoch starts from the model that the last learning epoch ended with: what was forgotten in between is undone;
        of epochs 0, 1, … of a task the odd ones learn, and the last one counts as one (of even number, it replays nothing);
        samples enter the buffer in forgetting epochs alone, of each batch the quarter with the smallest losses;
        what is replayed is compared over all rows of the head, and a batch over its own classes and those not seen yet.

    Here every epoch goes on from the one before, a round's samples are offered to the buffer at its end, all of them, and classes
    are the task's and those seen.

    Nothing travels. Memory: as of `er`, n samples with their labels and two numbers.

    size, total, batch_size, buffer: as in `er`. forget: false: every epoch learns.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"size": 4}, {"size": 3, "forget": False, "buffer": "balanced"})
    forget: bool = True

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        client = work.config.client
        per_epoch = max(1, math.ceil(len(work.shard) / client.batch_size))
        left = (work.config.server.rounds - work.round) * client.epochs  # epochs of the task, this round's first among them
        state = super().begin(work, memory, context, draw)
        return {**state, "step": 0, "per_epoch": per_epoch, "left": left}

    def learns(self, state: LocalState) -> bool:
        """Whether the buffer is replayed in the epoch of the current step."""
        return not self.forget or (state["left"] - state["step"] // state["per_epoch"]) % 2 == 1

    def replay(self, state: LocalState, positions: IntArray, draw: torch.Generator) -> IntArray:
        return super().replay(state, positions, draw) if self.learns(state) else positions[:0]

    def loss(self, state: LocalState, step: Step) -> Tensor | None:
        if not replays(step):
            return None
        return masked_cross_entropy(step.logits[step.replayed], step.labels[step.replayed], step.seen)

    def stepped(self, state: LocalState, params: Tensors) -> None:
        state["step"] += 1

    def end(self, state: LocalState, work: ClientWork, params: Tensors, draw: torch.Generator) -> Ending:
        return Ending(self.filled(state["buffer"], work, params, draw).memory())
