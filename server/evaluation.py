"""Evaluation of the deployed model on every task seen, in large batches, spread over the pool."""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.core.contracts import Pool
from fedsim.core.events import ClassRow, Row
from fedsim.core.messages import EvalJob, Tensors
from fedsim.core.work import seen_classes

SMALL = 16  # samples: a slice below that has more overhead than work


def evaluate(
    pool: Pool,
    deployed: Tensors,
    task: int,
    round: int,
    stage: str,
    task_classes: Sequence[Sequence[int]],
    test_sizes: Sequence[int],
    batch: int,
) -> tuple[tuple[Row, ...], tuple[ClassRow, ...]]:
    """One row of counts per task 0..task, and one per class seen."""
    seen = seen_classes(task_classes, task)
    jobs = [EvalJob(j, a, b, deployed, seen) for j in range(task + 1) for a, b in slices(test_sizes[j], batch)]
    counts = [[0, 0, 0] for _ in range(task + 1)]
    by_class = {c: [0, 0, 0] for c in seen}
    for r in pool.evaluate(jobs):
        for k, value in enumerate((r.correct, r.correct_in_task, r.total)):
            counts[r.task][k] += value
        for c, *values in r.by_class:
            by_class[c] = [a + b for a, b in zip(by_class[c], values, strict=True)]
    rows = tuple(Row(task, round, stage, j, *counts[j]) for j in range(task + 1))
    return rows, tuple(ClassRow(task, round, stage, c, *by_class[c]) for c in seen)


def slices(size: int, batch: int) -> list[tuple[int, int]]:
    """A task's test samples in equal slices of at most `batch`, and four at least where they are not too small: something for
    every worker in a task's first evaluation too. They do not depend on the number of workers."""
    count = max(-(-size // batch), min(4, size // SMALL))
    return [(i * size // count, (i + 1) * size // count) for i in range(count)]


def accuracies(rows: Sequence[Row]) -> tuple[float, ...]:
    """Percent per row; NaN for a task without test samples."""
    return tuple(100.0 * r.correct / r.total if r.total else float("nan") for r in rows)
