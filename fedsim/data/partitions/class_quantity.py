"""Label skew by a number of classes per client, drawn as in fed-mammoth's option `quantity`.

Shape suffixes: C classes of the task, K clients, k classes per client, S draws of who holds what.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsim.core import contracts
from fedsim.core.contracts import IntArray
from fedsim.core.errors import PartitionError
from fedsim.data.partitions import _common

MAX_DRAWS = 100
NUMBERS, AT_ONCE = 1 << 22, 1 << 16  # random numbers that go into who holds what: in all, and at a time


@dataclass(frozen=True)
class Partition(contracts.Partition):
    """k classes per client, drawn uniformly, and every sample of a class at one of the class's holders, drawn uniformly.

    Every client's set of k classes is uniform over all such sets, given that every class of the task is held by somebody (drawn
    again until it is); a holder's share of a class of n samples with h holders is Binomial(n, 1/h), so that a client may end
    with fewer than k classes. Drawn again, both steps, until everybody has `min_samples`.
    This is the law of fed-mammoth's `quantity` ("quantity-based label imbalance" of Li et al. 2022, "Federated learning on
    non-IID data silos: an experimental study"). The plug-in `pathological` keeps sizes even instead, and always covers.

    clients: K; min_samples: floor per client and task; classes_per_client: k.
    Raises PartitionError when K·k < C, k > C, the draws leave a class without a holder again and again (K·k near C), or the floor
    is not kept in 100 draws.
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
            counts_CK = _counts(sizes_C, self._holders(len(sizes_C), rng), rng)
            smallest = int(counts_CK.sum(axis=0).min())
            if smallest >= self.min_samples:
                return _common.deal_by_counts(class_N, counts_CK, rng)
            best = max(best, smallest)
        raise PartitionError(
            f"no split of {len(labels)} samples in {len(sizes_C)} classes gave each of {self.clients} clients {self.min_samples} "
            f"samples in {MAX_DRAWS} draws (best: {best}): use fewer clients, a lower min_samples, or partition: pathological, "
            f"which keeps sizes even"
        )

    def _holders(self, num_classes: int, rng: np.random.Generator) -> IntArray:
        """1 where client k holds class c, else 0 (C, K), every class at somebody: the first of many draws in which that is so.
        More and more are made together, until there have been `MAX_DRAWS` and `NUMBERS` random numbers."""
        drawn, together, k = 0, 1, self.classes_per_client
        while drawn < max(MAX_DRAWS, NUMBERS // (self.clients * num_classes)):
            chosen_SKk = rng.random((together, self.clients, num_classes)).argsort(axis=2)[:, :, :k]
            covered_SC = np.zeros((together, num_classes), dtype=np.bool_)
            covered_SC[np.arange(together)[:, None, None], chosen_SKk] = True
            whole = np.flatnonzero(covered_SC.all(axis=1))
            if len(whole):
                holds_KC = np.zeros((self.clients, num_classes), dtype=np.int64)
                np.put_along_axis(holds_KC, chosen_SKk[whole[0]], 1, axis=1)
                return holds_KC.T
            drawn, together = drawn + together, max(1, min(2 * together, AT_ONCE // (self.clients * num_classes)))
        raise PartitionError(
            f"{drawn} draws of {k} classes for each of {self.clients} clients all left one of the task's {num_classes} classes "
            f"to nobody: use more clients or classes_per_client, or partition: pathological, which leaves none over"
        )


def _counts(sizes_C: IntArray, holds_CK: IntArray, rng: np.random.Generator) -> IntArray:
    """Samples of every class at every client (C, K): each at one of the class's holders, all equally likely."""
    counts_CK = np.zeros_like(holds_CK)
    for c, size in enumerate(sizes_C):
        holders = np.flatnonzero(holds_CK[c])
        counts_CK[c, holders] = rng.multinomial(size, np.full(len(holders), 1 / len(holders)))
    return counts_CK
