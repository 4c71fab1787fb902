"""The median, number by number (Yin et al. 2018, "Byzantine-robust distributed learning: towards optimal
statistical rates")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedsim.core import contracts
from fedsim.core.contracts import Member
from fedsim.core.messages import Tensors
from server.merging import _robust


@dataclass(frozen=True)
class Merging(contracts.Merging):
    """θ⁺[p] = median_i θ_i[p]; of an even number of members the mean of the middle two. Every member has one vote.

    It stays between members that are honest as long as these are more than half. All members are held at once, K · P numbers; of
    what is sorted only about a million at a time are copied.
    """

    exempt: ClassVar[Mapping[str, str]] = _robust.EXEMPT

    def merge(self, members: Sequence[Member], base: Tensors, draw: torch.Generator) -> Tensors:
        return _robust.number_by_number(members, base, _robust.middle)
