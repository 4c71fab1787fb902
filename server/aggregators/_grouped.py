"""A rule per group of tensors, e.g. the adapter by LoRM and the head by variance weighting: what a list of rules becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsim.core import contracts, rng
from fedsim.core.contracts import AdditiveAggregator, Further
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate, RoundPlan, State, StatisticRequest, Tensors
from fedsim.core.tensors import matching, without_prefix


@dataclass(frozen=True)
class Aggregator(contracts.AdditiveAggregator):
    """Several rules side by side: the first glob that matches a tensor's name decides which rule merges it.

    Every rule sees its own tensors only, and all statistics. Clients train and send the union of what the rules ask for.
    It is summed where the clients run if all of its rules are. What one rule draws does not move the draws of another.
    State: `names` and `states`, one entry per rule.
    """

    groups: tuple[tuple[str, contracts.Aggregator], ...]

    @property
    def additive(self) -> bool:
        return all(rule.additive for _, rule in self.groups)

    @property
    def least(self) -> int:
        return max(rule.least for _, rule in self.groups)

    @property
    def products(self) -> bool:
        return any(rule.products for _, rule in self.groups)

    def init(self, params: Tensors, task: int = 0) -> State:
        """Raises ConfigError for a tensor without a rule, and for a rule without a tensor."""
        names = self._names(params)
        rules = zip(self.groups, names, strict=True)
        return {"names": names, "states": [rule.init({n: params[n] for n in own}, task) for (_, rule), own in rules]}

    def next_task(self, state: State, params: Tensors, task: int) -> State:
        names = self._names(params)
        rules = zip(self.groups, names, state["states"], strict=True)
        states = [rule.next_task(inner, {n: params[n] for n in own}, task) for (_, rule), own, inner in rules]
        return {"names": names, "states": states}

    def _names(self, params: Tensors) -> list[list[str]]:
        """The tensors that each rule merges."""
        names: list[list[str]] = [[] for _ in self.groups]
        for name in params:
            first = self._decider(name)
            if first is None:
                raise ConfigError(
                    f"no rule in server.aggregator matches '{name}': add a last entry {{match: \"*\", name: fedavg}}"
                )
            names[first].append(name)
        for (glob, _), own in zip(self.groups, names, strict=True):
            if not own:
                raise ConfigError(
                    f"match '{glob}' in server.aggregator decides for no tensor: it matches none, or the entries before it "
                    f"take them all; take it out or correct it. Tensors: {_shortened(list(params))}"
                )
        return names

    def plan(self, state: State, round: int) -> RoundPlan:
        """The union of the rules' plans, with every name written out."""
        train: list[str] = []
        keeps: list[str] = []
        requests: list[StatisticRequest] = []
        context: dict[str, Tensors] = {}
        for (_, rule), own, inner in zip(self.groups, state["names"], state["states"], strict=True):
            wanted = rule.plan(inner, round)
            train += matching(own, wanted.train)
            keeps += matching(own, wanted.keeps)
            context |= wanted.context
            requests += [replace(r, match=tuple(matching(own, r.match))) for r in wanted.statistics]
        return RoundPlan(
            train=tuple(train), keeps=tuple(keeps), statistics=_joined([r for r in requests if r.match]), context=context
        )

    def lift(self, update: ClientUpdate) -> Tensors:
        """`<rule>/<name>`: what each rule lifts from its own tensors."""
        lifted: dict[str, Tensor] = {}
        deciders = {n: self._decider(n) for n in update.params}
        for k, rule in enumerate(self._additive_rules()):
            own = {n: t for n, t in update.params.items() if deciders[n] == k}
            lifted |= {f"{k}/{n}": t for n, t in rule.lift(replace(update, params=own)).items()}
        return lifted

    def finish(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> tuple[State, Tensors]:
        outcomes, draws = [], rng.split(draw, len(self.groups))
        rules = zip(self._additive_rules(), state["names"], state["states"], draws, strict=True)
        for k, (rule, own, inner, its_draw) in enumerate(rules):
            share = without_prefix(total, f"{k}/")
            outcomes.append(rule.finish(inner, {n: params[n] for n in own}, share, its_draw))
        return _side_by_side(state, params, outcomes)

    def further(self, state: State, params: Tensors, updates: Sequence[ClientUpdate], last: bool) -> tuple[State, Further | None]:
        """The rules look one after the other; what other rules merge, clients have as they trained it."""
        states = list(state["states"])
        for k, ((_, rule), own) in enumerate(zip(self.groups, state["names"], strict=True)):
            states[k], look = rule.further(states[k], {n: params[n] for n in own}, _of(updates, own), last)
            if look is not None:
                return {**state, "states": states}, look
        return {**state, "states": states}, None

    def combine(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        contracts.require_updates(updates)
        outcomes, draws = [], rng.split(draw, len(self.groups))
        for (_, rule), own, inner, its_draw in zip(self.groups, state["names"], state["states"], draws, strict=True):
            outcomes.append(rule.combine(inner, {n: params[n] for n in own}, _of(updates, own), its_draw))
        return _side_by_side(state, params, outcomes)

    def deployed(self, state: State, params: Tensors) -> Tensors:
        """What each rule deploys in the place of its own tensors."""
        out = dict(params)
        for (_, rule), own, inner in zip(self.groups, state["names"], state["states"], strict=True):
            mine = {n: params[n] for n in own}
            shown = rule.deployed(inner, mine)
            if shown is not mine:
                out = {n: t for n, t in out.items() if n not in mine} | dict(shown)
        return out if any(out.get(n) is not t for n, t in params.items()) else params

    def beneath(self, state: State) -> Tensors:
        """What each rule has left beneath its own tensors."""
        left = [rule.beneath(inner) for (_, rule), inner in zip(self.groups, state["states"], strict=True)]
        return {n: t for tensors in left for n, t in tensors.items()}

    def _decider(self, name: str) -> int | None:
        """Which rule merges a tensor."""
        return next((k for k, (glob, _) in enumerate(self.groups) if matching([name], [glob])), None)

    def _additive_rules(self) -> list[AdditiveAggregator]:
        rules = [rule for _, rule in self.groups]
        additive = [rule for rule in rules if isinstance(rule, AdditiveAggregator)]
        assert len(additive) == len(rules), "lift and finish are for additive rules"
        return additive


def _of(updates: Sequence[ClientUpdate], names: Sequence[str]) -> list[ClientUpdate]:
    """The updates with these tensors alone."""
    mine = set(names)
    return [replace(u, params={n: t for n, t in u.params.items() if n in mine}) for u in updates]


def _side_by_side(state: State, params: Tensors, outcomes: Sequence[tuple[State, Tensors]]) -> tuple[State, Tensors]:
    """What each rule made of its own state and tensors, as one."""
    merged = {name: tensor for _, tensors in outcomes for name, tensor in tensors.items()}
    return {"names": state["names"], "states": [after for after, _ in outcomes]}, {name: merged[name] for name in params}


def _joined(requests: Sequence[StatisticRequest]) -> tuple[StatisticRequest, ...]:
    """Requests that differ only in their subjects become one."""
    out: list[StatisticRequest] = []
    for request in requests:
        same = next((k for k, r in enumerate(out) if replace(r, match=request.match) == request), None)
        if same is None:
            out.append(request)
        else:
            out[same] = replace(out[same], match=tuple(dict.fromkeys((*out[same].match, *request.match))))
    return tuple(out)


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
