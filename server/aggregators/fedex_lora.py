"""FedEx-LoRA: the means of the factors, and what they lose beneath them (Singhal et al. 2024, "FedEx-LoRA: Exact aggregation for
federated and efficient fine-tuning of foundation models").

Shapes: O outputs, I inputs, R rank (A_RI, B_OR), Q = Σ r_i ranks of all clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedsim.core import contracts
from fedsim.core.contracts import BENEATH, TAKES_RANKS, Member, Traits
from fedsim.core.messages import ClientUpdate, State, Tensors
from fedsim.core.tensors import LORA_A, LORA_B
from server.merging._factors import KEEPS_BENEATH, Factors, require_pairs, trained_pairs
from server.merging.mean import Merging as Mean


@dataclass(frozen=True)
class Aggregator(contracts.Aggregator):
    """A⁺ = Σ p_i A_i, B⁺ = Σ p_i B_i, p_i = n_i / Σ n, and what that loses is added to what is frozen:

        W ← W + R,   R = Σ p_i B_i A_i − B⁺ A⁺ = Σ p_i (B_i − B⁺)(A_i − A⁺)   of rank Σ r_i at most,

    so that the model is the mean of the clients' products exactly: W + R + B⁺ A⁺ = W + Σ p_i B_i A_i. R travels once to every
    client, as factors of Σ r_i (m + d) numbers a layer or as the matrix, m·d, whichever is smaller, beside the mean pair; up goes
    what FedAvg's clients send. Every other tensor, the head's too, by FedAvg. Where clients train one factor alone, its mean is
    exact and R is nothing. The clients' updates are needed one by one.

    State: `residual`, what the last merge has left beneath. Ours: R as a covariance, whose bits are zero for one client.
    Raises ConfigError for an adapter without pairs, AggregationError when nobody sent an update or nobody holds samples.
    """

    @property
    def traits(self) -> Traits:
        return Traits(gives={BENEATH, TAKES_RANKS}, refuses=KEEPS_BENEATH)

    @property
    def products(self) -> bool:
        return True

    def init(self, params: Tensors, task: int = 0) -> State:
        require_pairs(params, "fedex_lora")
        return {"residual": {}}

    def combine(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        contracts.require_updates(updates)
        members = Member.clients(updates)
        residual = dict[str, torch.Tensor]()
        for layer in trained_pairs(members, params):
            rows_QI, columns_OQ = Factors.of(members, params, layer).residual()
            dtype = params[layer + LORA_A].dtype
            residual |= {layer + LORA_A: rows_QI.to(dtype), layer + LORA_B: columns_OQ.to(dtype)}
        return {"residual": residual}, Mean().merge(members, params, draw)

    def beneath(self, state: State) -> Tensors:
        residual: Tensors = state["residual"]
        return residual
