"""What the two kinds of prompts have in common: options, masks, and which blocks they go into."""

# b samples, q queries, k keys, P prompts, D width, K clients

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core.errors import ConfigError, ModelError
from fedsim.models import inject


def check_options(length: int, blocks: Any, init_std: float) -> None:
    """Raise ConfigError for values that can never work."""
    if length < 1:
        raise ConfigError(f"length must be at least 1, got {length}")
    listed = isinstance(blocks, (list, tuple)) and bool(blocks) and all(type(b) is int for b in blocks)
    if blocks != "all" and not listed:
        raise ConfigError(f"blocks must be 'all' or a list of indices such as [0, 1], got {blocks!r}")
    if init_std < 0:
        raise ConfigError(f"init_std must not be negative, got {init_std}")


def blocks(adapter: str, encoder: nn.Module, which: Any) -> dict[str, nn.Module]:
    """The chosen blocks by name. Raises ModelError for an encoder without a list of blocks."""
    if not inject.has_blocks(encoder):
        raise refuse(adapter, encoder, "it has no list of blocks that prompts could go into")
    return inject.blocks(encoder, which)


def attention_of(block: nn.Module) -> list[nn.Module]:
    """The attention modules of a block that go through transformers' attention interface, which reads `is_causal` of them."""
    return [module for module in block.modules() if hasattr(module, "is_causal")]


def refuse(adapter: str, encoder: nn.Module, why: str) -> ModelError:
    """The error of an encoder that prompts do not fit, with an adapter that does: LoRA, which needs nothing but linear layers."""
    return ModelError(f"the adapter {adapter} does not fit a {type(encoder).__name__}: {why}; use the adapter lora")


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(1, 1, q, k), True where a query sees a key: what attention does by itself where it is causal and has no mask."""
    return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def normal(length: int, width: int, std: float, generator: torch.Generator) -> Tensor:
    """A fresh prompt (length, width), normal with mean 0."""
    return torch.randn(length, width, generator=generator) * std


def per_sample(prompt: Tensor, count: int) -> Tensor:
    """A prompt for each of `count` samples, (count, P, D): from (P, D) one for all, from (K, P, D) the k-th for the k-th slot."""
    if prompt.dim() == 2:
        return prompt.expand(count, -1, -1)
    return prompt[:, None].expand(-1, count // len(prompt), -1, -1).flatten(0, 1)


def widened(mask: Tensor, place: int, length: int, queries: bool = False) -> Tensor:
    """An attention mask (b, 1, q, k) with `length` keys more at `place`, which everybody may see.

    Boolean masks (True: visible) and additive ones (0: visible) keep their type. With `queries`, as many rows are put in at
    the same place, copies of the first: a prompt sees what the class token sees.
    """
    seen = mask.new_full((*mask.shape[:-1], length), 1 if mask.dtype == torch.bool else 0)
    wide = torch.cat([mask[..., :place], seen, mask[..., place:]], dim=-1)
    if queries and mask.shape[-2] > 1:
        rows = wide[..., :1, :].expand(*wide.shape[:-2], length, wide.shape[-1])
        wide = torch.cat([wide[..., :place, :], rows, wide[..., place:, :]], dim=-2)
    return wide
