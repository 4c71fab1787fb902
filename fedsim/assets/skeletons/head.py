"""NAME: one line that says how logits come from features, and the paper (authors, year, "title").

Hold it against the laws of its kind, then use it:

    fedsim check ./NAME.py
    fedsim run fedavg head=./NAME.py
"""

# b samples, D features, C classes (head rows), K clients

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import Head as Base
from fedsim import Tensors
from fedsim.core.names import HEAD_WEIGHT


@dataclass(frozen=True)
class Head(Base):
    """`z = scale · W f`: `head.weight` (C, D), which starts at zero, and no bias."""

    scale: float = 1.0

    def init(self, num_classes: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What is trained and sent; the first axis of each tensor is classes. A random start draws from the generator."""
        return {HEAD_WEIGHT: torch.zeros(num_classes, width)}

    def logits(self, features: Tensor, params: Tensors) -> Tensor:
        return self.scale * (features @ params[HEAD_WEIGHT].mT)

    def stacked_logits(self, features_KbD: Tensor, params: Tensors) -> Tensor:
        """The same for K clients at once: W is (K, C, D), or (C, D) where all clients have the same."""
        return self.scale * (features_KbD @ params[HEAD_WEIGHT].mT)
