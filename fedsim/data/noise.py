"""Label noise: training labels that are wrong on purpose. Test labels are never touched.

Shape suffixes: N samples, n those of one class, F flipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from fedsim.core import rng
from fedsim.core.config import NoiseConfig
from fedsim.core.contracts import IntArray
from fedsim.core.errors import ConfigError


class Flips(NamedTuple):
    """positions: of training samples, ascending; rows: of the head, the labels that they are given in the place of their own."""

    positions: IntArray = np.empty(0, dtype=np.int64)
    rows: IntArray = np.empty(0, dtype=np.int64)


def flips(
    noise: NoiseConfig, row_N: IntArray, positions: Sequence[IntArray], task_classes: Sequence[Sequence[int]], seed: int
) -> Flips:
    """Wrong labels of every task, each drawn from `rng.stream(seed, "label noise", task)`.

    row_N: true head rows of all training samples; positions: samples of every task; task_classes: head rows of every task.
    Of the n samples of a class in a task, round(share · n) are flipped, so that the share of a class is the same in any seed.
    A label is flipped within its own task, since the other classes are not there to be mistaken for.
    Raises ConfigError for a task with a single class.
    """
    if noise.share == 0:
        return Flips()
    found = []
    for task, (chosen, classes) in enumerate(zip(positions, task_classes, strict=True)):
        if len(classes) < 2:
            raise ConfigError(f"stream.noise: task {task} has a single class, and no other label to flip to: use larger tasks")
        draw = rng.stream(seed, "label noise", task)
        order = chosen[np.argsort(row_N[chosen], kind="stable")]
        bounds = np.searchsorted(row_N[order], [*classes, classes[-1] + 1])
        for place, (first, end) in enumerate(pairwise(bounds.tolist())):
            wrong_F = draw.permutation(order[first:end])[: round(noise.share * (end - first))]
            step_F = draw.integers(1, len(classes), len(wrong_F)) if noise.kind == "symmetric" else 1
            found.append(Flips(wrong_F, np.broadcast_to(np.asarray(classes)[(place + step_F) % len(classes)], wrong_F.shape)))
    positions_F, rows_F = (np.concatenate(parts) for parts in zip(*found, strict=True))
    ascending = np.argsort(positions_F)
    return Flips(positions_F[ascending], rows_F[ascending])
