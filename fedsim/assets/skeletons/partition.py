"""NAME: one line that says how a task's samples are split over clients, and the paper (authors, year, "title").

Hold it against the laws of its kind, then use it:

    fedsim check ./NAME.py
    fedsim partition quickstart partition=./NAME.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedsim import Partition as Base
from fedsim.core.errors import PartitionError
from fedsim.core.numbers import IntArray


@dataclass(frozen=True)
class Partition(Base):
    """Samples sorted by class and cut into equal parts, one for each client: every client holds a class or two.

    clients, min_samples: options of every partition.
    """

    def split(self, labels: IntArray, rng: np.random.Generator) -> Sequence[IntArray]:
        """Positions into `labels`, one array per client: every sample once, `min_samples` or more for each client."""
        if len(labels) < self.clients * self.min_samples:
            raise PartitionError(
                f"{len(labels)} samples cannot give {self.clients} clients {self.min_samples} each: use fewer partition.clients"
            )
        order = rng.permutation(len(labels))
        by_class = order[np.argsort(labels[order], kind="stable")]
        return np.array_split(by_class, self.clients)
