"""A linear layer on fixed random features (RanPAC, McDonnell et al. 2023, arXiv:2307.02251; random vector functional links)."""

# b samples, D features, M random features, C classes (head rows), K clients

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import Traits
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import Tensors
from fedsim.core.names import HEAD_BIAS, HEAD_WEIGHT
from fedsim.models.heads import linear

PROJECTION = "head.projection"


@dataclass(frozen=True)
class Head(contracts.Head):
    """`z = W h + b` of `h = relu(f P)`, P (D, M) with entries N(0, 1): `head.weight` (C, M) and `head.bias` (C,), which start at
    zero.

    P is drawn from the run's seed, the same on every worker and in the evaluation; it is neither trained nor sent, and no part of
    the run's bytes. Features h are √D times as long as f: a head that is trained by steps wants a smaller rate.
    Nonlinear features let a linear map tell classes apart whose features are not linearly separable; M is some times D.
    With `calibrator: ridge`, `aggregator: frozen` and `adapter: none` it is RanPAC without its first-session adaptation.

    size: M; a Gram of these features has M(M+1)/2 numbers, which clients send and a checkpoint holds (2 000: 8 MB and 16 MB;
    the reference's 10 000: 200 MB and 400 MB). activation: relu | none.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"size": 12}, {"size": 12, "activation": "none"})
    size: int = 2000
    activation: str = "relu"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"size must be at least 1, got {self.size}")
        require_choice("activation", self.activation, ("relu", "none"))

    @property
    def traits(self) -> Traits:
        return Traits(gives={"an affine head"})

    def init(self, num_classes: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        return linear.Head().init(num_classes, self.size, generator)

    def fixed(self, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {PROJECTION: torch.randn(width, self.size, generator=generator)}

    def inputs(self, features: Tensor, params: Tensors) -> Tensor:
        projected = features @ params[PROJECTION]
        return projected.relu() if self.activation == "relu" else projected

    def logits(self, features: Tensor, params: Tensors) -> Tensor:
        return linear.Head().logits(self.inputs(features, params), params)

    def affine(self, params: Tensors) -> tuple[Tensor, Tensor] | None:
        """`W Pᵀ`, where nothing bends it; None with relu."""
        if self.activation != "none":
            return None
        weight_CM = params[HEAD_WEIGHT]
        return (weight_CM.double() @ params[PROJECTION].double().T).to(weight_CM.dtype), params[HEAD_BIAS]

    def formula(self) -> str | None:
        inputs = '(features @ head["projection"])' + (".relu()" if self.activation == "relu" else "")
        return linear.FORMULA.replace("features", inputs)

    def stacked_logits(self, features_KbD: Tensor, params: Tensors) -> Tensor:
        return linear.Head().stacked_logits(self.inputs(features_KbD, params), params)
