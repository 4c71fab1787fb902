"""Sources that are collected, composed and left out: by hand, and in whole runs against runs without the client.

Shapes: C classes, D features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.core.config import build
from fedsim.core.errors import AggregationError, ConfigError
from fedsim.core.messages import ClientUpdate, num_bytes
from fedsim.simulation import run
from fedsim.unlearning.finished import FinishedRun
from fedsim.unlearning.remove import remove
from server.aggregators.collect import Aggregator as Collect
from server.consolidators.compose import Consolidator as Compose
from tests.tiny import final_state, same_bits, tiny

C, D = 4, 3
PROMPT = "adapter.layers.0.apt_prompt"
APT = ("adapter=apt", "head=mixture", "server.aggregator=collect", "server.consolidator=compose", "server.rounds=1")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def params() -> dict[str, Tensor]:
    return {PROMPT: torch.zeros(1, D), "head.weight": torch.zeros(C, D), "head.bias": torch.zeros(C)}


def samples(client: int) -> tuple[Tensor, Tensor]:
    """Features (n, D) and labels of a client."""
    labels = torch.tensor([[0, 1, 1, 1], [3, 3, 0], [2]][client % 3])
    return 2.0 + draw(len(labels), D, seed=50 + client), labels


def update(client: int, form: str = "full", empty: bool = False) -> ClientUpdate:
    features, labels = samples(client)
    if empty:
        features, labels = features[:0], labels[:0]
    count = torch.bincount(labels, minlength=C).float()
    rows = [features[labels == c] for c in range(C) if count[c]]
    moments = {"count": count}
    if form == "full":
        moments["mean"] = torch.stack([r.mean(0) for r in rows]) if rows else torch.zeros(0, D)
        moments["variance"] = torch.stack([r.var(0, correction=min(1, len(r) - 1)) for r in rows]) if rows else torch.zeros(0, D)
    sent = {n: draw(*t.shape, seed=100 * client + i) for i, (n, t) in enumerate(params().items())}
    return ClientUpdate(client, len(labels), sent, {f"class_moments.{n}/head.weight": t for n, t in moments.items()})


def collected(*clients: int, rule: Collect | None = None) -> dict[str, Tensor]:
    """What is deployed after a round of these clients."""
    rule, form = rule or Collect(), "scalar" if rule is not None and rule.weighting == "uniform" else "full"
    state, after = rule.combine(rule.init(params()), params(), [update(c, form) for c in clients], torch.Generator())
    return dict(rule.deployed(state, after))


# ---------------------------------------------------------------- collecting


def test_clients_are_kept_side_by_side_and_the_parameters_stay() -> None:
    rule, start = Collect(), params()
    assert rule.deployed(rule.init(start), start) is start
    state, after = rule.combine(
        rule.init(start), start, [update(7), update(1), update(3, empty=True), update(5)], torch.Generator()
    )
    assert after is start
    out = rule.deployed(state, after)
    assert out["source.client"].tolist() == [1, 5, 7]
    for s, client in enumerate([1, 5, 7]):
        assert all(torch.equal(out[n][s], t) for n, t in update(client).params.items())
        assert torch.equal(out["head.count"][s], update(client).statistics["class_moments.count/head.weight"])


def test_what_is_not_trained_is_as_it_was() -> None:
    only_head = ClientUpdate(0, 4, {"head.weight": torch.ones(C, D)}, update(0).statistics)
    rule = Collect()
    state, after = rule.combine({}, params(), [only_head], torch.Generator())
    out = rule.deployed(state, after)
    assert torch.equal(out[PROMPT][0], params()[PROMPT])
    assert torch.equal(out["head.weight"][0], torch.ones(C, D))


def test_prototypes_and_scale_are_those_of_the_clients_features() -> None:
    out = collected(0, 1, 2, rule=Collect(temperature=0.7))
    for client in range(3):
        features, labels = samples(client)
        scale = 0.7 * (features - features.mean(0)).square().sum(1).mean()
        torch.testing.assert_close(out["head.scale"][client], scale, rtol=1e-5, atol=1e-6)
        for c in range(C):
            want = features[labels == c].mean(0) if (labels == c).any() else torch.zeros(D)
            torch.testing.assert_close(out["head.prototypes"][client, c], want)
    assert out["head.scale"][2] == 0  # of a single sample


def test_uniform_weights_cost_no_means() -> None:
    rule = Collect(weighting="uniform")
    for weighting, form in (("uniform", "scalar"), ("prototypes", "full")):
        (request,) = Collect(weighting=weighting).plan({}, 0).statistics
        assert (request.name, request.match, request.options) == ("class_moments", ("head.weight",), {"form": form})
    assert set(collected(0, 1)) - set(collected(0, 1, rule=rule)) == {"head.prototypes", "head.scale"}


def test_a_clients_source_does_not_depend_on_the_other_clients() -> None:
    alone, among = collected(4), collected(0, 4, 8)
    assert same_bits(alone, {n: t[1:2] for n, t in among.items()})


def test_bad_options_and_missing_parts() -> None:
    with pytest.raises(ConfigError, match=r"weighting 'prototype' is unknown\. Did you mean 'prototypes'"):
        Collect(weighting="prototype")
    with pytest.raises(ConfigError, match="temperature must be above 0"):
        Collect(temperature=0.0)
    with pytest.raises(ConfigError, match=r"'head\.weight' is not among its tensors"):
        Collect().init({PROMPT: torch.zeros(1, D)})
    with pytest.raises(AggregationError, match=r"client 2 sent no 'class_moments\.mean/head\.weight'"):
        Collect().combine({}, params(), [update(2, "scalar")], torch.Generator())


# ---------------------------------------------------------------- composing


def composed(tasks: list[dict[str, Tensor]]) -> Any:
    rule = Compose()
    state = rule.init()
    for task, sources in enumerate(tasks):
        before = state
        want = rule.deployed(state, sources, finished=False)
        state = rule.end_task(state, sources, {}, torch.Generator())
        assert same_bits(dict(rule.deployed(state, params(), finished=True)), dict(want))
        assert before["tasks"] == task
    return state


def test_all_sources_of_all_tasks_are_deployed() -> None:
    first, second = collected(0, 1), collected(1, 2, 3)
    out = Compose().deployed(composed([first, second]), params(), finished=True)
    assert out["source.client"].tolist() == [0, 1, 1, 2, 3]
    assert out["source.task"].tolist() == [0, 0, 1, 1, 1]
    for name, tensor in first.items():
        assert torch.equal(out[name], torch.cat([tensor, second[name]]))


def test_every_task_starts_anew() -> None:
    fresh = {PROMPT: torch.ones(1, D)}
    begun = Compose().start_task(composed([collected(0)]), params(), fresh, {}).params
    assert torch.equal(begun[PROMPT], fresh[PROMPT])
    assert not begun["head.weight"].any()


@pytest.mark.parametrize(
    ("clients", "tasks", "left"),
    [({1}, {0, 1}, [[0], [2, 3]]), ({1}, {1}, [[0, 1], [2, 3]]), ({2, 3}, {0, 1}, [[0, 1], [1]]), ({0, 1}, {0}, [[], [1, 2, 3]])],
)
def test_a_source_that_is_left_out_is_as_if_it_had_never_been(clients: set[int], tasks: set[int], left: list[list[int]]) -> None:
    rule, state = Compose(), composed([collected(0, 1), collected(1, 2, 3)])
    before = {n: t.clone() for n, t in state["sources"].items()}
    got = rule.deployed(rule.without(state, clients, tasks), params(), finished=True)
    parts = [collected(*c) | {"source.task": torch.full((len(c),), t)} for t, c in enumerate(left) if c]
    assert same_bits(dict(got), {n: torch.cat([p[n] for p in parts]) for n in parts[0]})
    assert same_bits(state["sources"], before)


def test_leaving_out_nobody_and_everybody() -> None:
    rule, state = Compose(), composed([collected(0, 1)])
    assert same_bits(rule.without(state, {9}, {0}), state)
    assert rule.without(rule.init(), {0}, {0}) == rule.init()
    with pytest.raises(ConfigError, match="no source is left"):
        rule.without(state, {0, 1}, {0, 1})


def test_a_merged_model_is_no_source() -> None:
    with pytest.raises(AggregationError, match="compose takes one source per client"):
        Compose().end_task(Compose().init(), params(), {}, torch.Generator())


# ---------------------------------------------------------------- whole runs


def source_by_source(finished: FinishedRun, sources: dict[str, Tensor]) -> list[float]:
    """Percent right on every task: probabilities of one source after the other, each in a model of its own."""
    model, spec = finished.parts.model, finished.parts.spec
    percents = []
    for task in finished.tasks:
        at = spec.test_of(task)
        labels = torch.from_numpy(spec.test.labels[at])
        chance, weight = torch.zeros(len(at), 6, dtype=torch.float64), torch.zeros(len(at), 1, dtype=torch.float64)
        for s in range(len(sources["source.client"])):
            own = {n: t[s] for n, t in sources.items()}
            with torch.no_grad(), model.applied(own):
                f = model.features({"pixel_values": torch.from_numpy(spec.test.inputs["pixel_values"][at])}).double()
            z = f @ own["head.weight"].double().T + own["head.bias"]
            p = z.masked_fill(own["head.count"] == 0, -torch.inf).softmax(1)
            w = torch.ones_like(weight)
            if "head.prototypes" in own:
                means = own["head.prototypes"][own["head.count"] > 0].double()
                w = (-(f[:, None] - means).square().sum(2).amin(1, keepdim=True) / own["head.scale"]).exp()
            chance, weight = chance + w * p, weight + w
        percents.append(100 * float(((chance / weight).argmax(1) == labels).double().mean()))
    return percents


@pytest.mark.parametrize("weighting", ["prototypes", "uniform"])
def test_a_whole_run(weighting: str, tmp_path: Path) -> None:
    config = tiny(*APT, f"server.aggregator={{name: collect, weighting: {weighting}}}", "client.epochs=2", output=tmp_path)
    results = run(config)
    state = final_state(results.path, config)
    sources = state.consolidator["sources"]
    assert sources["source.client"].tolist() == [0, 1, 2] * 2
    assert sources["source.task"].tolist() == [0] * 3 + [1] * 3
    assert sources["adapter.layers.1.apt_memory"].shape == (6, 5, 16)
    assert not state.params["head.weight"].any()
    assert not sources["head.weight"][:3, 3:].any()  # a source's head has moved for its task's classes alone
    assert sources["head.weight"][:3, :3].any()
    assert len({tuple(t.flatten().tolist()) for t in sources["head.weight"]}) == 6
    np.testing.assert_allclose(results.accuracy[1], source_by_source(FinishedRun(results.path), sources))
    up = results.costs["bytes"]["up"]
    assert up["adapter"] == num_bytes({n: t for n, t in sources.items() if n.startswith("adapter.")})
    assert up["head"] == num_bytes({n: sources[n] for n in ("head.weight", "head.bias")})
    held = int((sources["head.count"] > 0).sum())
    assert up["statistics"] == 4 * (6 * 6 + (2 * 16 * held if weighting == "prototypes" else 6 * 6))


def test_forgetting_a_client_is_having_trained_without_it(tmp_path: Path) -> None:
    """Sources know nothing of each other: what is left has the bits of a run in which the client never took part."""
    config, without = (tiny(*APT, *more, output=tmp_path) for more in ((), ("server.without=[1]",)))
    whole, fewer = (FinishedRun(run(c).path) for c in (config, without))
    removed = remove(whole, [1])
    assert removed.way == "drop"
    assert same_bits(dict(removed.deployed), dict(fewer.deployed))
    assert removed.deployed["source.client"].tolist() == [0, 2, 0, 2]
    one_task = remove(whole, [1], tasks=[1]).deployed
    assert one_task["source.client"].tolist() == [0, 1, 2, 0, 2]


def test_averaged_prompts_are_an_ordinary_adapter(tmp_path: Path) -> None:
    config = tiny("adapter=apt", "server.aggregator=fedavg", "server.consolidator=mean", output=tmp_path)
    state = final_state(run(config).path, config)
    assert state.params["adapter.layers.0.apt_prompt"].shape == (1, 16)
    assert state.params["adapter.layers.0.apt_prompt"].any()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("server.rounds=2", "aggregator collect takes one round per task, but server.rounds is 2"),
        ("server.consolidator=mean", "use consolidator: compose"),
        ("server.aggregator=fedavg", "use aggregator: collect"),
        ("adapter=lora", "use adapter: apt"),
    ],
)
def test_parts_that_do_not_suit_sources(more: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tiny(*APT, more))


def test_the_rules_are_found_by_name() -> None:
    assert isinstance(build("aggregators", {"name": "collect", "temperature": 1.0}), Collect)
    assert isinstance(build("consolidators", {"name": "compose"}), Compose)
