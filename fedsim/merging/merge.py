"""Merges sources by any merging rule.

The module: merge(Δ_1, …, Δ_n; 1, …, 1; θ_0), what `server.merging.<rule>` makes of the sources' modules as consolidator `merged`
has it: a LoRA pair comes as its product, from θ_0 = 0, of any rank; other tensors number by number, from what all started from.
Every source has weight one. Statistics that the rule asks for are measured by a pass over each source's own training samples
through its own model.

The head: of tasks it is the run's own, which went on from task to task (and was made for the run's own merge, where a calibrator
repaired it). Of runs, row by row, the mean over those that learned the class: a run's row of a class that it never saw says
nothing, and does not count. `head="rule"` merges it with the module by the rule, where all runs learned the same classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedsim.core import rng
from fedsim.core.contracts import ChainedMerging, Member, Merging, require_members
from fedsim.core.defaults import torch_defaults
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import Tensors
from fedsim.core.names import HEAD, HEAD_UNKNOWN
from fedsim.core.tensors import LORA_A, LORA_B, lora_layers, require_finite, sum_in_order, with_prefix
from fedsim.merging.alike import shapes
from fedsim.merging.sources import Source, Sources
from fedsim.models.model import ADAPTER
from server.consolidators import merged as of_a_run
from server.merging import _products, _rule

HEADS = ("mean", "rule")


@dataclass(frozen=True)
class Merged:
    """What came out. deployed: `adapter.*` and `head.*`; rule: with every option written out; own: the rule is the one by which
    the run merged its tasks itself, from what its clients sent then. head: mean, rule, or the calibrator that solved it anew."""

    deployed: Tensors
    rule: Any
    head: str
    seed: int
    own: bool = False


def merge(sources: Sources, rule: str | Mapping[str, Any] | Merging, seed: int = 0, head: str = "mean") -> Merged:
    """One model of several.

    rule: as in a config, a name, a file or {name: …, its options}; or an object. seed: of what a rule draws.
    The rule by which a run merged its tasks itself gives what the run deployed, bit for bit.
    Raises ConfigError or PluginError for a rule or a head that cannot be had, and AggregationError for fewer models than the rule
    needs.
    """
    require_choice("head", head, HEADS)
    told = _rule.described(rule)
    merging, run = _rule.built(told), sources.run
    require_members(merging, [Member(source.who, {}) for source in sources.members])
    if head == "rule":
        _require_one_head(sources)
    if sources.of_tasks and _is_own(sources, merging):
        return Merged(run.deployed, told, head, seed, own=True)
    with torch_defaults(run.config.runtime.threads):
        shown = (ADAPTER,) if head == "mean" else (ADAPTER, HEAD)
        module = _module(sources, merging, seed, shown)
        whole = {**_head(sources), **module}
    require_finite(whole, "after the merge,")
    return Merged(whole, told, head, seed)


def remarks(sources: Sources, merged: Merged) -> list[str]:
    """What was done with the head, and whose merge it is."""
    calibrator = sources.run.config.server.calibrator
    if merged.head not in HEADS:
        return [f"The head was solved anew on the merged features, by calibrator {merged.head}."]
    if sources.of_tasks:
        told = ["The head is the run's own, which went on from task to task"]
        if calibrator is not None and not merged.own:
            told = [f"The head is the run's own, which calibrator {calibrator['name']} made for the run's own merge"]
        return [
            f"{told[0]}.",
            *(["The run itself merged its tasks by this rule: this is what it deployed."] if merged.own else []),
        ]
    if merged.head == "rule":
        return ["The head was merged by the rule, with the modules."]
    return ["Each class's row of the head is the mean over the runs that learned the class."]


def _module(sources: Sources, rule: Merging, seed: int, shown: Sequence[str]) -> dict[str, Tensor]:
    """What the rule makes of the tensors with these prefixes."""
    base = _base(sources.members, shown)
    if not base:
        return {}
    if isinstance(rule, ChainedMerging):
        return _typed(_chained(sources.members, rule, base, shown), base)
    members = []
    for source in sources.members:
        module = _chosen(source.params, shown)
        told = source.statistics(_products.asked(rule, module))
        members.append(Member(source.who, module, 1.0, told, source.key))
    return _typed(_products.merged(rule, members, base, rng.torch_stream(seed, "merge")), base)


def _chained(sources: Sequence[Source], rule: ChainedMerging, base: Tensors, shown: Sequence[str]) -> dict[str, Tensor]:
    """What a rule makes that merges part after part: before each, the sources' samples go through their own models with all parts
    before it as they were merged. Pairs are merged as whole products, of which nothing is cut."""
    modules = [_chosen(source.params, shown) for source in sources]
    members = [Member(s.who, _products.Products(m), key=s.key) for s, m in zip(sources, modules, strict=True)]
    look = rule.further(members, _products.Products(base), None, True)
    while look.statistics:
        requests = _products.of_pairs(look.statistics, base)
        done = _typed(_products.factored(look.merged, base), base)
        told = [_products.received(s.statistics(requests, done), m) for s, m in zip(sources, modules, strict=True)]
        seen = [replace(member, statistics=statistics) for member, statistics in zip(members, told, strict=True)]
        look = rule.further(seen, _products.Products(base), look.merged, True)
    return _products.factored(look.merged, base)


def _typed(merged: Tensors, base: Tensors) -> dict[str, Tensor]:
    """In the types of the base, which holds products in another one while they are merged."""
    return {name: merged[name].to(t.dtype) for name, t in base.items() if name in merged}


def _base(members: Sequence[Source], shown: Sequence[str]) -> dict[str, Tensor]:
    """θ_0: what all modules started from. Raises ConfigError where they did not start from the same, or grew."""
    first = members[0]
    bases = [_grounded(_chosen(source.start, shown)) for source in members]
    layout = shapes(bases[0])
    for source, base in zip(members, bases, strict=True):
        found = shapes(_chosen(source.params, shown))
        odd = [n for n in {**layout, **found} if layout.get(n) != found.get(n)]
        if odd:
            raise ConfigError(
                f"'{odd[0]}' of {source.who} is not as it started: the adapter grew, so that there is no θ_0 to merge from"
            )
        moved = [n for n, t in base.items() if not torch.equal(t, bases[0][n])]
        if moved:
            raise ConfigError(
                f"'{moved[0]}' of {source.who} and of {first.who} started from different numbers, so that they have no θ_0 in "
                "common: what can be merged are modules that start from zero (adapter lora, tangent), or from the same numbers"
            )
    return bases[0]


def _grounded(start: Tensors) -> dict[str, Tensor]:
    """A module that has learned nothing, with pairs of rank 0 where their product is zero."""
    out = dict(start)
    for p in lora_layers(start):
        a, b = p + LORA_A, p + LORA_B
        if not bool((start[b].double() @ start[a].double()).any()):
            out[a], out[b] = start[a][:0], start[b][:, :0]
    return out


def _chosen(params: Tensors, shown: Sequence[str]) -> dict[str, Tensor]:
    return {n: t for prefix in shown for n, t in with_prefix(params, prefix).items()}


def _head(sources: Sources) -> dict[str, Tensor]:
    """The head: a run's own, or the mean of its rows over the runs that learned the class; of a class that none learned, as the
    run's that gives the tasks."""
    own = with_prefix(sources.run.deployed, HEAD)
    if sources.of_tasks:
        return own
    out = {}
    for name, old in own.items():
        if name == HEAD_UNKNOWN:
            continue
        rows = old.double().clone()
        for c in sources.classes:
            told = [s.params[name][c].double() for s in sources.members if c in s.classes]
            rows[c] = sum_in_order(told) / len(told)
        out[name] = rows.to(old.dtype)
    return out


def _require_one_head(sources: Sources) -> None:
    if sources.of_tasks:
        raise ConfigError("--head rule: the tasks of a run have one head, which went on from task to task")
    for source in sources.members:
        if list(source.classes) != sources.classes:
            raise ConfigError(
                f"--head rule: {source.who} did not learn all classes that the others did, and has no rows for them"
            )


def _is_own(sources: Sources, rule: Merging) -> bool:
    consolidator = sources.run.consolidator
    return isinstance(consolidator, of_a_run.Consolidator) and consolidator.merging == rule
