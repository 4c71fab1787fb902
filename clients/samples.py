"""One split's arrays, gathered into batches on a device: no DataLoader, no copies of what is already there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.cache import Cache
from fedsim.core.contracts import ArraySplit, IntArray

LIMIT = 1 << 29  # bytes that one worker keeps of what it made of them, and the most that a single shard may take


class Samples:
    """Inputs and labels of a split. On a GPU they live there; on the CPU batches are gathered from the (shared) arrays.

    cache: what frozen blocks made of some of them.
    """

    def __init__(self, split: ArraySplit, device: torch.device) -> None:
        self._arrays = dict(split.inputs) | {"labels": split.labels}
        self._device = device
        self.cache = Cache[Any](LIMIT)
        self._resident: dict[str, Tensor] = {}
        if device.type != "cpu":
            self._resident = {k: torch.from_numpy(np.array(a)).to(device) for k, a in self._arrays.items()}

    def batch(self, positions: IntArray) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs (b, …) and labels (b,) at these positions."""
        if self._resident:
            index = torch.from_numpy(positions).to(self._device)
            inputs = {k: t[index] for k, t in self._resident.items()}
        else:
            inputs = {k: torch.from_numpy(_gather(a, positions)) for k, a in self._arrays.items()}
        return inputs, inputs.pop("labels")


def _gather(array: NDArray[np.generic], positions: IntArray) -> NDArray[np.generic]:
    gathered: NDArray[np.generic] = np.ascontiguousarray(array[positions])
    return gathered
