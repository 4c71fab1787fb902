"""Frozen pretrained encoders: what goes in, and the features that come out."""

# b samples, L tokens, D width

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core import config as configs
from fedsim.core.config import ModelConfig, RuntimeConfig
from fedsim.core.errors import ModelError
from fedsim.core.messages import Tensors
from fedsim.core.tensors import digest
from fedsim.models import families, kernels, layers, pretrained, resolution, vit

USE = (
    "num_attention_heads",
    "num_heads",
    "hidden_act",
    "layer_norm_eps",
    "layer_norm_epsilon",
)  # no shape of a weight tells them


@dataclass(frozen=True)
class Backbone:
    """A frozen encoder and what its inputs look like.

    width: D; kind: image | text; pooling: cls | mean | last | pooler (the encoder's own, as published); first_patch, last_patch:
    the patches are the tokens [first_patch, last_patch); image_size: (height, width); mean, std: per channel in 0..1;
    tokenizer_source: hub id or folder of the tokenizer that belongs to it; half: all weights and activations are bfloat16;
    features are not; lean: the last block may leave out tokens that no feature needs; by_encoder: features are the encoder's
    `pooler_output`; places: images become (b, D, H, W), not tokens; digest: "W.U", of the weights as they were read and of how
    they are used, "" if nobody asked.
    The image fields mean nothing for text.
    """

    encoder: nn.Module
    width: int
    kind: str
    pooling: str
    first_patch: int = 0
    image_size: tuple[int, int] = (0, 0)
    num_channels: int = 0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    tokenizer_source: str | None = None
    half: bool = False
    lean: bool = False
    last_patch: int | None = None
    by_encoder: bool = False
    places: bool = False
    digest: str = ""

    def image_features(self, pixels: Tensor, lean: bool = False) -> Tensor:
        """Normalised (b, C, H, W) -> (b, D): the class token, the mean over patches or places, or what the encoder makes of
        them. `lean`: see `Model.features`."""
        options = {"first": 1} if lean and self.lean else {}
        out: Any = self.encoder(pixel_values=pixels.bfloat16() if self.half else pixels, **options)
        if self.by_encoder:
            return self._of_width(_single(out.pooler_output).flatten(1))
        states: Tensor = out.last_hidden_state  # (b, L, D), or (b, L, S, D) of an adapter with sources
        if self.places:  # (b, D, H, W)
            return self._of_width(_single(states).mean(dim=(2, 3)))
        return self._of_width(
            _single(states[:, 0]) if self.pooling == "cls" else _single(states[:, self.first_patch : self.last_patch]).mean(dim=1)
        )

    def _of_width(self, features_bD: Tensor) -> Tensor:
        width = features_bD.shape[-1]
        if width != self.width:
            raise ModelError(f"a {type(self.encoder).__name__} as backbone gives {width} features, its config says {self.width}")
        return features_bD

    @cached_property
    def positions(self) -> int | None:
        """Tokens that a text may have; None where the architecture sets no bound. RoBERTa and its kin count positions from
        behind the padding's, so that they can use fewer than they have."""
        for name, module in self.encoder.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
                return module.num_embeddings - module.padding_idx - 1
        longest = getattr(self.encoder.config, "max_position_embeddings", None)
        return longest if isinstance(longest, int) and longest > 0 else None

    @cached_property
    def vocabulary(self) -> int | None:
        """Token ids that the encoder knows, from 0 on; None if it does not say."""
        try:
            table: Any = self.encoder.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            table = None
        return table.num_embeddings if isinstance(table, nn.Embedding) else None

    @staticmethod
    def used_tokens(inputs: Tensors) -> int:
        """Columns of a batch of texts up to the last one that is in a mask."""
        if "attention_mask" not in inputs:
            return inputs["input_ids"].shape[1]
        mask_bL = inputs["attention_mask"]
        return max(1, int((mask_bL.any(dim=0) * torch.arange(1, mask_bL.shape[1] + 1, device=mask_bL.device)).max()))

    def text_features(self, inputs: Tensors) -> Tensor:
        """`input_ids` and `attention_mask` (b, L) -> (b, D): the first token, the last or the mean of those in the mask.

        Columns at the end that hold nothing but padding are not computed. Raises ModelError for texts that are too long.
        """
        if "input_ids" not in inputs:
            raise ModelError(f"the backbone takes text, but the data hold {', '.join(inputs)}: choose an image backbone")
        ids_bL = inputs["input_ids"]
        mask_bL = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(ids_bL)
        used = self.used_tokens(inputs)
        ids_bL, mask_bL = ids_bL[:, :used], mask_bL[:, :used]  # most texts are far shorter than the longest one allowed
        longest = self.positions
        if longest is not None and used > longest:
            raise ModelError(f"texts of {used} tokens do not fit a backbone of {longest} positions: lower data.max_length")
        out: Any = self.encoder(input_ids=ids_bL, attention_mask=mask_bL)
        if self.by_encoder:
            return self._of_width(_single(out.pooler_output))
        return self._of_width(self._pooled(_single(out.last_hidden_state), mask_bL))

    def _pooled(self, tokens_bLD: Tensor, mask_bL: Tensor) -> Tensor:
        if self.pooling == "cls":
            return tokens_bLD[:, 0]
        if self.pooling == "last":
            last_b = (mask_bL * torch.arange(mask_bL.shape[1], device=mask_bL.device)).argmax(dim=1)
            return tokens_bLD[torch.arange(len(last_b), device=last_b.device), last_b]
        weight_bL1 = mask_bL.unsqueeze(-1).to(tokens_bLD.dtype)
        return (tokens_bLD * weight_bL1).sum(dim=1) / weight_bL1.sum(dim=1).clamp(min=1)


def load(config: ModelConfig, hashed: bool = False) -> Backbone:
    """The frozen backbone of a config, float32 on the CPU, in evaluation mode. hashed: with the digest of its weights and use.

    Raises ModelError (one line) for a folder or file that is missing or damaged, for weights that do not fit, and for an image
    size or a pooling that the architecture has not.
    """
    encoder, preprocessor = pretrained.load(config)
    known = digest(encoder.state_dict()) if hashed else ""  # before positions are interpolated, which another processor may round
    if config.image_size is not None:
        with pretrained.unseeded():
            encoder = resolution.changed(encoder, config.image_size)
    made = made_of(encoder, config, preprocessor)
    return dataclasses.replace(made, digest=f"{known}.{_use(made)}") if hashed else made


def _use(backbone: Backbone) -> str:
    """A digest of what no weight tells and a config.json or preprocessor_config.json may say otherwise tomorrow."""
    layout: Any = backbone.encoder.config
    told = {"mean": backbone.mean, "std": backbone.std, **{key: getattr(layout, key, None) for key in USE}}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def made_of(encoder: nn.Module, config: ModelConfig, preprocessor: Mapping[str, Any]) -> Backbone:
    """This encoder as a frozen backbone, pooled as the config says."""
    layers.as_linear(encoder)
    encoder.eval().requires_grad_(False)
    return _described(encoder, config, preprocessor)


def prepared(backbone: Backbone, runtime: RuntimeConfig, device: torch.device) -> Backbone:
    """The backbone on a device, in the precision and with the kernels of a run.

    In bf16 on the CPU the linear layers alone are in half precision, where it pays; on a GPU everything is.
    Raises ModelError where this torch lacks the kernels.
    """
    bf16 = runtime.precision == "bf16"
    if device.type == "cpu":
        name = configs.resolve_kernels(runtime.kernels, device.type)
        if bf16 or name != "torch":
            kernels.freeze(backbone.encoder, name, runtime.precision)
        lean = name != "torch" and _can_be_lean(backbone)
        return dataclasses.replace(backbone, lean=True) if lean else backbone
    backbone.encoder.to(device, torch.bfloat16 if bf16 else torch.float32)
    return dataclasses.replace(backbone, half=bf16, lean=_can_be_lean(backbone))


def _can_be_lean(backbone: Backbone) -> bool:
    return isinstance(backbone.encoder, vit.ViT) and backbone.pooling == "cls"


def _single(x: Tensor) -> Tensor:
    """Half precision widened to float32."""
    return x.float() if x.dtype == torch.bfloat16 else x


def _described(encoder: Any, config: ModelConfig, preprocessor: Mapping[str, Any]) -> Backbone:
    """What architecture and family say about inputs and outputs."""
    layout, name = encoder.config, f"'{config.backbone}' ({type(encoder).__name__})"
    if encoder.main_input_name == "input_ids":
        pooling = _text_pooling(layout, config.pooling, name)
        width: Any = getattr(layout, families.of(layout).width, None)
        if isinstance(width, int):
            own = pooling == families.POOLER
            return Backbone(encoder, width, "text", pooling, tokenizer_source=pretrained.tokenizer_name(config), by_encoder=own)
    elif encoder.main_input_name == "pixel_values" and (hasattr(layout, "image_size") or families.classifies_images(layout)):
        side: Any = getattr(layout, "image_size", None) or config.image_size or pretrained.usual_side(preprocessor)
        size = (side, side) if isinstance(side, int) else (side[0], side[1])
        channels = getattr(layout, "num_channels", 3)
        width, places = _measured(encoder, channels, size)
        pooling, class_token = _image_pooling(encoder, places, config.pooling, name)
        mean, std = pretrained.normalisation(preprocessor)
        before, after = families.extra_tokens(layout)
        return Backbone(
            encoder,
            width,
            "image",
            pooling,
            places=places,
            by_encoder=pooling in (families.POOLER, families.of(layout).normed),
            first_patch=class_token + before,
            last_patch=-after or None,
            image_size=size,
            num_channels=channels,
            mean=mean,
            std=std,
        )
    raise ModelError(f"model.backbone {name} is no encoder of images or text")


def _text_pooling(layout: Any, chosen: str, name: str) -> str:
    causal = families.is_causal(layout)
    if chosen == "cls" and causal:
        raise ModelError(f"model.pooling is cls, but {name} is a causal model, whose first token sees no other: use last or mean")
    if chosen != "auto":
        return chosen
    return families.of(layout).published(layout) or ("last" if causal else "mean")


def _image_pooling(encoder: Any, places: bool, chosen: str, name: str) -> tuple[str, bool]:
    """The pooling, and whether there is a class token."""
    class_token = not places and any(n.endswith(("cls_token", "class_embedding")) for n, _ in encoder.named_parameters())
    if chosen == "cls" and not class_token:
        raise ModelError(f"model.pooling is cls, but {name} has no class token: use mean")
    if chosen == "last":
        raise ModelError(f"model.pooling is last, which is for text, but {name} takes images: use auto, cls or mean")
    published = families.of(encoder.config).published(encoder.config)
    return (published or ("cls" if class_token else "mean")) if chosen == "auto" else chosen, class_token


@torch.no_grad()
def _measured(encoder: Any, channels: int, size: tuple[int, int]) -> tuple[int, bool]:
    """Width of the features of an encoder of images, and whether it makes (b, D, H, W) of them: by its config, or of one blank
    image, since widths that change from stage to stage have many names."""
    width: Any = getattr(encoder.config, "hidden_size", None)
    if isinstance(width, int):
        return width, False
    try:
        states: Tensor = encoder(pixel_values=torch.zeros(1, channels, *size)).last_hidden_state
    except Exception as e:
        name = type(encoder).__name__
        raise ModelError(f"a {name} cannot look at images of {size[0]} × {size[1]}: {pretrained.one_line(e)}") from e
    return (states.shape[1], True) if states.dim() == 4 else (states.shape[-1], False)
