"""A rule per group of tensors, e.g. the adapter by LoRM and the head by variance weighting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedsim.core import config, contracts
from fedsim.core.contracts import Aggregator
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate, RoundPlan, State, StatisticRequest, Tensors
from fedsim.core.tensors import matching


@dataclass(frozen=True)
class Grouped(contracts.Aggregator):
    """Several rules side by side: the first glob that matches a tensor's name decides which rule merges it.

    Every rule sees its own tensors only, and all statistics. Clients train and send the union of what the rules ask for.
    State: `names` and `states`, one entry per rule.
    """

    groups: tuple[tuple[str, Aggregator], ...]

    def init(self, params: Tensors) -> State:
        """Raises ConfigError for a tensor without a rule, and for a rule without a tensor."""
        names: list[list[str]] = [[] for _ in self.groups]
        for name in params:
            first = next((k for k, (glob, _) in enumerate(self.groups) if matching([name], [glob])), None)
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
        rules = zip(self.groups, names, strict=True)
        return {"names": names, "states": [rule.init({n: params[n] for n in own}) for (_, rule), own in rules]}

    def plan(self, state: State, round: int) -> RoundPlan:
        """The union of the rules' plans, with every name written out."""
        train: list[str] = []
        requests: list[StatisticRequest] = []
        for (_, rule), own, inner in zip(self.groups, state["names"], state["states"], strict=True):
            wanted = rule.plan(inner, round)
            train += matching(own, wanted.train)
            requests += [replace(r, match=tuple(matching(own, r.match))) for r in wanted.statistics]
        return RoundPlan(train=tuple(train), statistics=_joined([r for r in requests if r.match]))

    def combine(self, state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
        contracts.require_updates(updates)
        merged: dict[str, Tensor] = {}
        states: list[State] = []
        for (_, rule), own, inner in zip(self.groups, state["names"], state["states"], strict=True):
            mine = set(own)
            sent = [replace(u, params={n: t for n, t in u.params.items() if n in mine}) for u in updates]
            after, tensors = rule.combine(inner, {n: params[n] for n in own}, sent)
            states.append(after)
            merged |= tensors
        return {"names": state["names"], "states": states}, {name: merged[name] for name in params}


def from_config(sections: Sequence[Mapping[str, Any]]) -> Grouped:
    """The rule of a list such as `[{match: "adapter.*", name: lorm}, {match: "head.*", name: variance_weighted}]`."""
    rules = [config.build("aggregators", {k: v for k, v in s.items() if k != "match"}) for s in sections]
    return Grouped(tuple((str(s["match"]), rule) for s, rule in zip(sections, rules, strict=True)))


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
