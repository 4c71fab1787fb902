"""Label skew by a Dirichlet per class, as papers on federated continual learning do it.

Shape suffixes: D draws, C classes of the task, K clients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsim.core import contracts
from fedsim.core.contracts import IntArray
from fedsim.core.errors import ConfigError, PartitionError
from fedsim.data.partitions import _common

CHUNK = 1 << 20  # cells drawn at once: part of the bits, so a constant
WORK = 1 << 30  # cells drawn in all: about a minute


@dataclass(frozen=True)
class Partition(contracts.Partition):
    """For every class c of the task: q_c ~ Dir(α·1_K), and every sample of c goes to a client drawn from Categorical(q_c).

    The whole task is drawn again until every client holds `min_samples` or more; nothing else is repaired, so the draw is the
    Dirichlet's, given that the floor holds. This is "distribution-based label imbalance" of Yurochkin et al. 2019
    (arXiv:1905.12022) in the form that LoRM, HGP and LIVAR use (β in their tables; floor 6).

    clients: K; min_samples: floor per client and task.
    alpha: α > 0. Small: a class sits with one or two clients; large: every client sees the task's class mix.
    max_draws: bound on the draws of one task (fewer where C·K is very large).

    The same α means other things elsewhere:
    - Flower's `DirichletPartitioner` draws the same q_c per class, but cuts a class at the rounded-down cumulative shares
      instead of sampling each assignment, keeps samples of a class in file order while cutting, has a floor of 10, and gives
      up after 11 draws. With `self_balancing=True` (off by default) a client that is above N/K samples takes no more, in class
      order: later classes are then more concentrated than α says.
    - PFLlib ("dir", α 0.1 in its scripts) is that self-balancing variant, always on, with a floor of 1 and no bound on draws.
    - pfl-research (`partition_by_dirichlet_class_distribution`) and Flower's `InnerDirichletPartitioner` draw a mix of classes
      per client, p_k ~ Dir(α·1_C), for client sizes chosen beforehand, and sample classes from it until they run out. There α
      spreads one client over classes: 0.1 means "about one class per client", sizes as told, while here sizes vary too.

    Raises PartitionError at once when clients × min_samples exceeds the samples, and after the last draw otherwise.
    """

    min_samples: int = 6
    alpha: float = 0.5
    max_draws: int = 100_000

    def __post_init__(self) -> None:
        super().__post_init__()
        _common.check_positive("alpha", self.alpha)
        if self.max_draws < 1:
            raise ConfigError(f"max_draws must be at least 1, got {self.max_draws}")

    def split(self, labels: IntArray, rng: np.random.Generator) -> _common.Shards:
        _common.check_possible(self, len(labels))
        class_N, sizes_C = _common.classes_of(labels)
        return _common.deal_by_counts(class_N, self._counts(sizes_C, rng), rng)

    def _counts(self, sizes_C: IntArray, rng: np.random.Generator) -> IntArray:
        """Samples of every class at every client (C, K): the first draw that keeps the floor.

        Categorical draws of one class are a multinomial, so that a draw of the whole task is one call, and many go at once.
        """
        cells = len(sizes_C) * self.clients
        budget = min(self.max_draws, max(1, WORK // cells))
        drawn, step, best = 0, 1, 0
        while drawn < budget:
            step = min(step, budget - drawn, max(1, CHUNK // cells))
            q_DCK = _common.shares(self.alpha, self.clients, (step, len(sizes_C)), rng)
            counts_DCK = rng.multinomial(sizes_C, q_DCK)
            smallest_D = counts_DCK.sum(axis=1).min(axis=1)
            kept = np.flatnonzero(smallest_D >= self.min_samples)
            if len(kept):
                first: IntArray = counts_DCK[kept[0]]
                return first
            best = max(best, int(smallest_D.max()))
            drawn, step = drawn + step, step * 4
        raise PartitionError(
            f"no split of {int(sizes_C.sum())} samples in {len(sizes_C)} classes over {self.clients} clients with alpha "
            f"{self.alpha} gave every client {self.min_samples} samples in {drawn} draws (best: {best}): "
            f"raise alpha, lower min_samples, or use fewer clients"
        )
