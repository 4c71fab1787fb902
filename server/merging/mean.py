"""The weighted mean, tensor by tensor; of modules of LoRA pairs, the mean of their products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import Member
from fedsim.core.messages import Tensors
from fedsim.core.tensors import stack_modules, weighted

WEIGHT = "weight"


@dataclass(frozen=True)
class Merging(contracts.AdditiveMerging):
    """θ⁺ = Σ w_i θ_i / Σ w_i. Over clients it is FedAvg, over tasks every task counts the same."""

    linear: ClassVar[bool] = True

    def lift(self, member: Member) -> Tensors:
        return lift(member.params, member.weight)

    def finish(self, base: Tensors, total: Tensors, draw: torch.Generator) -> Tensors:
        return finish(base, total)


def lift(params: Tensors, weight: float) -> dict[str, Tensor]:
    """`w θ` of every tensor and `weight` w, closed under +, in float64."""
    w = torch.tensor(weight, dtype=torch.float64)
    return {name: weighted(t, w) for name, t in params.items()} | {WEIGHT: w}


def finish(params: Tensors, total: Tensors) -> dict[str, Tensor]:
    """The means from the sum of `lift`; tensors that are not in it stay as they are."""
    w = total[WEIGHT]
    return {name: (total[name] / w).to(t.dtype) if name in total else t for name, t in params.items()}


def mean_module(modules: Sequence[Tensors]) -> dict[str, Tensor]:
    """One module that acts as the uniform mean of several: LoRA pairs as products, one pair of rank Σ r_t."""
    return stack_modules(modules, [1 / len(modules)] * len(modules))
