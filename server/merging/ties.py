"""TIES: task vectors trimmed, signs elected, and those that agree averaged (Yadav et al. 2023, "TIES-merging: resolving
interference when merging models").

Shapes: P numbers of a model, or of one of its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import Member
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import Tensors
from fedsim.core.tensors import sum_in_order
from server.merging._rule import require_scale


@dataclass(frozen=True)
class Merging(contracts.Merging):
    """θ⁺ = θ_0 + scale · τ, number by number, from the task vectors τ_i = θ_i − θ_0.

    Trim:  τ̂_i keeps the density·P numbers of τ_i that are largest in size (one at least); the others become 0.
    Elect: γ = sign(Σ_i τ̂_i); where that is 0, the sign that most numbers have.
    Mean:  τ = the mean of those τ̂_i ≠ 0 whose sign is γ, 0 where there is none.

    A member that is alone is the result: nothing interferes with it. Every member has one vote, whatever it weighs.

    density: in (0, 1], published 0.2. scale: λ, published 1 and tuned from 0.3 to 1.8, negative to take away. fed-mammoth's rule
    of every round is density 0.3 and scale 0.4, but for numbers whose sum is exactly 0, which stay 0 there. trim: among which
    numbers the largest are sought: model (all of a model's at once, as published) | tensor (those of each tensor, and signs are
    counted there too).
    Ours: exactly density·P, rounded, are kept, where the published code keeps one more; numbers as large as the smallest that is
    kept are kept too. All is computed in float64, one member after the other.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"density": 1.0}, {"trim": "tensor", "scale": 0.4})
    density: float = 0.2
    scale: float = 1.0
    trim: str = "model"

    def __post_init__(self) -> None:
        require_choice("trim", self.trim, ("model", "tensor"))
        if not 0 < self.density <= 1:
            raise ConfigError(f"density must be in (0, 1], got {self.density}")
        require_scale(self.scale)
        kept = {"weights": "every member has one vote, whatever it weighs"}
        if self.density < 1 or self.scale != 1:
            kept["fixed_point"] = "what a model keeps of its task vector is density of its numbers, times scale"
        object.__setattr__(self, "exempt", kept)  # of this object: which laws hold depends on the options

    def merge(self, members: Sequence[Member], base: Tensors, draw: torch.Generator) -> Tensors:
        if len(members) == 1:
            return members[0].params
        groups = [list(base)] if self.trim == "model" else [[name] for name in base]
        return {n: t for names in groups for n, t in self._merged(members, {n: base[n] for n in names}).items()}

    def _merged(self, members: Sequence[Member], base: Tensors) -> dict[str, Tensor]:
        """Those tensors alone. Every member's vector is made twice, so that one at a time is held."""
        start_P = _flat(base, base)
        smallest = [self._smallest_kept(_flat(m.params, base) - start_P) for m in members]
        vectors = [(m, kept) for m, kept in zip(members, smallest, strict=True)]
        sign_P = _elected(sum_in_order(_trimmed(_flat(m.params, base) - start_P, kept) for m, kept in vectors))
        total_P, count_P = torch.zeros_like(start_P), torch.zeros_like(start_P)
        for member, kept in vectors:
            vector_P = _trimmed(_flat(member.params, base) - start_P, kept)
            agrees_P = (vector_P.sign() == sign_P) & (vector_P != 0)
            total_P += vector_P * agrees_P
            count_P += agrees_P
        merged_P = start_P + self.scale * total_P / count_P.clamp(min=1)
        ends = list(accumulate(t.numel() for t in base.values()))
        parts = torch.tensor_split(merged_P, ends[:-1])
        return {n: part.view(t.shape) for (n, t), part in zip(base.items(), parts, strict=True)}

    def _smallest_kept(self, vector_P: Tensor) -> float:
        """The size of the smallest number that trimming keeps."""
        kept = max(1, round(self.density * vector_P.numel()))
        return float(vector_P.abs().kthvalue(vector_P.numel() - kept + 1).values)


def _flat(params: Tensors, like: Tensors) -> Tensor:
    return torch.cat([params[name].double().flatten() for name in like])


def _trimmed(vector_P: Tensor, smallest: float) -> Tensor:
    return torch.where(vector_P.abs() >= smallest, vector_P, 0.0)


def _elected(sum_P: Tensor) -> Tensor:
    """The sign of every number; of a sum of 0, the sign that most of the others have."""
    sign_P = sum_P.sign()
    return torch.where(sign_P == 0, sign_P.sum().sign(), sign_P)
