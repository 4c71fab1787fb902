"""Flower's strategies as rules, against numbers worked out by hand, and what they must not do to the rest of the program."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("flwr")

from fedsim import laws
from fedsim.core.config import build, expand
from fedsim.core.errors import AggregationError, ConfigError, FedsimError
from fedsim.core.messages import ClientUpdate, State, Tensors
from server import flower
from server.aggregators.fedavg import Aggregator as FedAvg
from server.aggregators.flower import Aggregator


def clients(
    values: Sequence[float], samples: Sequence[int] | None = None, losses: Sequence[float] | None = None
) -> list[ClientUpdate]:
    """Updates of one number each."""
    samples, losses = samples or [1] * len(values), losses or [0.0] * len(values)
    return [
        ClientUpdate(k, n, {"head.bias": torch.tensor([v])}, metrics={"loss": loss})
        for k, (v, n, loss) in enumerate(zip(values, samples, losses, strict=True))
    ]


def merge(rule: Aggregator, start: float, updates: list[ClientUpdate], state: State = None) -> tuple[State, float]:
    params = {"head.bias": torch.tensor([start]), "head.untouched": torch.tensor([math.pi])}
    state, out = rule.combine(rule.init(params) if state is None else state, params, updates, torch.Generator())
    assert torch.equal(out["head.untouched"], params["head.untouched"])
    assert out["head.bias"].dtype == torch.float32
    return state, float(out["head.bias"])


@settings(max_examples=25)
@given(
    samples=st.lists(st.integers(1, 10_000), min_size=1, max_size=6),
    shape=st.sampled_from([(), (3,), (2, 5), (0, 4)]),
    seed=st.integers(0, 1000),
)
def test_flowers_fedavg_is_ours(samples: list[int], shape: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> dict[str, torch.Tensor]:
        return {n: torch.randn(shape, generator=generator) for n in ("adapter.x", "head.weight")}

    params: Tensors = {**draw(), "head.bias": torch.ones(2)}
    updates = [ClientUpdate(k, n, draw()) for k, n in enumerate(samples)]
    _, theirs = Aggregator("FedAvg").combine({}, params, updates, torch.Generator())
    _, ours = FedAvg().combine({}, params, updates, torch.Generator())
    torch.testing.assert_close(theirs, ours, rtol=2e-7, atol=1e-12)
    assert list(theirs) == list(params)


def test_median() -> None:
    """Middle value of three; mean of the two in the middle of four; numbers of samples play no part."""
    rule = Aggregator("FedMedian")
    assert merge(rule, 0.0, clients([1.0, 5.0, 2.0], [1, 1000, 1]))[1] == 2.0
    assert merge(rule, 0.0, clients([9.0, 1.0, 5.0, 2.0]))[1] == 3.5


def test_trimmed_mean() -> None:
    """A cut of 0.2 drops the smallest and the largest of five: (1 + 2 + 3) / 3."""
    assert merge(Aggregator("FedTrimmedAvg", {"beta": 0.2}), 0.0, clients([3.0, -50.0, 1.0, 100.0, 2.0]))[1] == 2.0


def test_krum() -> None:
    """Sum of squared distances to the two nearest: 0 -> 1 + 9, 1 -> 1 + 4, 3 -> 4 + 9, 10 -> 49 + 81. So 1 is chosen."""
    assert merge(Aggregator("Krum"), 0.0, clients([0.0, 1.0, 3.0, 10.0], [9, 1, 9, 9]))[1] == 1.0


def test_multikrum_weights_the_chosen_by_samples() -> None:
    """As above; 1 and 0 are chosen, with 3 and 1 samples: 3 / 4."""
    rule = Aggregator("MultiKrum", {"num_nodes_to_select": 2})
    assert merge(rule, 0.0, clients([0.0, 1.0, 3.0, 10.0], [1, 3, 9, 9]))[1] == 0.75


def test_bulyan() -> None:
    """Seven clients, one of them malicious: Krum keeps the five with the smallest sums of squares to their four nearest, which
    drops 9 and 100; the median of 0, 1, 2, 3, 4 is 2, and the mean of the three nearest to it is 2. Six clients are too few."""
    rule = Aggregator("Bulyan", {"num_malicious_nodes": 1})
    assert merge(rule, 0.0, clients([0.0, 1.0, 2.0, 3.0, 4.0, 9.0, 100.0]))[1] == 2.0
    with pytest.raises(AggregationError, match=r"no result for 6 updates: Insufficient replies.*at least 7 .*received 6"):
        merge(rule, 0.0, clients([0.0] * 6))


def test_qfedavg() -> None:
    """q = 1, L = 1 / client_learning_rate = 1, w = 0; losses F = 1, 3; clients at 1, 2.

    Δ_k = F_k L (w − w_k) = −1, −6;  h_k = q F_k^(q−1) |L (w − w_k)|² + L F_k^q = 1 + 1, 4 + 3;  w⁺ = w − ΣΔ / Σh = 7 / 9
    """
    rule = Aggregator("QFedAvg", {"client_learning_rate": 1.0, "q": 1.0})
    assert merge(rule, 0.0, clients([1.0, 2.0], losses=[1.0, 3.0]))[1] == pytest.approx(7 / 9, rel=1e-6)


def test_fedadam_over_two_rounds() -> None:
    """η = 0.1, β₁ = 0.9, β₂ = 0.99, τ = 0.001; Flower's bias correction has exponent t + 1.

    Round 1, w = 1, clients 2 and 4 with 1 and 3 samples: mean 3.5, Δ = 2.5
        m = 0.1 · 2.5 = 0.25                      v = 0.01 · 6.25 = 0.0625, √v = 0.25
        η₁ = 0.1 · √(1 − 0.9801) / (1 − 0.81) = 0.0742459
        w = 1 + 0.0742459 · 0.25 / 0.251 = 1.0739501
    Round 2, all clients at w + 1: Δ = 1
        m = 0.9 · 0.25 + 0.1 = 0.325              v = 0.99 · 0.0625 + 0.01 = 0.071875, √v = 0.2680951
        η₂ = 0.1 · √(1 − 0.970299) / (1 − 0.729) = 0.0635941
        w = 1.0739501 + 0.0635941 · 0.325 / 0.2690951 = 1.1507560
    Without its memory, round 2 would have m = 0.1, v = 0.01 and η₁: w = 1.1474608.
    """
    rule = Aggregator("FedAdam")
    state, first = merge(rule, 1.0, clients([2.0, 4.0], [1, 3]))
    assert first == pytest.approx(1.0739501, abs=2e-7)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    _, second = merge(rule, first, clients([first + 1, first + 1]), torch.load(file, weights_only=True))
    assert second == pytest.approx(1.1507560, abs=3e-7)
    assert merge(rule, first, clients([first + 1, first + 1]))[1] == pytest.approx(1.1474608, abs=3e-7)


def test_yogi_and_adagrad_over_two_rounds() -> None:
    """η = 0.1, τ = 0.001; Δ = 2, then Δ = 1.

    Adagrad (m = Δ): v = 4, then 5;  w = 0.1 · 2 / 2.001, then + 0.1 · 1 / (√5 + 0.001)
    Yogi (β₁ = 0.9, β₂ = 0.99): m = 0.2, then 0.28;  v = 0 + 0.01 · 4 = 0.04, then 0.04 + 0.01 · 1 = 0.05 (Δ² > v both times)
        w = 0.1 · 0.2 / (0.2 + 0.001), then + 0.1 · 0.28 / (√0.05 + 0.001)
    """
    for name, steps in {
        "FedAdagrad": (0.1 * 2 / 2.001, 0.1 / (math.sqrt(5) + 0.001)),
        "FedYogi": (0.1 * 0.2 / 0.201, 0.1 * 0.28 / (math.sqrt(0.05) + 0.001)),
    }.items():
        rule = Aggregator(name, {"eta": 0.1})
        state, first = merge(rule, 0.0, clients([2.0, 2.0]))
        _, second = merge(rule, first, clients([first + 1, first + 1]), state)
        assert first == pytest.approx(steps[0], rel=1e-6)
        assert second == pytest.approx(sum(steps), rel=1e-6)


def test_fedavgm_steps_from_the_parameters_it_is_given() -> None:
    """Momentum 0.5: round 1, w = 0, mean 1: velocity 1, w = 1. Then a calibrator moves w to 5; round 2, mean 6: velocity
    0.5 · 1 + 1 = 1.5, w = 6.5. (Flower's own loop would step from the 1 that it remembers.)"""
    rule = Aggregator("FedAvgM", {"server_momentum": 0.5})
    state, first = merge(rule, 0.0, clients([1.0, 1.0]))
    assert first == 1.0
    assert merge(rule, 5.0, clients([6.0, 6.0]), state)[1] == 6.5


def test_memory_starts_afresh_when_other_tensors_are_trained() -> None:
    rule = Aggregator("FedAdam")
    params = {"head.bias": torch.zeros(1), "head.weight": torch.zeros(1)}
    bias, weight = ([ClientUpdate(0, 1, {n: torch.ones(1)})] for n in params)
    state, _ = rule.combine({}, params, bias, torch.Generator())
    new, out = rule.combine(state, params, weight, torch.Generator())
    fresh, expected = rule.combine({}, params, weight, torch.Generator())
    assert new["round"] == fresh["round"] == 1
    assert torch.equal(out["head.weight"], expected["head.weight"])


def test_clients_without_samples_have_no_vote() -> None:
    """They send what they were sent, and a median would count it."""
    held = clients([1.0, 2.0, 9.0])
    nobody = [replace(u, num_samples=0) for u in clients([0.0, 0.0, 0.0])]
    assert merge(Aggregator("FedMedian"), 0.0, [*held, *nobody])[1] == 2.0


@pytest.mark.parametrize("name", sorted(set(flower.strategies()) - {e["strategy"] for e in Aggregator.examples}))
def test_strategies_keep_the_laws(name: str) -> None:
    """Those that are not among the class's examples, which the suite of all rules goes through."""
    needed: dict[str, dict[str, Any]] = {"Bulyan": {"num_malicious_nodes": 1}, "QFedAvg": {"client_learning_rate": 0.1}}
    assert [(r.name, r.explanation) for r in laws.check("aggregators", Aggregator(name, needed.get(name, {}))) if not r.ok] == []


def test_exemptions_belong_to_the_strategy() -> None:
    assert dict(Aggregator("FedAvg").exempt) == {}
    assert set(Aggregator("FedMedian").exempt) == {"weights"}
    assert set(Aggregator("FedAdam").exempt) == {"fixed_point", "one_client"}


def test_from_a_config() -> None:
    section = expand("aggregators", {"name": "flower", "strategy": "FedAdam", "options": {"eta": 0.5}}, "server.aggregator")
    assert section == {"name": "flower", "strategy": "FedAdam", "options": {"eta": 0.5}}
    rule = build("aggregators", section)
    assert isinstance(rule, Aggregator)
    assert rule.options == {"eta": 0.5}
    with pytest.raises(ConfigError, match="strategy must be given"):
        expand("aggregators", "flower", "server.aggregator")


@pytest.mark.parametrize(
    ("strategy", "options", "says"),
    [
        ("FedMedain", {}, r"strategy 'FedMedain' is not one of Flower's\. Did you mean 'FedMedian'\?"),
        ("FedProx", {}, "FedProx' of Flower cannot be a rule: its proximal term is the clients' business"),
        ("FedXgbBagging", {}, "trees of XGBoost"),
        ("DifferentialPrivacyServerSideFixedClipping", {}, "wraps another strategy"),
        ("FedAdam", {"eta_": 0.1}, r"options\.eta_ is not an option of Flower's FedAdam\. Did you mean 'eta"),
        ("FedAdam", {"eta": "big"}, r"options\.eta must be of type float, got 'big'"),
        ("Krum", {"num_malicious_nodes": 0.5}, r"options\.num_malicious_nodes must be of type int, got 0\.5"),
        ("Krum", {"num_malicious_nodes": True}, "must be of type int, got True"),
        ("FedAvg", {"fraction_train": 0.5}, r"options\.fraction_train cannot be set: server\.participation"),
        ("FedAvg", {"train_metrics_aggr_fn": "f"}, "a config holds no functions"),
        ("FedTrimmedAvg", {"beta": 0.5}, r"options do not suit Flower's FedTrimmedAvg: `beta` must be in the range \[0, 0\.5\)"),
        ("QFedAvg", {}, r"options\.client_learning_rate must be given for Flower's QFedAvg"),
    ],
)
def test_bad_options_are_one_clear_line(strategy: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as e:
        Aggregator(strategy, options)
    assert "\n" not in str(e.value)


def test_clients_that_trained_other_tensors() -> None:
    updates = [ClientUpdate(0, 1, {"a": torch.ones(1)}), ClientUpdate(4, 1, {"b": torch.ones(1)})]
    with pytest.raises(AggregationError, match="client 4 trained other tensors than client 0"):
        Aggregator("FedAvg").combine({}, {"a": torch.ones(1), "b": torch.ones(1)}, updates, torch.Generator())


def test_a_strategy_that_fails_is_named() -> None:
    """QFedAvg needs the clients' losses."""
    updates = [ClientUpdate(0, 1, {"a": torch.ones(1)})]
    rule = Aggregator("QFedAvg", {"client_learning_rate": 1.0})
    with pytest.raises(FedsimError, match="Flower's QFedAvg failed on 1 updates: Missing or invalid training loss"):
        rule.combine({}, {"a": torch.ones(1)}, updates, torch.Generator())


def test_flowers_log_is_silent_here_and_untouched_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("flwr")
    before = (logger.level, list(logger.filters), list(logger.handlers), logger.propagate)
    with caplog.at_level(logging.DEBUG):
        merge(Aggregator("FedAvg"), 0.0, clients([1.0, 2.0]))
        assert caplog.records == []
        logger.warning("a message of the user's own Flower code")
        assert [r.getMessage() for r in caplog.records] == ["a message of the user's own Flower code"]
    assert (logger.level, list(logger.filters), list(logger.handlers), logger.propagate) == before
