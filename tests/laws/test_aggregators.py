"""The law suite itself: rules that are broken on purpose are caught, each by the law that it breaks.

Shapes: N samples, I inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fedsim import laws
from fedsim.core import contracts
from fedsim.core.config import build
from fedsim.core.errors import AggregationError
from fedsim.core.messages import ClientUpdate, RoundPlan, State, StatisticRequest, Tensors
from fedsim.laws import aggregators as rules
from server.aggregators.fedavg import Aggregator as FedAvg
from tests.laws.one import against
from tests.pages import median_rule

KIND = "aggregators"
Combine = Callable[[State, Tensors, Sequence[ClientUpdate]], tuple[State, Tensors]]


@dataclass(frozen=True)
class Rule(contracts.Aggregator):
    """A rule from functions."""

    merge: Combine
    asks: RoundPlan = field(default_factory=RoundPlan)
    begin: Any = None
    go_on: Any = None
    needs: int = 1

    @property
    def least(self) -> int:
        return self.needs

    def next_task(self, state: State, params: Tensors, task: int) -> State:
        return self.init(params, task) if self.go_on is None else self.go_on(state, params)

    def init(self, params: Tensors, task: int = 0) -> State:
        return {} if self.begin is None else self.begin(params)

    def plan(self, state: State, round: int) -> RoundPlan:
        return self.asks

    def combine(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        return self.merge(state, params, updates)


def fedavg(state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
    return FedAvg().combine(state, params, updates, torch.Generator())


def broken(rule: contracts.Aggregator) -> dict[str, str]:
    return {r.name: r.explanation for r in laws.check("aggregators", rule) if not r.ok}


def lost_tensor(state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
    state, out = fedavg(state, params, updates)
    return state, {n: t for n, t in out.items() if n != "head.bias"}


def widened(state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
    state, out = fedavg(state, params, updates)
    return state, {n: t.double() for n, t in out.items()}


def narrowed(state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
    state, out = fedavg(state, params, updates)
    return state, {n: t.float().to(t.dtype) for n, t in out.items()}


def not_finite(state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
    state, out = fedavg(state, params, updates)
    return state, {n: t.masked_fill(torch.arange(t.numel()).view_as(t) == 0, float("nan")) for n, t in out.items()}


def shrunk(state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
    state, out = fedavg(state, params, updates)
    return state, {n: 0.9 * t for n, t in out.items()}


def last_counts_most(state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
    """A running mean that halves what came before: order decides."""
    contracts.require_updates(updates)
    out = dict(updates[0].params)
    for u in updates[1:]:
        out = {n: (t + u.params[n]) / 2 for n, t in out.items()}
    return state, {**params, **out}


def in_place(state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
    _, out = fedavg(state, params, updates)
    for n, t in params.items():
        t.copy_(out[n])
    return state, dict(params)


def scaled_updates(state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
    state, out = fedavg(state, params, updates)
    updates[0].params["head.bias"].mul_(2)
    return state, out


def noisy(state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
    state, out = fedavg(state, params, updates)
    return state, {n: t + 1e-12 * torch.randn_like(t) for n, t in out.items()}


def blind_to_size(state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
    contracts.require_updates(updates)
    mean = {n: torch.stack([u.params[n] for u in updates]).mean(0) for n in updates[0].params}
    return state, {**params, **mean}


def list_only(state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
    return fedavg(state, params, updates.copy())  # type: ignore[attr-defined]


def zeros_without_data(state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
    if sum(u.num_samples for u in updates) == 0:
        return state, {n: torch.zeros_like(t) for n, t in params.items()}
    return fedavg(state, params, updates)


def value_error_without_data(state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
    if sum(u.num_samples for u in updates) == 0:
        raise ValueError("empty")
    return fedavg(state, params, updates)


@pytest.mark.parametrize(
    ("merge", "law", "says"),
    [
        (lost_tensor, "layout", r"lost \['head\.bias'\]"),
        (
            widened,
            "layout",
            r"round 0: 'adapter\.block\.0\.lora_A' is \(2, 6\) torch\.float64 and should be \(2, 6\) torch\.float32",
        ),
        (narrowed, "float64", "came out with the digits of float32"),
        (not_finite, "finite", r"round 0, 32 clients: 1 of 12 numbers of 'adapter\.block\.0\.lora_A' are NaN"),
        (shrunk, "fixed_point", r"should be .* \(off by "),
        (shrunk, "one_client", r"one client alone: '.*'\[\d, \d\] is .* and should be"),
        (last_counts_most, "order", "updates reversed"),
        (in_place, "no_mutation", "the params that it was given changed"),
        (scaled_updates, "no_mutation", "the updates that it was given changed"),
        (noisy, "deterministic", r"merged twice: '.*' is not the same to the bit"),
        (blind_to_size, "weights", "a client with twice the samples against the client sent twice"),
        (blind_to_size, "without_samples", r"one more client without samples: '.*'\[\d, \d\] is .* and should be"),
        (list_only, "any_sequence", r"raised AttributeError: .*test_aggregators\.py, line \d+"),
        (zeros_without_data, "no_data", "combine returned tensors instead of raising"),
        (value_error_without_data, "no_data", r"raised ValueError \(empty\), not AggregationError"),
    ],
)
def test_broken_rule_is_caught_by_its_law(merge: Combine, law: str, says: str) -> None:
    told = against(KIND, Rule(merge), law)
    assert re.search(says, told), told


@pytest.mark.parametrize(
    ("merge", "only"),
    [
        (in_place, {"no_mutation"}),
        (scaled_updates, {"no_mutation"}),
        (noisy, {"deterministic", "state_file", "any_sequence"}),
        (blind_to_size, {"weights", "without_samples"}),
        (last_counts_most, {"order", "weights", "without_samples"}),
        (list_only, {"any_sequence"}),
        (narrowed, {"float64", "fixed_point", "one_client"}),
        (zeros_without_data, {"no_data"}),
        (fedavg, set()),
    ],
)
def test_no_other_law_complains(merge: Combine, only: set[str]) -> None:
    assert set(broken(Rule(merge))) == only


def test_state_that_no_file_holds() -> None:
    found = broken(Rule(fedavg, begin=lambda params: {"now": Rule}))
    assert set(found) == {"state_file", "next_task"}
    assert "a file cannot hold the state" in found["state_file"]
    assert "dicts, lists, tuples, tensors" in found["state_file"]


def test_state_that_is_part_of_the_merge_is_seen() -> None:
    """Momentum, kept in the state and changed in place."""

    def momentum(state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
        _, out = fedavg({}, params, updates)
        for n, t in params.items():
            state[n].mul_(0.9).add_(out[n] - t)
        return state, {n: t + state[n] for n, t in params.items()}

    rule = Rule(momentum, begin=lambda params: {n: torch.zeros_like(t) for n, t in params.items()})
    assert "the state that it was given changed" in against(KIND, rule, "no_mutation")


def test_a_task_that_follows_begins_with_a_state_that_works() -> None:
    def counting(state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
        return {"rounds": state["rounds"] + 1}, fedavg({}, params, updates)[1]

    def begin(params: Tensors) -> State:
        return {"rounds": 0}

    def in_its_place(state: State, params: Tensors) -> State:
        state["rounds"] = 0
        return state

    assert broken(Rule(counting, begin=begin, go_on=lambda state, params: {"rounds": state["rounds"]})) == {}
    assert "the state that it was given changed" in against(KIND, Rule(counting, begin=begin, go_on=in_its_place), "next_task")
    assert "KeyError" in against(KIND, Rule(counting, begin=begin, go_on=lambda state, params: {}), "next_task")
    drawn = Rule(counting, begin=begin, go_on=lambda state, params: {"rounds": float(torch.rand(()))})
    assert "begun twice" in against(KIND, drawn, "next_task")
    unborn = Rule(counting, begin=begin, go_on=lambda state, params: {"rounds": 0, "rule": Rule})
    assert "a file cannot hold the state" in against(KIND, unborn, "next_task")


def test_rules_that_need_several_clients_say_how_many() -> None:
    """One that says four and takes three, or nobody's samples for somebody's; and one that says three and takes four."""

    def from_four(state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
        if sum(u.num_samples > 0 for u in updates) < 4:
            raise AggregationError("four or more")
        return fedavg(state, params, updates)

    def counts_all(state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
        return from_four(state, params, [replace(u, num_samples=max(1, u.num_samples)) for u in updates])

    assert broken(Rule(from_four, needs=4)) == {}
    assert "merges 3 clients" in against(KIND, Rule(fedavg, needs=4), "enough")
    assert "merges 3 clients with samples" in against(KIND, Rule(counts_all, needs=4), "enough")
    assert "four or more" in against(KIND, Rule(from_four, needs=3), "enough")
    assert "four or more" in against(KIND, Rule(from_four), "fixed_point")


def test_plan_that_trains_nothing_there_is() -> None:
    assert "which matches none of adapter.block.0.lora_A" in against(KIND, Rule(fedavg, RoundPlan(train=("heads.*",))), "plan")


def test_statistic_that_the_suite_cannot_make_up() -> None:
    asks = RoundPlan(statistics=(StatisticRequest("torsion"),))
    told = against(KIND, Rule(fedavg, asks), "plan")
    assert "asks for the statistic 'torsion' of *: statistic: unknown statistic 'torsion'" in told


def test_gram_that_there_is_not() -> None:
    asks = RoundPlan(statistics=(StatisticRequest("gram", ("*.lora_A",), {"form": "projected"}),))
    assert "there is no gram of form 'projected' for 'adapter.block.0.lora_A'" in against(KIND, Rule(fedavg, asks), "plan")


@dataclass(frozen=True)
class NotAdditive(FedAvg):
    """The largest client wins: no sum of contributions can say that."""

    def finish(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> tuple[State, Tensors]:
        state, out = super().finish(state, params, total, draw)
        return state, out

    def combine(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        contracts.require_updates(updates)
        return state, {**params, **max(updates, key=lambda u: u.num_samples).params}


@dataclass(frozen=True)
class Ragged(FedAvg):
    """Contributions of different names."""

    def lift(self, update: ClientUpdate) -> dict[str, Tensor]:
        return super().lift(update) | (
            {f"client/{update.client_id}": torch.zeros(1, dtype=torch.float64)} if update.client_id > 3 else {}
        )

    def combine(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        return FedAvg().combine(state, params, updates, draw)


@dataclass(frozen=True)
class Narrow(FedAvg):
    """Contributions in float32."""

    def lift(self, update: ClientUpdate) -> dict[str, Tensor]:
        return {n: t.float() for n, t in super().lift(update).items()}

    def combine(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        return FedAvg().combine(state, params, updates, draw)


@pytest.mark.parametrize("number", [1, 2, 10, 32])
@pytest.mark.parametrize(("law", "factor"), [("finite", float("nan")), ("fixed_point", 2.0)])
def test_a_rule_that_fails_with_some_number_of_clients(number: int, law: str, factor: float) -> None:
    def merge(state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
        state, out = fedavg(state, params, updates)
        return state, {n: factor * t for n, t in out.items()} if len(updates) == number else out

    (checked,) = (one for one in rules.LAWS if one.name == law)
    with pytest.raises(laws.LawBroken, match=rf"^round 0, (all )?{number} clients"):
        checked.check(Rule(merge))


def test_the_rule_of_the_readme_keeps_the_laws(tmp_path: Path) -> None:
    (tmp_path / "my_rule.py").write_text(median_rule())
    rule = build("aggregators", {"name": str(tmp_path / "my_rule.py")})
    assert broken(rule) == {}
    assert set(rule.exempt) == {"weights"}


def test_additive_rules_that_are_not() -> None:
    assert "summed in bundles of 11" in against(KIND, NotAdditive(), "additive")
    assert "lift gives different names or shapes" in against(KIND, Ragged(), "additive")
    assert "torch.float32: sums are kept in float64" in against(KIND, Narrow(), "additive")


@dataclass(frozen=True)
class Exempt(Rule):
    exempt: ClassVar[Mapping[str, str]] = {"weights": "every client counts once", "wieghts": "misspelt"}


def test_exemptions_carry_their_reason_and_must_name_a_law() -> None:
    results = {r.name: r for r in laws.check("aggregators", Exempt(blind_to_size))}
    assert results["weights"].ok
    assert results["weights"].exempt == "every client counts once"
    assert not results["wieghts"].ok
    assert "laws: plan, layout" in results["wieghts"].explanation


def test_every_law_has_its_own_name_and_a_statement() -> None:
    assert len({law.name for law in rules.LAWS}) == len(rules.LAWS)
    assert all(len(law.statement) > 20 for law in rules.LAWS)


@dataclass(frozen=True)
class Looking(Rule):
    """Looks further as often as it is told, each time with so many tensors merged."""

    merge: Combine = fedavg
    merged: Sequence[int] = ()

    def further(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], last: bool
    ) -> tuple[State, contracts.Further | None]:
        looks = state.get("looks", 0)
        if looks == len(self.merged):
            return state, None
        names = list(params)[: self.merged[looks]]
        return {"looks": looks + 1}, contracts.Further(
            {n: params[n] for n in names}, (StatisticRequest("gram", ("head.weight",)),)
        )


@pytest.mark.parametrize(
    ("merged", "says"),
    [((1, 2), ""), (range(200), "after 100 further looks it asks for one more"), ((2, 1), r"lora_B', is not in the next")],
)
def test_rules_that_look_further(merged: Sequence[int], says: str) -> None:
    found = broken(Looking(merged=merged))
    assert re.search(says, found["further"]) if says else not found


@dataclass(frozen=True)
class Leaving(FedAvg):
    """FedAvg that leaves something beneath."""

    left: Any = None

    def beneath(self, state: State) -> Tensors:
        return dict(self.left)


@pytest.mark.parametrize(
    ("left", "told"),
    [
        ({"adapter.block.0.lora_A": torch.ones(2, 6), "adapter.block.0.lora_B": torch.ones(3, 2)}, "does not say so"),
        ({"head.weight": torch.ones(5, 4)}, "does not say so"),
    ],
)
def test_what_is_left_beneath_must_be_said(left: Tensors, told: str) -> None:
    assert told in against(KIND, Leaving(left), "beneath")


@dataclass(frozen=True)
class Saying(Leaving):
    """The same, and says so."""

    products: ClassVar[bool] = True

    @property
    def traits(self) -> contracts.Traits:
        return contracts.Traits(gives={contracts.BENEATH})


@pytest.mark.parametrize(
    ("left", "told"),
    [
        ({"head.weight": torch.ones(5, 4)}, "'head.weight', left beneath, is no factor"),
        ({"adapter.block.0.lora_A": torch.ones(2, 6), "adapter.block.0.lora_B": torch.ones(3, 1)}, "beneath is (3, 1) by (2, 6)"),
    ],
)
def test_what_is_left_beneath_are_pairs_of_the_adapter(left: Tensors, told: str) -> None:
    assert told in against(KIND, Saying(left), "beneath")
