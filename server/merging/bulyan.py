"""Bulyan: Krum chooses members, and of every number those nearest to the median are averaged (El Mhamdi et al. 2018, "The hidden
vulnerability of distributed learning in Byzantium").

Shapes: K members, S of them chosen, P numbers that are looked at together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import Member
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import Tensors
from server.merging import _robust


@dataclass(frozen=True)
class Merging(contracts.Merging):
    """S = K − 2f members are chosen: the one with the lowest Krum score, over and over, among those that are left. Then

        θ⁺[p] = the mean of the S − 2f chosen numbers that are nearest to their median, number by number.

    Krum alone lets one number be far off, if the rest is close; here every number is between honest ones. Every member has one
    vote. Distances are over all tensors together; all is computed in float64.

    byzantine: f, how many members may be anything; needs K ≥ 4f + 3 (`least`). choose: repeated, as in the paper: who is left
    is scored by the K' − f − 2 nearest (one at least) of the K' that are left | once: the S lowest scores of all, as in Flower.
    Scores by a single neighbour come in equal pairs (the last one with f ≤ 2): then it is the one nearer to all that are left,
    which is ours.
    Costs 2 K² P operations for P numbers, and all members are held at once; of what is sorted only about a million numbers at a
    time are copied.
    """

    exempt: ClassVar[Mapping[str, str]] = _robust.EXEMPT
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"byzantine": 2, "choose": "once"})

    byzantine: int = 1
    choose: str = "repeated"

    def __post_init__(self) -> None:
        require_choice("choose", self.choose, ("repeated", "once"))
        if self.byzantine < 0:
            raise ConfigError(f"byzantine must not be negative, got {self.byzantine}")

    @property
    def least(self) -> int:
        return 4 * self.byzantine + 3

    def merge(self, members: Sequence[Member], base: Tensors, draw: torch.Generator) -> Tensors:
        contracts.require_members(self, members)
        chosen = self._chosen(_robust.squared_distances(members, base))
        nearest = partial(_nearest_to_median, count=len(chosen) - 2 * self.byzantine)
        return _robust.number_by_number([members[k] for k in chosen], base, nearest)

    def _chosen(self, squared_KK: Tensor) -> list[int]:
        """Which members, ascending."""
        count, left = len(squared_KK) - 2 * self.byzantine, list(range(len(squared_KK)))
        if self.choose == "once":
            return sorted(_robust.krum_scores(squared_KK, self.byzantine).sort(stable=True).indices[:count].tolist())
        chosen: list[int] = []
        while len(chosen) < count:
            among = squared_KK[left][:, left]
            scores, totals = _robust.krum_scores(among, self.byzantine).tolist(), among.sum(dim=1).tolist()
            chosen.append(left.pop(min(range(len(left)), key=lambda k: (scores[k], totals[k]))))
        return sorted(chosen)


def _nearest_to_median(sorted_SP: Tensor, count: int) -> Tensor:
    """The mean of so many sorted numbers that are nearest to their median, (P,) float64. They stand side by side: the lowest or
    the highest that is left goes, whichever is farther (of equal ones the highest), until so many are left."""
    sorted_SP = sorted_SP.double()
    median_P, lowest_P = _robust.middle(sorted_SP), torch.zeros(sorted_SP.shape[1], dtype=torch.long)
    for left in range(len(sorted_SP), count, -1):
        low_P, high_P = sorted_SP.gather(0, torch.stack([lowest_P, lowest_P + left - 1]))
        lowest_P += median_P - low_P > high_P - median_P
    return sorted_SP.gather(0, lowest_P + torch.arange(count)[:, None]).mean(dim=0)
