"""The laws that every partition keeps: a disjoint cover, the same every time, or one clear line within a bounded time.

A partition is held against them with its own options on tasks of few and many samples, of classes that are equal and that are
not, and whose head rows have gaps.

Shapes: N samples of a task.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedsim.core import rng
from fedsim.core.contracts import IntArray, Partition
from fedsim.core.errors import PartitionError
from fedsim.laws.comparing import expect_unchanged
from fedsim.laws.frame import Law, LawBroken

SECONDS = 20.0  # in which a small task is split or refused
SEEDS = 3


def tasks(partition: Partition) -> dict[str, IntArray]:
    """Labels (N,) of tasks by a word: enough samples for every client, in all but the last many of them."""
    each = partition.clients * (partition.min_samples + 3)
    sizes: Mapping[str, Mapping[int, int]] = {
        "ten equal classes": dict.fromkeys(range(10), each),
        "unequal classes": {c: each * (1 + c) for c in range(5)},
        "rows with gaps": {2: each, 7: 2 * each, 30: each},
        "two classes": {0: 2 * each, 1: 2 * each},
        "a single class": {4: 4 * each},
        "hardly enough": {0: partition.clients * partition.min_samples, 1: partition.clients * partition.min_samples},
    }
    return {what: np.repeat(list(of), list(of.values())).astype(np.int64) for what, of in sizes.items()}


def split(partition: Partition, labels: IntArray, seed: int = 0) -> list[IntArray] | None:
    """Every client's positions; None for a task that it refuses."""
    result = attempt(partition, labels, seed)
    if isinstance(result, PartitionError):
        return None
    if isinstance(result, Exception):
        raise result
    return result


def attempt(partition: Partition, labels: IntArray, seed: int = 0) -> list[IntArray] | Exception:
    """Every client's positions, or what was raised. Raises LawBroken where it comes to no end."""
    found: list[list[IntArray] | Exception] = []

    def work() -> None:
        try:
            found.append(list(partition.split(labels, rng.stream(seed, "partition", 0))))
        except Exception as e:
            found.append(e)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if not found:
        raise LawBroken(f"{len(labels)} samples for {partition.clients} clients: no split after {SECONDS:.0f} seconds, no error")
    return found[0]


def _cover(partition: Partition) -> None:
    split_any = False
    for what, labels in tasks(partition).items():
        for seed in range(SEEDS):
            shards = split(partition, labels, seed)
            if shards is None:
                continue
            split_any = True
            _require_cover(shards, len(labels), partition.clients, what)
    if not split_any:
        raise LawBroken(f"every task is refused, of {', '.join(tasks(partition))}")


def _require_cover(shards: Sequence[IntArray], samples: int, clients: int, what: str) -> None:
    if len(shards) != clients:
        raise LawBroken(f"{what}: {len(shards)} shards for {clients} clients")
    kinds = {np.asarray(shard).dtype.kind for shard in shards}
    if not kinds <= {"i", "u"}:
        raise LawBroken(f"{what}: shards hold numbers of kind {kinds}, not positions")
    counts_N = np.bincount(np.concatenate(shards), minlength=samples)
    if len(counts_N) > samples:
        raise LawBroken(f"{what}: position {len(counts_N) - 1} of {samples} samples")
    for times, word in ((counts_N == 0, "nobody holds"), (counts_N > 1, "several hold")):
        if times.any():
            raise LawBroken(f"{what}: {word} {int(times.sum())} of {samples} samples, {int(times.argmax())} first")


def _floor(partition: Partition) -> None:
    for floor in {partition.min_samples, partition.min_samples + 4}:
        raised = replace(partition, min_samples=floor)
        for what, labels in tasks(raised).items():
            for seed in range(SEEDS):
                shards = split(raised, labels, seed)
                smallest = min(map(len, shards)) if shards else floor
                if smallest < floor:
                    raise LawBroken(f"{what}: a client holds {smallest} samples, fewer than min_samples {floor}")


def _impossible(partition: Partition) -> None:
    labels = tasks(partition)["ten equal classes"]
    greedy = replace(partition, min_samples=len(labels) // partition.clients + 1)
    need = f"{greedy.clients} clients with at least {greedy.min_samples} of {len(labels)} samples each"
    result = attempt(greedy, labels)
    if not isinstance(result, Exception):
        raise LawBroken(f"{need}: it gave shards instead of raising PartitionError")
    if not isinstance(result, PartitionError):
        raise LawBroken(f"{need}: raised {type(result).__name__} ({result}), not PartitionError") from result
    if "\n" in str(result).strip() or not str(result):
        raise LawBroken(f"{need}: the PartitionError is not one line: {str(result)!r}")


def _deterministic(partition: Partition) -> None:
    for what, labels in tasks(partition).items():
        first, again = split(partition, labels), split(partition, labels)
        if (first is None) != (again is None):
            raise LawBroken(f"{what}: split once and refused once, with the same generator")
        for k, (a, b) in enumerate(zip(first or (), again or (), strict=True)):
            if not np.array_equal(a, b):
                raise LawBroken(f"{what}: client {k} holds other samples when the same task is split again: draw from `rng` only")


def _no_mutation(partition: Partition) -> None:
    for what, labels in tasks(partition).items():
        given = labels.copy()
        split(partition, given)
        expect_unchanged({"labels": given}, {"labels": labels}, what)


LAWS: tuple[Law[Partition], ...] = (
    Law("cover", "every sample is held by exactly one client, in every task that is not refused; not all tasks are", _cover),
    Law("floor", "every client holds `min_samples` or more", _floor),
    Law("impossible", "fewer samples than clients need are refused by a PartitionError of one line", _impossible),
    Law("deterministic", "the same generator gives the same split", _deterministic),
    Law("no_mutation", "the labels that go in are not changed", _no_mutation),
)
