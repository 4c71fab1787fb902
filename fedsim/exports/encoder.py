"""A run's encoder as transformers itself has it, with the run's weights put in where fedsim's names say.

fedsim renames little: a plain ViT is its own class with transformers' names, and linear maps of other kinds are `nn.Linear`
(`fedsim.models.layers`), a convolution of 1 × 1 under `<name>.linear`, a transposed one under its own name.
"""

# r rank, d inputs of a layer, m outputs

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core.config import ModelConfig
from fedsim.core.errors import ModelError
from fedsim.core.messages import Tensors
from fedsim.models import families, pretrained, resolution, vit

LINEAR = ".linear"  # what stands behind the name of a convolution of 1 × 1, see `fedsim.models.layers.Pointwise`


def published(config: ModelConfig) -> tuple[Any, Mapping[str, Any]]:
    """The encoder of a config, a model of transformers, float32 on the CPU in evaluation mode; and what its preprocessor says."""
    encoder, preprocessor = pretrained.load(config)
    if config.image_size is not None:
        with pretrained.unseeded():
            encoder = resolution.changed(encoder, config.image_size)
    return (_vit(encoder) if isinstance(encoder, vit.ViT) else encoder).eval(), preprocessor


def _vit(encoder: vit.ViT) -> Any:
    from transformers import ViTConfig, ViTModel

    layout = ViTConfig(**{key: getattr(encoder.config, key) for key in vit.REQUIRED}, hidden_act="gelu")
    with torch.device("meta"):
        model = ViTModel(layout, add_pooling_layer=False)
    model.load_state_dict(encoder.state_dict(), assign=True)
    return model


def found_by_name(config: ModelConfig, encoder: Any) -> bool:
    """Whether transformers loads this very encoder from the name that the config has for it."""
    made_here = config.backbone in ("random", "omniglot-vit") or config.backbone.endswith(".safetensors")
    same = config.image_size is None and type(encoder) is pretrained.encoder_class(encoder.config)
    return same and not made_here


def maker(encoder: Any) -> tuple[str, str]:
    """How a script gets the class of an encoder: what it imports it from, and its name."""
    import transformers

    mapping: Any = transformers.AutoModel._model_mapping
    cls = type(encoder)
    if type(encoder.config) in mapping and mapping[type(encoder.config)] is cls:
        return "transformers", "AutoModel"
    return ("transformers" if hasattr(transformers, cls.__name__) else cls.__module__), cls.__name__


def options(encoder: Any) -> dict[str, bool]:
    """What `from_pretrained` must be told so that it makes no more than is there."""
    return families.pooler_option(type(encoder), encoder.config)


def layer(encoder: nn.Module, name: str) -> tuple[str, nn.Module]:
    """Name and module that transformers has for one of fedsim's linear layers."""
    own = name.removesuffix(LINEAR) if name.endswith(LINEAR) and not _has(encoder, name) else name
    if not _has(encoder, own):
        raise ModelError(f"the exported encoder has no layer '{name}' of the run's")
    return own, encoder.get_submodule(own)


@torch.no_grad()
def put(encoder: nn.Module, weights: Tensors) -> None:
    """Write these weights, by fedsim's names, over the encoder's own: tied ones are then tied still."""
    for name, tensor in weights.items():
        owner, _, key = name.rpartition(".")
        module = layer(encoder, owner)[1] if owner else encoder
        old: Tensor = getattr(module, key)
        new = tensor.t() if key == "weight" and _is_transposed(module) else tensor
        old.copy_(new.reshape(old.shape))


def factors(module: nn.Module, a_rd: Tensor, b_mr: Tensor) -> tuple[Tensor, Tensor]:
    """A and B in the shapes that PEFT's LoRA has for a layer of this kind."""
    if isinstance(module, nn.Conv2d):
        return a_rd[:, :, None, None], b_mr[:, :, None, None]
    return a_rd, b_mr


def fans_in_first(module: nn.Module) -> bool:
    """PEFT's `fan_in_fan_out`: whether the layer's weight lies (inputs, outputs)."""
    return _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _has(encoder: nn.Module, name: str) -> bool:
    try:
        encoder.get_submodule(name)
    except AttributeError:
        return False
    return True
