"""Pools that are broken on purpose are caught, each by the law that it breaks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import pytest

from clients.pools import serial
from fedsim import laws
from fedsim.core.defaults import torch_defaults
from fedsim.core.errors import PoolError
from fedsim.core.messages import Bundle, ClientJob, ClientUpdate, EvalJob, EvalResult, ServerJob, State
from fedsim.core.sums import BLOCK
from fedsim.laws import pools
from tests.laws.one import against


class Changed(serial.Pool):
    """The serial pool, but for one thing."""

    what: ClassVar[str] = ""

    def train(self, jobs: Sequence[ClientJob]) -> Iterator[Bundle]:
        if self.what == "in place":
            jobs[0].params["head.bias"].add_(1)  # type: ignore[attr-defined]
        bundles = list(self._in_blocks(jobs) if self.what in ("blocks", "narrow sums") else super().train(jobs))
        for bundle in bundles[1:] if self.what == "lost" else bundles[::-1]:
            yield self._changed(bundle, jobs)

    def _in_blocks(self, jobs: Sequence[ClientJob]) -> Iterator[Bundle]:
        for start in range(0, len(jobs), BLOCK):
            with torch_defaults(1):
                yield self._worker.train(start, jobs[start : start + BLOCK])

    def _changed(self, bundle: Bundle, jobs: Sequence[ClientJob]) -> Bundle:
        first = bundle.results[0]
        if self.what == "mixed up":
            return replace(bundle, results=(replace(first, client_id=99),))
        if self.what == "failure" and not isinstance(first, ClientUpdate):
            raise PoolError(first.reason)
        if self.what == "forgetful" and isinstance(first, ClientUpdate):
            return replace(bundle, results=(replace(first, memory=None), *bundle.results[1:]))
        if self.what == "rounded" and isinstance(first, ClientUpdate):
            params = {n: t.bfloat16().to(t.dtype) for n, t in first.params.items()}
            return replace(bundle, results=(replace(first, params=params), *bundle.results[1:]))
        if self.what == "narrow sums" and bundle.totals is not None:
            totals = {part: {n: t.float().double() for n, t in total.items()} for part, total in bundle.totals.items()}
            return replace(bundle, totals=totals)
        if self.what == "large" and bundle.start == 0:
            return replace(bundle, results=tuple(r for b in serial.Pool.train(self, jobs) for r in b.results))
        return bundle

    def evaluate(self, jobs: Sequence[EvalJob]) -> Iterator[EvalResult]:
        yield from super().evaluate(jobs[1:] if self.what == "counts" else jobs)

    def make(self, job: ServerJob) -> State:
        made = super().make(job)
        return {**made, "rounds": tuple(made["rounds"])} if self.what == "tuple" else made

    def close(self) -> None:
        if self.what == "closed" and not hasattr(self, "_worker"):
            raise ValueError("closed already")
        if self.what == "closed":
            del self._worker


def changed(name: str) -> type[Changed]:
    return type("Pool", (Changed,), {"what": name})


@pytest.mark.parametrize("name", ["", "blocks"])
def test_good_ones_keep_all(name: str) -> None:
    """Clients one by one or in blocks, the last one first."""
    assert [(r.name, r.explanation) for r in laws.check("pools", changed(name)) if not r.ok] == []


@pytest.mark.parametrize(
    ("what", "law", "says"),
    [
        ("lost", "every_job", "the first round: of 13 jobs, those that are answered are"),
        ("mixed up", "every_job", "are not those of clients"),
        ("large", "every_job", "the first round: of 13 jobs, those that are answered are"),
        ("closed", "every_job", "closed already"),
        ("rounded", "bits", r"the first round, client \d+, its params: .* (is not the same to the bit|should be)"),
        ("forgetful", "bits", r"the first round, client \d+, its memory"),
        ("narrow sums", "sums", r"the sum of the \d+ clients from \d+ on"),
        ("failure", "failures", "PoolError"),
        ("counts", "evaluation", "the counts of"),
        ("tuple", "server", "came back as"),
        ("in place", "no_mutation", "the jobs that it was given changed"),
    ],
)
def test_broken_one_is_caught_by_its_law(what: str, law: str, says: str) -> None:
    told = against("pools", changed(what), law)
    assert re.search(says, told), told


def test_sums_failures_and_memory_are_among_what_is_played() -> None:
    assert all(bundle.totals for bundle in pools.played(changed("blocks")).bundles[pools.SUMMED])
    assert not any(isinstance(result, ClientUpdate) for result in pools.expected(pools.FAILING))
    assert all(isinstance(u, ClientUpdate) and u.memory for u in pools.expected("a round with memory"))
    assert all(job.memory for job in pools.asked()["a round with memory"])
