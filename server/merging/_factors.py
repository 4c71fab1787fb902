"""The LoRA factors that members send, layer by layer: means, stacks, and what the one loses against the other.

Shapes: O outputs, I inputs, R rank (A_RI, B_OR), Q ranks of all members together. p_i: shares of the members, Σ p_i = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core.contracts import Member
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.core.tensors import LORA_A, LORA_B, lora_layers, sum_in_order

KEEPS_BENEATH: Mapping[str, str] = {  # for the `refuses` of a rule that leaves something beneath
    "unlearning": "leaves part of the model beneath the module, from which no client can be subtracted: leave out "
    "server.unlearning, or use aggregator: fedavg",
}


def factor_of(round: int, train: str, start: str = "B") -> str:
    """ "A" or "B": the factor that is trained in a round (0-based) of a task. train: alternate | A | B; start: of the first."""
    if train != "alternate":
        return train
    return start if round % 2 == 0 else "BA"["AB".index(start)]


def require_pairs(params: Tensors, rule: str) -> None:
    """Raise ConfigError where a tensor of the adapter is no LoRA factor."""
    pairs = {p + factor for p in lora_layers(params) for factor in (LORA_A, LORA_B)}
    other = [n for n in params if n.startswith("adapter.") and n not in pairs]
    if other:
        raise ConfigError(
            f"{rule} merges pairs of LoRA factors and '{other[0]}' is none: "
            f"use adapter: lora, or give it a rule of its own (- {{match: {other[0]}, name: fedavg}})"
        )


@dataclass(frozen=True)
class Factors:
    """The pairs of one layer, float64. p: shares of the members."""

    p: Sequence[float]
    a: Sequence[Tensor]
    b: Sequence[Tensor]

    @classmethod
    def of(cls, members: Sequence[Member], params: Tensors, layer: str) -> Factors:
        """What members sent; a factor that they did not train is the one that all received."""
        total = sum(m.weight for m in members)
        a, b = ([m.params.get(layer + f, params[layer + f]).double() for m in members] for f in (LORA_A, LORA_B))
        return cls([m.weight / total for m in members], a, b)

    @property
    def mean_a(self) -> Tensor:
        """Ā = Σ p_i A_i."""
        return sum_in_order(p * a for p, a in zip(self.p, self.a, strict=True))

    @property
    def mean_b(self) -> Tensor:
        """B̄ = Σ p_i B_i."""
        return sum_in_order(p * b for p, b in zip(self.p, self.b, strict=True))

    def stacked(self) -> tuple[Tensor, Tensor]:
        """[p_1 A_1; …; p_N A_N] (Q, I) and [B_1, …, B_N] (O, Q): their product is Σ p_i B_i A_i. Ranks that a client does not
        have, of which both factors are zero, take no place."""
        return _without_zeros([p * a for p, a in zip(self.p, self.a, strict=True)], self.b)

    def residual(self) -> tuple[Tensor, Tensor]:
        """[A_1 − Ā; …] (Q, I) and [p_1 (B_1 − B̄), …] (O, Q): their product is Σ p_i B_i A_i − B̄ Ā, which is the clients'
        covariance Σ p_i (B_i − B̄)(A_i − Ā)."""
        mean_a, mean_b = self.mean_a, self.mean_b
        return _without_zeros([a - mean_a for a in self.a], [p * (b - mean_b) for p, b in zip(self.p, self.b, strict=True)])


def _without_zeros(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    a_QI, b_OQ = torch.cat(list(a)), torch.cat(list(b), dim=1)
    there_Q = a_QI.any(dim=1) | b_OQ.any(dim=0)
    return a_QI[there_Q], b_OQ[:, there_Q]


def trained_pairs(members: Sequence[Member], params: Tensors) -> list[str]:
    """Layers of which members trained both factors; where they shared one, a mean of the other is exact."""
    return [p for p in lora_layers(params) if p + LORA_A in members[0].params and p + LORA_B in members[0].params]
