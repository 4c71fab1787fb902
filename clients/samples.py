"""One split's arrays, gathered into batches on a device: no DataLoader, no copies of what is already there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.cache import Cache
from fedsim.core.contracts import ArraySplit, IntArray

LABELS = "labels"
LIMIT = 1 << 29  # bytes that one worker keeps of what it made of them, and the most that a single shard may take


class Samples:
    """Inputs and labels of a split. On a GPU they live there; on the CPU batches are gathered from the (shared) arrays.

    cache: what frozen blocks made of some of them.
    """

    def __init__(self, split: ArraySplit, device: torch.device) -> None:
        self._arrays = dict(split.inputs) | {LABELS: split.labels}
        self._device = device
        self.cache = Cache[Any](LIMIT)
        self._resident: dict[str, Tensor] = {}
        if device.type != "cpu":
            self._resident = {k: torch.from_numpy(np.array(a)).to(device) for k, a in self._arrays.items()}

    def batch(self, positions: IntArray) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs (b, …) and labels (b,) at these positions."""
        inputs = self._at(positions, self._arrays)
        return inputs, inputs.pop(LABELS)

    def labels(self, positions: IntArray) -> Tensor:
        """Labels (b,) at these positions, without their inputs."""
        return self._at(positions, (LABELS,))[LABELS]

    def _at(self, positions: IntArray, names: Iterable[str]) -> dict[str, Tensor]:
        if self._resident:
            index = torch.from_numpy(positions).to(self._device)
            return {k: self._resident[k][index] for k in names}
        return {k: torch.from_numpy(_gather(self._arrays[k], positions)) for k in names}


def _gather(array: NDArray[np.generic], positions: IntArray) -> NDArray[np.generic]:
    gathered: NDArray[np.generic] = np.ascontiguousarray(array[positions])
    return gathered
