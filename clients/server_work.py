"""What a learner's server half works with where it trains something of its own (`Learner.made`): the model, and no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core.config import SimConfig
from fedsim.core.contracts import BackboneLike, Outputs
from fedsim.core.errors import ModelError
from fedsim.core.messages import Tensors
from fedsim.models.model import Model


@dataclass(frozen=True, eq=False)
class ServerWork:
    """`contracts.ServerWork`, from a model on its device and what the job says. data_shape: of one sample by input."""

    model: Model
    config: SimConfig
    task: int
    seen: Sequence[int]
    params: Tensors
    fresh: Tensors
    data_shape: Mapping[str, tuple[int, ...]]
    draw: torch.Generator

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def backbone(self) -> BackboneLike:
        return self.model.backbone

    @property
    def image_shape(self) -> tuple[int, ...]:
        if "pixel_values" not in self.data_shape:
            raise ModelError(f"there are no images to be made: the data hold {', '.join(self.data_shape)}")
        return self.data_shape["pixel_values"]

    def outputs(self, pixels: Tensor, params: Tensors | None = None) -> Outputs:
        params = self.params if params is None else params
        trained = any(t.requires_grad for t in params.values())
        with self.model.applied(params) if trained else self.model.merged(params):
            features_bD = self.model.features({"pixel_values": 255 * pixels}, lean=True)
        return Outputs(features_bD, self.model.logits(features_bD, params))
