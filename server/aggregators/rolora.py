"""RoLoRA: LoRA factors averaged in turn (Chen et al. 2024, "Robust federated finetuning of LLMs via alternating optimization of
LoRA"); with `train: B` it is FFA-LoRA (Sun et al. 2024, "Improving LoRA in privacy-preserving federated learning")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import TAKES_RANKS, Traits
from fedsim.core.errors import require_choice
from fedsim.core.messages import ClientUpdate, RoundPlan, State, Tensors
from server.merging import mean
from server.merging._factors import factor_of, require_pairs


@dataclass(frozen=True)
class Aggregator(contracts.AdditiveAggregator):
    """Clients train B (m, r) in one round of a task and A (r, d) in the next, beside the head; what they train is averaged:

        A common:  B⁺ = Σ p_i B_i,  B⁺ A = Σ p_i B_i A      B common:  A⁺ = Σ p_i A_i,  B A⁺ = Σ p_i B A_i      p_i = n_i / Σ n

    With one factor common to all clients the mean of the other is the mean of their products: nothing is lost by averaging. It is
    LoRM without its statistics. A task begins with B: while B is zero, A has no gradient. Every round sends one factor, r·m or
    r·d numbers a layer, and the head; no more comes down, since a client has the other factor already.

    train: alternate (RoLoRA) | B (FFA-LoRA: A stays as it was drawn for the task, the same for all) | A (for
        pairs whose B does not start at zero: with `adapter: lora` nothing would be trained, and a run is refused).
    FFA-LoRA trains half of the numbers, and its authors give it a larger learning rate. The head by FedAvg [ours].
    Raises ConfigError for an adapter without pairs, AggregationError when nobody sent an update or nobody holds samples.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"train": "B"}, {"train": "A"})
    train: str = "alternate"

    def __post_init__(self) -> None:
        require_choice("train", self.train, ("alternate", "A", "B"))

    @property
    def traits(self) -> Traits:
        return Traits(gives={TAKES_RANKS})

    def init(self, params: Tensors, task: int = 0) -> State:
        require_pairs(params, "rolora")
        return {}

    def plan(self, state: State, round: int) -> RoundPlan:
        return RoundPlan(train=(f"*.lora_{factor_of(round, self.train)}", "head.*"))

    def lift(self, update: ClientUpdate) -> dict[str, Tensor]:
        return mean.lift(update.params, float(update.num_samples))

    def finish(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> tuple[State, Tensors]:
        return state, mean.finish(params, total)
