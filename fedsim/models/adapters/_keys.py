"""Queries of samples held against trained keys, and prompts chosen by them."""

# b samples, D features, M keys, N chosen of them, K clients

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def cosines(query_bD: Tensor, keys: Tensor) -> Tensor:
    """cos(q, k) of every sample and key, (b, M), for keys (M, D), or (K, M, D) in K slots of as many samples each. Gradients
    flow to the keys; in the keys' precision."""
    query_bD = F.normalize(query_bD.to(keys.dtype), dim=-1)
    keys = F.normalize(keys, dim=-1)
    if keys.dim() == 2:
        return query_bD @ keys.mT
    return (query_bD.view(len(keys), -1, query_bD.shape[-1]) @ keys.mT).flatten(0, 1)


def nearest(cosines_bM: Tensor, count: int) -> Tensor:
    """Indices of each sample's `count` nearest keys, the nearest first, (b, N)."""
    return cosines_bM.detach().topk(count, dim=1).indices


def voted(chosen_bN: Tensor, keys: int, rows: Sequence[int], width: int) -> Tensor:
    """The indices that the samples of a slot chose most often, for all of them, (b, N); among equals the smaller index. rows: how
    many samples of each slot, `width` rows wide, vote."""
    count, found = chosen_bN.shape[1], []
    for slot, own in enumerate(rows):
        votes_M = torch.bincount(chosen_bN[slot * width : slot * width + own].flatten(), minlength=keys)
        order_M = votes_M.sort(descending=True, stable=True).indices
        found.append(order_M[:count].expand(width, -1))
    return torch.cat(found)


def picked(pool: Tensor, chosen_bN: Tensor, axes: int) -> Tensor:
    """Entries of a pool at each sample's indices, (b, N, …), from (M, …) with `axes` axes, or from (K, M, …) the k-th pool for
    the k-th slot. Gradients flow to what was chosen."""
    if pool.dim() > axes:
        clients, entries = pool.shape[:2]
        first_K = torch.arange(clients, device=chosen_bN.device) * entries
        chosen_bN = chosen_bN + first_K.repeat_interleave(len(chosen_bN) // clients)[:, None]
        pool = pool.flatten(0, 1)
    return F.embedding(chosen_bN, pool.flatten(1)).view(*chosen_bN.shape, *pool.shape[1:])
