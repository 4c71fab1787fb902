"""Classes as Gaussians, each with a covariance of its own: logits are quadratic in the features (quadratic discriminants)."""

# b samples, D features, C classes (head rows), K clients

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import Traits
from fedsim.core.messages import Tensors
from fedsim.core.names import HEAD_OFFSET, HEAD_PRECISION, HEAD_WEIGHT


@dataclass(frozen=True)
class Head(contracts.Head):
    """`z_c = −½ (f − w_c)ᵀ P_c (f − w_c) + b_c`, w_c the class's mean, P_c the inverse of its covariance: `head.weight` (C, D),
    `head.precision` (C, D, D) and `head.offset` (C,).

    Made for `calibrator: qda`, which solves for all three. It starts with w = 0, P = I and b = 0, and trains like any other, P_c
    without being kept symmetric or positive; `calibrator: nearest_mean` puts means into w alone. C D² numbers: 655 kB for 10
    classes of 128 features, and they travel like those of any head where they are trained.
    """

    @property
    def traits(self) -> Traits:
        return Traits(gives={"a quadratic head"})

    def init(self, num_classes: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            HEAD_WEIGHT: torch.zeros(num_classes, width),
            HEAD_PRECISION: torch.eye(width).repeat(num_classes, 1, 1),
            HEAD_OFFSET: torch.zeros(num_classes),
        }

    def logits(self, features: Tensor, params: Tensors) -> Tensor:
        return self._logits(features[None], params)

    def formula(self) -> str | None:
        off = 'features[:, None] - head["weight"]'
        return f'head["offset"] - 0.5 * torch.einsum("bcd,cde,bce->bc", {off}, head["precision"], {off})'

    def stacked_logits(self, features_KbD: Tensor, params: Tensors) -> Tensor:
        return self._logits(features_KbD[:, None], params)

    def _logits(self, features: Tensor, params: Tensors) -> Tensor:
        """(…, b, C) from (…, 1, b, D)."""
        centred = features - params[HEAD_WEIGHT][..., None, :]
        squares = (centred @ params[HEAD_PRECISION] * centred).sum(dim=-1)
        return -0.5 * squares.mT + params[HEAD_OFFSET][..., None, :]
