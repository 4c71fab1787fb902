"""An encoder for images of another size than its checkpoint's: tables of learned positions are interpolated once, so that a step
costs no more, and features have the bits that transformers' own interpolation in every step gives."""

# n × n patches, L tokens, D width

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core.errors import ModelError
from fedsim.models import families, vit

OF_THE_FAMILY = "interpolate_pos_encoding"  # transformers' name of the method that knows how a family was meant to be enlarged


@torch.no_grad()
def changed(encoder: nn.Module, side: int) -> nn.Module:
    """The encoder for images of side × side pixels, the same one where that is its own size.

    Raises ModelError for a side that its patches do not divide, and where positions are not a table that can be interpolated.
    """
    layout: Any = encoder.config
    own, patch = getattr(layout, "image_size", None), getattr(layout, "patch_size", None)
    if encoder.main_input_name != "pixel_values":
        raise ModelError(
            f"model.image_size is for images, but the backbone, a {type(encoder).__name__}, takes text: leave it out"
        )
    if isinstance(patch, int) and side % patch:
        raise ModelError(f"model.image_size {side} is not a multiple of the backbone's patches of {patch} pixels")
    if own is None:  # no size was fixed in training
        layout.image_size = side
        return encoder
    if (own if isinstance(own, int) else tuple(own)) in (side, (side, side)):
        return encoder
    if isinstance(encoder, vit.ViT):
        return encoder.resized(side)
    other = _empty(encoder, layout, side if isinstance(own, int) else [side, side])
    have, want = encoder.state_dict(), other.state_dict()
    fitted = {n: t if t.shape == want[n].shape else _interpolated(encoder, n, want[n], side) for n, t in have.items()}
    other.load_state_dict(fitted, assign=True)
    return other


def _empty(encoder: nn.Module, layout: Any, size: Any) -> nn.Module:
    """The same architecture for images of that size, its weights still to be filled in."""
    from transformers.initialization import no_init_weights

    layout = copy.deepcopy(layout)
    layout.image_size = size
    options = families.pooler_option(type(encoder), layout)
    with no_init_weights():
        empty: nn.Module = type(encoder)(layout, **options)
    return empty


def _interpolated(encoder: nn.Module, name: str, want: Tensor, side: int) -> Tensor:
    """The table of positions of that name for images of that side, by the family's own method."""
    owner: Any = None
    for prefix, module in encoder.named_modules():
        if hasattr(module, OF_THE_FAMILY) and name.startswith(f"{prefix}."):
            owner = module
    if owner is None:
        raise ModelError(
            f"model.image_size cannot be {side}: positions of a {type(encoder).__name__} ('{name}') are no table that can be "
            f"interpolated, so leave it out"
        )
    table_1LD: Tensor = owner.interpolate_pos_encoding(torch.zeros(1, *want.shape[-2:]), side, side)
    return table_1LD.view(want.shape).clone()
