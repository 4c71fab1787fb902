"""What happens to a client's update on the wire: clipping and noise, quantisation, sparsification, masks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.core.contracts.traits import Part
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors


@dataclass(frozen=True, eq=False)
class Code:
    """How one tensor is written on the wire: `numbers` of `bits` each, and `extra` bits beside them (positions, scales).

    at: flat positions of the numbers that travel, ascending; None: all of them travel.
    """

    numbers: int
    bits: int
    extra: int = 0
    at: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Of the encoded tensor, in whole bytes."""
        return math.ceil((self.numbers * self.bits + self.extra) / 8)


@dataclass(frozen=True, eq=False)
class Parcel:
    """A client's update on its way through the channels.

    delta: what training changed, `trained − received`, by name of a trained tensor, float32 on the CPU (empty in a pass for
    statistics). statistics: by name, as in `ClientUpdate`. codes: how tensors of both are written; those that are not in it
    travel as they are.
    """

    client_id: int
    task: int
    round: int
    delta: Tensors
    statistics: Tensors = field(default_factory=dict)
    codes: Mapping[str, Code] = field(default_factory=dict)

    def code(self, name: str) -> Code:
        """How a tensor is written now."""
        tensor = self.delta[name] if name in self.delta else self.statistics[name]
        return self.codes.get(name) or Code(tensor.numel(), 8 * tensor.element_size())


@dataclass(frozen=True)
class Channel(Part, ABC):
    """One thing that happens to what clients send. `server.channel` lists them in the order in which they act on the way up.

    `send` runs beside the client, before any sum; `receive` on the server, in reverse order, on sums over clients. Both are pure;
    randomness comes from the generator that they are handed, what a client's side remembers is its memory.

    unbiased: the mean over draws of what is sent is what was to be sent, number by number. scales: `send` multiplies each tensor
    by one factor, so that what is encoded already stays so. encodes: it writes numbers on a grid, so that only a channel that
    `scales` may come after it.
    """

    unbiased: ClassVar[bool] = False
    scales: ClassVar[bool] = False
    encodes: ClassVar[bool] = False

    @property
    def covers(self) -> Sequence[str]:
        """Globs over names of statistics (`gram`, `class_*`) that may travel beside it; a run that asks for others is refused."""
        return ()

    @property
    def receives(self) -> bool:
        """Whether `receive` does anything, so that the server's rules must be given sums."""
        return type(self).receive is not Channel.receive

    @property
    def last(self) -> str:
        """Why no other channel may come after it; empty: others may."""
        return ""

    @abstractmethod
    def send(self, start: Tensors, parcel: Parcel, memory: Tensors, draw: torch.Generator) -> tuple[Parcel, Tensors]:
        """What goes on, and this client's new memory for this channel.

        start: the parameters as the client received them; memory: what this returned when the client last sent, empty at first.
        A tensor that does not change is best handed on as the same object: then not even its rounding moves.
        """

    def receive(self, start: Tensors, total: Tensors, clients: int, draw: torch.Generator) -> Tensors:
        """The sum over clients, float64, as the rule (or who asked for statistics) is to see it.

        start: the parameters that the clients received, empty where the sum is no rule's but of statistics alone; clients: how
        many with samples are in the sum. Rules that do not merge from a sum are refused where a channel `receives`.
        """
        return total

    def bound(self, delta: Tensors) -> float:
        """The most that ‖sent − delta‖₂ over all tensors can be, with no memory; infinity where nothing is promised."""
        return math.inf

    def suits(self, trained: Sequence[str], rounds: int, clients: int) -> tuple[str, ...]:
        """Before any training: raise ConfigError for what cannot work; lines that whoever reads the numbers has to know.

        trained: names of the tensors that clients train in any round; rounds: of the whole run, in each of which every client may
        send; clients: how many there are, numbered from 0."""
        return ()


def require_covered(name: str, channel: Channel, statistics: Iterable[str]) -> None:
    """Raise ConfigError for a statistic that a channel does not cover, by its name or by that of one of its tensors."""
    globs = [g for glob in channel.covers for g in (glob, f"{glob}.*")]
    free = next((s for s in statistics if not any(fnmatchcase(s, g) for g in globs)), None)
    if free is not None:
        raise ConfigError(
            f"server.channel: {name} does not cover the statistic '{free}', which clients send beside their updates: use parts "
            f"that need none, or leave {name} out"
        )
