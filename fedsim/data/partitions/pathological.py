"""Pathological label skew: every client holds exactly k classes of a task.

Shape suffixes: C classes of the task, K clients, k classes per client.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsim.core import contracts
from fedsim.core.contracts import IntArray
from fedsim.core.errors import PartitionError
from fedsim.data.partitions import _common

MAX_DRAWS = 100


@dataclass(frozen=True)
class Partition(contracts.Partition):
    """k classes per client and task, every class held by somebody and divided evenly (at random) over its holders.

    Clients choose in random order; each takes the classes that nobody holds yet, then those with the most samples per
    holder (n_c / (holders + 1)), ties at random: so sizes stay as even as the classes allow.
    After McMahan et al. 2017 ("Communication-efficient learning of deep networks"), with classes in place of shards. Related,
    but another law: classes and holders drawn uniformly, as in fed-mammoth's `quantity`, is the plug-in `class_quantity`.

    clients: K; min_samples: floor per client and task; classes_per_client: k.
    Raises PartitionError when K·k < C (a class would be left over), k > C, a class has fewer samples than holders, or the
    floor is not kept in 100 draws.
    """

    classes_per_client: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _common.check_at_least_one("classes_per_client", self.classes_per_client)

    def split(self, labels: IntArray, rng: np.random.Generator) -> _common.Shards:
        _common.check_possible(self, len(labels))
        class_N, sizes_C = _common.classes_of(labels)
        _common.check_cover(self.clients, self.classes_per_client, len(sizes_C))
        best = 0
        for _ in range(MAX_DRAWS):
            counts_CK = _even_counts(sizes_C, self._holders(sizes_C, rng), rng)
            smallest = int(counts_CK.sum(axis=0).min())
            if smallest >= self.min_samples and bool((np.count_nonzero(counts_CK, axis=0) == self.classes_per_client).all()):
                return _common.deal_by_counts(class_N, counts_CK, rng)
            best = max(best, smallest)
        raise PartitionError(
            f"no split of {len(labels)} samples in {len(sizes_C)} classes (smallest: {int(sizes_C.min())}) gave each of "
            f"{self.clients} clients {self.classes_per_client} classes "
            f"and {self.min_samples} samples in {MAX_DRAWS} draws (best: {best} samples): "
            f"use fewer clients, fewer classes_per_client, or a lower min_samples"
        )

    def _holders(self, sizes_C: IntArray, rng: np.random.Generator) -> IntArray:
        """1 where client k holds class c, else 0 (C, K)."""
        holds_CK = np.zeros((len(sizes_C), self.clients), dtype=np.int64)
        holders_C = np.zeros(len(sizes_C), dtype=np.int64)
        for client in rng.permutation(self.clients):
            wanted_C = np.where(holders_C == 0, np.inf, sizes_C / (holders_C + 1))
            chosen = np.lexsort((rng.random(len(sizes_C)), -wanted_C))[: self.classes_per_client]
            holds_CK[chosen, client] = 1
            holders_C[chosen] += 1
        return holds_CK


def _even_counts(sizes_C: IntArray, holds_CK: IntArray, rng: np.random.Generator) -> IntArray:
    """Samples of every class at every client (C, K): n_c over its holders, the remainder one each to random holders."""
    counts_CK = np.zeros_like(holds_CK)
    for c, size in enumerate(sizes_C):
        holders = rng.permutation(np.flatnonzero(holds_CK[c]))
        counts_CK[c, holders] = size // len(holders)
        counts_CK[c, holders[: size % len(holders)]] += 1
    return counts_CK
