"""What the partitions share: checks with one clear line, and dealing samples to their owners.

Shape suffixes: C classes of the task, K clients, N samples of the task.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsim.core.contracts import IntArray, Partition
from fedsim.core.errors import ConfigError, PartitionError


def check_positive(name: str, value: float) -> None:
    """Raise ConfigError unless a number is positive and finite."""
    if not (value > 0 and np.isfinite(value)):
        raise ConfigError(f"{name} must be positive{'' if value <= 0 else ' and finite'}, got {value}")


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


def deal(owner_N: IntArray, clients: int, rng: np.random.Generator) -> list[IntArray]:
    """Positions of every client's samples, in random order, so that any part of a shard is a random sample of it."""
    shuffled = rng.permutation(len(owner_N))
    order = shuffled[np.argsort(owner_N[shuffled], kind="stable")]
    return list(np.split(order, np.cumsum(np.bincount(owner_N, minlength=clients))[:-1]))


def deal_by_counts(class_N: IntArray, counts_CK: IntArray, rng: np.random.Generator) -> list[IntArray]:
    """Positions of every client's samples, when client k is to get `counts_CK[c, k]` random samples of class c.

    class_N: class index in 0..C-1 of every sample; the rows of `counts_CK` sum to the sizes of the classes.
    """
    num_classes, clients = counts_CK.shape
    shuffled = rng.permutation(len(class_N))
    by_class = shuffled[np.argsort(class_N[shuffled], kind="stable")]
    owner_N = np.empty(len(class_N), dtype=np.int64)
    owner_N[by_class] = np.repeat(np.tile(np.arange(clients), num_classes), counts_CK.ravel())
    return deal(owner_N, clients, rng)


def classes_of(labels: IntArray) -> tuple[IntArray, NDArray[np.int64]]:
    """Class index in 0..C-1 of every sample, and the sizes of the C classes that occur."""
    _, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return index.astype(np.int64), sizes.astype(np.int64)
