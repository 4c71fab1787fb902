"""Clients merged by any merging rule: `rule: ties`, or a file of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from fedsim.core import contracts
from fedsim.core.contracts import (
    NEW_BASIS,
    OUTSIDE_SPAN,
    TAKES_RANKS,
    AdditiveMerging,
    ChainedMerging,
    Further,
    Member,
    Traits,
    holding,
)
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import ClientUpdate, RoundPlan, State, Tensors
from server.merging import _products, _rule
from server.merging.krum import Merging as Krum
from server.merging.mean import Merging as Mean


@dataclass(frozen=True)
class Aggregator(contracts.AdditiveAggregator):
    """w⁺ = merge(w_1, …, w_K; n_1, …, n_K; w): what `server.merging.<rule>` makes of the clients' tensors, all of them from the
    server's w of the round, weighed by their samples where the rule weighs.

    LoRA pairs come to the rule as their factors, number by number, since within a round all clients start from the same ones; or
    as products B_i A_i, of which averaging the factors makes something else. Products are merged and brought back to the server's
    rank r by a truncated singular value decomposition, Δ = U S Vᵀ, B = U_r S_r^½, A = S_r^½ V_rᵀ: with the rule `mean` that is
    FlexLoRA's server step (Bai et al. 2024, "Federated fine-tuning of large language models under heterogeneous tasks and client
    resources"), with the root of S on both sides. The factors that come out say nothing of those before: directions
    change signs and places, so that parts which keep numbers for every factor (EWC, SCAFFOLD, CoMA, the residuals of `topk`) are
    refused beside it. Clients' pairs may have ranks of their own, and for linear rules no m × d matrix is made. A pair of which
    clients train one factor only is no pair: that factor is merged as it is. Asks for what the rule asks for. A rule that is a
    sum over its members is summed where the clients run, but for products; one that merges part after part looks at their data
    for each, and brings products to their rank itself. Clients without samples are left out; tensors that nobody trained stay as
    they are.

    rule: the name of one of `fedsim list merging` or the path of a file that defines a `Merging`, or {name: …, its options}.
    pairs: factors | products | auto (products for a rule that merges nothing else).
    State, with products: `names` of the tensors, and `cut`, the share ‖cut‖_F / ‖Δ‖_F that the last merge lost to the rank.
    Raises AggregationError when nobody sent an update or nobody holds samples.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"rule": "mean"},
        {"rule": "mean", "pairs": "products"},
        {"rule": {"name": "ties", "density": 0.5}},
    )
    rule: str | dict[str, Any] | contracts.Merging
    pairs: str = "auto"

    def __post_init__(self) -> None:
        require_choice("pairs", self.pairs, ("auto", "factors", "products"))
        object.__setattr__(self, "rule", _rule.described(self.rule))
        if self.merging.pairs and self.pairs == "factors":
            raise ConfigError("pairs must be products or auto: the rule merges LoRA pairs as their products")
        said = dict(self.merging.exempt)
        if "one_member" in said:
            said["one_client"] = said.pop("one_member")
        object.__setattr__(self, "exempt", said)  # of this object: which laws hold depends on the rule

    @cached_property
    def merging(self) -> contracts.Merging:
        """The rule itself."""
        return _rule.built(self.rule)

    @property
    def products(self) -> bool:
        return self.pairs == "products" or self.merging.pairs

    @property
    def traits(self) -> Traits:
        words = {
            TAKES_RANKS: self.products or isinstance(self.merging, Mean),
            NEW_BASIS: self.products and not isinstance(self.merging, ChainedMerging),
            OUTSIDE_SPAN: self.products or not (self.merging.linear or isinstance(self.merging, Krum)),
        }
        return Traits(gives=holding(words))

    @property
    def additive(self) -> bool:
        summed = isinstance(self.merging, AdditiveMerging) and type(self.merging).merge is AdditiveMerging.merge
        return summed and not self.products

    def init(self, params: Tensors, task: int = 0) -> State:
        return {"names": list(params), "cut": 0.0} if self.products else {}

    @property
    def least(self) -> int:
        return self.merging.least

    def plan(self, state: State, round: int) -> RoundPlan:
        asked = _products.asked(self.merging, state["names"]) if self.products else self.merging.asks()
        return RoundPlan(statistics=asked)

    def further(self, state: State, params: Tensors, updates: Sequence[ClientUpdate], last: bool) -> tuple[State, Further | None]:
        members = Member.clients(updates)
        if not isinstance(self.merging, ChainedMerging) or not members:
            return state, None
        look = self.merging.further(members, _started(params, members), state.get("merged"), last)
        return {**state, "merged": dict(look.merged)}, look if look.statistics else None

    def lift(self, update: ClientUpdate) -> Tensors:
        assert isinstance(self.merging, AdditiveMerging)
        lifted = self.merging.lift(Member.client(update))
        return lifted if update.num_samples else {n: torch.zeros_like(t) for n, t in lifted.items()}  # not all rules weigh

    def finish(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> tuple[State, Tensors]:
        assert isinstance(self.merging, AdditiveMerging)
        return state, like(params, self.merging.finish(params, total, draw))

    def combine(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        if self.additive:
            return super().combine(state, params, updates, draw)
        contracts.require_updates(updates)
        if "merged" in state:
            return {n: t for n, t in state.items() if n != "merged"}, like(params, state["merged"])
        members = Member.clients(updates)
        base = _started(params, members)
        if not base:
            return state, params
        if not self.products:
            return state, like(params, self.merging.merge(members, base, draw))
        module, cut = _products.truncated(_products.merged(self.merging, members, base, draw), base)
        return {**state, "cut": cut}, like(params, module)


def _started(params: Tensors, members: Sequence[Member]) -> Tensors:
    """What the members' tensors started from."""
    return {n: t for n, t in params.items() if n in members[0].params}


def like(params: Tensors, merged: Tensors) -> dict[str, torch.Tensor]:
    """The parameters with what was merged in their types."""
    return {name: merged[name].to(t.dtype) if name in merged else t for name, t in params.items()}
