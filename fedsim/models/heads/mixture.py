"""A linear layer per source, and one prediction of them all: what is deployed where every client keeps a module and a head of its
own (for À-la-carte Prompt Tuning, APT, Bowman et al., 2023, arXiv:2302.07994)."""

# b samples, D features, C classes (head rows); S sources, H classes that a source holds

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.core.contracts import Traits
from fedsim.core.messages import Tensors
from fedsim.core.names import HEAD_BIAS, HEAD_COUNT, HEAD_PROTOTYPES, HEAD_SCALE, HEAD_WEIGHT
from fedsim.models.heads import linear

FARTHEST = 1e30  # of a source's distances: all sources may be so far, and infinity less infinity is no number


@dataclass(frozen=True)
class Head(linear.Head):
    """From features (b, S, D) and a linear head per source, `head.weight` (S, C, D): `z = log Σ_s w_s(x) p_s(c | x)`, −∞ for
    classes that no source knows.

    `p_s` is the softmax of source s over the classes that it holds, `w = softmax_s(source_weights)` how much it is believed.
    While clients train, each of them has one linear head, and so has the model before there is any source. Which sources there
    are, and what they tell of themselves (`head.count`, `head.prototypes`, `head.scale`), is up to the aggregator (`collect`).
    """

    @property
    def traits(self) -> Traits:
        why = "composes a head per client, but {aggregator} merges them into one: use aggregator: collect, or head: linear"
        gives = {"composes heads", "an affine head"}
        return Traits(gives=gives, needs={"a module per client": why})

    def logits(self, features: Tensor, params: Tensors) -> Tensor:
        return mixture(features, params) if params[HEAD_WEIGHT].dim() == 3 else super().logits(features, params)

    def formula(self) -> str | None:
        return None

    def affine(self, params: Tensors) -> tuple[Tensor, Tensor] | None:
        return None if params[HEAD_WEIGHT].dim() == 3 else super().affine(params)


def mixture(features_bSD: Tensor, params: Tensors) -> Tensor:
    """One prediction of S sources, `log Σ_s w_s(x) p_s(c | x)` with `w = softmax_s(source_weights)`, (b, C).

    −∞ for classes that no source knows. One source alone keeps its own prediction.
    """
    known_bSC, weight_bS = source_log_probabilities(features_bSD, params), source_weights(features_bSD, params)
    return (known_bSC + weight_bS.log_softmax(dim=1)[:, :, None]).logsumexp(dim=1)


def source_log_probabilities(features_bSD: Tensor, params: Tensors) -> Tensor:
    """`log p_s(c | x)`, (b, S, C): the softmax of every source's own head over the classes that it holds samples of
    (`head.count` (S, C) above zero), −∞ for the others. Source by source: its bits do not depend on the rest."""
    out_SbC = []
    for s, held_C in enumerate(params[HEAD_COUNT] > 0):
        features_bD = features_bSD[:, s].contiguous()
        z_bH = F.linear(features_bD, params[HEAD_WEIGHT][s][held_C], params[HEAD_BIAS][s][held_C])
        whole_bC = z_bH.new_full((len(z_bH), len(held_C)), -torch.inf)
        whole_bC[:, held_C] = z_bH.log_softmax(dim=1)
        out_SbC.append(whole_bC)
    return torch.stack(out_SbC, dim=1)


def source_weights(features_bSD: Tensor, params: Tensors) -> Tensor:
    """The logarithm of how much a source is believed, beside the others, (b, S): `−min_c ‖f_s(x) − μ_sc‖² / v_s`.

    μ: `head.prototypes` (S, C, D), the means of the source's features over the classes that it holds; v: `head.scale` (S,).
    Without prototypes all sources count the same. A source without a scale (all its samples look the same to it) counts only
    where nobody else does.
    """
    if HEAD_PROTOTYPES not in params:
        return features_bSD.new_zeros(features_bSD.shape[:2])
    near_Sb = []
    for s, held_C in enumerate(params[HEAD_COUNT] > 0):
        means_HD = params[HEAD_PROTOTYPES][s][held_C]
        features_bD = features_bSD[:, s].contiguous()
        squares_bH = torch.cdist(features_bD, means_HD, compute_mode="donot_use_mm_for_euclid_dist").square()
        near_Sb.append(squares_bH.amin(dim=1))
    distance_bS = torch.stack(near_Sb, dim=1) / params[HEAD_SCALE]
    return -distance_bS.nan_to_num(nan=0.0, posinf=FARTHEST).clamp(max=FARTHEST)
