"""Partitions: laws that all keep, the distribution that each promises, and the estimate of α."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import optimize, special, stats

from fedsim.core import config, plugins, rng
from fedsim.core.errors import ConfigError, PartitionError
from fedsim.data.manifest import estimate_alpha
from fedsim.data.partitions import class_quantity, dirichlet, iid, pathological, quantity

NAMES = plugins.names("partitions")
SPLIT = [name for name in NAMES if not plugins.load("partitions", name).whole]


def counts_of(labels: NDArray[Any], shards: list[NDArray[Any]]) -> NDArray[Any]:
    """(C, K)"""
    return np.stack([np.bincount(labels[shard], minlength=labels.max() + 1) for shard in shards], axis=1)


def test_all_four_are_found() -> None:
    assert {"dirichlet", "iid", "pathological", "quantity"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    clients=st.integers(1, 12),
    floor=st.integers(1, 5),
    alpha=st.sampled_from([1e-300, 0.01, 0.5, 3.0, 1e300]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40)
def test_disjoint_cover_or_clear_error(name: str, sizes: list[int], clients: int, floor: int, alpha: float, seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    clients = clients if name in SPLIT else 1
    section: dict[str, Any] = {"name": name, "clients": clients, "min_samples": floor}
    if name in ("dirichlet", "quantity"):
        section["alpha"] = alpha
    if name == "dirichlet":
        section["max_draws"] = 500
    partition = config.build("partitions", section)
    try:
        shards = partition.split(labels, rng.stream(seed, "partition", 0))
    except PartitionError:
        assert name not in ("iid", "quantity") or clients * floor > len(labels)
        return
    assert len(shards) == clients
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(len(labels)))
    assert min(map(len, shards)) >= floor
    again = partition.split(labels, rng.stream(seed, "partition", 0))
    assert all(np.array_equal(a, b) for a, b in zip(shards, again, strict=True))


def test_joint_is_for_one_client() -> None:
    with pytest.raises(ConfigError, match=r"^partition\.clients must be 1 with joint, .* got 2$"):
        config.expand("partitions", {"name": "joint", "clients": 2}, "partition")


@pytest.mark.parametrize("name", SPLIT)
def test_too_many_clients_is_an_error_at_once(name: str) -> None:
    partition = config.build("partitions", {"name": name, "clients": 50, "min_samples": 6})
    with pytest.raises(
        PartitionError, match=r"50 clients with at least 6 samples each need 300 samples, but there are 299: use fewer clients"
    ):
        partition.split(np.arange(299) % 10, np.random.default_rng(0))


@pytest.mark.parametrize("name", NAMES)
def test_bad_options_name_their_key(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^partition\.clients must be at least 1, got 0$"):
        config.expand("partitions", {"name": name, "clients": 0}, "partition")
    with pytest.raises(ConfigError, match=r"^partition\.min_samples must be at least 1 .*got 0$"):
        config.expand("partitions", {"name": name, "min_samples": 0}, "partition")


@pytest.mark.parametrize("name", ["dirichlet", "quantity"])
@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_alpha_must_be_positive(name: str, alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"^partition\.alpha must be (positive|a finite number), got"):
        config.expand("partitions", {"name": name, "alpha": alpha}, "partition")


def test_alpha_zero_says_what_the_user_typed() -> None:
    with pytest.raises(ConfigError) as error:
        dirichlet.Partition(alpha=0.0)
    assert str(error.value) == "alpha must be positive, got 0.0"


def test_dirichlet_has_the_moments_of_the_dirichlet_multinomial() -> None:
    # x ~ DirMult(n, α·1_K): E x = n/K,  Var x = n (1/K)(1 − 1/K) (n + Kα)/(1 + Kα); classes are independent, so that
    # the variance of a client's total over C classes is C times that
    alpha, clients, n, classes, draws = 2.0, 4, 1000, 2, 2000
    labels = np.repeat(np.arange(classes), n)
    partition = dirichlet.Partition(clients=clients, alpha=alpha, min_samples=1)
    x = np.stack([counts_of(labels, partition.split(labels, rng.stream(1, "t", d))) for d in range(draws)])  # (D, C, K)
    variance = n / clients * (1 - 1 / clients) * (n + clients * alpha) / (1 + clients * alpha)
    error = math.sqrt(variance / draws)
    assert np.abs(x.mean(axis=0) - n / clients).max() < 4.5 * error
    assert np.allclose(x.var(axis=0), variance, rtol=0.15)
    assert np.allclose(x.sum(axis=1).var(axis=0), classes * variance, rtol=0.15)


def test_dirichlet_puts_a_whole_class_at_one_client_as_often_as_it_should() -> None:
    # P(all n samples of a class at one client) = K · Γ(Kα) Γ(α+n) / (Γ(Kα+n) Γ(α))
    alpha, clients, n, classes, draws = 0.1, 3, 5, 40, 200
    labels = np.repeat(np.arange(classes), n)
    partition = dirichlet.Partition(clients=clients, alpha=alpha, min_samples=1)
    whole = sum(int((counts_of(labels, partition.split(labels, rng.stream(2, "t", d))) == n).sum()) for d in range(draws))
    log_p = (
        special.gammaln(clients * alpha)
        + special.gammaln(alpha + n)
        - special.gammaln(clients * alpha + n)
        - special.gammaln(alpha)
    )
    p = clients * math.exp(log_p)
    assert stats.binomtest(whole, draws * classes, p).pvalue > 1e-3


def test_dirichlet_with_a_floor_is_the_dirichlet_given_the_floor() -> None:
    # K = 2, one class of 4, α = 1: the share of client 0 is uniform on 0..4, given the floor 1 uniform on 1..3
    labels = np.zeros(4, dtype=np.int64)
    partition = dirichlet.Partition(clients=2, alpha=1.0, min_samples=1)
    sizes = [len(partition.split(labels, rng.stream(3, "t", d))[0]) for d in range(3000)]
    assert stats.chisquare(np.bincount(sizes, minlength=4)[1:]).pvalue > 1e-3


def test_dirichlet_assigns_samples_of_a_class_at_random() -> None:
    # whatever the shares, early and late samples of a class are equally likely to be anywhere
    labels = np.repeat([0, 1], 20)
    partition = dirichlet.Partition(clients=3, alpha=0.5, min_samples=1)
    owner = np.zeros((1500, 40))
    for d in range(len(owner)):
        for k, shard in enumerate(partition.split(labels, rng.stream(4, "t", d))):
            owner[d, shard] = k
    error = owner.std(axis=0).max() / math.sqrt(len(owner))
    assert np.abs(owner.mean(axis=0) - owner.mean()).max() < 4.5 * error


def test_shards_are_shuffled() -> None:
    labels = np.repeat(np.arange(10), 100)
    for partition in (
        iid.Partition(clients=2),
        dirichlet.Partition(clients=2),
        quantity.Partition(clients=2),
        pathological.Partition(clients=5),
    ):
        shard = max(partition.split(labels, np.random.default_rng(0)), key=len)
        assert abs(stats.spearmanr(np.arange(len(shard)), shard).statistic) < 0.3


def test_dirichlet_gives_up_with_numbers() -> None:
    labels = np.repeat([0, 1], 15)
    with pytest.raises(
        PartitionError, match=r"30 samples in 2 classes over 10 clients with alpha 0.01 .* 2 samples in 700 draws .*raise alpha"
    ):
        dirichlet.Partition(clients=10, alpha=0.01, min_samples=2, max_draws=700).split(labels, np.random.default_rng(0))


def test_dirichlet_finds_rare_splits_fast() -> None:
    # 10 classes, 10 clients, α 0.05: about one draw in a thousand keeps the floor (the hardest setting in published tables)
    labels = np.repeat(np.arange(10), 200)
    for seed in range(5):
        shards = dirichlet.Partition(clients=10, alpha=0.05, min_samples=6).split(labels, np.random.default_rng(seed))
        assert min(map(len, shards)) >= 6


def test_iid_and_quantity_take_a_hundred_thousand_clients() -> None:
    labels = np.arange(300_000) % 20
    assert {len(s) for s in iid.Partition(clients=100_000).split(labels, np.random.default_rng(0))} == {3}
    assert min(map(len, quantity.Partition(clients=100_000).split(labels, np.random.default_rng(0)))) == 1


def test_iid_sizes_differ_by_at_most_one_and_mix_classes() -> None:
    labels = np.repeat(np.arange(5), 401)
    shards = iid.Partition(clients=4).split(labels, np.random.default_rng(0))
    assert sorted(map(len, shards)) == [501, 501, 501, 502]
    assert stats.chi2_contingency(counts_of(labels, shards)).pvalue > 1e-3


def test_quantity_skews_sizes_and_not_classes() -> None:
    labels = np.repeat(np.arange(4), 1000)
    clients, floor, draws = 5, 100, 400
    sizes = []
    for d in range(draws):
        shards = quantity.Partition(clients=clients, min_samples=floor, alpha=0.5).split(labels, rng.stream(5, "t", d))
        sizes.append([len(s) for s in shards])
    assert stats.chi2_contingency(counts_of(labels, shards)).pvalue > 1e-3
    # n_k − m ~ DirMult(N − K·m, α): the variance of the Dirichlet-multinomial
    n, k_alpha = len(labels) - clients * floor, clients * 0.5
    variance = n / clients * (1 - 1 / clients) * (n + k_alpha) / (1 + k_alpha)
    assert np.asarray(sizes).var(axis=0).mean() == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize(("clients", "k", "classes"), [(10, 2, 20), (10, 3, 10), (7, 4, 9), (3, 5, 5), (1, 6, 6)])
def test_pathological_gives_k_classes_to_everybody_and_leaves_no_class_over(clients: int, k: int, classes: int) -> None:
    labels = np.repeat(np.arange(classes), np.arange(classes) + 30)
    counts = counts_of(
        labels, pathological.Partition(clients=clients, classes_per_client=k).split(labels, np.random.default_rng(1))
    )
    assert (np.count_nonzero(counts, axis=0) == k).all()
    assert (counts.sum(axis=1) == np.arange(classes) + 30).all()
    held = np.where(counts == 0, counts.max() + 1, counts).min(axis=1)
    assert (counts.max(axis=1) - held <= 1).all()  # a class is divided evenly over its holders


def test_class_quantity_draws_sets_of_classes_uniformly_given_that_all_are_held() -> None:
    # K = 3 clients with 2 of 3 classes each: 3³ draws, of which the 3 with three times the same set leave a class over
    labels = np.repeat(np.arange(3), 60)
    partition = class_quantity.Partition(clients=3, classes_per_client=2)
    lacking: dict[tuple[int, ...], int] = {}
    for d in range(2400):
        counts = counts_of(labels, partition.split(labels, rng.stream(6, "t", d)))
        assert (counts.sum(axis=1) == 60).all()
        assert ((counts == 0).sum(axis=0) == 1).all()  # 60 samples at 2 or 3 holders: nobody goes without by chance
        key = tuple((counts == 0).argmax(axis=0).tolist())
        lacking[key] = lacking.get(key, 0) + 1
    assert len(lacking) == 24
    assert stats.chisquare(list(lacking.values())).pvalue > 1e-3


def test_class_quantity_leaves_every_sample_to_chance_among_the_holders() -> None:
    # both clients hold both classes: a share of 6 samples is Binomial(6, 1/2), and classes are independent
    labels = np.repeat(np.arange(2), 6)
    partition = class_quantity.Partition(clients=2, classes_per_client=2)
    draws = [counts_of(labels, partition.split(labels, rng.stream(7, "t", d)))[:, 0] for d in range(3000)]
    pmf = np.outer(*[stats.binom.pmf(np.arange(7), 6, 0.5)] * 2).ravel()
    pmf[[0, -1]] = 0  # somebody would have nothing: drawn again
    table = np.zeros((7, 7))
    np.add.at(table, tuple(np.stack(draws).T), 1)
    expected = pmf / pmf.sum() * len(draws)
    often = expected >= 5
    found, want = table.ravel(), expected
    bins = [*found[often], found[~often].sum()], [*want[often], want[~often].sum()]
    assert stats.chisquare(*bins).pvalue > 1e-3


def test_class_quantity_says_when_chance_leaves_a_class_over() -> None:
    labels = np.repeat(np.arange(20), 15)
    with pytest.raises(
        PartitionError, match=r"draws of 2 classes for each of 10 clients all left one of the task's 20 classes to nobody"
    ):
        class_quantity.Partition(clients=10).split(labels, np.random.default_rng(0))
    with pytest.raises(PartitionError, match=r"5 clients with 2 classes each hold at most 10 of the task's 20 classes"):
        class_quantity.Partition(clients=5).split(labels, np.random.default_rng(0))
    with pytest.raises(PartitionError, match=r"gave each of 30 clients 9 samples in 100 draws \(best: \d\): use fewer clients"):
        class_quantity.Partition(clients=30, min_samples=9).split(labels, np.random.default_rng(0))
    with pytest.raises(ConfigError, match=r"^classes_per_client must be at least 1, got 0$"):
        class_quantity.Partition(classes_per_client=0)


def test_pathological_draws_other_classes_for_other_seeds() -> None:
    labels = np.repeat(np.arange(10), 30)
    sets = {
        tuple(np.unique(labels[pathological.Partition().split(labels, np.random.default_rng(seed))[0]]).tolist())
        for seed in range(30)
    }
    assert len(sets) > 15


def test_pathological_says_what_is_impossible() -> None:
    labels = np.repeat(np.arange(20), 15)
    with pytest.raises(
        PartitionError,
        match=r"5 clients with 2 classes each hold at most 10 of the task's 20 classes: use at least 10 clients, or .* 4",
    ):
        pathological.Partition(clients=5).split(labels, np.random.default_rng(0))
    with pytest.raises(PartitionError, match=r"classes_per_client is 21, but the task has 20 classes"):
        pathological.Partition(classes_per_client=21).split(labels, np.random.default_rng(0))
    with pytest.raises(PartitionError, match=r"gave each of 150 clients 20 classes"):
        pathological.Partition(clients=150, classes_per_client=20).split(labels, np.random.default_rng(0))


# ---------------------------------------------------------------- estimate_alpha


def log_likelihood(alpha: float, counts: NDArray[Any]) -> float:
    clients = counts.shape[1]
    per_class = special.gammaln(clients * alpha) - special.gammaln(clients * alpha + counts.sum(axis=1))
    return float((per_class + (special.gammaln(alpha + counts) - special.gammaln(alpha)).sum(axis=1)).sum())


@pytest.mark.parametrize("alpha", [0.02, 0.1, 0.5, 2.0, 10.0])
def test_estimate_equals_scipys_optimum_and_recovers_alpha(alpha: float) -> None:
    draw = np.random.default_rng(7)
    counts = draw.multinomial(60, draw.dirichlet(np.full(10, alpha), size=1500))
    estimate = estimate_alpha(counts)
    best = optimize.minimize_scalar(lambda z: -log_likelihood(math.exp(z), counts), bracket=(-3, 0), tol=1e-12)
    assert estimate == pytest.approx(math.exp(best.x), rel=1e-5)
    assert estimate == pytest.approx(alpha, rel=0.06)


@given(counts=st.lists(st.lists(st.integers(0, 40), min_size=4, max_size=4), min_size=1, max_size=6))
@settings(max_examples=60)
def test_estimate_is_where_the_likelihood_is_highest(counts: list[list[int]]) -> None:
    table = np.array(counts)
    estimate = estimate_alpha(table)
    grid = np.exp(np.linspace(-12, 12, 200))
    if math.isnan(estimate):
        assert (table.sum(axis=1) <= 1).all()
        return
    at = log_likelihood(min(max(estimate, 1e-7), 1e7), table)
    assert at >= max(log_likelihood(a, table) for a in grid) - 1e-4


def test_estimate_at_the_edges() -> None:
    assert estimate_alpha(np.array([[9, 0, 0], [0, 0, 4]])) == 0.0
    assert estimate_alpha(np.array([[5, 5, 5], [3, 3, 3]])) == math.inf
    assert math.isnan(estimate_alpha(np.array([[5], [3]])))
    assert math.isnan(estimate_alpha(np.array([[1, 0], [0, 1]])))


def test_estimate_of_a_partition_that_was_asked_for() -> None:
    labels = np.repeat(np.arange(300), 40)
    for alpha in (0.1, 0.5, 5.0):
        shards = dirichlet.Partition(clients=10, alpha=alpha).split(labels, np.random.default_rng(0))
        assert estimate_alpha(counts_of(labels, shards)) == pytest.approx(alpha, rel=0.15)
