"""Tasks merged by any merging rule: `rule: ties`, or a file of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from fedsim.core import contracts
from fedsim.core.contracts import TOLD, ChainedMerging, Member, Past, TaskStart
from fedsim.core.errors import AggregationError, ConfigError
from fedsim.core.messages import RoundPlan, State, Tensors
from fedsim.core.tensors import with_prefix
from server.merging import _products, _rule
from server.merging.mean import mean_module


@dataclass(frozen=True)
class Consolidator(contracts.Consolidator):
    """Δ = merge(Δ_1, …, Δ_T; 1, …, 1; 0): what `server.merging.<rule>` makes of the modules of all tasks, each of which trained a
    fresh one on the pretrained backbone. The head goes on.

    A LoRA pair is merged as its product B_t A_t (m, d), since factors of different tasks have no directions in common. What comes
    of a rule that is linear, or works on pairs themselves, has rank T·r at most and is deployed so. What comes of another has
    full rank, and is deployed exactly, as a pair of rank min(m, d) of which one factor is the identity: that is as large as the
    layers themselves, each time that the model travels to clients for a pass. State holds the factors only.
    Tensors that are no LoRA pairs are merged number by number, if they start from zeros.
    During a task the uniform mean of past modules and the current one is deployed, and so it is at the end of a task until there
    are as many modules as the rule needs.

    rule: the name of one of `fedsim list merging` or the path of a file that defines a `Merging`, or {name: …, its options}.
    What the rule asks for comes from a pass at the task's end: Grams of a layer's inputs, through the mean of all modules so far,
    as those of its product. `mean` and `regmean` give what the consolidators of these names give, `regmean` without rank T·r.
    State: `past` modules, their `statistics`, and the `seed` of what the rule draws. Raises ConfigError for an adapter whose
    tensors start from anything else, and AggregationError when nobody sent statistics.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"rule": "mean"}, {"rule": "ties"})

    rule: str | dict[str, Any] | contracts.Merging

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", _rule.described(self.rule))
        if isinstance(self.merging, ChainedMerging):
            name = self.rule["name"] if isinstance(self.rule, dict) else type(self.merging).__module__
            raise ConfigError(f"{name} looks at the data of all that it merges, and those of past tasks are gone: {TOLD}")

    @cached_property
    def merging(self) -> contracts.Merging:
        """The rule itself."""
        return _rule.built(self.rule)

    @property
    def least(self) -> int:
        return self.merging.least

    def init(self) -> State:
        return {"past": [], "statistics": [], "seed": 0}

    def start_task(self, state: State, params: Tensors, fresh: Tensors, total: Tensors) -> TaskStart:
        started = {**params, **fresh}
        _require_zeros(with_prefix(started, "adapter."))
        return TaskStart(started, past=Past.mean(state["past"]))

    def plan(self, state: State, params: Tensors) -> RoundPlan | None:
        requests = _products.asked(self.merging, with_prefix(params, "adapter."))
        return RoundPlan(train=(), statistics=requests) if requests else None

    def end_task(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> State:
        module = with_prefix(params, "adapter.")
        for request in _products.asked(self.merging, module):
            _require_sent(request.name, request.match, total)
        sent = {key: t for key, t in total.items() if "/" in key}
        seed = int(torch.randint(2**63 - 1, (), generator=draw))
        return {"past": [*state["past"], module], "statistics": [*state["statistics"], sent], "seed": seed}

    def modules(self, state: State) -> Sequence[Tensors]:
        past: Sequence[Tensors] = state["past"]
        return past

    def deployed(self, state: State, params: Tensors, finished: bool) -> Tensors:
        if not finished:
            return {**params, **mean_module([*state["past"], with_prefix(params, "adapter.")])}
        return {**params, **self._merged(state)}

    def _merged(self, state: State) -> Tensors:
        past: list[Tensors] = state["past"]
        if not past[0] or (len(past) == 1 and "one_member" not in self.merging.exempt):
            return past[0]
        if len(past) < self.merging.least:
            return mean_module(past)
        told = zip(past, state["statistics"], strict=True)
        members = [Member(f"task {t}", module, 1.0, statistics) for t, (module, statistics) in enumerate(told)]
        draw = torch.Generator().manual_seed(state["seed"])
        merged = _products.merged(self.merging, members, _products.origin(past[0]), draw)
        return {name: merged[name].to(t.dtype) for name, t in past[0].items()}


def _require_zeros(fresh: Tensors) -> None:
    """Raise ConfigError unless a fresh module does nothing by being zero."""
    for name, tensor in _products.Products(fresh).items():
        if bool(tensor.any()):
            raise ConfigError(
                f"consolidator merged merges what tasks add to zeros, and '{name}' starts from other numbers: use adapter: lora "
                "or tangent, or consolidator: mean"
            )


def _require_sent(statistic: str, subjects: Sequence[str], total: Tensors) -> None:
    for subject in subjects:
        if not any(key.startswith(f"{statistic}.") and key.partition("/")[2] == subject for key in total):
            raise AggregationError(
                f"no client sent the {statistic} of '{subject}': the statistics pass at the task's end must reach the clients"
            )
