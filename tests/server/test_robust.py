"""Robust rules against Flower's strategies, numbers worked out by hand, and what a byzantine member may not do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim.core.config import build, expand
from fedsim.core.contracts import Member, Merging
from fedsim.core.errors import AggregationError, ConfigError
from fedsim.core.messages import ClientUpdate, Tensors
from fedsim.core.rng import torch_stream
from fedsim.simulation import prepare
from server.aggregators.merged import Aggregator as Merged
from server.consolidators.merged import Consolidator
from server.merging import _robust, bulyan
from tests.tiny import same_bits, tiny

SHAPES = {"adapter.x.lora_A": (2, 5), "head.weight": (3, 4), "head.bias": (3,), "empty": (0, 2), "one": ()}
RULES: dict[str, dict[str, Any]] = {
    "median": {},
    "trimmed_mean": {"share": 0.2},
    "krum": {},
    "multi_krum": {"keep": 3},
    "bulyan": {},
    "bulyan_once": {"choose": "once"},
}


def rule(name: str, **options: Any) -> Merging:
    """By the name of one of RULES, or of a plug-in."""
    plugin = {"multi_krum": "krum", "bulyan_once": "bulyan"}.get(name, name)
    made: Merging = build("merging", expand("merging", {"name": plugin, **RULES[name], **options}, "rule"))
    return made


def drawn(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {n: torch.randn(s, dtype=dtype, generator=torch_stream(seed, "robust", n)) for n, s in SHAPES.items()}


def members(count: int, dtype: torch.dtype = torch.float64) -> list[Member]:
    return [Member(f"client {k}", drawn(k + 1, dtype), float(k + 1)) for k in range(count)]


def points(*values: float, weights: Sequence[float] = ()) -> list[Member]:
    """Members of one number each."""
    weights = weights or [1.0] * len(values)
    return [
        Member(f"client {k}", {"x": torch.tensor([v], dtype=torch.float64)}, w)
        for k, (v, w) in enumerate(zip(values, weights, strict=True))
    ]


def merged(rule: Merging, several: Sequence[Member], base: Tensors | None = None) -> Tensors:
    base = base or {n: torch.zeros_like(t) for n, t in several[0].params.items()}
    return rule.merge(several, base, torch.Generator())


def value(rule: Merging, several: Sequence[Member]) -> float:
    return float(merged(rule, several)["x"])


def close(got: Tensors, want: Tensors, tolerance: float = 1e-12) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name].double(), tensor.double(), rtol=0, atol=tolerance)


# ---------------------------------------------------------------- oracles


@pytest.mark.parametrize(
    ("name", "options", "strategy", "theirs"),
    [
        ("median", {}, "FedMedian", {}),
        ("trimmed_mean", {"share": 0.3}, "FedTrimmedAvg", {"beta": 0.3}),
        ("krum", {"byzantine": 2}, "Krum", {"num_malicious_nodes": 2}),
        ("multi_krum", {"weights": "samples"}, "MultiKrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 3}),
        ("bulyan_once", {}, "Bulyan", {"num_malicious_nodes": 1}),
        ("bulyan_once", {"byzantine": 0}, "Bulyan", {"num_malicious_nodes": 0}),
    ],
)
@pytest.mark.parametrize("count", [8, 11])
def test_flower_merges_alike(name: str, options: dict[str, Any], strategy: str, theirs: dict[str, Any], count: int) -> None:
    flower = pytest.importorskip("server.flower")
    start = drawn(0)
    updates = [ClientUpdate(k, k + 1, m.params) for k, m in enumerate(members(count))]
    _, want = flower.Aggregator(strategy, theirs).combine({}, start, updates, torch.Generator())
    _, got = Merged(rule(name, **options)).combine({}, start, updates, torch.Generator())
    close(got, want)


def test_medians_and_trimmed_means_are_numpys_and_scipys() -> None:
    several = members(7)
    for name in SHAPES:
        rows = np.stack([m.params[name].numpy() for m in several])
        for count in (6, 7):
            got = merged(rule("median"), several[:count])[name]
            np.testing.assert_allclose(got.numpy(), np.median(rows[:count], axis=0), rtol=0, atol=1e-15)
        scipy = pytest.importorskip("scipy.stats")
        if rows.size:
            want = scipy.trim_mean(rows, 0.3, axis=0)
            np.testing.assert_allclose(merged(rule("trimmed_mean", share=0.3), several)[name].numpy(), want, rtol=0, atol=1e-14)


def test_the_share_is_that_which_is_written() -> None:
    """0.29 · 100 is 28.999… in binary; ⌊0.2 · 4⌋ is nobody."""
    several = points(*[0.0] * 71, *[1e9] * 29)
    assert value(rule("trimmed_mean", share=0.29), several) == 0.0
    assert value(rule("trimmed_mean", share=0.28), several) > 1e6
    assert value(rule("trimmed_mean"), points(0, 1, 2, 9)) == 3.0


def test_krum_by_hand() -> None:
    """Of 0, 1, 2, 3, 10 with f = 1 each has two nearest: scores 5, 2, 2, 5, 113. The first of the smallest is taken; of two, the
    mean, or with weights 3 and 1 by samples."""
    several = points(0, 1, 2, 3, 10, weights=(9, 3, 1, 9, 9))
    distances = _robust.squared_distances(several, {"x": torch.zeros(1)})
    assert distances[0].tolist() == [0, 1, 4, 9, 100]
    assert _robust.krum_scores(distances, 1).tolist() == [5, 2, 2, 5, 113]
    assert value(rule("krum"), several) == 1.0
    assert value(rule("krum", keep=2), several) == 1.5
    assert value(rule("krum", keep=2, weights="samples"), several) == 1.25
    assert value(rule("krum", keep=4), several) == 1.5, "all but the outlier"


def test_bulyan_by_hand() -> None:
    """0, 1, 2, 3, 4, 9, 100 with f = 1: five are chosen, and of these the three nearest to their median are averaged.

    Scores by four, three, two, one, one nearest of those that are left (7, 6, 5, 4, 3 of them): 2 is chosen from all (1 + 1 + 4 +
    4). Left 0, 1, 3, 4, 9, 100: 1 + 9 + 16, 1 + 4 + 9, 1 + 4 + 9, 1 + 9 + 16, 25 + 36 + 64, …: of 1 and 3 the totals are 1 + 4 +
    9 + 64 + 9801 and 9 + 4 + 1 + 36 + 9409, so it is 3. Left 0, 1, 4, 9, 100: 17, 10, 25, …: 1. Left 0, 4, 9, 100: one nearest,
    16, 16, 25, …: 0's total is 10 097, 4's 9 257: 4. Left 0, 9, 100: 81, 81: 9's total is 8 362, 0's 10 081: 9. Chosen are 1, 2,
    3, 4, 9, whose median is 3: (2 + 3 + 4) / 3. At once the five lowest scores are those of 0 to 4: (1 + 2 + 3) / 3.
    """
    several = points(0, 1, 2, 3, 4, 9, 100)
    assert value(rule("bulyan"), several) == 3.0
    assert value(rule("bulyan_once"), several) == 2.0


def test_distances_are_those_of_all_tensors_together() -> None:
    several = members(6, torch.float32)
    flat = torch.stack([torch.cat([t.double().flatten() for t in m.params.values()]) for m in several])
    got = _robust.squared_distances(several, drawn(0))
    torch.testing.assert_close(got, torch.cdist(flat, flat).square(), rtol=1e-12, atol=1e-12)
    assert torch.equal(got, got.T) and not got.diagonal().any()


@settings(max_examples=60)
@given(data=st.data(), f=st.integers(0, 3), extra=st.integers(0, 4))
def test_bulyans_mean_is_that_of_the_nearest_numbers(data: st.DataObject, f: int, extra: int) -> None:
    """Against sorting by distance; whole numbers, so that many are equal, and as far on one side as on the other: then the lower
    number counts."""
    chosen = 2 * f + 3 + extra
    values = data.draw(st.lists(st.integers(-9, 9), min_size=chosen, max_size=chosen))
    nearest = sorted(values, key=lambda v: (abs(v - np.median(values)), v))[: chosen - 2 * f]
    got = bulyan._nearest_to_median(torch.tensor(sorted(values))[:, None], chosen - 2 * f)
    assert float(got) == pytest.approx(float(np.mean(nearest)), abs=1e-12)


# ---------------------------------------------------------------- what every robust rule promises


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("outlier", [1e9, -1e9])
def test_an_outlier_leaves_the_result_among_the_honest(name: str, outlier: float) -> None:
    """Number by number, wherever the outlier stands; the mean is carried away."""
    base, honest = drawn(0), members(6)
    for place in (0, 3, 6):
        several = [*honest]
        several.insert(place, Member("byzantine", {n: t + outlier for n, t in base.items()}))
        out = merged(rule(name), several, base)
        for n in SHAPES:
            rows = torch.stack([m.params[n] for m in honest])
            assert bool(((out[n] >= rows.amin(0)) & (out[n] <= rows.amax(0))).all())
        assert float(merged(build("merging", {"name": "mean"}), several, base)["one"].abs()) > 1e6


@pytest.mark.parametrize("name", RULES)
def test_the_order_and_the_weights_do_not_matter(name: str) -> None:
    several, base = members(8), drawn(0)
    want = merged(rule(name), several, base)
    for order in itertools.islice(itertools.permutations(range(8)), 0, 40000, 5001):
        close(merged(rule(name), [several[k] for k in order], base), want)
    heavier = [Member(m.who, m.params, 100.0 / m.weight) for m in several]
    assert same_bits(dict(merged(rule(name), heavier, base)), dict(want))


@pytest.mark.parametrize("name", RULES)
def test_the_result_moves_and_scales_with_the_members(name: str) -> None:
    several, base = members(8), drawn(0)
    want, shift = merged(rule(name), several, base), drawn(99)

    def changed(scale: float) -> Tensors:
        moved = [Member(m.who, {n: scale * t + shift[n] for n, t in m.params.items()}) for m in several]
        return merged(rule(name), moved, {n: scale * t + shift[n] for n, t in base.items()})

    for scale in (1.0, -3.0):
        close(changed(scale), {n: scale * t + shift[n] for n, t in want.items()}, 1e-11)


def test_krums_result_is_one_of_its_members_and_a_mean_of_all_the_mean() -> None:
    several, base = members(7), drawn(0)
    out = merged(rule("krum", byzantine=2), several, base)
    assert sum(all(torch.equal(out[n], m.params[n]) for n in base) for m in several) == 1
    mean = {n: torch.stack([m.params[n] for m in several]).mean(0) for n in base}
    close(merged(rule("krum", byzantine=0, keep=7), several, base), mean)
    close(merged(rule("trimmed_mean", share=0.0), several, base), mean)
    close(merged(rule("bulyan", byzantine=0), several, base), mean)


@pytest.mark.parametrize("name", RULES)
def test_tensors_are_cut_into_columns_without_a_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    several, base = members(8, torch.float32), drawn(0, torch.float32)
    want = merged(rule(name), several, base)
    monkeypatch.setattr(_robust, "TOGETHER", 24)
    got = merged(rule(name), several, base)
    close(got, want, 1e-12)
    assert name == "krum" or all(t.dtype == torch.float64 for n, t in got.items() if t.numel() and name != "multi_krum")


def test_over_products_it_is_products_that_lie_close_to_each_other() -> None:
    """Of pairs (B / g, g A) the product knows no g; factors are torn apart by it. Products 0, 1, 2, 3, 10: Krum takes 1, the
    median is 2."""
    start = {
        "adapter.x.lora_A": torch.ones(1, 2, dtype=torch.float64),
        "adapter.x.lora_B": torch.zeros(3, 1, dtype=torch.float64),
    }
    scales = (1.0, 50.0, 1.0, -1.0, 1.0)
    updates = []
    for k, (v, g) in enumerate(zip((0.0, 1.0, 2.0, 3.0, 10.0), scales, strict=True)):
        own = {"adapter.x.lora_A": g * start["adapter.x.lora_A"], "adapter.x.lora_B": torch.full((3, 1), v / g).double()}
        updates.append(ClientUpdate(k, 1, own))
    for name, want in (("krum", 1.0), ("median", 2.0), ("trimmed_mean", 2.0)):
        made = Merged(rule(name), pairs="products")
        _, out = made.combine(made.init(start), start, updates, torch.Generator())
        torch.testing.assert_close(out["adapter.x.lora_B"] @ out["adapter.x.lora_A"], torch.full((3, 2), want).double())
    _, factors = Merged(rule("krum"), pairs="factors").combine({}, start, updates, torch.Generator())
    assert not torch.allclose(factors["adapter.x.lora_B"] @ factors["adapter.x.lora_A"], torch.ones(3, 2).double())


# ---------------------------------------------------------------- too few


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [
        ("median", {}, 1),
        ("trimmed_mean", {}, 1),
        ("krum", {"byzantine": 2}, 7),
        ("krum", {"byzantine": 1, "keep": 6}, 7),
        ("bulyan", {"byzantine": 2}, 11),
    ],
)
def test_how_many_members_a_rule_needs(name: str, options: dict[str, Any], least: int) -> None:
    made = rule(name, **options)
    assert made.least == Merged(made).least == least
    merged(made, members(least))
    if least > 1:
        with pytest.raises(AggregationError, match=rf"{name} needs at least {least} models to merge, but .* only {least - 1}"):
            merged(made, members(least - 1))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["server.aggregator={name: merged, rule: krum}"], r"merged needs at least 5 clients with samples .* round 0 has 3"),
        (
            ["server.aggregator=[{match: 'head.*', name: merged, rule: bulyan}, {match: '*', name: fedavg}]"],
            r"merged \+ fedavg needs at least 7 clients with samples",
        ),
        (
            ["server.aggregator={name: merged, rule: {name: krum, byzantine: 0}}", "server.participation=0.67"],
            r"at least 3 clients with samples .* has 2 \(2 take part\)",
        ),
        (
            ["server.aggregator={name: flower, strategy: Bulyan, options: {num_malicious_nodes: 1}}"],
            r"flower needs at least 7 clients",
        ),
        (["server.consolidator={name: merged, rule: krum}"], r"consolidator merged needs at least 5 tasks, but the stream has 2"),
    ],
)
def test_too_few_are_refused_before_any_training(overrides: list[str], says: str, tmp_path: Path) -> None:
    if "flower" in overrides[0]:
        pytest.importorskip("flwr")
    base = ["server.aggregator=fedavg", "server.consolidator=none"]
    with pytest.raises(ConfigError, match=says) as told:
        prepare(tiny(*base, *overrides, output=tmp_path))
    assert "\n" not in str(told.value)


def test_too_few_that_came_back_are_one_line() -> None:
    """Clients without samples do not count."""
    updates = [ClientUpdate(k, int(k != 2), m.params) for k, m in enumerate(members(5))]
    with pytest.raises(AggregationError, match=r"krum needs at least 5 .* only 4 \(client 0, client 1, client 3, client 4\)"):
        Merged(rule("krum")).combine({}, drawn(0), updates, torch.Generator())


def test_over_tasks_the_mean_is_deployed_until_there_are_enough() -> None:
    """Modules of one tensor that starts from zeros: after four tasks their mean, after five Krum's choice."""
    consolidator, start = Consolidator(rule("krum")), {"adapter.x": torch.zeros(2, 3, dtype=torch.float64)}
    state, modules = consolidator.init(), [{"adapter.x": drawn(k)["adapter.x.lora_A"][:, :3]} for k in range(5)]
    for task, module in enumerate(modules):
        consolidator.start_task(state, start, start, {})
        state = consolidator.end_task(state, module, {}, torch.Generator())
        deployed = consolidator.deployed(state, module, finished=True)["adapter.x"]
        if task < 4:
            torch.testing.assert_close(deployed, torch.stack([m["adapter.x"] for m in modules[: task + 1]]).mean(0))
    assert sum(torch.equal(deployed, m["adapter.x"]) for m in modules) == 1


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("trimmed_mean", {"share": 0.5}, r"rule\.share must be in \[0, 0\.5\), got 0\.5"),
        ("trimmed_mean", {"share": -0.1}, r"share must be in \[0, 0\.5\)"),
        ("krum", {"byzantine": -1}, "byzantine must not be negative, got -1"),
        ("krum", {"keep": 0}, "keep must be at least 1, got 0"),
        ("krum", {"weights": "size"}, "weights 'size' is unknown"),
        ("bulyan", {"byzantine": -1}, "byzantine must not be negative"),
        ("bulyan", {"choose": "twice"}, "choose 'twice' is unknown"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        rule(name, **options)
