"""FedSA-LoRA: A is shared, B stays with its client (Guo et al. 2025, "Selective aggregation for low-rank adaptation in federated
learning")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import OUTSIDE_SPAN, TAKES_RANKS, Traits
from fedsim.core.messages import ClientUpdate, RoundPlan, State, Tensors
from fedsim.core.tensors import LORA_B
from server.merging import mean
from server.merging._factors import require_pairs


@dataclass(frozen=True)
class Aggregator(contracts.AdditiveAggregator):
    """Clients train A (r, d) and B (m, r), and send A alone: A⁺ = Σ p_i A_i, p_i = n_i / Σ n. Client i has the model B_i A⁺, and
    B_i stays with it from round to round: what is common goes into A, what is its own into B.

    Up go r·d numbers a layer and the head in every round, and B in a task's last one alone. The clients of that round hand their
    B_i in, and what is evaluated, and merged over tasks, is B = Σ p_i B_i: B A⁺ is the mean of their own models, exactly [ours:
    the paper evaluates each client's own model on its own data, and knows no tasks. One model for all classes is what this
    simulator measures, and a client's own knows its own classes only]. Before that the server has the B that the task began
    with, so that accuracies within a task say little. The head by FedAvg [ours].

    A client that has not trained this module yet begins with the server's B. With a fresh module per task B begins anew; where
    one module goes on, so does every client's B. A client keeps r·m numbers a layer in memory, which devices must store.
    Raises ConfigError for an adapter without pairs, AggregationError when nobody sent an update or nobody holds samples.
    """

    @property
    def traits(self) -> Traits:
        alone = "leaves B with the clients, and what they become by themselves is a model without it: leave out server.unlearning"
        return Traits(gives={OUTSIDE_SPAN, TAKES_RANKS}, refuses={"unlearning": alone})

    def init(self, params: Tensors, task: int = 0) -> State:
        require_pairs(params, "fedsa")
        return {}

    def plan(self, state: State, round: int) -> RoundPlan:
        return RoundPlan(keeps=("*" + LORA_B,))

    def lift(self, update: ClientUpdate) -> dict[str, Tensor]:
        return mean.lift(update.params, float(update.num_samples))

    def finish(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> tuple[State, Tensors]:
        return state, mean.finish(params, total)
