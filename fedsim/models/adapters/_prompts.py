"""What the two kinds of prompts have in common."""

# b samples, q queries, k keys, P prompts, D width, K clients

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedsim.core.errors import ConfigError


def check_options(length: int, blocks: Any, init_std: float) -> None:
    """Raise ConfigError for values that can never work."""
    if length < 1:
        raise ConfigError(f"length must be at least 1, got {length}")
    listed = isinstance(blocks, (list, tuple)) and bool(blocks) and all(type(b) is int for b in blocks)
    if blocks != "all" and not listed:
        raise ConfigError(f"blocks must be 'all' or a list of indices such as [0, 1], got {blocks!r}")
    if init_std < 0:
        raise ConfigError(f"init_std must not be negative, got {init_std}")


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
