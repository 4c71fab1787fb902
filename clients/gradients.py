"""The gradient of every sample by itself, as if each were a client with a batch of one: what Fisher information is made of; and
of what comes out of layers: what its Kronecker factors are made of."""

# b samples, C classes, I inputs and O outputs of a layer, D features, K directions

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from fedsim.core.contracts import Slots
from fedsim.core.messages import Tensors
from fedsim.core.names import HEAD_BIAS, HEAD_WEIGHT
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


@torch.enable_grad()
def layer_gradients(
    model: Model, inputs: Tensors, subjects: Sequence[str], directions: Callable[[Tensor], Tensor]
) -> Mapping[str, tuple[Tensor, Sequence[Tensor]]]:
    """Of a raw batch through the bare backbone: what goes into the layers that tensors belong to, (…, I), and the gradient of
    what comes out, (…, O), along each of K directions. directions: features (b, D) -> (K, b, D). A layer on whose output
    features do not depend has zeros; of a layer that is called several times, the last call is seen."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def watch(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen[layer] = args[0], out if out.requires_grad else out.requires_grad_()

    layers = {s: model.layer(s) for s in subjects}
    with ExitStack() as hooks:
        for layer in dict.fromkeys(layers.values()):
            hooks.callback(layer.register_forward_hook(watch).remove)
        features_bD = model.query(inputs)
    outs, pulls_KbD = [out for _, out in seen.values()], directions(features_bD.detach())
    found = [
        torch.autograd.grad(features_bD, outs, pull_bD, retain_graph=True, allow_unused=True, materialize_grads=True)
        for pull_bD in pulls_KbD
    ]
    gradients = {layer: [of[k].detach() for of in found] for k, layer in enumerate(seen)}
    return {s: (seen[layer][0].detach(), gradients[layer]) for s, layer in layers.items()}


def layer_outputs(model: Model, inputs: Tensors, subjects: Sequence[str], params: Tensors) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Of a raw batch, through what is applied to the model: what goes into the linear layers that tensors belong to, (…, I), and
    what comes out without the bias, (…, O); of `head.weight` what its map is given, and the logits without theirs."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def watch(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        bias = layer.bias
        seen[layer] = args[0], out - bias if isinstance(bias, Tensor) else out

    layers = {s: model.layer(s) for s in subjects if s != HEAD_WEIGHT}
    with ExitStack() as hooks:
        for layer in dict.fromkeys(layers.values()):
            hooks.callback(layer.register_forward_hook(watch).remove)
        features_bD = model.features(inputs)
    found = {s: seen[layer] for s, layer in layers.items()}
    if HEAD_WEIGHT in subjects:
        logits_bC = model.logits(features_bD, params)
        found[HEAD_WEIGHT] = model.head_inputs(features_bD, params), logits_bC - params.get(HEAD_BIAS, 0.0)
    return found
