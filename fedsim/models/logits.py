"""What is made of logits: the cross-entropy over the classes that matter, and predictions.

Labels are head rows. Masking takes the columns of the chosen classes, so that no other class gets a gradient.
"""

# b samples, C classes (head rows), S classes that are kept

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.core.errors import ModelError

_IGNORE_NOTHING = -(2**31)  # cross_entropy skips targets of -100 silently; a label outside the mask must fail instead


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
    if _side_by_side(classes):
        return columns(logits_bC, classes), labels_b.long() - classes[0]
    place_C = torch.full((logits_bC.shape[1],), -1, device=logits_bC.device)
    place_C[torch.as_tensor(classes, device=logits_bC.device)] = torch.arange(len(classes), device=logits_bC.device)
    return columns(logits_bC, classes), place_C[labels_b.long()]


def columns(logits_bC: Tensor, classes: Sequence[int]) -> Tensor:
    """Those of `classes`, in this order, (b, S)."""
    if _side_by_side(classes):
        return logits_bC[:, classes[0] : classes[0] + len(classes)]
    return logits_bC[:, torch.as_tensor(classes, device=logits_bC.device)]


def _side_by_side(classes: Sequence[int]) -> bool:
    return list(classes) == list(range(classes[0], classes[0] + len(classes)))


def predict(logits_bC: Tensor, classes: Sequence[int]) -> Tensor:
    """Head row of the largest logit among `classes`, (b,)."""
    rows_S = torch.as_tensor(classes, device=logits_bC.device)
    return rows_S[logits_bC[:, rows_S].argmax(dim=1)]
