"""Quantisation: every number of an update as 8 or 4 bits of a common scale, rounded at random so that its mean stays true."""

# P numbers of one tensor, N of them that travel, in K blocks of B

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import OUTSIDE_SPAN, Parcel, Traits
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import Tensors


@dataclass(frozen=True)
class Channel(contracts.Channel):
    """The numbers x of w − w₀ that travel, in blocks of `block` (None: a tensor is one block), each with a scale s = max|x|:

        q = ⌊ L x / s + u ⌋,   u uniform in [0, 1),   L = 2^(bits − 1) − 1 = 127 or 7;    the server reads  x̂ = q s / L.

    q is one of the whole numbers −L … L. E x̂ = x, |x̂ − x| < s / L (one step), and E (x̂ − x)² ≤ (s / 2L)² (half a step). A block
    of zeros stays zeros. Computed in float64, x̂ rounded to float32.
    On the wire: `bits` for every number that travels (of a tensor that was made sparse before, the numbers that are left), and
    32 for every block's scale; whole bytes per tensor. Statistics travel as they are, counted in full.

    bits: 8 | 4. block: numbers that share a scale; null: a whole tensor.

    QSGD (Alistarh et al. 2017, "QSGD: communication-efficient SGD via gradient quantization and encoding") scales by the norm and
    encodes with Elias' code; the maximum as the scale and the fixed length are ours, as in common 8-bit formats.
    """

    bits: int = 8
    block: int | None = 256

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"bits": 4}, {"block": None})
    unbiased: ClassVar[bool] = True
    encodes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_choice("bits", self.bits, (8, 4))
        if self.block is not None and self.block < 1:
            raise ConfigError(f"block must be at least 1 (null: a tensor is one block), got {self.block}")

    @property
    def traits(self) -> Traits:
        return Traits(gives={OUTSIDE_SPAN})

    @property
    def covers(self) -> Sequence[str]:
        return ("*",)

    def send(self, start: Tensors, parcel: Parcel, memory: Tensors, draw: torch.Generator) -> tuple[Parcel, Tensors]:
        delta, codes = dict(parcel.delta), dict(parcel.codes)
        for name, x in parcel.delta.items():
            code, x_P = parcel.code(name), x.flatten()
            travels_N = x_P if code.at is None else x_P[code.at]
            read_N = self._read(travels_N, draw)
            delta[name] = (read_N if code.at is None else x_P.index_copy(0, code.at, read_N)).view_as(x)
            blocks = len(self._blocks(travels_N))
            codes[name] = replace(code, bits=self.bits, extra=code.extra + 32 * blocks)
        return replace(parcel, delta=delta, codes=codes), memory

    def bound(self, delta: Tensors) -> float:
        """A step in every number: (Σ_blocks n (s / L)²)^½ with n numbers in a block."""
        found = (self._blocks(x.flatten().double()) for x in delta.values())
        return math.sqrt(sum(float(_scales(x_KB).square().sum()) * x_KB.shape[1] for x_KB in found)) / self._levels

    @property
    def _levels(self) -> int:
        return int(2 ** (self.bits - 1)) - 1

    def _read(self, x_N: Tensor, draw: torch.Generator) -> Tensor:
        """x̂: what the server reads."""
        x_KB = self._blocks(x_N.double())
        scale_K1 = _scales(x_KB)
        u_KB = torch.rand(x_KB.shape, generator=draw, dtype=torch.float64)
        q_KB = torch.floor(x_KB * self._levels / torch.where(scale_K1 > 0, scale_K1, 1.0) + u_KB)
        return (q_KB * scale_K1 / self._levels).flatten()[: len(x_N)].to(x_N.dtype)

    def _blocks(self, x_N: Tensor) -> Tensor:
        """(K, B), the last block filled up with zeros."""
        size = min(self.block or len(x_N), len(x_N))
        if size == 0:
            return x_N.view(0, 0)
        return torch.nn.functional.pad(x_N, (0, -len(x_N) % size)).view(-1, size)


def _scales(x_KB: Tensor) -> Tensor:
    """max |x| of every block, (K, 1)."""
    return x_KB.abs().amax(dim=1, keepdim=True) if x_KB.numel() else x_KB
