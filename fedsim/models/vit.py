"""The plain vision transformer, for checkpoints in transformers' own layout: the same tensors, names and bits as its ViTModel.

Loading transformers' model code takes longer than all the rest of a start, and its bookkeeping a few percent of every forward.
Whatever is not exactly this architecture is left to transformers.
"""

# b samples, C channels, H × W pixels, L tokens, D width, h heads, e head width

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SDPA = "sdpa"
REQUIRED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size", "num_channels",
    "qkv_bias", "layer_norm_eps",
)  # fmt: skip
NOT_OURS = ("quantization_config", "auto_map", "head_dim")
UNUSED = ("pooler.", "classifier.", "decoder.")  # what features do not pass through
PLAIN = ("vit", "vit_mae")  # an autoencoder's encoder, with no patch hidden, is a plain one
OF_FILES = {  # parts of names in published files -> ours, the longest first
    "encoder.layer.": "layers.",
    "attention.attention.query.": "attention.q_proj.",
    "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.",
    "attention.output.dense.": "attention.o_proj.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
}


@dataclass
class Layout:
    """The architecture, under transformers' names. `_attn_implementation` may be changed: "sdpa", or a function in its table."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    num_channels: int
    qkv_bias: bool
    layer_norm_eps: float
    model_type: str = "vit"
    hidden_act: str = "gelu"
    _attn_implementation: str = SDPA


class PatchEmbeddings(nn.Module):
    """Non-overlapping patches, each mapped to a token."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        side = layout.patch_size
        self.projection = nn.Conv2d(layout.num_channels, layout.hidden_size, kernel_size=side, stride=side)

    def forward(self, pixels_bCHW: Tensor) -> Tensor:
        tokens_bDL: Tensor = self.projection(pixels_bCHW).flatten(2)
        return tokens_bDL.transpose(1, 2)


class Embeddings(nn.Module):
    """The class token and the patches, with learned positions."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        across = layout.image_size // layout.patch_size
        self.image_size = layout.image_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, layout.hidden_size))
        self.patch_embeddings = PatchEmbeddings(layout)
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + across * across, layout.hidden_size))

    def forward(self, pixels_bCHW: Tensor) -> Tensor:
        if pixels_bCHW.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images are {tuple(pixels_bCHW.shape[2:])}, the backbone takes {self.image_size} × {self.image_size}"
            )
        tokens_bLD = self.patch_embeddings(pixels_bCHW)
        tokens_bLD = torch.cat((self.cls_token.expand(len(tokens_bLD), -1, -1), tokens_bLD), dim=1)
        return tokens_bLD + self.position_embeddings


class Attention(nn.Module):
    """Multi-head self-attention. Attributes that transformers' attention functions read have transformers' names."""

    is_causal = False

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        width = layout.hidden_size
        self.config = layout
        self.head_dim = width // layout.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=layout.qkv_bias) for _ in range(3))
        self.o_proj = nn.Linear(width, width)

    def forward(self, x_bLD: Tensor, mask: Tensor | None = None, first: int | None = None) -> Tensor:
        """(b, L, D) -> (b, L, D), or (b, first, D): what the first tokens get from all."""
        asking_bLD = x_bLD if first is None else x_bLD[:, :first]
        b, length, _ = asking_bLD.shape
        q_bhLe, k_bhLe, v_bhLe = (
            layer(x).view(b, x.shape[1], -1, self.head_dim).transpose(1, 2)
            for layer, x in ((self.q_proj, asking_bLD), (self.k_proj, x_bLD), (self.v_proj, x_bLD))
        )
        chosen = self.config._attn_implementation
        if chosen == SDPA:
            out_bhLe = F.scaled_dot_product_attention(q_bhLe, k_bhLe, v_bhLe, attn_mask=mask, scale=self.scaling)
            out_bLhe = out_bhLe.transpose(1, 2).contiguous()
        else:
            out_bLhe = _from_table(chosen)(self, q_bhLe, k_bhLe, v_bhLe, mask, dropout=0.0, scaling=self.scaling)[0]
        out_bLD: Tensor = self.o_proj(out_bLhe.reshape(b, length, -1).contiguous())
        return out_bLD


class Mlp(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.fc1 = nn.Linear(layout.hidden_size, layout.intermediate_size)
        self.fc2 = nn.Linear(layout.intermediate_size, layout.hidden_size)

    def forward(self, x_bLD: Tensor) -> Tensor:
        out_bLD: Tensor = self.fc2(F.gelu(self.fc1(x_bLD)))
        return out_bLD


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.attention = Attention(layout)
        self.layernorm_before = nn.LayerNorm(layout.hidden_size, eps=layout.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(layout.hidden_size, eps=layout.layer_norm_eps)
        self.mlp = Mlp(layout)

    def forward(self, x_bLD: Tensor, attention_mask: Tensor | None = None, first: int | None = None) -> Tensor:
        kept_bLD = x_bLD if first is None else x_bLD[:, :first]
        x_bLD = self.attention(self.layernorm_before(x_bLD), attention_mask, first) + kept_bLD
        out_bLD: Tensor = self.mlp(self.layernorm_after(x_bLD)) + x_bLD
        return out_bLD


class ViT(nn.Module):
    """The encoder. It is frozen: there is no dropout in it, and weights come from a file."""

    main_input_name = "pixel_values"

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.config = layout
        self.embeddings = Embeddings(layout)
        self.layers = nn.ModuleList([Block(layout) for _ in range(layout.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(layout.hidden_size, eps=layout.layer_norm_eps)

    def forward(self, pixel_values: Tensor, first: int | None = None) -> Any:
        """Normalised (b, C, H, W) -> an object with `last_hidden_state` (b, L, D), or of the first tokens only: the last block
        then computes no other."""
        x_bLD = self.embeddings(pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype))
        for block in self.layers[:-1]:
            x_bLD = block(x_bLD, None)
        x_bLD = self.layers[-1](x_bLD, None) if first is None else self.layers[-1](x_bLD, None, first=first)
        return SimpleNamespace(last_hidden_state=self.layernorm(x_bLD))

    def resized(self, side: int) -> ViT:
        """Itself, in place, for images of side × side pixels: positions are interpolated, bicubically as in transformers."""
        new, table_1LD = side // self.config.patch_size, self.embeddings.position_embeddings.detach()
        old = self.config.image_size // self.config.patch_size
        grid_1Dhw = table_1LD[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
        grid_1Dhw = F.interpolate(grid_1Dhw, size=(new, new), mode="bicubic", align_corners=False)
        patches_1LD = grid_1Dhw.permute(0, 2, 3, 1).reshape(1, new * new, -1)
        self.embeddings.position_embeddings = nn.Parameter(torch.cat((table_1LD[:, :1], patches_1LD), dim=1))
        self.config.image_size = self.embeddings.image_size = side
        return self


def load(folder: Path) -> ViT | None:
    """The encoder of a folder with config.json and model.safetensors, float32; None for anything but this very architecture."""
    layout = _layout(folder / "config.json")
    weights = folder / "model.safetensors"
    if layout is None or not weights.is_file():
        return None
    from safetensors.torch import load_file

    try:
        tensors = load_file(weights)
    except Exception:  # damaged: transformers says what is wrong
        return None
    stored = {_renamed(n.removeprefix("vit.")): t for n, t in tensors.items()}
    kept = {n: t.to(torch.float32, copy=True) for n, t in stored.items() if not n.startswith(UNUSED)}
    with torch.device("meta"):  # nothing is drawn, everything is assigned
        encoder = ViT(layout)
    if {n: t.shape for n, t in kept.items()} != {n: t.shape for n, t in encoder.state_dict().items()}:
        return None
    encoder.load_state_dict(kept, assign=True)
    return encoder


def _layout(file: Path) -> Layout | None:
    """What config.json tells, if it is a plain ViT's and leaves nothing to defaults."""
    try:
        told: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(told, Mapping) or told.get("model_type") not in PLAIN or told.get("hidden_act") != "gelu":
        return None
    if any(key not in told for key in REQUIRED) or any(key in told for key in NOT_OURS):
        return None
    layout = Layout(**{key: told[key] for key in REQUIRED})
    whole = (layout.hidden_size, layout.image_size, layout.patch_size, layout.num_attention_heads)
    if not all(type(size) is int and size > 0 for size in whole) or layout.hidden_size % layout.num_attention_heads:
        return None
    return layout


def _renamed(name: str) -> str:
    for theirs, ours in OF_FILES.items():
        name = name.replace(theirs, ours)
    return name


def _from_table(name: str) -> Any:
    """An attention function of transformers' table, where adapters put theirs."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[name]
