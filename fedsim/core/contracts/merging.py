"""Merging: several models as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch

from fedsim.core.contracts.traits import Part
from fedsim.core.errors import AggregationError
from fedsim.core.messages import ClientUpdate, StatisticRequest, Tensors
from fedsim.core.sums import summed

TOLD = "use it as a rule of server.aggregator merged, or in fedsim merge"


@dataclass(frozen=True)
class Member:
    """One of the models that are merged: a client's, a task's or a run's.

    who: as messages call it, "client 3"; key: what its own draws hang on, by default the same. weight: what it counts for where a
    rule weighs: a client's samples, 1 for a task. statistics: what the rule asked for, named as in an update.
    """

    who: str
    params: Tensors
    weight: float = 1.0
    statistics: Tensors = field(default_factory=dict)
    key: str = ""

    @classmethod
    def client(cls, update: ClientUpdate) -> Member:
        """What a client sent."""
        return cls(f"client {update.client_id}", update.params, float(update.num_samples), update.statistics)

    @classmethod
    def clients(cls, updates: Sequence[ClientUpdate]) -> list[Member]:
        """What those sent that hold samples: others sent what they were sent."""
        return [cls.client(u) for u in updates if u.num_samples > 0]


class Further(NamedTuple):
    """A further look at the data of those who are merged, before they are.

    merged: tensors that are merged by now: every member looks through them and, for all else, through its own. statistics: what
    each sends of it; none: all is merged.
    """

    merged: Tensors
    statistics: tuple[StatisticRequest, ...] = ()


@dataclass(frozen=True)
class Merging(Part, ABC):
    """Several models as one: pure maths, the same whatever the models are of. It keeps no state and touches no device.

    It merges the clients of a round as `server.aggregator: {name: merged, rule: ...}`, and the tasks of a stream as
    `server.consolidator: {name: merged, rule: ...}`. `base` holds the tensors that all members started from: θ_i − θ_0 is what
    is called a task vector. Over clients θ_0 are the server's parameters of the round. Over tasks, and over clients with the
    aggregator's `pairs: products`, a LoRA pair comes as its product B A (m, d), named `<layer>.weight` (over tasks with θ_0 = 0),
    since neither factor means anything without the other.

    pairs: it is given LoRA pairs as they are, `<layer>.lora_A` (r_i, d) and `<layer>.lora_B` (m, r_i), of ranks that may differ
    among members and from the base's, and gives pairs of any rank. What it merges are their products; which of the pairs of a
    product it gives is up to it.
    linear: θ⁺ = θ_0 + Σ_i c_i τ_i, or Σ_i c_i θ_i, with the same c_i for all numbers. Then products are merged without making an
    (m, d) matrix, in the space that all factors span, and what comes out has the ranks of all together.
    """

    pairs: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    @property
    def least(self) -> int:
        """Members that it needs. Of fewer it makes nothing (`require_members`), and a run that would give it fewer is refused."""
        return 1

    def asks(self, products: bool = False) -> tuple[StatisticRequest, ...]:
        """Statistics that it needs of every member; none by default. They are asked for, and come, under the names of the tensors
        that it is shown: the Gram of a linear map's inputs under the name of the map's weight, whatever the members are of.

        products: LoRA pairs come as products."""
        return ()

    @abstractmethod
    def merge(self, members: Sequence[Member], base: Tensors, draw: torch.Generator) -> Tensors:
        """One model with the names and shapes of `base` (but for ranks of `pairs`), in any floating type: from `least` members
        or more, all with these names and positive weights.

        draw: what a rule that draws draws from, on the CPU.
        """


@dataclass(frozen=True)
class AdditiveMerging(Merging):
    """A rule that merges from a sum over members: over clients it is summed where the clients run."""

    @abstractmethod
    def lift(self, member: Member) -> Tensors:
        """One member's contribution, float64; every member gives the same names and shapes."""

    @abstractmethod
    def finish(self, base: Tensors, total: Tensors, draw: torch.Generator) -> Tensors:
        """What `merge` gives, from the sum of what `lift` gave."""

    def merge(self, members: Sequence[Member], base: Tensors, draw: torch.Generator) -> Tensors:
        return self.finish(base, summed(map(self.lift, members)), draw)


@dataclass(frozen=True)
class ChainedMerging(Merging):
    """A rule that merges part after part, each from statistics that look through the parts before it as they were merged. It
    needs the members' data several times: of the clients of a round, or of finished runs, but not of the tasks of a stream."""

    @abstractmethod
    def further(self, members: Sequence[Member], base: Tensors, merged: Tensors | None, last: bool) -> Further:
        """All that is merged by now, in the types of `base`, and what is asked for next. merged: None at first, then what this
        gave before; the members then come with the statistics that were asked for, but for those who failed in that look: one
        has them at least. last: the round is a task's last."""

    def merge(self, members: Sequence[Member], base: Tensors, draw: torch.Generator) -> Tensors:
        """One member is itself. Raises AggregationError for several: they are merged by `further`."""
        if len(members) == 1:
            return members[0].params
        raise AggregationError(f"{type(self).__module__} merges part after part, and looks at the members' data for each: {TOLD}")


def require_members(rule: Merging, members: Sequence[Member]) -> None:
    """Raise AggregationError where there are fewer members than a rule needs."""
    if len(members) < rule.least:
        name = type(rule).__module__.rpartition(".")[2]
        who = ", ".join(m.who for m in members[:5]) + (", …" if len(members) > 5 else "")
        raise AggregationError(
            f"{name} needs at least {rule.least} models to merge, but there are only {len(members)} ({who}): give it more, or "
            "options (or a rule) with which fewer are enough"
        )
