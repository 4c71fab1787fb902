"""What learners share that are taught by the model of the last task's end: what they need of a run, and how logits and features
are compared with the teacher's.

In a first task nobody teaches: `teacher` is None and nothing may be added to the loss.
"""

# b samples, C classes (head rows), S classes that are compared

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from fedsim.core.contracts import TEACHER, Context
from fedsim.core.messages import Tensors
from fedsim.models.logits import columns, masked

NEEDS: Mapping[str, str] = {
    f"context {TEACHER}": "is taught by the model of the last task's end, which a stream of one task has not (stream.tasks: "
    "{stream.tasks}, stream.joint: {stream.joint}): use several tasks"
}


def teacher(context: Context) -> Tensors | None:
    """The model that the last task's end deployed; None in a first task."""
    return context.get(TEACHER)


def old_classes(classes: Sequence[int], seen: Sequence[int]) -> list[int]:
    """Head rows that the teacher has learned: those seen before this task. All of them, where the task brings no new class."""
    new = set(classes)
    return [c for c in seen if c not in new] or list(seen)


def distillation(logits_bC: Tensor, taught_bC: Tensor, classes: Sequence[int], temperature: float) -> Tensor:
    """Hinton et al. 2015: the mean over the batch of   −Σ_{c ∈ classes} softmax(t / T)_c · log softmax(z / T)_c,   both softmaxes
    over these columns alone.

    taught: t, the teacher's logits. Not multiplied by T². Its gradient by z is (softmax(z / T) − softmax(t / T)) / (T b).
    """
    ours_bS, theirs_bS = (columns(logits, classes) / temperature for logits in (logits_bC, taught_bC))
    return F.cross_entropy(ours_bS, theirs_bS.softmax(dim=1))


def sigmoid_distillation(
    logits_bC: Tensor, labels_b: Tensor, taught_bC: Tensor | None, classes: Sequence[int], seen: Sequence[int]
) -> Tensor:
    """Rebuffi et al. 2017 (iCaRL, LwF.MC): the mean over samples and classes seen of the binary cross-entropy of σ(z_c). Its
    target is the one-hot label for the task's classes, and σ(t_c) for older ones (None: nobody teaches, they are one-hot too)."""
    logits_bS, targets_bS = sigmoids(logits_bC, labels_b, seen)
    if taught_bC is not None:
        new = set(classes)
        old = [place for place, c in enumerate(seen) if c not in new]
        targets_bS[:, old] = columns(taught_bC, seen)[:, old].sigmoid()
    return F.binary_cross_entropy_with_logits(logits_bS, targets_bS)


def sigmoids(logits_bC: Tensor, labels_b: Tensor, seen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The columns of the classes seen, and the one-hot labels that their sigmoids should be, both (b, S)."""
    logits_bS, places_b = masked(logits_bC, labels_b, seen)
    return logits_bS, F.one_hot(places_b, len(seen)).to(logits_bS.dtype)
