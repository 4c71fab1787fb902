"""LoRA-FAIR: the mean of B corrected for what averaging the factors loses (Bian et al. 2024, "LoRA-FAIR: Federated LoRA
fine-tuning with aggregation and initialization refinement").

Shapes: O outputs, I inputs, R rank (A_RI, B_OR).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedsim.core import contracts
from fedsim.core.contracts import OUTSIDE_SPAN, TAKES_RANKS, Member, Traits
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate, State, Tensors
from fedsim.core.tensors import LORA_B
from server.linalg import solve_gram
from server.merging._factors import Factors, require_pairs, trained_pairs
from server.merging.mean import Merging as Mean


@dataclass(frozen=True)
class Aggregator(contracts.Aggregator):
    """A⁺ = Ā, B⁺ = B̄ + ΔB, with Ā = Σ p_i A_i, B̄ = Σ p_i B_i, p_i = n_i / Σ n, and

        ΔB = argmin ‖Σ p_i B_i A_i − (B̄ + ΔB) Ā‖² + λ ‖ΔB‖² = E Āᵀ (Ā Āᵀ + λ I)⁻¹,    E = Σ p_i B_i A_i − B̄ Ā

    As much of the clients' mean product as a pair with the rows of Ā can hold, and near to B̄. No (m, d) matrix is formed. Every
    other tensor, the head's too, by FedAvg. What travels is what FedAvg's does: r (m + d) numbers a layer up and down.
    The clients' updates are needed one by one.

    penalty: λ, 0 or more, beside ‖Ā‖² ≈ r / 3; published 0.01. Ours: the squared distance, which has this closed form, where the
    paper maximises a cosine similarity by gradient steps; its refined start of clients is the usual one here, the merged pair.
    Raises ConfigError for an adapter without pairs, AggregationError when nobody sent an update or nobody holds samples.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"penalty": 0.0})
    penalty: float = 0.01

    def __post_init__(self) -> None:
        if not self.penalty >= 0:
            raise ConfigError(f"penalty must not be negative, got {self.penalty}")

    @property
    def traits(self) -> Traits:
        return Traits(gives={OUTSIDE_SPAN, TAKES_RANKS})

    def init(self, params: Tensors, task: int = 0) -> State:
        require_pairs(params, "lora_fair")
        return {}

    def combine(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        contracts.require_updates(updates)
        members = Member.clients(updates)
        merged = dict(Mean().merge(members, params, draw))
        for layer in trained_pairs(members, params):
            factors = Factors.of(members, params, layer)
            a_RI, (rows_QI, columns_OQ) = factors.mean_a, factors.residual()
            gram_RR = a_RI @ a_RI.T + self.penalty * torch.eye(len(a_RI), dtype=torch.float64)
            correction_OR = solve_gram(columns_OQ @ (rows_QI @ a_RI.T), gram_RR)
            merged[layer + LORA_B] = (factors.mean_b + correction_OR).to(merged[layer + LORA_B].dtype)
        return state, merged
