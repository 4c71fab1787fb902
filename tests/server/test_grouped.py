"""A rule per group of tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from fedsim import laws
from fedsim.core.config import build_aggregator
from fedsim.core.errors import AggregationError, ConfigError
from fedsim.core.messages import ClientUpdate, RoundPlan, State, StatisticRequest, Tensors
from fedsim.core.rng import torch_stream
from fedsim.laws import aggregators as rules
from fedsim.laws import made_up
from server.aggregators._grouped import Aggregator as Grouped
from server.aggregators.fairavg import Aggregator as FairAvg
from server.aggregators.fedatt import Aggregator as FedAtt
from server.aggregators.fedavg import Aggregator as FedAvg
from server.aggregators.lorm import Aggregator as Lorm
from server.aggregators.variance_weighted import Aggregator as VarianceWeighted

SECTIONS = [{"match": "adapter.*", "name": "lorm", "decay": 0.5}, {"match": "head.*", "name": "variance_weighted"}]


def test_every_rule_is_built_with_its_options() -> None:
    assert build_aggregator(SECTIONS) == Grouped((("adapter.*", Lorm(decay=0.5)), ("head.*", VarianceWeighted())))


def test_every_group_gets_what_its_rule_gives_alone() -> None:
    rule = build_aggregator(SECTIONS)
    for scene in rules.scenes(rule):
        _, out = rule.combine(scene.state, scene.params, scene.updates, torch.Generator())
        assert list(out) == list(scene.params)
        for prefix, alone in (("adapter.", Lorm(decay=0.5)), ("head.", VarianceWeighted())):
            own = {n: t for n, t in scene.params.items() if n.startswith(prefix)}
            sent = [replace(u, params={n: t for n, t in u.params.items() if n in own}) for u in scene.updates]
            for name, expected in alone.combine({}, own, sent, torch.Generator())[1].items():
                assert torch.equal(out[name], expected)


def test_plan_is_the_union_with_names_written_out() -> None:
    rule = build_aggregator(SECTIONS)
    state = rule.init(made_up.make_params())
    first, second = rule.plan(state, 0), rule.plan(state, 1)
    head = ("head.weight", "head.bias")
    assert first.train == ("adapter.block.0.lora_B", "adapter.block.1.lora_B", *head)
    assert second.train == ("adapter.block.0.lora_A", "adapter.block.1.lora_A", *head)
    subjects = ("adapter.block.0.lora_B", "adapter.block.1.lora_B")
    assert first.statistics == (
        StatisticRequest("gram", subjects, {"form": "projected", "decay": 0.5}, blended=True),
        StatisticRequest("class_moments", ("head.weight",), {"form": "scalar"}, blended=True),
    )


@dataclass(frozen=True)
class Telling(FedAvg):
    """Tells clients something."""

    what: str = "a"

    def plan(self, state: State, round: int) -> RoundPlan:
        return RoundPlan(context={self.what: {"x": torch.ones(1)}})


def test_clients_are_told_what_any_of_the_rules_tells() -> None:
    rule = Grouped(
        (
            ("adapter.*", Telling("a")),
            ("head.*", Telling("b")),
        )
    )
    assert rule.plan(rule.init(made_up.make_params()), 0).context.keys() == {"a", "b"}


def test_equal_requests_of_two_groups_are_one_pass() -> None:
    rule = build_aggregator([{"match": "*.0.*", "name": "lorm"}, {"match": "*", "name": "lorm"}])
    state = rule.init(made_up.make_params())
    asked = {r.options["form"]: r.match for r in rule.plan(state, 0).statistics}
    assert asked == {"projected": ("adapter.block.0.lora_B", "adapter.block.1.lora_B"), "full": ("head.weight",)}


def test_first_match_decides() -> None:
    rule = Grouped((("head.bias", FairAvg()), ("*", FedAvg())))
    scene = next(iter(rules.scenes(rule)))
    _, out = rule.combine(scene.state, scene.params, scene.updates, torch.Generator())
    for name, alone in (("head.bias", FairAvg()), ("head.weight", FedAvg())):
        assert torch.equal(out[name], alone.combine({}, scene.params, scene.updates, torch.Generator())[1][name])


def test_groups_keep_the_laws_of_their_rules() -> None:
    rule = build_aggregator([{"match": "adapter.*", "name": "lorm"}, {"match": "*", "name": "fedavg"}])
    assert [(r.name, r.explanation) for r in laws.check("aggregators", rule) if not r.ok] == []


def test_a_tensor_without_a_rule() -> None:
    with pytest.raises(
        ConfigError, match=r"no rule in server\.aggregator matches 'head\.weight': add a last entry \{match: \"\*\""
    ):
        build_aggregator(SECTIONS[:1]).init(made_up.make_params())


@pytest.mark.parametrize(
    "sections", [[*SECTIONS, {"match": "prompt.*", "name": "fedavg"}], [{"match": "*", "name": "fedavg"}, *SECTIONS]]
)
def test_a_rule_without_a_tensor(sections: list[dict[str, object]]) -> None:
    with pytest.raises(
        ConfigError, match=r"match '.*' in server\.aggregator decides for no tensor.*adapter\.block\.0\.lora_A.* and 2 more"
    ):
        build_aggregator(sections).init(made_up.make_params())


def test_no_updates() -> None:
    rule = build_aggregator(SECTIONS)
    with pytest.raises(AggregationError, match="no client sent an update"):
        rule.combine(rule.init(made_up.make_params()), made_up.make_params(), [], torch.Generator())


def test_what_one_rule_draws_does_not_move_the_draws_of_another() -> None:
    """The head's noise is the same beside a rule that draws none, and is not the adapter's."""
    head = {n: torch.zeros(40, 50, dtype=torch.float64) for n in ("head.weight",)}
    params = {"adapter.x": torch.zeros(40, 50, dtype=torch.float64), **head}
    updates = [ClientUpdate(0, 1, params)]

    def merged(noise: float) -> Tensors:
        rule = Grouped((("adapter.*", FedAtt(noise=noise)), ("head.*", FedAtt(noise=1.0))))
        return rule.combine(rule.init(params), params, updates, torch_stream(2, "draw"))[1]

    loud, quiet = merged(1.0), merged(0.0)
    assert torch.equal(loud["head.weight"], quiet["head.weight"]) and bool(loud["head.weight"].any())
    assert float((loud["adapter.x"] - loud["head.weight"]).abs().max()) > 1
    assert torch.equal(merged(1.0)["adapter.x"], loud["adapter.x"])
