"""Partitions that are broken on purpose are caught, each by the law that it breaks."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from fedsim import laws
from fedsim.core import contracts
from fedsim.core.contracts import IntArray
from fedsim.core.errors import PartitionError
from fedsim.laws import partitions
from tests.laws.one import against


@dataclass(frozen=True)
class Dealt(contracts.Partition):
    """Keeps all laws: like cards, after shuffling."""

    clients: int = 4

    def split(self, labels: IntArray, rng: np.random.Generator) -> Sequence[IntArray]:
        if len(labels) < self.clients * self.min_samples:
            raise PartitionError("too few samples: use fewer clients")
        order = rng.permutation(len(labels))
        return [order[k :: self.clients] for k in range(self.clients)]


@dataclass(frozen=True)
class Lossy(Dealt):
    def split(self, labels: IntArray, rng: np.random.Generator) -> Sequence[IntArray]:
        return [shard[1:] for shard in super().split(labels, rng)]


@dataclass(frozen=True)
class Shared(Dealt):
    def split(self, labels: IntArray, rng: np.random.Generator) -> Sequence[IntArray]:
        first, *rest = super().split(labels, rng)
        return [np.concatenate([first, rest[0][:1]]), *rest]


@dataclass(frozen=True)
class OneTooMany(Dealt):
    def split(self, labels: IntArray, rng: np.random.Generator) -> Sequence[IntArray]:
        return [*super().split(labels, rng), np.array([], dtype=np.int64)]


@dataclass(frozen=True)
class Picky(Dealt):
    def split(self, labels: IntArray, rng: np.random.Generator) -> Sequence[IntArray]:
        raise PartitionError("not today")


@dataclass(frozen=True)
class Greedy(Dealt):
    """The first client takes all but one of each."""

    def split(self, labels: IntArray, rng: np.random.Generator) -> Sequence[IntArray]:
        shards = super().split(labels, rng)
        return [np.concatenate([shards[0], *(s[1:] for s in shards[1:])]), *(s[:1] for s in shards[1:])]


@dataclass(frozen=True)
class Careless(Dealt):
    """Never says that there are too few."""

    def split(self, labels: IntArray, rng: np.random.Generator) -> Sequence[IntArray]:
        order = rng.permutation(len(labels))
        return [order[k :: self.clients] for k in range(self.clients)]


@dataclass(frozen=True)
class Raw(Dealt):
    def split(self, labels: IntArray, rng: np.random.Generator) -> Sequence[IntArray]:
        if len(labels) < self.clients * self.min_samples:
            raise ValueError("empty")
        return super().split(labels, rng)


@dataclass(frozen=True)
class Unseeded(Dealt):
    def split(self, labels: IntArray, rng: np.random.Generator) -> Sequence[IntArray]:
        return super().split(labels, np.random.default_rng())


@dataclass(frozen=True)
class Sorting(Dealt):
    def split(self, labels: IntArray, rng: np.random.Generator) -> Sequence[IntArray]:
        labels[:] = -np.sort(-labels)
        return super().split(labels, rng)


DONE = threading.Event()


@dataclass(frozen=True)
class Endless(Dealt):
    def split(self, labels: IntArray, rng: np.random.Generator) -> Sequence[IntArray]:
        DONE.wait()
        return super().split(labels, rng)


def broken(partition: contracts.Partition) -> dict[str, str]:
    return {r.name: r.explanation for r in laws.check("partitions", partition) if not r.ok}


def test_a_good_one_keeps_all() -> None:
    assert broken(Dealt()) == {}


@pytest.mark.parametrize(
    ("partition", "law", "says"),
    [
        (Lossy(), "cover", r"ten equal classes: nobody holds 4 of 160 samples, \d+ first"),
        (Shared(), "cover", "several hold 1 of 160 samples"),
        (OneTooMany(), "cover", "5 shards for 4 clients"),
        (Picky(), "cover", "every task is refused"),
        (Greedy(), "floor", "a client holds 1 samples, fewer than min_samples 5"),
        (Careless(), "impossible", "it gave shards instead of raising PartitionError"),
        (Raw(), "impossible", r"raised ValueError \(empty\), not PartitionError"),
        (Unseeded(), "deterministic", "client 0 holds other samples when the same task is split again"),
        (Sorting(), "no_mutation", "the labels that it was given changed under its hands"),
    ],
)
def test_broken_one_is_caught_by_its_law(partition: contracts.Partition, law: str, says: str) -> None:
    told = against("partitions", partition, law)
    assert re.search(says, told), told


def test_one_that_comes_to_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "SECONDS", 0.05)
    try:
        assert "no split after 0 seconds, no error" in broken(Endless())["cover"]
    finally:
        DONE.set()
