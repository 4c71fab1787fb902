"""All that a process which runs clients is sent, once: config, samples, and who holds what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.core.config import SimConfig
from fedsim.core.numbers import IntArray


@dataclass(frozen=True)
class ArraySplit:
    """One split as arrays: inputs keyed like the backbone's (`pixel_values` uint8 (N, H, W) or (N, H, W, C);
    `input_ids` and `attention_mask` (N, L)), labels (N,), and the domain of every sample where there are domains."""

    inputs: Mapping[str, NDArray[Any]]
    labels: IntArray
    domains: IntArray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sample_bytes(self) -> int:
        """Of one sample and its label, as they lie here."""
        arrays = (*self.inputs.values(), self.labels)
        return sum(a.dtype.itemsize * int(np.prod(a.shape[1:])) for a in arrays)


def seen_classes(task_classes: Sequence[Sequence[int]], task: int) -> list[int]:
    """Head rows of the classes of tasks 0..task, ascending."""
    return sorted({c for classes in task_classes[: task + 1] for c in classes})


@dataclass(frozen=True, eq=False)
class ShardLookup:
    """Who holds what, found in flat arrays: shared by the manifest and by what is sent to the workers.

    shard_offsets (T·K + 1,): client k's samples of task t are `shard_indices[offsets[t*K+k] : offsets[t*K+k+1]]`, positions
    into the training split; test_offsets (T + 1,): the same for the test split.
    """

    num_clients: int
    shard_indices: IntArray
    shard_offsets: IntArray
    test_indices: IntArray
    test_offsets: IntArray

    def shard(self, task: int, client_id: int) -> IntArray:
        """Positions into the training split of one client's samples of one task."""
        cell = task * self.num_clients + client_id
        return self.shard_indices[self.shard_offsets[cell] : self.shard_offsets[cell + 1]]

    def test_of(self, task: int) -> IntArray:
        """Positions into the test split of one task's samples."""
        return self.test_indices[self.test_offsets[task] : self.test_offsets[task + 1]]


@dataclass(frozen=True)
class WorkSpec(ShardLookup):
    """All that a worker needs to build its model and find a client's shard; sent once. Labels are in the head's row order."""

    config: SimConfig
    train: ArraySplit
    test: ArraySplit
    task_classes: tuple[tuple[int, ...], ...]
    user_files: tuple[tuple[str, str], ...] = ()  # path and fingerprint of the user's plug-in files when the run began
    weights: int = 0  # bytes of the backbone, which every worker holds for itself
    class_names: tuple[str, ...] = ()  # in the order of the head's rows; these three are for clients on machines of their own
    task_names: tuple[str, ...] = ()
    split: str = ""  # hash of the manifest
