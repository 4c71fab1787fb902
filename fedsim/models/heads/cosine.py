"""Classes as directions: logits are cosines between features and one prototype per class (Gidaris & Komodakis 2018,
arXiv:1804.09458; LUCIR, Hou et al. 2019)."""

# b samples, D features, C classes (head rows), K clients

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.core.names import HEAD_WEIGHT


@dataclass(frozen=True)
class Head(contracts.Head):
    """`z_c = scale · cos(f, w_c)`, w_c the class's prototype: `head.weight` (C, D), no bias.

    How long a feature or a prototype is does not count, so that classes of old tasks do not lose to new ones by their length.
    What rules see as the head's inputs are features of length 1; with `calibrator: nearest_mean` prototypes are their means
    (SimpleCIL's comparison by cosine). Logits are not affine in W: rules that merge or train the head in that form refuse it.
    Prototypes start as random directions of length 1, drawn from the run's seed and the same for everybody: at zero there is no
    direction, and no gradient. A feature or a prototype of zeros has the cosine 0.

    scale: of all logits, fixed [ours; LUCIR learns it]: 16 lets a softmax over a hundred classes come near to 1.
    """

    scale: float = 16.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ConfigError(f"scale must be positive, got {self.scale}")

    def init(self, num_classes: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {HEAD_WEIGHT: F.normalize(torch.randn(num_classes, width, generator=generator), dim=1)}

    def inputs(self, features: Tensor, params: Tensors) -> Tensor:
        return F.normalize(features, dim=-1)

    def logits(self, features: Tensor, params: Tensors) -> Tensor:
        return self.scale * F.linear(self.inputs(features, params), F.normalize(params[HEAD_WEIGHT], dim=-1))

    def formula(self) -> str | None:
        normed = "torch.nn.functional.normalize"
        return f'{self.scale} * {normed}(features) @ {normed}(head["weight"]).T'

    def stacked_logits(self, features_KbD: Tensor, params: Tensors) -> Tensor:
        return self.scale * (self.inputs(features_KbD, params) @ F.normalize(params[HEAD_WEIGHT], dim=-1).mT)
