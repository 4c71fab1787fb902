"""Samples that are held out of training: for a data set without test samples, and for tuning.

Shape suffixes: N samples.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedsim.core import rng
from fedsim.core.contracts import Dataset, IntArray
from fedsim.core.errors import DataError
from fedsim.data.sources import _common


def of_every_group(group_N: IntArray, share: float, purpose: str) -> NDArray[np.bool_]:
    """Which samples are held out, (N,): this share of every group, at least one and not all; none of a group of one.

    Drawn from `rng.stream(0, purpose)`, so the same whatever the seed of the run.
    """
    draw, held_N = rng.stream(0, purpose), np.zeros(len(group_N), dtype=bool)
    for group in np.unique(group_N):
        places = np.flatnonzero(group_N == group)
        count = min(max(1, round(share * len(places))), len(places) - 1)
        held_N[draw.permutation(places)[:count]] = True
    return held_N


def validation(dataset: Dataset, share: float) -> Dataset:
    """The data to tune on: a share of the training samples of every class (and domain) in the place of the test samples.

    The test samples are gone from it. With share 0 it is the data set itself. Raises DataError where nothing can be held out.
    """
    if share == 0:
        return dataset
    train = dataset.train
    domains = 0 if train.domains is None else train.domains
    held_N = of_every_group(train.labels + len(dataset.class_names) * domains, share, "validation")
    if not held_N.any():
        raise DataError("stream.validation: no class has two training samples, so that none can be held out")
    said = f"tested on {int(held_N.sum())} of {len(train)} training samples, held out (stream.validation {share:g})"
    left, held = (_common.subset(train, np.flatnonzero(kept_N)) for kept_N in (~held_N, held_N))
    return replace(dataset, train=left, test=held, notes=(*dataset.notes, f"{said}: not on the test samples"))
