"""Weights from the margins between prototypes, against dense computations on the samples themselves.

Shapes: N samples, C classes, D features.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim.core.config import build
from fedsim.core.errors import AggregationError, ConfigError
from fedsim.core.messages import ClientUpdate, Tensors
from fedsim.core.rng import torch_stream
from fedsim.laws import made_up
from fedsim.simulation import run
from server.aggregators.fairavg import Aggregator as FairAvg
from server.aggregators.fedavg import Aggregator as FedAvg
from server.aggregators.prototype_margin import Aggregator as PrototypeMargin
from tests.tiny import tiny

C, D = made_up.CLASSES, 4
OPTIONS = [(distance, deviation) for distance in ("euclidean", "cosine") for deviation in ("ratio", "difference")]


@dataclass(frozen=True)
class Shard:
    """One client's features (N, D) and labels (N,)."""

    features: np.ndarray
    labels: np.ndarray


def shards(seed: int = 0, clients: int = 4) -> list[Shard]:
    """Classes lie at random places; clients hold some of them, a few samples each, scattered by a width of their own."""
    rng = np.random.default_rng(seed)
    places, out = 3 * rng.normal(size=(C, D)), []
    for k in range(clients):
        classes = rng.permutation(C)[: 2 + k % 3]
        labels = np.repeat(classes, rng.integers(1, 6, len(classes)) + 1)
        out.append(Shard(places[labels] + rng.uniform(0.3, 2) * rng.normal(size=(len(labels), D)), labels))
    return out


def update(k: int, shard: Shard) -> ClientUpdate:
    """What the client sends, moments by the suite's own stand-in for the statistic (which is held against the real one)."""
    rows = torch.from_numpy(shard.features)
    client = made_up.Client(k, {}, rows, torch.from_numpy(shard.labels))
    request = PrototypeMargin().plan({}, 0).statistics[0]
    sent = made_up.synthesise(request, client, {"head.weight": torch.zeros(C, D)})
    own = {"head.weight": torch.full((C, D), float(k), dtype=torch.float64)}
    return ClientUpdate(k, len(shard.labels), own, sent)


def weights(rule: PrototypeMargin, which: Sequence[Shard]) -> list[float]:
    """a_i, from what becomes of clients that send 1 in one place each."""
    eye = torch.eye(len(which), dtype=torch.float64)
    updates = [replace(update(k, s), params={"head.bias": eye[k]}) for k, s in enumerate(which)]
    start = {"head.bias": torch.zeros(len(which), dtype=torch.float64)}
    out: list[float] = rule.combine({}, start, updates, torch.Generator())[1]["head.bias"].tolist()
    return out


def dense_margin(shard: Shard, distance: str) -> float:
    classes = np.unique(shard.labels)
    rows = {c: shard.features[shard.labels == c] for c in classes}
    prototypes = {c: r.mean(axis=0) for c, r in rows.items()}
    gaps = []
    for a, b in itertools.combinations(classes, 2):
        p, q = prototypes[a], prototypes[b]
        gaps.append(np.linalg.norm(p - q) if distance == "euclidean" else 1 - p @ q / np.linalg.norm(p) / np.linalg.norm(q))
    if distance == "cosine":
        return float(np.mean(gaps))
    spreads = [np.sqrt(((r - r.mean(0)) ** 2).sum() / (len(r) - 1)) for r in rows.values() if len(r) > 1]
    return float(np.mean(gaps) / np.mean(spreads))


def together(which: Sequence[Shard]) -> Shard:
    return Shard(np.concatenate([s.features for s in which]), np.concatenate([s.labels for s in which]))


# ---------------------------------------------------------------- the formula


@pytest.mark.parametrize(("distance", "deviation"), OPTIONS)
@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), gamma=st.sampled_from([0, 1]), temperature=st.sampled_from([0.3, 1.0, 4.0]))
def test_weights_written_out(distance: str, deviation: str, seed: int, gamma: int, temperature: float) -> None:
    """Margins of the samples themselves, and the global one of all samples in one place."""
    which = shards(seed)
    own, common = [dense_margin(s, distance) for s in which], dense_margin(together(which), distance)
    d = np.array([m / common if deviation == "ratio" else m - common for m in own])
    score = np.array([len(s.labels) for s in which]) ** gamma * np.exp(d / temperature)
    rule = PrototypeMargin(temperature=temperature, gamma=gamma, deviation=deviation, distance=distance)
    np.testing.assert_allclose(weights(rule, which), score / score.sum(), rtol=1e-9, atol=1e-12)


def test_by_hand() -> None:
    """Client 0: classes at 0 and 10 with spreads of √2 each, margin 10/√2. Client 1: at 0 and 5, margin 5/√2. All together:
    class 0 has samples ±1, ±1 (variance 4/3), class 1 has 9, 11, 4, 6 (mean 7.5, variance 29/3)."""
    which = [Shard(np.array([[-1.0], [1.0], [p - 1], [p + 1]]), np.array([0, 0, 1, 1])) for p in (10.0, 5.0)]
    common = 7.5 / ((np.sqrt(4 / 3) + np.sqrt(29 / 3)) / 2)
    d = np.array([10, 5]) / np.sqrt(2) / common
    np.testing.assert_allclose(weights(PrototypeMargin(), which), np.exp(d) / np.exp(d).sum(), rtol=1e-12)


@pytest.mark.parametrize(("distance", "deviation"), OPTIONS)
def test_equal_margins_are_fairavg_or_fedavg(distance: str, deviation: str) -> None:
    """The same margin in other places: features turned by a rotation of each client's own; numbers of samples differ."""
    base = Shard(np.array([[0, 2.0, 0, 0], [0, 4, 0, 0], [5, 1, 0, 0], [7, 1, 0, 0]]), np.array([0, 0, 1, 1]))
    updates = []
    for k in range(3):
        turn = np.linalg.qr(np.random.default_rng(k).normal(size=(D, D)))[0]
        one = update(k, Shard(base.features @ turn, base.labels))
        updates.append(replace(one, num_samples=(2, 6, 9)[k]))
    start = {"head.weight": torch.zeros(C, D, dtype=torch.float64)}
    for gamma, oracle in ((0, FairAvg()), (1, FedAvg())):
        rule = PrototypeMargin(gamma=gamma, distance=distance, deviation=deviation)
        got, want = (r.combine({}, start, updates, torch.Generator())[1]["head.weight"] for r in (rule, oracle))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("distance", "deviation"), OPTIONS)
@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_scaling_all_features_changes_nothing(distance: str, deviation: str, scale: float) -> None:
    rule = PrototypeMargin(distance=distance, deviation=deviation)
    scaled = [Shard(scale * s.features, s.labels) for s in shards()]
    np.testing.assert_allclose(weights(rule, scaled), weights(rule, shards()), rtol=1e-9)


@pytest.mark.parametrize("deviation", ["ratio", "difference"])
def test_a_wider_margin_weighs_more_and_more(deviation: str) -> None:
    """Client 1's samples draw closer to their prototypes, which stay: its margin widens, and its weight with it."""
    which, seen = shards(), []
    labels = which[1].labels
    middle = np.stack([which[1].features[labels == c].mean(axis=0) for c in labels])
    for scatter in (2.0, 1.0, 0.8, 0.5, 0.3):
        closer = Shard(middle + scatter * (which[1].features - middle), labels)
        seen.append(weights(PrototypeMargin(deviation=deviation), [which[0], closer, *which[2:]])[1])
    assert seen == sorted(seen)
    assert seen[-1] > 1.5 * seen[0]


def test_a_small_temperature_lets_one_client_win() -> None:
    """Without overflow; a large one is the uniform mean."""
    got = weights(PrototypeMargin(temperature=1e-6), shards())
    margins = [dense_margin(s, "euclidean") for s in shards()]
    assert got == pytest.approx([float(m == max(margins)) for m in margins])
    assert weights(PrototypeMargin(temperature=1e9), shards()) == pytest.approx([0.25] * 4)


# ---------------------------------------------------------------- what cannot be told


@pytest.mark.parametrize(("distance", "deviation"), OPTIONS)
@pytest.mark.parametrize("why", ["one class", "one sample of each class", "samples on top of each other"])
def test_a_margin_that_cannot_be_told_is_neutral(why: str, distance: str, deviation: str) -> None:
    """The client weighs what one weighs whose margin is the global one: exp(1) under a ratio, exp(0) under a difference."""
    which = shards()
    first = {"one class": [0, 1, 0], "one sample of each class": [0, 1], "samples on top of each other": [0, 0, 1, 1]}[why]
    places = np.array([[5.0, 1, 0, 0], [-2, 3, 1, 0]])
    lone = Shard(places[first], np.zeros(3, dtype=int) if why == "one class" else np.array(first))
    which = [lone, *which[1:]]
    common = dense_margin(together(which), distance)
    own = common if distance == "euclidean" or why == "one class" else dense_margin(lone, distance)
    d = np.array(
        [m / common if deviation == "ratio" else m - common for m in (own, *(dense_margin(s, distance) for s in which[1:]))]
    )
    got = weights(PrototypeMargin(distance=distance, deviation=deviation), which)
    np.testing.assert_allclose(got, np.exp(d) / np.exp(d).sum(), rtol=1e-9)


def test_nothing_to_tell_is_the_plain_mean() -> None:
    """One class in all; all prototypes in one place; every sample alone; samples on top of each other."""
    rng = np.random.default_rng(0)
    one_class = [Shard(rng.normal(size=(3, D)), np.zeros(3, dtype=int)) for _ in range(3)]
    one_place = [Shard(np.tile([[1.0, 0, 0, 0], [-1, 0, 0, 0]], (2, 1)), np.array([0, 0, 1, 1])) for _ in range(3)]
    alone = [Shard(rng.normal(size=(1, D)), np.array([k])) for k in range(3)]
    no_spread = [Shard(np.repeat(np.eye(D)[:2], 2, axis=0), np.array([0, 0, 1, 1])) for _ in range(3)]
    for which in (one_class, one_place, alone, no_spread):
        for deviation in ("ratio", "difference"):
            assert weights(PrototypeMargin(deviation=deviation), which) == pytest.approx([1 / 3] * 3)


def test_clients_without_samples_are_left_out() -> None:
    updates = [update(k, s) for k, s in enumerate(shards())]
    sent = {n: torch.zeros(C) if "count" in n else torch.zeros(0, D) for n in updates[0].statistics}
    idle = ClientUpdate(9, 0, {"head.weight": torch.full((C, D), 99.0, dtype=torch.float64)}, sent)
    start = {"head.weight": torch.zeros(C, D, dtype=torch.float64)}
    for gamma in (0, 1):
        rule = PrototypeMargin(gamma=gamma)
        got, want = (rule.combine({}, start, u, torch.Generator())[1]["head.weight"] for u in ([*updates, idle], updates))
        assert torch.equal(got, want)


# ---------------------------------------------------------------- the rest


def test_every_tensor_has_the_same_weights_and_what_nobody_trained_stays() -> None:
    updates = [update(k, s) for k, s in enumerate(shards())]
    extra = [torch.randn(2, 3, dtype=torch.float64, generator=torch_stream(0, k)) for k in range(4)]
    both = [replace(u, params={**u.params, "adapter.x": e}) for u, e in zip(updates, extra, strict=True)]
    start: Tensors = {
        "adapter.x": torch.zeros(2, 3, dtype=torch.float64),
        "adapter.y": torch.ones(2),
        "head.weight": torch.zeros(C, D),
    }
    _, got = PrototypeMargin().combine({}, start, both, torch.Generator())
    want: Tensor = sum(a * e for a, e in zip(weights(PrototypeMargin(), shards()), extra, strict=True))  # type: ignore[assignment]
    torch.testing.assert_close(got["adapter.x"], want, rtol=0, atol=1e-12)
    assert got["adapter.y"] is start["adapter.y"]
    assert got["head.weight"].dtype == torch.float32


def test_it_needs_the_heads_weight_and_its_statistics() -> None:
    with pytest.raises(
        ConfigError, match=r"prototype_margin looks at the inputs of 'head\.weight', which is not among its tensors"
    ):
        PrototypeMargin().init({"adapter.x": torch.zeros(1)})
    bare = [ClientUpdate(3, 2, {"head.weight": torch.zeros(C, D)})]
    with pytest.raises(AggregationError, match=r"client 3 sent no 'class_moments\.count/head\.weight'"):
        PrototypeMargin().combine({}, {"head.weight": torch.zeros(C, D)}, bare, torch.Generator())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"gamma": 2}, r"gamma must be 0 \(samples do not count\) or 1 \(they do\), got 2"),
        ({"deviation": "ration"}, "deviation 'ration' is unknown. Did you mean 'ratio'"),
        ({"distance": "cosinus"}, "distance 'cosinus' is unknown. Did you mean 'cosine'"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("aggregators", {"name": "prototype_margin", **options})


@pytest.mark.parametrize("adapter", ["lora", "none", "prefix"])
def test_a_whole_run(adapter: str, tmp_path: Path) -> None:
    config = tiny("server.aggregator=prototype_margin", "server.consolidator=none", f"adapter={adapter}", output=tmp_path)
    assert np.isfinite(run(config).accuracy[1]).all()
