"""One linear layer over all classes of the stream."""

# b samples, D features, C classes (head rows), K clients

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import Traits
from fedsim.core.messages import Tensors
from fedsim.core.names import HEAD_BIAS, HEAD_WEIGHT

FORMULA = 'features @ head["weight"].T + head["bias"]'  # `Head.formula` of a linear layer


@dataclass(frozen=True)
class Head(contracts.Head):
    """`z = W f + b`: `head.weight` (C, D) and `head.bias` (C,), which start at zero: in few steps a random start decides more
    than any rule."""

    @property
    def traits(self) -> Traits:
        return Traits(gives={"an affine head"})

    def init(self, num_classes: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {HEAD_WEIGHT: torch.zeros(num_classes, width), HEAD_BIAS: torch.zeros(num_classes)}

    def logits(self, features: Tensor, params: Tensors) -> Tensor:
        return F.linear(features, params[HEAD_WEIGHT], params[HEAD_BIAS])

    def affine(self, params: Tensors) -> tuple[Tensor, Tensor] | None:
        return params[HEAD_WEIGHT], params[HEAD_BIAS]

    def formula(self) -> str | None:
        return FORMULA

    def stacked_logits(self, features_KbD: Tensor, params: Tensors) -> Tensor:
        bias = params[HEAD_BIAS]
        return features_KbD @ params[HEAD_WEIGHT].mT + (bias if bias.dim() == 1 else bias[:, None])
