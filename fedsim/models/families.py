"""What is known of families of encoders beyond what their configs tell: one record for each that needs one.

A family without a record is read off its config and its modules: the class token where there is one, else the mean over
patches, space or tokens, and the last token of causal language models.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

POOLER = "pooler"  # the encoder's own pooling, as published: its `pooler_output`


@dataclass(frozen=True)
class Family:
    """Facts of one `model_type`.

    part: of a checkpoint of several towers, the config of the one that encodes images.
    plain: the encoder is a plain ViT under the same names, and is read as one.
    auto: the pooling that `auto` stands for; only_if: the switch of the config that must be on for it, without which it is as
    for any other family; optional: the switch can be turned off, and the modules behind it go.
    normed: the pooling whose last norm is applied in `pooler_output` only.
    before, after: names of numbers of the config, or numbers, of tokens between class token and patches and behind the patches.
    width: name of the config's width of the outputs.
    """

    part: str | None = None
    plain: bool = False
    auto: str | None = None
    only_if: str | None = None
    optional: bool = False
    normed: str | None = None
    before: str | int = "num_register_tokens"
    after: str | int = 0
    width: str = "hidden_size"

    def published(self, layout: Any) -> str | None:
        """`auto`, where the config has it switched on."""
        return self.auto if self.only_if is None or getattr(layout, self.only_if, False) else None


UNKNOWN = Family()
TWO_TOWERS = Family(part="vision_config")
CLASS_TOKEN_NORMED_LAST = Family(normed="cls")  # CLIPVisionModel: `post_layernorm` of the class token, on which CLIP was trained
MEAN_NORMED_LAST = Family(auto=POOLER)  # ConvNextModel: the norm of the mean over space
MEAN_IF_TRAINED_SO = Family(auto=POOLER, only_if="use_mean_pooling")  # BeitModel: the norm of the mean over the patches
KNOWN: dict[str, Family] = {
    "clip": TWO_TOWERS,
    "siglip": TWO_TOWERS,
    "chinese_clip": TWO_TOWERS,
    "clip_vision_model": CLASS_TOKEN_NORMED_LAST,
    "chinese_clip_vision_model": CLASS_TOKEN_NORMED_LAST,
    "clip_text_model": Family(auto=POOLER),  # the token of the end
    "siglip_vision_model": Family(auto=POOLER, only_if="vision_use_head", optional=True),  # attention of one learned query
    "convnext": MEAN_NORMED_LAST,
    "convnextv2": MEAN_NORMED_LAST,
    "hiera": MEAN_NORMED_LAST,
    "dinov3_convnext": Family(auto=POOLER, before=1),  # the normed mean, which also stands before the places
    "aimv2_vision_model": Family(auto=POOLER, only_if="use_head", optional=True),
    "beit": MEAN_IF_TRAINED_SO,
    "data2vec-vision": MEAN_IF_TRAINED_SO,
    "vit_mae": Family(plain=True),  # ViTMAEModel hides patches at random in evaluation too
    "deit": Family(before=1),  # the distillation token
    "yolos": Family(after="num_detection_tokens"),
    "xlnet": Family(auto="last"),  # its class token comes last
    "bert-generation": Family(auto="mean"),  # counted among the causal models, but an encoder unless told otherwise
    "opt": Family(width="word_embed_proj_dim"),
}


def of(layout: Any) -> Family:
    """The record of a config's family."""
    return KNOWN.get(layout.model_type, UNKNOWN)


def is_causal(layout: Any) -> bool:
    """Whether tokens see only those before them, so that the last one alone has seen the text."""
    from transformers.models.auto import modeling_auto

    if getattr(layout, "is_decoder", False):
        return True
    if getattr(layout, "use_bidirectional_attention", False) or getattr(layout, "is_causal", True) is False:
        return False
    generates = layout.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    fills_in = layout.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return generates and not fills_in and not layout.is_encoder_decoder


def classifies_images(layout: Any) -> bool:
    """Whether transformers has a classifier of images of this family."""
    from transformers.models.auto import modeling_auto

    return layout.model_type in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES


def pooler_option(encoder: Any, layout: Any) -> dict[str, bool]:
    """The argument of an encoder's class that leaves out a pooler through which features do not pass."""
    optional = "add_pooling_layer" in inspect.signature(encoder.__init__).parameters
    return {"add_pooling_layer": of(layout).published(layout) == POOLER} if optional else {}


def extra_tokens(layout: Any) -> tuple[int, int]:
    """Tokens between class token and patches, and behind the patches."""
    family = of(layout)
    before, after = (getattr(layout, n, 0) if isinstance(n, str) else n for n in (family.before, family.after))
    return int(before), int(after)
