"""Krum and Multi-Krum: the members that lie closest to most of the others (Blanchard et al. 2017, "Machine learning with
adversaries: Byzantine tolerant gradient descent").

Shapes: K members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedsim.core import contracts
from fedsim.core.contracts import Member
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import Tensors
from fedsim.core.sums import summed
from server.merging import _robust, mean


@dataclass(frozen=True)
class Merging(contracts.Merging):
    """score_i = the sum of ‖θ_i − θ_j‖² to the K − f − 2 members j that are nearest; θ⁺ = the mean of the `keep` members with the
    lowest scores, of equal ones the first. Distances are over all tensors together; they and the scores are float64.

    byzantine: f, how many members may be anything; needs K ≥ 2f + 3 and keep ≤ K − f (`least`). keep: 1 is Krum, whose result is
    one of its members; more is Multi-Krum. weights: the mean of those that are kept is `uniform`, or by `samples` (as Flower has
    it). Flower has f = 0 by default and takes fewer members than the paper does, with one neighbour at least.
    Where members differ because their data do, those that hold what few others hold lie far away and are dropped, honest or not.

    Costs 2 K² P operations for P numbers, and all members are held at once.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"byzantine": 2, "keep": 4}, {"keep": 3, "weights": "samples"})

    byzantine: int = 1
    keep: int = 1
    weights: str = "uniform"

    def __post_init__(self) -> None:
        require_choice("weights", self.weights, ("uniform", "samples"))
        if self.byzantine < 0:
            raise ConfigError(f"byzantine must not be negative, got {self.byzantine}")
        if self.keep < 1:
            raise ConfigError(f"keep must be at least 1, got {self.keep}")
        kept = {"weights": "which members are kept is decided by one vote of each"}
        if self.byzantine == 0:
            kept["order"] = "of three members, scored by one neighbour, two have the same score, and the first of them is taken"
        object.__setattr__(self, "exempt", kept)  # of this object: which laws hold depends on the options

    @property
    def least(self) -> int:
        return max(2 * self.byzantine + 3, self.keep + self.byzantine)

    def merge(self, members: Sequence[Member], base: Tensors, draw: torch.Generator) -> Tensors:
        contracts.require_members(self, members)
        scores_K = _robust.krum_scores(_robust.squared_distances(members, base), self.byzantine)
        best = sorted(scores_K.sort(stable=True).indices[: self.keep].tolist())
        if self.keep == 1:
            return {name: members[best[0]].params[name] for name in base}
        shares = [members[k].weight if self.weights == "samples" else 1.0 for k in best]
        total = summed(mean.lift(members[k].params, w) for k, w in zip(best, shares, strict=True))
        return mean.finish(base, total)
