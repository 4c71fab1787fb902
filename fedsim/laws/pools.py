"""The laws that every pool keeps: wherever clients run, what comes back is what comes back from one process.

A pool is opened once and plays a few small rounds with more clients than a block of sums has: two that train, one in which every
client fails, and one more. A pool that starts processes starts them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch

from clients.pools import serial
from fedsim import simulation
from fedsim.core import config as configs
from fedsim.core.contracts import Pool, lift_statistics
from fedsim.core.errors import ClientFailed
from fedsim.core.messages import (
    Bundle,
    ClientJob,
    ClientUpdate,
    EvalJob,
    EvalResult,
    Reply,
    RoundPlan,
    ServerJob,
    StatisticRequest,
)
from fedsim.core.sums import BLOCK, PartSums
from fedsim.laws.comparing import expect_bits, expect_unchanged, same
from fedsim.laws.frame import Law, LawBroken, once
from fedsim.laws.learners import RUN
from fedsim.simulation import Prepared

CLIENTS = BLOCK + 3
TIMES = 4  # that every client is in the pass that may be summed: of few jobs nobody makes blocks
STATISTICS = "statistics"  # the part of a run that is satisfied with a sum
SUMMED, FAILING = "a pass that may be summed", "a round in which all fail"
GRAM = StatisticRequest("gram", ("head.weight",))
STATE: Mapping[str, Any] = {"seen": torch.arange(3), "rounds": [1, 2.5, None, "a"]}  # of a learner's server half


@dataclass(frozen=True, eq=False)
class Played:
    """What a pool was handed, and what came back."""

    handed: Mapping[str, Sequence[ClientJob]]
    bundles: Mapping[str, Sequence[Bundle]]
    counts: Sequence[EvalResult]
    state: Any


@cache
def prepared() -> Prepared:
    """A run of ER, which keeps a memory, over more clients than a block has."""
    change = {
        "data": {"train_per_class": 10},
        "partition": {"clients": CLIENTS},
        "client": {"learners": [{"name": "er", "size": 2}]},
        "runtime": {"workers": min(2, os.cpu_count() or 1)},
    }
    return simulation.prepare(configs.from_dict(configs.merge(RUN, change)))


@cache
def asked() -> Mapping[str, Sequence[ClientJob]]:
    """The jobs of every round, by a word."""
    whole, summed = RoundPlan(statistics=(GRAM,)), RoundPlan(train=(), statistics=(GRAM,))
    params = prepared().state.params
    broken = {n: torch.full_like(t, torch.inf) for n, t in params.items()}
    first = [ClientJob(k, 0, 0, params, whole) for k in range(CLIENTS)]
    remembered = {u.client_id: u.memory or {} for u in _alone(first) if isinstance(u, ClientUpdate)}
    return {
        "the first round": first,
        "a round with memory": [ClientJob(k, 0, 1, params, whole, remembered[k]) for k in range(CLIENTS)],
        SUMMED: TIMES * [ClientJob(k, 0, 2, params, summed, reply=Reply((STATISTICS,))) for k in range(CLIENTS)],
        FAILING: [ClientJob(k, 0, 3, broken, whole) for k in range(CLIENTS)],
        "the round after that": [ClientJob(k, 0, 4, params, whole) for k in range(CLIENTS)],
    }


@cache
def expected(what: str) -> Sequence[ClientUpdate | ClientFailed]:
    """Every client's whole result, in the order of the jobs."""
    return _alone(asked()[what])


def _alone(jobs: Sequence[ClientJob]) -> list[ClientUpdate | ClientFailed]:
    """From one process, one client after the other."""
    pool = serial.Pool(prepared().spec)
    return [result for bundle in pool.train([replace(job, reply=Reply()) for job in jobs]) for result in bundle.results]


@once
def played(pool: type[Pool]) -> Played:
    """Everything, in one pool, which is closed twice."""
    spec, handed, made = prepared().spec, deepcopy(asked()), cast(Any, pool)
    pool.check(spec)
    opened: Pool = made(spec)
    try:
        bundles = {what: tuple(opened.train(jobs)) for what, jobs in handed.items()}
        counts = list(opened.evaluate(slices()))
        state = opened.make(ServerJob("er", 0, prepared().state.params, deepcopy(STATE)))
    finally:
        opened.close()
        opened.close()
    return Played(handed, bundles, counts, state)


def slices() -> list[EvalJob]:
    """Of the first task's test samples."""
    spec, params = prepared().spec, prepared().state.params
    size = len(spec.test_of(0))
    return [EvalJob(0, start, min(start + 2, size), params, list(spec.task_classes[0])) for start in range(0, size, 2)]


# ---------------------------------------------------------------- the laws


def _every_job(pool: type[Pool]) -> None:
    for what, bundles in played(pool).bundles.items():
        jobs = asked()[what]
        places = [bundle.start + n for bundle in bundles for n in range(len(bundle.results))]
        if sorted(places) != list(range(len(jobs))):
            raise LawBroken(f"{what}: of {len(jobs)} jobs, those that are answered are {sorted(places)}")
        for bundle in bundles:
            ids = [jobs[bundle.start + n].client_id for n in range(len(bundle.results))]
            if [result.client_id for result in bundle.results] != ids:
                raise LawBroken(f"{what}: the results from place {bundle.start} on are not those of clients {ids}")
            if len(bundle.results) > 1 and (bundle.start % BLOCK or len(bundle.results) > BLOCK):
                raise LawBroken(f"{what}: {len(bundle.results)} jobs from place {bundle.start} on are no block of {BLOCK}")


def _bits(pool: type[Pool]) -> None:
    for what, bundles in played(pool).bundles.items():
        for bundle in bundles:
            for place, got in enumerate(bundle.results, bundle.start):
                want = expected(what)[place]
                if isinstance(want, ClientUpdate) and isinstance(got, ClientUpdate) and bundle.totals is None:
                    _expect_update(got, want, f"{what}, client {want.client_id}")


def _expect_update(got: ClientUpdate, want: ClientUpdate, when: str) -> None:
    for part in ("params", "statistics", "memory"):
        expect_bits(getattr(got, part) or {}, getattr(want, part) or {}, f"{when}, its {part}")
    if (got.num_samples, got.metrics.get("loss")) != (want.num_samples, want.metrics.get("loss")):
        raise LawBroken(
            f"{when}: {got.num_samples} samples and a loss of {got.metrics.get('loss')} came back, not {want.num_samples}"
        )


def _sums(pool: type[Pool]) -> None:
    """Whole updates or sums, as the pool likes; sums have the bits of the sum over the block."""
    for bundle in played(pool).bundles[SUMMED]:
        if bundle.totals is None:
            continue
        sums = PartSums({STATISTICS: lift_statistics})
        for place, want in enumerate(expected(SUMMED)[bundle.start : bundle.start + len(bundle.results)]):
            sums.add(place, want if isinstance(want, ClientUpdate) else None)
        for part, total in (sums.result() or {}).items():
            expect_bits(
                bundle.totals.get(part, {}), total, f"the sum of the {len(bundle.results)} clients from {bundle.start} on"
            )


def _failures(pool: type[Pool]) -> None:
    for bundle in played(pool).bundles[FAILING]:
        for got, want in zip(bundle.results, expected(FAILING)[bundle.start :], strict=False):
            if not same(got, want):
                raise LawBroken(f"client {want.client_id}, which cannot train, came back as {got}, not {want}")


def _evaluation(pool: type[Pool]) -> None:
    def placed(results: Sequence[EvalResult]) -> list[str]:
        return sorted(map(repr, results))

    got, want = placed(played(pool).counts), placed(list(serial.Pool(prepared().spec).evaluate(slices())))
    if got != want:
        raise LawBroken(f"the counts of {len(want)} slices of test samples are {got}, not {want}")


def _server(pool: type[Pool]) -> None:
    if not same(played(pool).state, dict(STATE)):
        raise LawBroken(f"the state of a learner that trains nothing on the server came back as {played(pool).state}")


def _no_mutation(pool: type[Pool]) -> None:
    for what, jobs in played(pool).handed.items():
        expect_unchanged({"jobs": list(jobs)}, {"jobs": list(asked()[what])}, what)


LAWS: tuple[Law[type[Pool]], ...] = (
    Law("every_job", "every job is answered once, alone or in a block that begins where sums begin", _every_job),
    Law("bits", "a client's tensors, statistics, memory and loss have the bits of one process, after a failed round too", _bits),
    Law("sums", "where sums may travel, whole updates come or sums of the same bits", _sums),
    Law("failures", "a client that fails is a value, with stage and reason", _failures),
    Law("evaluation", "test samples are counted once each, as in one process", _evaluation),
    Law("server", "what a learner's server half hands over comes back with its types and bits", _server),
    Law("no_mutation", "jobs that go in are not changed", _no_mutation),
)
