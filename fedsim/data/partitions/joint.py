"""Joint: nothing is split, one client holds all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedsim.core import contracts
from fedsim.core.contracts import IntArray
from fedsim.core.errors import ConfigError
from fedsim.data.partitions import _common


@dataclass(frozen=True)
class Partition(contracts.Partition):
    """One client holds every sample of a task, in random order; with `stream.joint` every sample of the stream.

    clients: 1; min_samples: floor of that client.
    Raises PartitionError when there are fewer samples than that.
    """

    whole: ClassVar[bool] = True

    clients: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clients != 1:
            raise ConfigError(f"clients must be 1 with joint, which gives all samples to one client, got {self.clients}")

    def split(self, labels: IntArray, rng: np.random.Generator) -> _common.Shards:
        _common.check_possible(self, len(labels))
        return _common.Shards(rng.permutation(len(labels)), np.array([len(labels)]))
