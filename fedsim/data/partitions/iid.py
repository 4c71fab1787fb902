"""IID: samples are dealt at random, as evenly as can be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsim.core import contracts
from fedsim.core.contracts import IntArray
from fedsim.data.partitions import _common


@dataclass(frozen=True)
class Partition(contracts.Partition):
    """A random permutation of the task's samples, cut into equal parts (sizes differ by at most one).

    clients: number of clients; min_samples: floor per client and task.
    Raises PartitionError when there are fewer than clients × min_samples samples.
    """

    def split(self, labels: IntArray, rng: np.random.Generator) -> list[IntArray]:
        _common.check_possible(self, len(labels))
        return list(np.array_split(rng.permutation(len(labels)), self.clients))
