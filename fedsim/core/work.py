"""All that a process which runs clients is sent, once: config, samples, and who holds what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsim.core.contracts.data import ArraySplit
from fedsim.core.contracts.numbers import IntArray

if TYPE_CHECKING:
    from fedsim.core.config import SimConfig


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
