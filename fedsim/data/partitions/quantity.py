"""Quantity skew: clients hold very different numbers of samples, of the same mix of classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsim.core import contracts
from fedsim.core.contracts import IntArray
from fedsim.data.partitions import _common


@dataclass(frozen=True)
class Partition(contracts.Partition):
    """Sizes from a Dirichlet, samples at random: p ~ Dir(α·1_K), n_k = m + Multinomial(N − K·m, p)_k.

    clients: K; min_samples: the floor m per client and task, given to everybody before the rest is skewed.
    alpha: concentration of the sizes; small: a few clients hold nearly all, large: equal sizes. It says nothing of labels.
    This is the "quantity skew" of Li et al. 2022 ("Federated learning on non-IID data silos: an experimental study"); what
    fed-mammoth calls `quantity` is a number of classes per client, the plug-in `class_quantity`.
    Raises PartitionError when there are fewer than clients × min_samples samples.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _common.check_positive("alpha", self.alpha)

    def split(self, labels: IntArray, rng: np.random.Generator) -> _common.Shards:
        _common.check_possible(self, len(labels))
        share_K = _common.shares(self.alpha, self.clients, (), rng)
        sizes_K = self.min_samples + rng.multinomial(len(labels) - self.clients * self.min_samples, share_K)
        return _common.Shards(rng.permutation(len(labels)), sizes_K)
