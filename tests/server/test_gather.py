"""Sums whose bits depend on nothing but the places of what is summed, and rounds that are gathered from bundles."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import reduce
from itertools import pairwise
from operator import add

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clients.pools._bundles import MANY, PER_WORKER, bundles
from fedsim.core.contracts import lift_statistics
from fedsim.core.errors import AggregationError, ClientFailed
from fedsim.core.messages import Bundle, ClientJob, ClientUpdate, Reply, RoundPlan, bytes_up
from fedsim.core.sums import BLOCK, BlockSum, PartSums
from server import gather, sampling
from server.aggregators.fedavg import Aggregator as FedAvg
from server.gather import Gathering, merge

PARAMS = {"adapter.x": torch.zeros(3), "head.bias": torch.zeros(2)}


def summed(values: Sequence[float | None]) -> Tensor | None:
    """Place by place; None is an empty place."""
    total = BlockSum()
    for place, value in enumerate(values):
        total.add(place, 1, None if value is None else {"x": torch.tensor(value, dtype=torch.float64)})
    result = total.result()
    return None if result is None else result["x"]


def by_hand(values: Sequence[float | None]) -> float | None:
    """Blocks from left to right, then the blocks."""
    blocks = [[v for v in values[i : i + BLOCK] if v is not None] for i in range(0, len(values), BLOCK)]
    sums = [reduce(add, block) for block in blocks if block]
    return reduce(add, sums) if sums else None


FLOATS = st.one_of(st.none(), st.floats(-1e9, 1e9, allow_nan=False))


@given(values=st.lists(FLOATS, max_size=70), size=st.sampled_from([1, BLOCK]), seed=st.integers(0, 9))
@settings(max_examples=200)
def test_terms_and_blocks_in_any_order_give_the_same_bits(values: list[float | None], size: int, seed: int) -> None:
    """Blocks are summed apart, as workers do, and arrive shuffled."""
    expected = by_hand(values)
    starts = list(range(0, len(values), size))
    random.Random(seed).shuffle(starts)
    total = BlockSum()
    for start in starts:
        block = summed(values[start : start + size])
        total.add(start, len(values[start : start + size]), None if block is None else {"x": block})
    result = total.result()
    assert (None if result is None else float(result["x"])) == expected
    if expected is not None:
        exact = float(sum(Fraction(v) for v in values if v is not None))
        assert expected == pytest.approx(exact, rel=1e-12, abs=1e-5)


@pytest.mark.parametrize("count", [1, 5, 20])
def test_terms_are_not_written_into_and_the_result_may_be(count: int) -> None:
    terms = [{"x": torch.full((2,), float(k), dtype=torch.float64)} for k in range(count)]
    total = BlockSum()
    for place, term in enumerate(terms):
        total.add(place, 1, term)
    result = total.result()
    assert result is not None and torch.equal(result["x"], torch.full((2,), sum(range(count)), dtype=torch.float64))
    result["x"].fill_(-1)
    assert [float(t["x"][0]) for t in terms] == list(range(count))


def test_what_waits_goes_in_as_soon_as_it_can() -> None:
    total = BlockSum()
    for place in (*range(1, BLOCK), 2 * BLOCK, 2 * BLOCK + 1):
        total.add(place, 1, {"x": torch.zeros(())})
    assert len(total._waiting) == BLOCK + 1
    total.add(0, 1, None)
    assert sorted(total._waiting) == [2 * BLOCK, 2 * BLOCK + 1]
    total.add(BLOCK, BLOCK, {"x": torch.zeros(())})
    assert not total._waiting


def test_terms_with_other_names_are_refused() -> None:
    total = BlockSum()
    total.add(0, 1, {"x": torch.zeros(1), "y": torch.zeros(1)})
    with pytest.raises(AggregationError, match="only some of them have 'y'"):
        total.add(1, 1, {"x": torch.zeros(1)})


# ---------------------------------------------------------------- rounds

SUMMED = Reply(("rule",))


def update(client: int) -> ClientUpdate:
    draw = torch.Generator().manual_seed(client)
    return ClientUpdate(client, 3 + client, {n: torch.randn(t.shape, generator=draw) for n, t in PARAMS.items()})


def jobs_of(count: int) -> list[ClientJob]:
    return [ClientJob(k, 0, 0, PARAMS, RoundPlan()) for k in range(count)]


def as_worker(start: int, updates: Sequence[ClientUpdate | ClientFailed], observed: Sequence[int] = ()) -> Bundle:
    """What a worker makes of a bundle under FedAvg."""
    sums = PartSums({"rule": FedAvg().lift})
    lean: list[ClientUpdate | ClientFailed] = []
    for place, one in enumerate(updates):
        sums.add(place, one if isinstance(one, ClientUpdate) else None)
        lean.append(one.summed(one.client_id in observed) if isinstance(one, ClientUpdate) else one)
    return Bundle(start, tuple(lean), sums.result())


@pytest.mark.parametrize("count", [1, 7, 10, 33, 60])
def test_summed_on_workers_of_any_number_is_summed_here(count: int) -> None:
    """FedAvg of whole updates, of bundles of any size in any order, and of a mix: the same bits."""
    outcomes = []
    for workers, here in ((1, True), (1, False), (2, False), (7, False)):
        jobs = jobs_of(count)
        gathering = Gathering(SUMMED, {"rule": FedAvg().lift})
        cut = list(bundles(jobs, workers, fused=False))
        random.Random(workers).shuffle(cut)
        for start, some in cut:
            made = [update(job.client_id) for job in some]
            bundle = Bundle(start, tuple(made)) if here else as_worker(start, made)
            assert [r.client_id for r in gathering.add(bundle)] == [job.client_id for job in some]
        round = gathering.result()
        assert [u.client_id for u in round.updates] == list(range(count))
        assert [bytes_up(u) for u in round.updates] == [{"adapter": 12, "head": 8, "statistics": 0}] * count
        assert not any(u.params for u in round.updates)
        outcomes.append(merge(FedAvg(), {}, PARAMS, round, torch.Generator())[1])
    for outcome in outcomes[1:]:
        assert all(torch.equal(outcome[n], outcomes[0][n]) for n in PARAMS)
    _, direct = FedAvg().combine({}, PARAMS, [update(k) for k in range(count)], torch.Generator())
    assert all(torch.equal(outcomes[0][n], direct[n]) for n in PARAMS)


def test_a_failed_client_leaves_an_empty_place() -> None:
    last = 2 * BLOCK
    gathering = Gathering(SUMMED, {"rule": FedAvg().lift})
    failed = {k: ClientFailed(k, 0, 0, "training", "no luck") for k in (1, *range(BLOCK, last), last + 1)}
    list(gathering.add(as_worker(BLOCK, [failed[k] for k in range(BLOCK, last)])))  # a block in which all failed
    list(gathering.add(Bundle(last, (update(last),))))
    list(gathering.add(as_worker(0, [update(0), failed[1], *(update(k) for k in range(2, BLOCK))])))
    list(gathering.add(Bundle(last + 1, (failed[last + 1],))))
    assert len(gathering.failures) == BLOCK + 2 and gathering.count == last + 2
    _, out = merge(FedAvg(), {}, PARAMS, gathering.result(), torch.Generator())
    _, direct = FedAvg().combine({}, PARAMS, [update(k) for k in (0, *range(2, BLOCK), last)], torch.Generator())
    for name in PARAMS:
        torch.testing.assert_close(out[name], direct[name])


def test_nobody_is_left() -> None:
    gathering = Gathering(Reply(), {})
    list(gathering.add(Bundle(0, (ClientFailed(0, 0, 0, "training", "no luck"),))))
    with pytest.raises(
        AggregationError,
        match=r"task 0, round 0: nobody is left, all 1 clients failed, for the same reason in stage training: no luck$",
    ):
        gathering.result()


def test_clients_without_samples_are_nothing_to_sum() -> None:
    gathering = Gathering(Reply(("statistics",)), {"statistics": lift_statistics})
    list(gathering.add(Bundle(0, (replace(update(0), num_samples=0),))))
    with pytest.raises(AggregationError, match="hold no samples"):
        gathering.result()


def test_statistics_are_summed_with_the_samples() -> None:
    gathering = Gathering(Reply(("statistics",)), {"statistics": lift_statistics})
    for k in range(3):
        list(gathering.add(Bundle(k, (ClientUpdate(k, 2, {}, {"s": torch.tensor([0.1 * k])}),))))
    total = gathering.result().totals["statistics"]
    assert total["num_samples"] == 6 and total["s"].dtype == torch.float64
    assert float(total["s"]) == sum(float(np.float32(0.1 * k)) for k in range(3))


def test_a_rule_that_is_not_additive_gets_whole_updates() -> None:
    gathering = Gathering(Reply(), {})
    list(gathering.add(Bundle(0, (update(0), update(1)))))
    round = gathering.result()
    assert not round.totals and all(u.params and u.bytes_sent is None for u in round.updates)


# ---------------------------------------------------------------- who is watched, and in which order


def test_all_clients_are_watched_while_they_are_small_and_few() -> None:
    assert gather.observed([4, 7, 9], PARAMS, RoundPlan()) == (4, 7, 9)


def test_of_many_clients_some_are_watched_evenly_spaced() -> None:
    chosen = gather.observed(range(129), PARAMS, RoundPlan())
    assert len(chosen) == len(set(chosen)) == gather.MOST_OBSERVED
    assert {b - a for a, b in pairwise(chosen)} == {2}
    assert gather.observed(range(1000), PARAMS, RoundPlan(train=("none",))) == gather.observed(range(1000), PARAMS, RoundPlan())


def test_large_updates_are_watched_within_a_bound() -> None:
    """Only what is trained counts."""
    large = {"adapter.x": torch.empty(10 * 2**18), "head.bias": torch.empty(2**26, device="meta")}  # 10 MB, 256 MB
    assert len(gather.observed(range(1000), large, RoundPlan(train=("adapter.*",)))) == 6
    assert len(gather.observed(range(1000), large, RoundPlan())) == 2


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_longest_first(sizes: list[int]) -> None:
    clients = list(range(0, len(sizes), 2))
    order = sampling.longest_first(clients, np.array(sizes))
    assert order == sorted(clients, key=lambda c: (-sizes[c], c))


@pytest.mark.parametrize(
    ("jobs", "workers", "size"),
    [(10, 2, 1), (39, 2, 1), (50, 2, BLOCK), (1000, 2, BLOCK), (3, 1, 1), (20, 1, BLOCK), (999, 50, 1), (1000, 512, BLOCK)],
)
def test_bundles_are_blocks_with_enough_for_every_worker(jobs: int, workers: int, size: int) -> None:
    cut = list(bundles(jobs_of(jobs), workers, fused=False))
    assert [job.client_id for _, some in cut for job in some] == list(range(jobs))
    assert {len(some) for _, some in cut[:-1]} <= {size} and all(start % size == 0 for start, _ in cut)
    assert size == 1 or len(cut) >= min(PER_WORKER * workers, MANY // BLOCK)


def test_who_is_fused_with_whom_knows_nothing_of_workers() -> None:
    cuts = [[len(some) for _, some in bundles(jobs_of(23), workers, fused=True)] for workers in (1, 2, 9)]
    assert cuts == [[BLOCK, BLOCK, 3]] * 3
