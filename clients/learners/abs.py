"""ABS, asymmetric balanced sampling: which samples a client keeps where labels may be wrong (Millunzi, Bonicelli, Porrello,
Credi, Kolm, Calderara 2024, "May the forgetting be with you: alternate replay for learning with noisy labels", BMVC)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.learners import aer
from clients.learners._buffers import Buffer, shares
from fedsim.core.contracts import ClientWork, Ending, IntArray, LocalState
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors


@dataclass(frozen=True)
class Learner(aer.Learner):
    """Replay as in `aer`. After every round the client chooses anew from its buffer and its samples of the task, as many of every
    class as can be, of each class

        of the current task    those with the largest q_y, the model's probability of the label that the sample has (the smallest
                               losses): likely right ones
        of earlier tasks       without replacement with weights 1 − q_y: those that tell most, since they were chosen for being
                               right before

    q is a softmax over the task's classes for the former and over all classes seen for the latter, in the model that the round
    began with: what one client learned by heart, wrong labels among it, the mean over clients has forgotten. In a task's first
    round, where nobody has learned its classes yet, it is that of the client's own model at the end of the last forgetting epoch
    (with none, of the last step).

    Reconstructed from the abstract (purity for the current task, complex samples for the past), beside mammoth's er_ace_aer_abs;
    the paper was not read. In mammoth samples go by in a stream: in forgetting epochs the quarter of each batch with the smallest
    losses is offered to a reservoir, and what takes a place there drives out a sample of the current task by its loss, or one of
    the past by one minus its loss (losses scaled to 0 … 1, taken when the sample was last drawn; which of the two by their shares
    of the buffer). Classes are not balanced there. Ours: as many of every class; 1 − q as weights; that the whole shard is
    weighed in every round, which a client has at hand as long as the task lasts; and the model that judges. How training differs
    see `aer`.
    Fashion-MNIST with 40 % of the labels wrong: after a task's first round 10 % of the quarter of its samples that is likeliest
    to the merged model are wrong. In buffers after two tasks it is 27 %, and 31 % to 34 % where clients' own models judge.

    Nothing travels. Memory: as of `er`. size, total, batch_size, buffer: as there; forget: see `aer`.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"size": 4}, {"size": 3, "forget": False})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buffer != "reservoir":
            raise ConfigError(
                f"buffer {self.buffer} does not go with abs, which chooses by itself: leave it out, or use learner aer"
            )

    def stepped(self, state: LocalState, params: Tensors) -> None:
        ends = (state["step"] + 1) % state["per_epoch"] == 0
        if ends and not self.learns(state):
            state["forgotten"] = {name: t.detach().clone() for name, t in params.items()}
        super().stepped(state, params)

    def end(self, state: LocalState, work: ClientWork, params: Tensors, draw: torch.Generator) -> Ending:
        judge = work.params if work.round else {**params, **state.get("forgotten", {})}
        return Ending(self.filled(state["buffer"], work, judge, draw).memory())

    def filled(self, buffer: Buffer, work: ClientWork, params: Tensors, draw: torch.Generator) -> Buffer:
        fresh = work.shard[~np.isin(work.shard, buffer.positions)]
        candidates = np.concatenate([buffer.positions, fresh])
        labels, current = work.labels(candidates), torch.tensor(list(work.classes))
        likely = _likelihood(work, candidates, params, labels, work.classes)
        past = 1 - _likelihood(work, candidates, params, labels, work.seen)
        keys = torch.where(torch.isin(labels.cpu(), current), likely.double(), sampling_keys(past, draw))
        kept = chosen(labels.cpu().numpy(), keys.numpy(), self.room(work.config.partition["clients"]))
        offered = buffer.offered + (0 if buffer.task == work.task else len(work.shard))
        return Buffer(candidates[kept], {}, offered, task=work.task)


def sampling_keys(weights: Tensor, draw: torch.Generator) -> Tensor:
    """Keys log(u) / w, the largest of which are a weighted sample without replacement (Efraimidis & Spirakis 2006)."""
    uniform = torch.rand(len(weights), dtype=torch.float64, generator=draw).clamp_min(1e-300)
    return uniform.log() / weights.double().clamp_min(1e-12)


def chosen(labels: IntArray, keys: NDArray[np.float64], room: int) -> IntArray:
    """Places with the largest keys of every class, the same number of each as far as there are any."""
    classes, held = np.unique(labels, return_counts=True)
    kept = []
    for label, count in zip(classes.tolist(), shares(held, room), strict=True):
        places = np.flatnonzero(labels == label)
        kept.append(places[np.argsort(-keys[places], kind="stable")[:count]])
    return np.concatenate(kept) if kept else np.zeros(0, dtype=np.int64)


def _likelihood(work: ClientWork, positions: IntArray, params: Tensors, labels: Tensor, rows: Sequence[int]) -> Tensor:
    """q_y over these rows of the head, (n,), on the CPU; of labels that are none of them something that nobody looks at."""
    logits = work.outputs(positions, params).logits
    every = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    every[list(rows)] = True
    found: Tensor = logits.masked_fill(~every, -torch.inf).softmax(1).gather(1, labels[:, None])[:, 0].cpu()
    return found
