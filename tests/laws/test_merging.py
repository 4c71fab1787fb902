"""The laws of merging rules find what is wrong with one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from fedsim.core import contracts
from fedsim.core.contracts import Member
from fedsim.core.messages import Tensors
from fedsim.laws import merging
from fedsim.laws.frame import LawBroken
from server.merging.mean import Merging as Mean

LAWS = {law.name: law.check for law in merging.LAWS}


@dataclass(frozen=True)
class Summed(contracts.Merging):
    """Adds up models, not what they differ by from where they started."""

    def merge(self, members: Sequence[Member], base: Tensors, draw: torch.Generator) -> Tensors:
        return {n: sum((m.params[n] for m in members), torch.zeros_like(t)) for n, t in base.items()}


@dataclass(frozen=True)
class Clipped(Mean):
    """Has a threshold that does not grow with the numbers."""

    def finish(self, base: Tensors, total: Tensors, draw: torch.Generator) -> Tensors:
        return {n: base[n] + (t - base[n]).clamp(-0.2, 0.2) for n, t in super().finish(base, total, draw).items()}


@dataclass(frozen=True)
class Largest(contracts.Merging):
    """Says that it is linear, and looks at numbers one by one."""

    linear: ClassVar[bool] = True

    def merge(self, members: Sequence[Member], base: Tensors, draw: torch.Generator) -> Tensors:
        return {n: torch.stack([m.params[n] for m in members]).amax(0) for n in base}


@dataclass(frozen=True)
class Turned(contracts.Merging):
    """Takes pairs, and gives the first member's with A and B of another size."""

    pairs: ClassVar[bool] = True

    def merge(self, members: Sequence[Member], base: Tensors, draw: torch.Generator) -> Tensors:
        return {n: t[:, 1:] if n.endswith("lora_A") else t for n, t in members[0].params.items()}


@dataclass(frozen=True)
class Careless(contracts.Merging):
    """Takes pairs, and writes into them."""

    pairs: ClassVar[bool] = True

    def merge(self, members: Sequence[Member], base: Tensors, draw: torch.Generator) -> Tensors:
        return {n: t.add_(1) for n, t in members[0].params.items()}


@pytest.mark.parametrize(
    ("rule", "law", "told"),
    [
        (Summed(), "affine", "three times as large and moved by the same"),
        (Clipped(), "affine", "should be"),
        (Largest(), "linear", "multiplied from the left"),
        (Turned(), "products", r"3 tasks: 'adapter\.block\.0\.weight' is \(3, 5\)"),
        (Careless(), "products", "the members that it was given changed under its hands"),
    ],
)
def test_what_is_wrong_with_a_rule_is_found(rule: contracts.Merging, law: str, told: str) -> None:
    with pytest.raises(LawBroken, match=told):
        LAWS[law](rule)
    LAWS[law](Mean())
