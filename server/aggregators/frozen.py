"""Trains nothing and merges nothing: references that no training is behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import ONE_ROUND, Traits
from fedsim.core.messages import ClientUpdate, RoundPlan, State, Tensors


@dataclass(frozen=True)
class Aggregator(contracts.AdditiveAggregator):
    """w⁺ = w: clients train nothing and send nothing, in one round per task.

    With `calibrator: nearest_mean` and `adapter: none` it is the nearest class mean of the bare backbone. Raises AggregationError
    when nobody holds samples.
    """

    exempt: ClassVar[Mapping[str, str]] = {"one_client": "nothing that a client could train comes into the model"}

    @property
    def traits(self) -> Traits:
        return Traits(refuses=ONE_ROUND)

    def plan(self, state: State, round: int) -> RoundPlan:
        return RoundPlan(train=())

    def lift(self, update: ClientUpdate) -> dict[str, Tensor]:
        return {"num_samples": torch.tensor(float(update.num_samples), dtype=torch.float64)}

    def finish(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> tuple[State, Tensors]:
        return state, params
