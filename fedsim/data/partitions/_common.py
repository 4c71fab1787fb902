"""What the partitions share: checks with one clear line, and dealing samples to their owners.

Shape suffixes: C classes of the task, K clients, N samples of the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from fedsim.core.contracts import IntArray, Partition
from fedsim.core.errors import ConfigError, PartitionError


def check_positive(name: str, value: float) -> None:
    """Raise ConfigError unless a number is positive."""
    if not value > 0:
        raise ConfigError(f"{name} must be positive, got {value}")


def check_at_least_one(name: str, value: int) -> None:
    """Raise ConfigError unless a number is 1 or more."""
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, got {value}")


def check_cover(clients: int, each: int, num_classes: int) -> None:
    """Raise PartitionError when clients with so many classes each cannot hold all classes of a task, or no such number at all."""
    if each > num_classes:
        raise PartitionError(f"classes_per_client is {each}, but the task has {num_classes} classes: lower classes_per_client")
    if clients * each < num_classes:
        raise PartitionError(
            f"{clients} clients with {each} classes each hold at most {clients * each} of the task's {num_classes} classes: "
            f"use at least {-(-num_classes // each)} clients, or classes_per_client {-(-num_classes // clients)}"
        )


def check_possible(partition: Partition, num_samples: int) -> None:
    """Raise PartitionError when even the fairest split would leave a client below the floor."""
    need = partition.clients * partition.min_samples
    if need > num_samples:
        each = f"{partition.min_samples} sample{'s' * (partition.min_samples > 1)}"
        raise PartitionError(
            f"{partition.clients} clients with at least {each} each need {need} samples, but there are {num_samples}: "
            f"use fewer clients, a lower min_samples, or more data per task"
        )


def shares(alpha: float, clients: int, size: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    """Draws from Dir(α·1_K), shape (*size, K). Beyond 10¹² no sample can tell α from infinity, and sums of it would overflow."""
    return rng.dirichlet(np.full(clients, min(alpha, 1e12)), size=size)


class Shards(Sequence[IntArray]):
    """Clients' positions, one after the other in one array, so that a million clients are no million arrays."""

    def __init__(self, positions: IntArray, sizes_K: IntArray) -> None:
        self.positions = positions
        self.sizes = sizes_K
        self._offsets = np.concatenate([[0], np.cumsum(sizes_K)])

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> IntArray: ...
    @overload
    def __getitem__(self, index: slice) -> list[IntArray]: ...
    def __getitem__(self, index: int | slice) -> IntArray | list[IntArray]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        k = range(len(self))[index]
        return self.positions[self._offsets[k] : self._offsets[k + 1]]


def deal(owner_N: NDArray[np.integer], clients: int, rng: np.random.Generator) -> Shards:
    """Positions of every client's samples, in random order, so that any part of a shard is a random sample of it."""
    shuffled = rng.permutation(len(owner_N))
    order = shuffled[stable_order(owner_N[shuffled])]
    return Shards(order, np.bincount(owner_N, minlength=clients))


def deal_by_counts(class_N: IntArray, counts_CK: IntArray, rng: np.random.Generator) -> Shards:
    """Positions of every client's samples, when client k is to get `counts_CK[c, k]` random samples of class c.

    class_N: class index in 0..C-1 of every sample; the rows of `counts_CK` sum to the sizes of the classes.
    """
    num_classes, clients = counts_CK.shape
    shuffled = rng.permutation(len(class_N))
    by_class = shuffled[stable_order(class_N[shuffled])]
    del shuffled  # arrays of all samples are what a partition's memory goes into
    owner_N = np.empty(len(class_N), dtype=np.int32)
    owner_N[by_class] = np.repeat(np.tile(np.arange(clients, dtype=np.int32), num_classes), counts_CK.ravel())
    del by_class
    return deal(owner_N, clients, rng)


def classes_of(labels: IntArray) -> tuple[IntArray, NDArray[np.int64]]:
    """Class index in 0..C-1 of every sample, and the sizes of the C classes that occur."""
    of_label = np.bincount(labels)
    occurs = of_label > 0
    return (np.cumsum(occurs) - 1)[labels], of_label[occurs]


def stable_order(key_N: NDArray[np.integer]) -> IntArray:
    """`argsort(key_N, kind="stable")` of keys in 0..2³²-1, faster: numpy sorts 16 bits in linear time."""
    order: IntArray = np.argsort(key_N.astype(np.uint16), kind="stable")
    if len(key_N) and key_N.max() >> 16:
        order = order[np.argsort((key_N >> 16).astype(np.uint16)[order], kind="stable")]
    return order
