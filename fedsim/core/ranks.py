"""How many ranks of every LoRA pair a client has, where clients differ (`client.ranks`).

A client of rank r_i holds the first r_i rows of A and columns of B; the others are zero, and are neither trained nor sent. With
both at zero their gradients are zero too, ∂A = Bᵀ δ xᵀ and ∂B = δ (A x)ᵀ, so that it trains as a module of rank r_i does: shapes
are the same for all clients. s is one number for all, and does not depend on r_i.
"""

# r ranks of the server's pair, d inputs of a layer, m outputs

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.core import rng
from fedsim.core.config import SimConfig
from fedsim.core.messages import Tensors
from fedsim.core.tensors import LORA_A, LORA_B


def rank_of(config: SimConfig, client: int) -> int | None:
    """Of a client's pairs, at most those of the server's; None: all of them."""
    ranks = config.client.ranks
    if ranks is None:
        return None
    if not isinstance(ranks, Mapping):
        return int(ranks[client])
    of = ranks["of"]
    place = client % len(of) if ranks["law"] == "turns" else rng.stream(config.seed, "rank", client).integers(len(of))
    return int(of[int(place)])


def cut(tensors: Tensors, rank: int | None) -> dict[str, Tensor]:
    """LoRA factors of these tensors in which something is beyond a rank, with zeros there."""
    return {name: tensors[name].masked_fill(mask, 0.0) for name, mask in beyond(tensors, rank).items()}


def beyond(tensors: Tensors, rank: int | None) -> dict[str, Tensor]:
    """What of LoRA factors is beyond a rank, by name, as masks of their shapes; factors of which nothing is are left out."""
    found: dict[str, Tensor] = {}
    if rank is None:
        return found
    for name, tensor in tensors.items():
        axis = factor_axis(name)
        if axis is not None and tensor.shape[axis] > rank:
            found[name] = tensor.new_zeros(tensor.shape, dtype=torch.bool)
            found[name].narrow(axis, rank, tensor.shape[axis] - rank).fill_(True)
    return found


def factor_axis(name: str) -> int | None:
    """The axis of ranks of a LoRA factor; None of any other tensor."""
    return 0 if name.endswith(LORA_A) else 1 if name.endswith(LORA_B) else None


def bytes_of(name: str, tensor: Tensor, rank: int | None) -> int:
    """Of the part of a tensor that a client of this rank has."""
    axis = factor_axis(name)
    if rank is None or axis is None or rank >= tensor.shape[axis]:
        return tensor.nbytes
    return tensor.nbytes // tensor.shape[axis] * rank
