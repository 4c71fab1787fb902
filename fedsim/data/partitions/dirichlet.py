"""Label skew by a Dirichlet per class, as papers on federated continual learning do it.

Shape suffixes: D draws, C classes of the task, K clients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedsim.core import contracts
from fedsim.core.contracts import IntArray
from fedsim.core.errors import ConfigError, PartitionError
from fedsim.data.partitions import _common

CHUNK = 1 << 20  # cells drawn at once: part of the bits, so a constant
WORK = 1 << 30  # cells drawn in all: about a minute
HOPELESS = -20.0  # ln of a probability: a split is not looked for that all draws together find more rarely


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

    Raises PartitionError at once when clients × min_samples exceeds the samples, or when α is so small that all draws together
    find a split with probability below exp(-20) (`reached`), and after the last draw otherwise.
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
        if self.min_samples and math.log(budget) + reached(sizes_C, self.clients, self.alpha) < HOPELESS:
            raise PartitionError(
                f"no split of {int(sizes_C.sum())} samples in {len(sizes_C)} classes over {self.clients} clients with alpha "
                f"{self.alpha} gives every client {self.min_samples} samples: a class goes to so few clients that not all get "
                f"any; raise alpha, lower min_samples, or use fewer clients"
            )
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


def reached(sizes_C: IntArray, clients: int, alpha: float) -> float:
    """A bound from above on ln of the probability that one draw gives every client a sample.

    The clients of a class are a Pólya urn: with θ = Kα, its sample i (0-based) goes to a client that has none of the class with
    probability θ/(θ + i) at most. So the clients reached by all classes are no more than C and a sum of independent coins with
    mean λ = Σ_c Σ_{0<i<n_c} θ/(θ + i), of which a = K − C have to fall: P ≤ exp(−λ) (eλ/a)^a for a > λ (Chernoff).
    """
    theta, wanted = clients * min(alpha, 1e12), clients - len(sizes_C)
    more_C = np.maximum(sizes_C - 1, 0)  # samples after the first; their sum of 1/(θ + i) from its first term and an integral
    lam = float(theta * np.where(more_C > 0, 1 / (theta + 1) + np.log((theta + more_C.clip(1)) / (theta + 1)), 0.0).sum())
    return wanted - lam - wanted * math.log(wanted / lam) if wanted > lam > 0 else -math.inf if wanted > lam else 0.0
