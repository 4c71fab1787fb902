"""The head: one linear layer over all classes of the stream, masked to the classes that matter, or one per source.

Labels are head rows. Masking takes the columns of the chosen classes, so that no other class gets a gradient.
"""

# b samples, D features, C classes (head rows), S classes that are kept, K clients
# of a mixture: S sources, H classes that a source holds

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.core.errors import ModelError
from fedsim.core.messages import Tensors

WEIGHT, BIAS = "head.weight", "head.bias"
COUNT, PROTOTYPES, SCALE = "head.count", "head.prototypes", "head.scale"  # what a head per source has beside it
FARTHEST = 1e30  # of a source's distances: all sources may be so far, and infinity less infinity is no number
_IGNORE_NOTHING = -(2**31)  # cross_entropy skips targets of -100 silently; a label outside the mask must fail instead


def init(num_classes: int, width: int) -> dict[str, Tensor]:
    """`head.weight` (C, D) and `head.bias` (C,), all zeros: in few steps a random start decides more than any rule."""
    return {WEIGHT: torch.zeros(num_classes, width), BIAS: torch.zeros(num_classes)}


def logits(features: Tensor, params: Tensors) -> Tensor:
    """`h Wᵀ + b`, (b, C), from features (b, D). From features (b, S, D) and a head per source, (S, C, D): `mixture`."""
    if params[WEIGHT].dim() == 3:
        return mixture(features, params)
    return F.linear(features, params[WEIGHT], params[BIAS])


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
    for s, held_C in enumerate(params[COUNT] > 0):
        features_bD = features_bSD[:, s].contiguous()
        z_bH = F.linear(features_bD, params[WEIGHT][s][held_C], params[BIAS][s][held_C])
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
    if PROTOTYPES not in params:
        return features_bSD.new_zeros(features_bSD.shape[:2])
    near_Sb = []
    for s, held_C in enumerate(params[COUNT] > 0):
        means_HD = params[PROTOTYPES][s][held_C]
        features_bD = features_bSD[:, s].contiguous()
        squares_bH = torch.cdist(features_bD, means_HD, compute_mode="donot_use_mm_for_euclid_dist").square()
        near_Sb.append(squares_bH.amin(dim=1))
    distance_bS = torch.stack(near_Sb, dim=1) / params[SCALE]
    return -distance_bS.nan_to_num(nan=0.0, posinf=FARTHEST).clamp(max=FARTHEST)


def stacked_logits(features_KbD: Tensor, params: Tensors) -> Tensor:
    """`h_k W_kᵀ + b_k`, (K, b, C): W (K, C, D) and b (K, C), or without the axis of clients where it is the same for all."""
    bias = params[BIAS]
    return features_KbD @ params[WEIGHT].mT + (bias if bias.dim() == 1 else bias[:, None])


def masked_cross_entropy(logits_bC: Tensor, labels_b: Tensor, classes: Sequence[int]) -> Tensor:
    """Mean over the batch of `−log softmax(z_S)[y]`, the softmax being over the columns `classes` alone.

    labels: head rows, each one of `classes`; another label is an IndexError of torch. classes: not empty.
    """
    return F.cross_entropy(*masked(logits_bC, labels_b, classes), ignore_index=_IGNORE_NOTHING)


def masked_cross_entropies(logits_bC: Tensor, labels_b: Tensor, classes: Sequence[int]) -> Tensor:
    """The terms of `masked_cross_entropy`'s mean, (b,)."""
    return F.cross_entropy(*masked(logits_bC, labels_b, classes), ignore_index=_IGNORE_NOTHING, reduction="none")


def masked(logits_bC: Tensor, labels_b: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The columns of `classes`, (b, S), and where the labels stand among them, (b,)."""
    if not len(classes):
        raise ModelError("cross-entropy over no classes: a task must have at least one class")
    start = classes[0]
    if list(classes) == list(range(start, start + len(classes))):
        return logits_bC[:, start : start + len(classes)], labels_b.long() - start
    rows_S = torch.as_tensor(classes, device=logits_bC.device)
    place_C = torch.full((logits_bC.shape[1],), -1, device=logits_bC.device)
    place_C[rows_S] = torch.arange(len(classes), device=logits_bC.device)
    return logits_bC[:, rows_S], place_C[labels_b.long()]


def predict(logits_bC: Tensor, classes: Sequence[int]) -> Tensor:
    """Head row of the largest logit among `classes`, (b,)."""
    rows_S = torch.as_tensor(classes, device=logits_bC.device)
    return rows_S[logits_bC[:, rows_S].argmax(dim=1)]
