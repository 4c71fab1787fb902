"""Sparsification: of every tensor's change only the largest numbers travel; the rest is remembered and sent later."""

# N numbers of one tensor

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

import torch

from fedsim.core import contracts
from fedsim.core.contracts import NEW_BASIS, OUTSIDE_SPAN, Code, Parcel, Traits
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors

TASK = "task"  # in whose rounds the residual was left over


@dataclass(frozen=True)
class Channel(contracts.Channel):
    """Of each tensor the k = ⌈share · n⌉ largest of n numbers by magnitude, with error feedback:

        d = (w − w₀) + e,    sent: d where |d| is among the k largest, else 0,    e⁺ = d − sent.

    Sums are float32: sent + e⁺ = d holds bit for bit, since every number of d is in one of the two. e, the residual, is the
    client's memory: one number per trained number. It lasts from round to round in which a tensor is trained and ends with the
    task, whose end changes the parameters that it belongs to. Rules that change them in every round, since they give a product of
    LoRA factors other factors (`flora`, `merged` with products), are refused with feedback.
    share: of a tensor's numbers that are sent, in (0, 1]. feedback: false leaves it out (e = 0).
    Without memory ‖sent − (w − w₀)‖² ≤ (1 − k/n) ‖w − w₀‖² of each tensor.
    On the wire, of each tensor: k numbers, and their positions in ⌈log₂ n⌉ bits each or a bitmap of n bits, whichever is less
    (none if k = n); whole bytes per tensor. Statistics travel as they are, counted in full.

    Stich, Cordonnier & Jaggi 2018, "Sparsified SGD with memory"; Karimireddy et al. 2019, "Error feedback fixes SignSGD and other
    gradient compression schemes". Theirs is a step of SGD, here it is a client's round. What later channels lose (`quantise`) is
    not fed back.
    """

    share: float = 0.01
    feedback: bool = True

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"share": 0.3}, {"feedback": False})

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"share must be in (0, 1], got {self.share}")

    @property
    def covers(self) -> Sequence[str]:
        return ("*",)

    @property
    def traits(self) -> Traits:
        why = (
            "keeps a residual for every factor of a LoRA pair, but {aggregator} gives its product other factors in every round: "
            "use another rule, or feedback: false"
        )
        return Traits(gives={OUTSIDE_SPAN} if self.share < 1 else (), refuses={NEW_BASIS: why} if self.feedback else {})

    def send(self, start: Tensors, parcel: Parcel, memory: Tensors, draw: torch.Generator) -> tuple[Parcel, Tensors]:
        if not parcel.delta:
            return parcel, memory
        task, delta, codes = torch.tensor(parcel.task), dict(parcel.delta), dict(parcel.codes)
        residual = dict(memory) if TASK in memory and bool(memory[TASK] == task) else {}
        for name, change in parcel.delta.items():
            size, count = change.numel(), self._kept(change.numel())
            if count == size:
                continue
            d_N = (change + residual[name] if name in residual else change).flatten()
            at = d_N.abs().topk(count).indices.sort().values
            delta[name] = torch.zeros_like(d_N).index_copy_(0, at, d_N[at]).view_as(change)
            residual[name] = d_N.index_fill(0, at, 0.0).view_as(change)
            codes[name] = Code(count, parcel.code(name).bits, min(count * (size - 1).bit_length(), size), at)
        if not residual or not self.feedback:
            return replace(parcel, delta=delta, codes=codes), memory
        return replace(parcel, delta=delta, codes=codes), residual | {TASK: task}

    def bound(self, delta: Tensors) -> float:
        """(Σ_tensors (1 − k/n) ‖w − w₀‖²)^½."""
        parts = ((1 - self._kept(x.numel()) / max(1, x.numel())) * float(x.double().square().sum()) for x in delta.values())
        return math.sqrt(sum(parts))

    def _kept(self, size: int) -> int:
        """k = ⌈share · n⌉, of the share as it is written: 7 of 100 for 0.07, which is a little more in binary."""
        return math.ceil(Fraction(str(self.share)) * size)
