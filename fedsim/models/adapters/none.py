"""No adapter: the backbone as it is, only the head is trained."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import BackboneLike, Slots
from fedsim.core.messages import Tensors


@dataclass(frozen=True)
class Adapter(contracts.Adapter):
    """No tensors: linear probing of the frozen backbone."""

    lean: ClassVar[bool] = True

    def init(self, backbone: BackboneLike, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def applied(
        self, backbone: BackboneLike, tensors: Tensors, dropout: torch.Generator | None = None
    ) -> AbstractContextManager[None]:
        return nullcontext()

    def weights(self, backbone: BackboneLike, tensors: Tensors) -> dict[str, Tensor]:
        return {}

    def stacked(self, backbone: BackboneLike, tensors: Tensors, slots: Slots) -> AbstractContextManager[None]:
        return nullcontext()
