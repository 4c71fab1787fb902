"""The trimmed mean, number by number (Yin et al. 2018, "Byzantine-robust distributed learning: towards optimal
statistical rates").

Shapes: K members, P numbers that are looked at together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import Member
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from server.merging import _robust


@dataclass(frozen=True)
class Merging(contracts.Merging):
    """θ⁺[p] = the mean of the θ_i[p] without the ⌊share · K⌋ lowest and the ⌊share · K⌋ highest. Every member has one vote.

    share: β in [0, 0.5), as many of the members as may be byzantine (Flower has 0.2); 0 is the plain mean. With share · K below 1
    nothing is trimmed. ⌊share · K⌋ is that of the share as it is written (29 of 100 for 0.29, which in binary is a little less,
    where Flower trims 28). All members are held at once, K · P numbers; of what is sorted only about a million at a time are
    copied.
    """

    exempt: ClassVar[Mapping[str, str]] = _robust.EXEMPT
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"share": 0.4})

    share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.share < 0.5:
            raise ConfigError(f"share must be in [0, 0.5), got {self.share}")

    def merge(self, members: Sequence[Member], base: Tensors, draw: torch.Generator) -> Tensors:
        return _robust.number_by_number(members, base, self._trimmed)

    def _trimmed(self, sorted_KP: Tensor) -> Tensor:
        cut = math.floor(Fraction(str(self.share)) * len(sorted_KP))
        return sorted_KP[cut : len(sorted_KP) - cut].double().mean(dim=0)
