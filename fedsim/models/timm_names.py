"""Plain vision transformers from files with timm's names (`blocks.0.attn.qkv.weight`, ...), as transformers' ViTModel."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core.errors import ModelError

HEAD_DIM = 64  # channels per attention head, which no shape tells: so in all DeiT and plain ViT checkpoints
OURS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
OURS_IN_BLOCK = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}


def load(file: Path) -> nn.Module:
    """The encoder of a `.safetensors` file, float32; every size but the head's is read off the tensors, `head.*` is dropped.

    Raises ModelError for a file that is missing or damaged, and for tensors that are missing, left over or of a wrong shape.
    """
    from safetensors.torch import load_file
    from transformers import ViTModel

    if not file.is_file():
        raise ModelError(f"no file {file}: model.backbone must name a .safetensors file with a ViT's weights under timm's names")
    try:
        tensors = load_file(file)
    except Exception as e:  # safetensors has one error of its own, and lets through those of the system
        raise ModelError(f"{file} is damaged or no safetensors file: {type(e).__name__}: {' '.join(str(e).split())}") from e
    layout = _layout(file, {n: tuple(t.shape) for n, t in tensors.items()})
    weights = _renamed({n: t.to(torch.float32) for n, t in tensors.items() if not n.startswith("head.")})
    with torch.device("meta"):  # nothing is drawn, everything is assigned
        encoder: nn.Module = ViTModel(layout, add_pooling_layer=False)
    misfit = _misfit(weights, encoder.state_dict())
    if misfit:
        raise ModelError(
            f"{file} does not fit a plain ViT with timm's names (class token, learned positions, final norm): {misfit}"
        )
    encoder.load_state_dict(weights, assign=True)
    return encoder


def _layout(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """The architecture that the shapes tell."""
    from transformers import ViTConfig

    patch, positions, hidden = (shapes.get(n, ()) for n in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"))
    if len(patch) != 4 or len(positions) != 3 or len(hidden) != 2:
        raise ModelError(
            f"{file} holds no ViT with timm's names, such as patch_embed.proj.weight, pos_embed, blocks.0.mlp.fc1.weight"
        )
    width, channels, height, across = patch
    side = math.isqrt(max(positions[1] - 1, 0))
    if side * side != positions[1] - 1 or height != across or width % HEAD_DIM:
        raise ModelError(
            f"{file} is no ViT that can be read: {positions[1]} positions, patches of {height}x{across} and width {width} "
            f"(needed: 1 + n*n positions, square patches, a width that is a multiple of {HEAD_DIM})"
        )
    return ViTConfig(
        hidden_size=width,
        num_hidden_layers=1 + max(int(n.split(".")[1]) for n in shapes if re.match(r"blocks\.\d+\.", n)),
        num_attention_heads=width // HEAD_DIM,
        intermediate_size=hidden[0],
        image_size=side * height,
        patch_size=height,
        num_channels=channels,
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
        layer_norm_eps=1e-6,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names; the joint projection of queries, keys and values is cut in three. Unknown names stay."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        block = re.match(r"blocks\.(\d+)\.(.+)$", stem)
        if block is None:
            out[OURS[name] if name in OURS else f"{OURS.get(stem, stem)}.{leaf}"] = tensor
        elif block[2] == "attn.qkv":
            for part, rows in zip(("q_proj", "k_proj", "v_proj"), tensor.tensor_split(3), strict=True):
                out[f"layers.{block[1]}.attention.{part}.{leaf}"] = rows.clone()
        else:
            out[f"layers.{block[1]}.{OURS_IN_BLOCK.get(block[2], block[2])}.{leaf}"] = tensor
    return out


def _misfit(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """The first thing that does not fit, in words."""
    for name, want in wanted.items():
        if name not in weights:
            return f"it lacks '{name}'"
        if weights[name].shape != want.shape:
            return f"'{name}' has shape {list(weights[name].shape)}, expected {list(want.shape)}"
    extra = sorted(weights.keys() - wanted.keys())
    return f"nothing takes '{extra[0]}'" if extra else None
