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

    def split(self, labels: IntArray, rng: np.random.Generator) -> _common.Shards:
        _common.check_possible(self, len(labels))
        each, more = divmod(len(labels), self.clients)
        sizes_K = np.full(self.clients, each, dtype=np.int64)
        sizes_K[:more] += 1
        return _common.Shards(rng.permutation(len(labels)), sizes_K)
