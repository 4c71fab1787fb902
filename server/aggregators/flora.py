"""FLoRA: the clients' LoRA pairs stacked, and merged into what they train on top of (Wang et al. 2024, "FLoRA: Federated
fine-tuning large language models with heterogeneous low-rank adaptations").

Shapes: O outputs, I inputs, R rank (A_RI, B_OR), Q = Σ r_i ranks of all clients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import BENEATH, NEW_BASIS, TAKES_RANKS, Member, Traits
from fedsim.core.messages import ClientUpdate, State, Tensors
from fedsim.core.tensors import LORA_A, LORA_B
from server.merging._factors import KEEPS_BENEATH, Factors, require_pairs, trained_pairs
from server.merging.mean import Merging as Mean


@dataclass(frozen=True)
class Aggregator(contracts.Aggregator):
    """B = [B_1, …, B_N] (m, Σ r_i),  A = [p_1 A_1; …; p_N A_N] (Σ r_i, d),  W ← W + B A = W + Σ p_i B_i A_i,   p_i = n_i / Σ n

    The mean of the clients' products, exactly, whatever their ranks: the stack is merged into what clients train on top of, and
    they begin the next round with a new pair, A drawn anew and B = 0. Weights stand on one factor only: on both they would be
    squared. Every other tensor, the head's too, by FedAvg. Where clients train one factor alone, its mean is exact and goes on.

    Down go Σ r_i (m + d) numbers a layer, or m·d where the product is smaller, once to every client (the published code merges
    it there), beside the new A, which the ledger counts whole where a seed would do; up goes what FedAvg's clients send.
    The published code scales by alpha = 2 r_i per client; here one s holds for all (see the adapter), so that it is in B A
    already. Its optimizer is new in every round, as all are here. The clients' updates are needed one by one.

    State: `stack`, what the last merge has left beneath. Raises ConfigError for an adapter without pairs, AggregationError when
    nobody sent an update or nobody holds samples.
    """

    @property
    def traits(self) -> Traits:
        return Traits(gives={BENEATH, NEW_BASIS, TAKES_RANKS}, refuses=KEEPS_BENEATH)

    @property
    def products(self) -> bool:
        return True

    def init(self, params: Tensors, task: int = 0) -> State:
        require_pairs(params, "flora")
        return {"stack": {}}

    def combine(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        contracts.require_updates(updates)
        members = Member.clients(updates)
        merged, stack = dict(Mean().merge(members, params, draw)), dict[str, Tensor]()
        for layer in trained_pairs(members, params):
            a, b = layer + LORA_A, layer + LORA_B
            rows_QI, columns_OQ = Factors.of(members, params, layer).stacked()
            stack |= {a: rows_QI.to(merged[a].dtype), b: columns_OQ.to(merged[b].dtype)}
            bound = 1 / math.sqrt(merged[a].shape[1])
            drawn = torch.empty(merged[a].shape, dtype=torch.float64).uniform_(-bound, bound, generator=draw)
            merged[a] = drawn.to(merged[a].dtype)
            merged[b] = torch.zeros_like(merged[b])
        return {"stack": stack}, merged

    def beneath(self, state: State) -> Tensors:
        stack: Tensors = state["stack"]
        return stack
