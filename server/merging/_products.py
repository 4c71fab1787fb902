"""Modules of LoRA pairs as a merging rule sees them: every pair is one linear map, its product.

Shapes: O outputs, I inputs, R rank (A_RI, B_OR).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedsim.core.messages import StatisticRequest, Tensors
from fedsim.core.tensors import LORA_A, LORA_B, lora_layers, matching

WEIGHT = ".weight"


class Products(Mapping[str, Tensor]):
    """A module's tensors, LoRA pairs as `<layer>.weight` = B A (O, I), float64, each computed when it is looked at: only one of
    them is held at a time."""

    def __init__(self, module: Tensors) -> None:
        self._module = module
        self._names = names(module)

    def __getitem__(self, name: str) -> Tensor:
        layer = self._names[name]
        if layer is None:
            return self._module[name]
        return self._module[layer + LORA_B].double() @ self._module[layer + LORA_A].double()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def names(module: Tensors) -> dict[str, str | None]:
    """Name that a rule sees -> the layer whose product it is, None for a tensor that is no LoRA factor."""
    layers = lora_layers(module)
    factors = {p + factor for p in layers for factor in (LORA_A, LORA_B)}
    return {p + WEIGHT: p for p in layers} | {name: None for name in module if name not in factors}


def zeros(module: Tensors) -> dict[str, Tensor]:
    """θ_0 = 0 of every tensor that a rule sees of a module."""
    return {name: torch.zeros_like(module[name]) if p is None else _zero(module, p) for name, p in names(module).items()}


def factored(merged: Tensors, like: Tensors) -> dict[str, Tensor]:
    """Merged tensors as a module again, in the types of `like`. A product is exact as a pair of rank min(O, I): one factor holds
    it, the other is the identity."""
    out: dict[str, Tensor] = {}
    for name, layer in names(like).items():
        if layer is None:
            out[name] = merged[name].to(like[name].dtype)
            continue
        a, b = layer + LORA_A, layer + LORA_B
        delta_OI = merged[name].to(like[a].dtype)
        outputs, inputs = delta_OI.shape
        wide = outputs < inputs
        out[a] = delta_OI if wide else torch.eye(inputs, dtype=delta_OI.dtype)
        out[b] = torch.eye(outputs, dtype=delta_OI.dtype) if wide else delta_OI
    return out


def asked(requests: Sequence[StatisticRequest], module: Tensors) -> tuple[StatisticRequest, ...]:
    """A rule's requests in the names of a module's tensors, through the mean of all modules so far (blended). What is asked of
    a product is asked of its `lora_A`: it has the same inputs."""
    seen = names(module)
    told = []
    for request in requests:
        subjects = [name if seen[name] is None else f"{seen[name]}{LORA_A}" for name in matching(seen, request.match)]
        if subjects:
            told.append(replace(request, match=tuple(subjects), blended=True))
    return tuple(told)


def received(statistics: Tensors, module: Tensors) -> dict[str, Tensor]:
    """Statistics that were asked for so, under the names that the rule sees."""
    inputs = {f"{layer}{LORA_A}": name for name, layer in names(module).items() if layer is not None}
    out = {}
    for key, tensor in statistics.items():
        form, _, subject = key.partition("/")
        out[f"{form}/{inputs.get(subject, subject)}"] = tensor
    return out


def _zero(module: Tensors, layer: str) -> Tensor:
    a_RI, b_OR = module[layer + LORA_A], module[layer + LORA_B]
    return torch.zeros(len(b_OR), a_RI.shape[1], dtype=a_RI.dtype)
