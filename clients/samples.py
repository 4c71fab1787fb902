"""One split's arrays, gathered into batches on a device: no DataLoader, no copies of what is already there."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.kept import LIMIT, Kept
from fedsim.core.contracts import ArraySplit, IntArray


class Samples:
    """Inputs and labels of a split. On a GPU they live there; on the CPU batches are gathered from the (shared) arrays.

    kept: what frozen blocks made of some of them.
    """

    def __init__(self, split: ArraySplit, device: torch.device) -> None:
        self._arrays = dict(split.inputs) | {"labels": split.labels}
        self._device = device
        self.kept = Kept(LIMIT)
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
