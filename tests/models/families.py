"""Small random encoders of the families that researchers bring, for every test that runs over families.

To add one: a row of `FAMILIES` with its kind and a layout, which is what `model.config` takes: `model_type` and the sizes under
transformers' names, two blocks where it has blocks, widths of 16, images of 16 × 16 with one channel, a vocabulary of 50. Tests
find it there; `make tables` puts it into the table of families.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 50
POSITIONS = 12
SIDE = 16
TEXT_LENGTHS = (3, 7, 5)  # tokens of the texts in a batch


@dataclass(frozen=True)
class Family:
    """kind: image | text; layout: for `model.config`; pooling: what `auto` stands for; width: of the features."""

    kind: str
    layout: dict[str, Any]
    pooling: str
    width: int = 16


TWO_BLOCKS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IMAGES = {"image_size": SIDE, "num_channels": 1}
PATCHES = {**TWO_BLOCKS, **IMAGES, "patch_size": 4}
TOKENS = {**TWO_BLOCKS, "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS}
STAGES = {**IMAGES, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 2}
DECODER = {**TOKENS, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _image(model_type: str, pooling: str, width: int = 16, **layout: Any) -> Family:
    return Family("image", {"model_type": model_type, **layout}, pooling, width)


def _text(model_type: str, pooling: str, **layout: Any) -> Family:
    return Family("text", {"model_type": model_type, **layout}, pooling)


FAMILIES: dict[str, Family] = {
    "vit": _image("vit", "cls", **PATCHES),
    "deit": _image("deit", "cls", **PATCHES),
    "beit": _image("beit", "pooler", **PATCHES),
    "beit_relative": _image("beit", "pooler", **PATCHES, use_relative_position_bias=True),
    "dinov2": _image("dinov2", "cls", **PATCHES, mlp_ratio=2),
    "dinov2_with_registers": _image("dinov2_with_registers", "cls", **PATCHES, mlp_ratio=2, num_register_tokens=3),
    "vit_msn": _image("vit_msn", "cls", **PATCHES),
    "vit_mae": _image("vit_mae", "cls", **PATCHES),
    "yolos": _image("yolos", "cls", **{**PATCHES, "image_size": [SIDE, SIDE]}, num_detection_tokens=3),
    "swin": _image("swin", "mean", **STAGES),
    "swinv2": _image("swinv2", "mean", **STAGES),
    "clip_vision": _image("clip_vision_model", "cls", **PATCHES),
    "siglip_vision": _image("siglip_vision_model", "pooler", **PATCHES),
    "resnet": _image(
        "resnet", "mean", **IMAGES, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="bottleneck"
    ),
    "convnext": _image("convnext", "pooler", **IMAGES, hidden_sizes=[8, 16], depths=[1, 1], patch_size=2, num_stages=2),
    "convnextv2": _image("convnextv2", "pooler", **IMAGES, hidden_sizes=[8, 16], depths=[1, 1], patch_size=2, num_stages=2),
    "bert": _text("bert", "mean", **TOKENS),
    "roberta": _text("roberta", "mean", **{**TOKENS, "max_position_embeddings": POSITIONS + 2}, pad_token_id=1),
    "distilbert": _text(
        "distilbert", "mean", dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
    ),
    "electra": _text("electra", "mean", **TOKENS, embedding_size=8),
    "albert": _text("albert", "mean", **TOKENS, embedding_size=8),
    "mpnet": _text("mpnet", "mean", **{**TOKENS, "max_position_embeddings": POSITIONS + 2}, pad_token_id=1),
    "deberta_v2": _text(
        "deberta-v2", "mean", **TOKENS, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4,
    ),
    "modernbert": _text(
        "modernbert", "mean", **TOKENS, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
        local_attention=4, global_attn_every_n_layers=2,
    ),
    "xlnet": _text("xlnet", "last", d_model=16, n_layer=2, n_head=2, d_inner=24, vocab_size=VOCABULARY),
    "t5": _text("t5", "mean", d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=24, vocab_size=VOCABULARY),
    "gpt2": _text(
        "gpt2", "last", n_embd=16, n_layer=2, n_head=2, n_inner=24, vocab_size=VOCABULARY, n_positions=POSITIONS,
        bos_token_id=1, eos_token_id=2,
    ),
    "opt": _text(
        "opt", "last", **{**TOKENS, "intermediate_size": 24}, ffn_dim=24, word_embed_proj_dim=16, pad_token_id=0,
    ),
    "llama": _text("llama", "last", **DECODER),
    "qwen3": _text("qwen3", "last", **DECODER),
    "mamba": _text(
        "mamba", "last", hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=VOCABULARY, pad_token_id=0,
    ),
}  # fmt: skip


def batch(family: Family) -> dict[str, Tensor]:
    """Three raw samples: grey images, or texts of 3, 7 and 5 tokens that are padded on the right."""
    generator = torch.Generator().manual_seed(2)
    if family.kind == "image":
        return {"pixel_values": torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=generator)}
    mask = torch.tensor([[1] * n + [0] * (max(TEXT_LENGTHS) - n) for n in TEXT_LENGTHS])
    ids = torch.randint(3, VOCABULARY, mask.shape, generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask}
