"""Classes as points: logits are distances between features and one learnable centre per class (convolutional prototype learning,
Yang et al. 2018; PILoRA, Guo et al. 2024)."""

# b samples, D features, C classes (head rows), K clients

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import CENTRES, Traits
from fedsim.core.messages import Tensors
from fedsim.core.names import HEAD_WEIGHT

SMALLEST = 1e-12  # of squared distances under a root, whose slope is infinite at 0


@dataclass(frozen=True)
class Head(contracts.Head):
    """`z_c = −‖f − w_c‖² / D`, w_c the class's centre: `head.weight` (C, D), no bias.

    Centres start at N(0, 0.1²), drawn from the run's seed and the same for everybody [the size is ours]: at equal places no
    gradient would tell them apart. With `calibrator: nearest_mean` they are class means.
    The quadratic term of f is common to all classes, but it is part of the logits: what a learner reads as −z_c is a distance.
    Rules that merge or train a head in the form W inputs + b refuse it.

    root: `z_c = −‖f − w_c‖ / √D`, as fed-mammoth has it.
    """

    root: bool = False

    @property
    def traits(self) -> Traits:
        return Traits(gives={CENTRES})

    def init(self, num_classes: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {HEAD_WEIGHT: 0.1 * torch.randn(num_classes, width, generator=generator)}

    def logits(self, features: Tensor, params: Tensors) -> Tensor:
        return self._logits(features, params[HEAD_WEIGHT])

    def affine(self, params: Tensors) -> tuple[Tensor, Tensor] | None:
        """`2/D w_c f − ‖w_c‖²/D`, which leaves out the −‖f‖²/D of all classes; None with the root, which bends it."""
        centres_CD = params[HEAD_WEIGHT]
        width = centres_CD.shape[1]
        return None if self.root else (2 / width * centres_CD, -centres_CD.square().sum(dim=1) / width)

    def formula(self) -> str | None:
        distances, width = 'torch.cdist(features, head["weight"])', "features.shape[1]"
        return f"-{distances} / {width} ** 0.5" if self.root else f"-{distances}.square() / {width}"

    def stacked_logits(self, features_KbD: Tensor, params: Tensors) -> Tensor:
        return self._logits(features_KbD, params[HEAD_WEIGHT])

    def _logits(self, features: Tensor, centres: Tensor) -> Tensor:
        """(…, b, C) from (…, b, D) and (…, C, D), or centres (C, D) that all have in common."""
        own, common = features.square().sum(dim=-1, keepdim=True), centres.square().sum(dim=-1)[..., None, :]
        squares = (own + common - 2 * features @ centres.mT) / features.shape[-1]
        return -squares.clamp_min(SMALLEST).sqrt() if self.root else -squares
