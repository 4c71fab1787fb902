"""Tiny random models for the tests of this folder, and what they are held against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedsim.core.config import ModelConfig, SimConfig, TransformConfig
from fedsim.models import model as models
from fedsim.models.model import Model

VIT: dict[str, Any] = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": 8, "patch_size": 4, "num_channels": 1, "layer_norm_eps": 1e-6,
}  # fmt: skip
BERT: dict[str, Any] = {
    "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "vocab_size": 50, "max_position_embeddings": 12,
}  # fmt: skip
LENGTHS = (3, 7, 5)  # tokens of the sentences in `texts`


def model(layout: dict[str, Any], adapter: dict[str, Any], double: bool = True, pooling: str = "auto", **transform: Any) -> Model:
    """A model of random weights that are large enough for every part to matter, float64 by default."""
    config = SimConfig(
        model=ModelConfig(backbone="random", config=layout, pooling=pooling),
        adapter=adapter,
        transform=TransformConfig(**transform),
    )
    built = models.build(config, num_classes=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in built.backbone.encoder.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    if double:
        built.backbone.encoder.double()
    return built


def images(count: int = 3, *shape: int) -> dict[str, Tensor]:
    size = shape or (8, 8)
    return {"pixel_values": torch.randint(0, 256, (count, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))}


def texts() -> dict[str, Tensor]:
    mask = torch.tensor([[1] * n + [0] * (max(LENGTHS) - n) for n in LENGTHS])
    ids = torch.randint(1, 50, mask.shape, generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids * mask, "attention_mask": mask}


def trained(built: Model, seed: int = 4) -> dict[str, Tensor]:
    """Adapter tensors in the encoder's precision in which nothing is zero, as after training."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(built.backbone.encoder.parameters()).dtype
    fresh = built.init_adapter(torch.Generator().manual_seed(0))
    return {n: (torch.randn(t.shape, generator=generator) * 0.3).to(dtype) for n, t in fresh.items()}
