"""What robust rules have in common: every member has one vote, whatever it weighs.

Shapes: K members, P numbers of a tensor, or as many of them as are looked at together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedsim.core.contracts import Member
from fedsim.core.messages import Tensors

EXEMPT: Mapping[str, str] = {"weights": "every member has one vote, whatever it weighs"}
TOGETHER = 2**20  # numbers that are sorted together: they stay near the processor, and copies are small


def number_by_number(members: Sequence[Member], base: Tensors, rule: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Every tensor by a rule that makes (P,) float64 of the members' numbers, which it is given in ascending order (K, P) and in
    the members' type."""
    out = {}
    for name, start in base.items():
        parts = [rule(_ascending(part_KP)) for part_KP in _parts([m.params[name] for m in members])]
        out[name] = torch.cat(parts).view(start.shape) if parts else start
    return out


def squared_distances(members: Sequence[Member], base: Tensors) -> Tensor:
    """‖θ_i − θ_j‖² over all tensors together, (K, K), float64, symmetric, zeros on the diagonal.

    From the Gram of the task vectors, G = Σ_tensors V Vᵀ with V = θ − θ_0 (K, P): 2 K² P operations, as matrix products; pair by
    pair it would be 3 K² P / 2 at the speed of memory. ‖v_i‖² + ‖v_j‖² − 2 v_i·v_j loses digits only where members are far closer
    to each other than to θ_0.
    """
    gram_KK = torch.zeros(len(members), len(members), dtype=torch.float64)
    for name, start in base.items():
        for part_KP in _parts([start, *(m.params[name] for m in members)], torch.float64):
            vectors_KP = part_KP[1:] - part_KP[0]
            gram_KK += vectors_KP @ vectors_KP.T
    norms_K = gram_KK.diagonal()
    squared_KK = (norms_K[:, None] + norms_K - (gram_KK + gram_KK.T)).clamp(min=0)
    return squared_KK.fill_diagonal_(0)


def krum_scores(squared_KK: Tensor, byzantine: int) -> Tensor:
    """Of each, the sum of squared distances to its max(1, K − f − 2) nearest others, (K,); 0 of one that is alone."""
    count = len(squared_KK)
    others_KK = squared_KK + torch.diag(torch.full((count,), torch.inf, dtype=torch.float64))
    nearest = min(max(1, count - byzantine - 2), count - 1)
    return others_KK.sort(dim=1).values[:, :nearest].sum(dim=1)


def middle(sorted_KP: Tensor) -> Tensor:
    """The median of sorted numbers, (P,) float64; of an even number of them the mean of the middle two."""
    half = len(sorted_KP) // 2
    upper_P = sorted_KP[half].double()
    return upper_P if len(sorted_KP) % 2 else (sorted_KP[half - 1].double() + upper_P) / 2


def _ascending(values_KP: Tensor) -> Tensor:
    """Sorted column by column: by numpy, which takes a tenth of torch's time for so few rows."""
    return torch.from_numpy(np.sort(values_KP.numpy(), axis=0))


def _parts(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Iterator[Tensor]:
    """Tensors of one shape as rows, so many columns at a time."""
    flat = [t.flatten() for t in tensors]
    width = max(1, TOGETHER // len(flat))
    for start in range(0, len(flat[0]), width):
        yield torch.stack([t[start : start + width].to(dtype or t.dtype) for t in flat])
