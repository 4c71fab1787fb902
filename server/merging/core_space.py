"""Core Space: LoRA pairs merged by any rule inside the small space that they span together (Panariello et al. 2025, "Accurate and
efficient low-rank model merging in core space").

Shapes: p and q directions of the space of a layer (core_pq).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core.contracts import Member
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.core.tensors import lora_layers
from server.merging import _products, _rule
from server.merging._core import leading


@dataclass(frozen=True)
class Merging(_rule.Around):
    """C_i = (Uᵀ B_i)(A_i Vᵀ), M = then(C_1, …, C_T), ΔW = U M V, with U and V the singular vectors of all B side by side and of
    all A one below the other: B_i A_i = U C_i V without loss, for pairs of any ranks, and M is as small as the sum of the ranks.

    Rules that are linear (mean, task_arithmetic) give the same as on whole products. Others (ties, dare, tsv) do not: there each
    number stands for a direction that modules share. What they give depends on the basis, and so on how a product is split into
    its factors. Over clients the server's pair is one of those that span the space, and τ_i = C_i − C_0 [ours; published for
    modules that start from nothing]. Directions without any size are left out, and signs of bases are fixed [ours].
    Tensors that are no LoRA pairs go through the same rule as they are. A task's module is deployed as a pair of rank
    Σ r_t, a round's brought back to the server's rank (see the aggregator `merged`).

    then: the rule inside; it may not ask for statistics, which know nothing of the space. scale: λ on what it adds to θ_0,
    besides its own; 0.2 in a published configuration. isotropic: every singular value of M − C_0 becomes their mean (Iso, Marczak
    et al. 2025, "No task left behind"), those of no size stay 0 [ours].
    """

    pairs: ClassVar[bool] = True
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"then": {"name": "ties", "density": 0.5}},
        {"then": {"name": "dare"}},
        {"isotropic": True, "scale": 0.4},
    )
    scale: float = 1.0
    isotropic: bool = False

    def __post_init__(self) -> None:
        _rule.require_scale(self.scale)
        super().__post_init__()
        if asked := self.inner.asks(products=True):
            raise ConfigError(f"then must be a rule that asks for no statistics, and this one asks for '{asked[0].name}'")

    def breaks(self) -> Mapping[str, str]:
        kept = {} if self.inner.linear else {"weights": "the basis hangs on how many modules there are of a kind"}
        if self.isotropic or self.scale != 1:
            kept |= dict.fromkeys(("fixed_point", "one_member"), "what modules agree on is scaled")
        return kept

    def merge(self, members: Sequence[Member], base: Tensors, draw: torch.Generator) -> Tensors:
        layers = {p + _products.WEIGHT for p in lora_layers(base)}
        return _products.in_core(partial(self._merged, layers, draw), members, base)

    def _merged(self, layers: set[str], draw: torch.Generator, members: Sequence[Member], base: Tensors) -> Tensors:
        """Of cores. layers: their names."""
        merged, out = self.inner.merge(members, base, draw), {}
        for name, start in base.items():
            if self.scale == 1 and not (self.isotropic and name in layers):
                out[name] = merged[name]
                continue
            start, vector = start.double(), merged[name].double() - start.double()
            if self.isotropic and name in layers:
                vector = flattened(vector, float(start.norm()))
            out[name] = start + self.scale * vector
        return out


def flattened(vector_pq: Tensor, size: float) -> Tensor:
    """U s̄ Vᵀ of U S Vᵀ, s̄ the mean of those singular values that are not rounding, in numbers of this size or their own."""
    left, sizes, right = leading(vector_pq, min(vector_pq.shape), size)
    return (sizes.mean() if len(sizes) else 0.0) * left @ right
