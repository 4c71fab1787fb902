"""FairAvg: every participant counts the same (Michieli & Ozay 2021, "Are all users treated fairly in federated learning
systems?")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import TAKES_RANKS, UNIFORM_MEAN, UNIFORM_SUM, Traits
from fedsim.core.messages import ClientUpdate, State, Tensors
from server.merging import mean


@dataclass(frozen=True)
class Aggregator(contracts.AdditiveAggregator):
    """w⁺ = (1/N) Σ w_i over the N clients that hold samples; tensors that nobody trained stay as they are.

    Asks for no statistics. Raises AggregationError when nobody sent an update or nobody holds samples.
    """

    exempt: ClassVar[Mapping[str, str]] = {"weights": "every client counts once, whatever the number of its samples"}

    @property
    def traits(self) -> Traits:
        return Traits(gives={UNIFORM_SUM, UNIFORM_MEAN, TAKES_RANKS})

    def lift(self, update: ClientUpdate) -> dict[str, Tensor]:
        return mean.lift(update.params, float(update.num_samples > 0))

    def finish(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> tuple[State, Tensors]:
        return state, mean.finish(params, total)
