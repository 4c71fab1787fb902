"""The gradient of every sample by itself, as if each were a client with a batch of one: what Fisher information is made of."""

# b samples, C classes

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedsim.core.contracts import Slots
from fedsim.core.messages import Tensors
from fedsim.models.model import Model

MOST_TOGETHER, MOST_NUMBERS = 32, 2**24  # samples of a chunk, and numbers of all their gradients together
Loss = Callable[[Tensor, Tensor], Tensor]


def sample_gradients(
    model: Model, inputs: Tensors, labels: Tensor, params: Tensors, names: Sequence[str], loss: Loss
) -> dict[str, Tensor]:
    """∂ loss_n / ∂ w for every sample n of a raw batch and every tensor w of these names, (b, …), in evaluation.

    params: all tensors; loss: logits (b, C) and labels (b,) -> (b,). A tensor that a loss does not depend on has zeros. In one
    backward where the adapter can be stacked, sample by sample where it cannot.
    """
    size = len(labels) if model.stacks else 1
    parts = []
    for start in range(0, len(labels), size):
        rows = slice(start, start + size)
        parts.append(_at_once(model, {n: t[rows] for n, t in inputs.items()}, labels[rows], params, names, loss))
    return {n: torch.cat([part[n] for part in parts]) for n in names}


@torch.enable_grad()
def _at_once(
    model: Model, inputs: Tensors, labels_b: Tensor, params: Tensors, names: Sequence[str], loss: Loss
) -> dict[str, Tensor]:
    """Each sample has tensors of its own in a batch of as many slots."""
    b = len(labels_b)
    leaves = {n: params[n].detach().expand(b, *params[n].shape).clone().requires_grad_() for n in names}
    if not model.stacks:
        single = {**params, **{n: t[0] for n, t in leaves.items()}}
        with model.applied(single):
            logits_bC = model.logits(model.features(inputs, lean=True), single)
    else:
        slots, own = Slots(1, [1] * b), {**params, **leaves}
        with model.stacked(own, slots):
            logits_bC = model.stacked_logits(model.stacked_features(inputs, slots, None)[:, None], own)[:, 0]
    losses_b = loss(logits_bC, labels_b)
    found = torch.autograd.grad(losses_b.sum(), list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), found, strict=True)}
