"""FedSum: clients are added up, not averaged; a baseline of published code (fed-mammoth)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import OUTSIDE_SPAN, UNIFORM_SUM, Traits, holding
from fedsim.core.errors import require_choice
from fedsim.core.messages import ClientUpdate, State, Tensors
from server.merging import mean


@dataclass(frozen=True)
class Aggregator(contracts.AdditiveAggregator):
    """w⁺ = w + Σ_i (w_i − w), or Σ_i w_i, over the clients that hold samples; tensors that nobody trained stay as they are.

    Every client counts once, whatever it holds. With N clients the step is N times that of a uniform mean: it suits clients whose
    updates have little in common.

    sum_of: delta (ours: task vectors) | weights (the code's: the tensors themselves, which grow N-fold in every round).
    threshold: keeps clients with p_i = n_i / Σ n above 1/(10 N) only, N those of the round that hold samples (the code's option
    "treshold"); then all updates are needed at once, and the rule is not additive.

    Asks for no statistics. Raises AggregationError when nobody sent an update or nobody holds samples.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"sum_of": "weights"}, {"threshold": True})

    sum_of: str = "delta"
    threshold: bool = False

    def __post_init__(self) -> None:
        require_choice("sum_of", self.sum_of, ("delta", "weights"))
        object.__setattr__(  # of this object: which laws hold depends on the options
            self,
            "exempt",
            {"weights": "every client counts once, whatever it holds", "fixed_point": "clients are added up, not averaged"},
        )

    @property
    def traits(self) -> Traits:
        words = {UNIFORM_SUM: not self.threshold, OUTSIDE_SPAN: self.sum_of == "weights"}
        return Traits(gives=holding(words))

    @property
    def additive(self) -> bool:
        return not self.threshold

    def lift(self, update: ClientUpdate) -> dict[str, Tensor]:
        return mean.lift(update.params, float(update.num_samples > 0))

    def finish(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> tuple[State, Tensors]:
        others = total[mean.WEIGHT] - 1 if self.sum_of == "delta" else 0.0
        return state, {n: (total[n] - others * t.double()).to(t.dtype) if n in total else t for n, t in params.items()}

    def combine(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        contracts.require_updates(updates)
        if self.threshold:
            samples, holders = sum(u.num_samples for u in updates), sum(u.num_samples > 0 for u in updates)
            updates = [u for u in updates if 10 * holders * u.num_samples > samples]
        return super().combine(state, params, updates, draw)
