"""Buffers of rehearsal: which of its own samples a client keeps, and what all learners share that replay them.

Shapes: n samples in a buffer, N of an offer (those in the buffer first, then the new ones), C classes (head rows), D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.config import SimConfig
from fedsim.core.contracts import BUFFER, REWRITES, ClientWork, Context, IntArray, LocalState, Step, Traits
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import Tensors

POSITIONS, OFFERED, TASK, COUNTS = "positions", "offered", "task", "counts"
TIE = 1e-5  # distances of features of length 1 that differ by no more are equal
SIZE = 200  # of a client's buffer, where nothing is said


class Buffer(NamedTuple):
    """What a client keeps.

    positions (n,): of its samples in the training split; beside: what is stored with every sample, by name, (n, …); offered: how
    many samples it was ever offered; counts: of every class, (largest class + 1,), where its policy asks for them; task: the last
    one whose samples it was offered.
    """

    positions: IntArray
    beside: Tensors
    offered: int = 0
    counts: IntArray = np.zeros(0, dtype=np.int64)
    task: int = -1

    @classmethod
    def of(cls, memory: Tensors) -> Buffer:
        """As it lies in a client's memory; empty at first."""
        if POSITIONS not in memory:
            return cls(np.zeros(0, dtype=np.int64), {})
        beside = {n: t for n, t in memory.items() if n not in (POSITIONS, OFFERED, TASK, COUNTS)}
        counts = memory[COUNTS].cpu().numpy() if COUNTS in memory else cls._field_defaults["counts"]
        return cls(memory[POSITIONS].cpu().numpy(), beside, int(memory[OFFERED]), counts, int(memory[TASK]))

    def memory(self) -> dict[str, Tensor]:
        """What `of` reads."""
        numbers = {OFFERED: torch.tensor(self.offered), TASK: torch.tensor(self.task)}
        counts = {COUNTS: torch.from_numpy(self.counts)} if len(self.counts) else {}
        return {POSITIONS: torch.from_numpy(self.positions), **self.beside, **counts, **numbers}


@dataclass(frozen=True, eq=False)
class Offer:
    """Samples that could be kept: the first `stored` are in the buffer, in its order, the others are new.

    positions, labels (N,); size: of the buffer; offered, counts: as in `Buffer`, of the past; features: of the samples at these
    places of the offer, (·, D), as the model sees them now.
    """

    positions: IntArray
    labels: IntArray
    stored: int
    size: int
    offered: int
    counts: IntArray
    features: Callable[[IntArray], Tensor]


def reservoir(offer: Offer, draw: torch.Generator) -> IntArray:
    """Places of an offer that are kept, each sample ever offered with the same probability (Vitter 1985, algorithm R): item n
    (from 0) fills a free place, or takes place j, uniform in 0 … n, if there is one."""
    kept = list(range(offer.stored))
    for n, place in enumerate(range(offer.stored, len(offer.labels)), offer.offered):
        if len(kept) < offer.size:
            kept.append(place)
            continue
        j = int(torch.randint(n + 1, (), generator=draw))
        if j < offer.size:
            kept[j] = place
    return np.array(kept, dtype=np.int64)


def balanced(offer: Offer, draw: torch.Generator) -> IntArray:
    """Places of an offer that are kept, as many of every class as can be (Chrysakis & Moens 2020, "Online continual learning from
    imbalanced data": class-balancing reservoir sampling).

    In a full buffer, a sample of a class of which none was ever left out, and which is not the largest, takes the place of a
    random one of a largest class; any other takes with probability m_c / n_c the place of one of the m_c that are stored of its
    class, of which n_c were offered. So each sample ever offered of a class is in it with the same probability.
    """
    kept = list(range(offer.stored))
    counts = np.zeros(max(len(offer.counts), 1 + int(offer.labels.max(initial=0))), dtype=np.int64)
    counts[: len(offer.counts)] = offer.counts
    held: dict[int, list[int]] = {int(c): [] for c in np.unique(offer.labels)}  # slots of every class
    for slot, label in enumerate(offer.labels[: offer.stored].tolist()):
        held[label].append(slot)
    for place in range(offer.stored, len(offer.labels)):
        label = int(offer.labels[place])
        own, none_left_out = held[label], counts[label] == len(held[label])
        counts[label] += 1
        if len(kept) < offer.size:
            own.append(len(kept))
            kept.append(place)
            continue
        largest = max(map(len, held.values()))
        if none_left_out and len(own) < largest:
            victims = [(slots, slot) for slots in held.values() if len(slots) == largest for slot in slots]
            slots, slot = victims[int(torch.randint(len(victims), (), generator=draw))]
            slots.remove(slot)
            own.append(slot)
        else:
            j = int(torch.randint(int(counts[label]), (), generator=draw))
            if j >= len(own):
                continue
            slot = own[j]
        kept[slot] = place
    return np.array(kept, dtype=np.int64)


def herding(offer: Offer, draw: torch.Generator) -> IntArray:
    """Places of an offer that are kept, class by class, those of a class in the order of herding, so that its first ones stay
    when the others must go (Rebuffi et al. 2017, "iCaRL"). Room is shared evenly over the classes that the client has held."""
    classes, held = np.unique(offer.labels, return_counts=True)
    fresh = set(offer.labels[offer.stored :].tolist())
    kept = []
    for label, room in zip(classes.tolist(), shares(held, offer.size), strict=True):
        places = np.flatnonzero(offer.labels == label)
        order = herded(offer.features(places), room) if label in fresh else np.arange(room)
        kept.append(places[order])
    return np.concatenate(kept) if kept else np.zeros(0, dtype=np.int64)


def herded(features_nD: Tensor, count: int) -> IntArray:
    """The `count` samples whose mean of normalised features comes nearest to that of all: one after the other, each the one that
    brings the mean of those chosen nearest. Of several that are equally near, up to rounding, the first."""
    units_nD = F.normalize(features_nD.double(), dim=1)
    mean_D, sum_D = units_nD.mean(0), units_nD.new_zeros(units_nD.shape[1])
    free_n, chosen = torch.ones(len(units_nD), dtype=torch.bool, device=units_nD.device), list[int]()
    for number in range(1, count + 1):
        far_n = torch.linalg.vector_norm(mean_D - (units_nD + sum_D) / number, dim=1)
        far_n = far_n.masked_fill(~free_n, torch.inf)
        best = int((far_n <= far_n.min() + TIE).nonzero()[0])
        free_n[best] = False
        sum_D = sum_D + units_nD[best]
        chosen.append(best)
    return np.array(chosen, dtype=np.int64)


def shares(held: IntArray, size: int) -> list[int]:
    """How many samples of each class are kept of those that are held: as even as can be, and no more than `size` together."""
    rooms, left = [0] * len(held), size
    for number, k in enumerate(np.argsort(held, kind="stable").tolist()):
        rooms[k] = min(int(held[k]), left // (len(held) - number))
        left -= rooms[k]
    return rooms


POLICIES: Mapping[str, Callable[[Offer, torch.Generator], IntArray]] = {
    "reservoir": reservoir,
    "balanced": balanced,
    "herding": herding,
}


@dataclass(frozen=True)
class Rehearsal(contracts.Learner):
    """A learner with a buffer. The buffer is the client's own and never travels; it stays over the tasks, also while the client
    is not drawn. What is stored are positions of samples in the training split, which the simulator has: a device would store the
    samples, and the ledger counts them so. The same sample replayed again is augmented anew.

    size: of a client's buffer, in samples (200 where neither is given); total: of all clients' buffers together, shared evenly.
    batch_size: samples replayed in a draw; null: as many as `client.batch_size`.
    buffer: reservoir (each sample ever offered with the same probability) | balanced (as many of every class as can be, at random
    within a class) | herding (as many of every class, those whose mean is nearest to the class mean).

    For those who derive: `chosen` decides what is kept, `beside` what is stored with it; `filled` offers the round's samples to a
    buffer, `drawn` draws from it.
    """

    size: int | None = None
    total: int | None = None
    batch_size: int | None = None
    buffer: str = "reservoir"

    def __post_init__(self) -> None:
        require_choice("buffer", self.buffer, tuple(POLICIES))
        if self.size is not None and self.total is not None:
            raise ConfigError(f"total {self.total} and size {self.size} exclude each other: set one of them to null")
        if self.size is None and self.total is None:
            object.__setattr__(self, "size", SIZE)
        for key in ("size", "total", "batch_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"{key} must be at least 1, got {value}")

    @property
    def traits(self) -> Traits:
        return Traits({REWRITES}, {BUFFER})

    def room(self, clients: int) -> int:
        """Samples in the buffer of each of so many clients."""
        return self.size if self.size is not None else (self.total or 0) // clients

    def suits(self, config: SimConfig, sizes_TK: IntArray) -> tuple[str, ...]:
        clients, most, name = sizes_TK.shape[1], int(sizes_TK.sum(axis=0).max()), type(self).__module__.rpartition(".")[2]
        room = self.room(clients)
        if room < 1:
            raise ConfigError(
                f"learner {name}: total {self.total} leaves none of {clients} clients a sample: use {clients} or more"
            )
        if room > most:
            key, enough = ("size", most) if self.total is None else ("total", most * clients)
            raise ConfigError(
                f"learner {name}: no client can fill a buffer of {room}, since none ever holds more than {most} samples: set "
                f"{key} to {enough} or less (with all samples kept it is joint training of each client's own data)"
            )
        return ()

    # ------------------------------------------------ on the client

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        return {"buffer": Buffer.of(memory), "count": self.batch_size or work.config.client.batch_size}

    def replay(self, state: LocalState, positions: IntArray, draw: torch.Generator) -> IntArray:
        chosen: IntArray = state["buffer"].positions[self.drawn(state, draw)]
        return chosen

    def drawn(self, state: LocalState, draw: torch.Generator) -> IntArray:
        """Places of `batch_size` samples of the buffer, or of all that there are, without replacement."""
        places: IntArray = torch.randperm(len(state["buffer"].positions), generator=draw)[: state["count"]].numpy()
        return places

    def filled(self, buffer: Buffer, work: ClientWork, params: Tensors, draw: torch.Generator) -> Buffer:
        """The buffer after it was offered the samples of this round, as these tensors see them; as it is, if it was offered the
        same ones in an earlier round."""
        if not len(work.shard) or (work.task == buffer.task and not work.config.stream.online):
            return buffer
        stored, candidates = len(buffer.positions), np.concatenate([buffer.positions, work.shard])
        labels, room = work.labels(candidates).cpu().numpy(), self.room(work.config.partition["clients"])

        def features(places: IntArray) -> Tensor:
            return work.outputs(candidates[places], params).features

        offer = Offer(candidates, labels, stored, room, buffer.offered, buffer.counts, features)
        kept = self.chosen(offer, work, params, draw)
        positions, new = candidates[kept], kept >= stored
        beside = _joined(buffer.beside, kept, new, self.beside(work, positions[new], params) if new.any() else {})
        counts = _counted(buffer.counts, labels[stored:]) if self.buffer == "balanced" else buffer.counts
        return Buffer(positions, beside, buffer.offered + len(work.shard), counts, work.task)

    def chosen(self, offer: Offer, work: ClientWork, params: Tensors, draw: torch.Generator) -> IntArray:
        """Places of an offer that are kept, in the buffer's order."""
        return POLICIES[self.buffer](offer, draw)

    def beside(self, work: ClientWork, positions: IntArray, params: Tensors) -> Tensors:
        """What is stored with new samples, by name, a row for each."""
        return {}


def picked_at_the_end(name: str, config: SimConfig) -> tuple[str, ...]:
    """What a run is told whose learner picks exemplars at a task's end, where samples go by only once."""
    if not config.stream.online:
        return ()
    return (f"learner {name} picks exemplars at a task's end, and with stream.online from the last round's samples alone",)


def rows_of(step: Step) -> slice | list[int]:
    """The client's own rows of a batch and those that this learner replayed, without those of others."""
    if not replays(step):
        return step.own
    if step.replayed.start == step.own.stop:
        return slice(step.own.start, step.replayed.stop)
    own, replayed = (range(len(step.labels))[rows] for rows in (step.own, step.replayed))
    return [*own, *replayed]


def replays(step: Step) -> bool:
    """Whether this learner replays anything in this batch."""
    return len(step.labels[step.replayed]) > 0


def _joined(before: Tensors, kept: IntArray, new: np.ndarray, fresh: Tensors) -> dict[str, Tensor]:
    """What is stored with the samples that are kept: of old ones as it was, of new ones `fresh`."""
    found = {}
    for name, like in {**before, **fresh}.items():
        rows = like.new_empty(len(kept), *like.shape[1:])
        if name in fresh:
            rows[torch.from_numpy(new)] = fresh[name]
        if name in before:
            rows[torch.from_numpy(~new)] = before[name][torch.from_numpy(kept[~new])]
        found[name] = rows
    return found


def _counted(counts: IntArray, labels: IntArray) -> IntArray:
    """How many samples of every class were ever offered, with these."""
    length = max(len(counts), 1 + int(labels.max(initial=0)))
    total: IntArray = np.bincount(labels, minlength=length) + np.pad(counts, (0, length - len(counts)))
    return total
