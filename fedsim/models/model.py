"""A client's model: a frozen backbone, an adapter that is applied to it, and one linear head over all classes.

The model holds no trainable state. Adapter and head travel as tensors (`adapter.*`, `head.*`) and are handed in.
"""

# b samples, D features, C classes

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fedsim.core import config as configs
from fedsim.core import contracts
from fedsim.core.config import SimConfig
from fedsim.core.errors import ModelError
from fedsim.core.messages import Tensors
from fedsim.models import backbone as backbones
from fedsim.models import head, inject, transform
from fedsim.models.backbone import Backbone
from fedsim.models.transform import Transform

ADAPTER = "adapter."


class Model:
    """What clients train and evaluate with. Made by `build`."""

    def __init__(
        self, backbone: Backbone, adapter: contracts.Adapter, num_classes: int, device: torch.device, transform: Transform | None
    ) -> None:
        self.backbone = backbone
        self.adapter = adapter
        self.num_classes = num_classes
        self.device = device
        self._transform = transform

    def init_adapter(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh `adapter.*` tensors, CPU float32. Raises ModelError if the adapter does not fit the backbone."""
        return {ADAPTER + n: t for n, t in self.adapter.init(self.backbone, generator).items()}

    def init_head(self) -> dict[str, Tensor]:
        """`head.weight` (C, D) and `head.bias` (C,), zeros, CPU float32."""
        return head.init(self.num_classes, self.backbone.width)

    def applied(self, params: Tensors, dropout: torch.Generator | None = None) -> AbstractContextManager[None]:
        """While open, features are those of the backbone with the `adapter.*` tensors, and gradients flow to them.

        dropout: generator of the adapter's dropout masks in training, None otherwise.
        """
        return self.adapter.applied(self.backbone, _adapter_tensors(params), dropout)

    def merged(self, params: Tensors) -> AbstractContextManager[None]:
        """Like `applied`, in the cheapest form for inference."""
        return self.adapter.merged(self.backbone, _adapter_tensors(params))

    def features(self, inputs: Tensors, augment: torch.Generator | None = None) -> Tensor:
        """A raw batch on the device (`pixel_values` uint8, or `input_ids` and `attention_mask`) -> pooled features (b, D).

        augment: generator of random augmentations in training, None otherwise. Raises ModelError if the batch does not fit.
        """
        if self._transform is None:
            return self.backbone.text_features(inputs)
        if "pixel_values" not in inputs:
            raise ModelError(f"the backbone takes images, but the data hold {', '.join(inputs)}: choose a text backbone")
        return self.backbone.image_features(self._transform(inputs["pixel_values"], augment))

    def logits(self, features: Tensor, params: Tensors) -> Tensor:
        """`h Wᵀ + b` of `head.weight` and `head.bias`, (b, C)."""
        return head.logits(features, params)

    def layer(self, parameter: str) -> nn.Module:
        """The encoder's module that an adapter tensor belongs to: `adapter.layers.0.mlp.fc1.lora_A` -> `layers.0.mlp.fc1`."""
        name = parameter.removeprefix(ADAPTER).rpartition(".")[0]
        if not parameter.startswith(ADAPTER) or not name:
            raise ModelError(f"parameter '{parameter}' belongs to no layer of the backbone: expected adapter.<layer>.<tensor>")
        return inject.submodule(self.backbone.encoder, name)


def build(config: SimConfig, num_classes: int, device: torch.device | str = "cpu") -> Model:
    """The model of a run on a device. Raises ModelError for weights that are missing, damaged or do not fit."""
    device = torch.device(device)
    backbone = backbones.load(config.model)
    backbone.encoder.to(device)
    adapter: contracts.Adapter = configs.build("adapters", config.adapter)
    images = None
    if backbone.kind == "image":
        images = transform.build(
            config.transform, backbone.image_size, backbone.num_channels, backbone.mean, backbone.std, device
        )
    return Model(backbone, adapter, num_classes, device, images)


def _adapter_tensors(params: Tensors) -> dict[str, Tensor]:
    return {n.removeprefix(ADAPTER): t for n, t in params.items() if n.startswith(ADAPTER)}
