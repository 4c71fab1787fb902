"""Task arithmetic: task vectors added up (Ilharco et al. 2023, "Editing models with task arithmetic")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedsim.core import contracts
from fedsim.core.contracts import Member
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from server.merging import mean
from server.merging._rule import require_scale
from server.merging.mean import WEIGHT


@dataclass(frozen=True)
class Merging(contracts.AdditiveMerging):
    """θ⁺ = θ_0 + λ Σ_i τ_i, τ_i = θ_i − θ_0. Every member has one vote, whatever it weighs.

    With λ = 1/N it is the plain mean (over clients FairAvg, the same bits), with λ = 1 the sum of all task vectors; a negative λ
    takes away what members have learned. A member that is alone is scaled too.

    scale: λ, a number other than 0, or `mean` for 1/N. 0.4 as in the code of TIES; 0.3 is typical for eight vision tasks. Over
    clients in every round a λ above 2/N overshoots what they agree on: use `mean` there.
    """

    linear: ClassVar[bool] = True
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"scale": "mean"}, {"scale": -1.0})
    scale: float | str = 0.4

    def __post_init__(self) -> None:
        kept = {"weights": "every member has one vote, whatever it weighs"}
        if self.scale != "mean":
            if isinstance(self.scale, str):
                raise ConfigError(f"scale must be a number or mean, got '{self.scale}'")
            require_scale(self.scale)
            kept |= dict.fromkeys(("fixed_point", "one_member"), "the sum of task vectors is scaled, not their mean")
        object.__setattr__(self, "exempt", kept)  # of this object: which laws hold depends on the options

    def lift(self, member: Member) -> Tensors:
        return mean.lift(member.params, 1.0)

    def finish(self, base: Tensors, total: Tensors, draw: torch.Generator) -> Tensors:
        if isinstance(self.scale, str):
            return mean.finish(base, total)
        out = {}
        for name, start in base.items():
            vector = total[name] - total[WEIGHT] * start.double()
            out[name] = (start.double() + self.scale * vector).to(start.dtype)
        return out
