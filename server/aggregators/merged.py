"""Clients merged by any merging rule: `rule: ties`, or a file of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from fedsim.core import contracts
from fedsim.core.contracts import AdditiveMerging, Member
from fedsim.core.messages import ClientUpdate, RoundPlan, State, Tensors
from server.merging import _rule


@dataclass(frozen=True)
class Aggregator(contracts.AdditiveAggregator):
    """w⁺ = merge(w_1, …, w_K; n_1, …, n_K; w): what `server.merging.<rule>` makes of the clients' tensors, all of them from the
    server's w of the round, weighed by their samples where the rule weighs.

    LoRA factors are merged as they are, number by number: within a round all clients start from the same ones. Asks for what the
    rule asks for. A rule that is a sum over its members is summed where the clients run. Clients without samples are left out;
    tensors that nobody trained stay as they are.

    rule: the name of one of `fedsim list merging` or the path of a file that defines a `Merging`, or {name: …, its options}.
    Raises AggregationError when nobody sent an update or nobody holds samples.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"rule": "mean"}, {"rule": {"name": "ties", "density": 0.5}})
    rule: str | dict[str, Any] | contracts.Merging

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", _rule.described(self.rule))
        said = dict(self.merging.exempt)
        if "one_member" in said:
            said["one_client"] = said.pop("one_member")
        object.__setattr__(self, "exempt", said)  # of this object: which laws hold depends on the rule

    @cached_property
    def merging(self) -> contracts.Merging:
        """The rule itself."""
        return _rule.built(self.rule)

    @property
    def additive(self) -> bool:
        return isinstance(self.merging, AdditiveMerging) and type(self.merging).merge is AdditiveMerging.merge

    @property
    def least(self) -> int:
        return self.merging.least

    def plan(self, state: State, round: int) -> RoundPlan:
        return RoundPlan(statistics=self.merging.asks())

    def lift(self, update: ClientUpdate) -> Tensors:
        assert isinstance(self.merging, AdditiveMerging)
        return self.merging.lift(Member.client(update))

    def finish(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> tuple[State, Tensors]:
        assert isinstance(self.merging, AdditiveMerging)
        return state, like(params, self.merging.finish(params, total, draw))

    def combine(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        if self.additive:
            return super().combine(state, params, updates, draw)
        contracts.require_updates(updates)
        members = [Member.client(u) for u in updates if u.num_samples > 0]
        base = {n: t for n, t in params.items() if n in members[0].params}
        return state, params if not base else like(params, self.merging.merge(members, base, draw))


def like(params: Tensors, merged: Tensors) -> dict[str, torch.Tensor]:
    """The parameters with what was merged in their types."""
    return {name: merged[name].to(t.dtype) if name in merged else t for name, t in params.items()}
