"""Head rows weighted by the spread of their class (the head of LIVAR, arXiv 2507.06813).

Shapes: C classes, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate, RoundPlan, State, StatisticRequest, Tensors
from fedsim.core.names import HEAD_BIAS, HEAD_WEIGHT
from fedsim.core.tensors import weighted

SPREAD = f"class_moments.spread/{HEAD_WEIGHT}"


@dataclass(frozen=True)
class Aggregator(contracts.AdditiveAggregator):
    """H⁺[c] = Σ_i ω_ic H_i[c], b⁺[c] = Σ_i ω_ic b_i[c], ω_ic = v_ic / Σ_j v_jc; every other tensor by FedAvg.

    v_ic: mean over the features of their unbiased variance in class c on client i (0 with fewer than 2 samples), under the
    client's own module, in a blend with those of past tasks where that is what is deployed. A class whose spreads are all zero
    keeps the server's row.
    Asks for `class_moments` in scalar form: 2 numbers per class. Raises AggregationError when nobody sent an update or nobody
    holds samples, and ConfigError when its tensors do not hold the head's weight.
    """

    exempt: ClassVar[Mapping[str, str]] = {"weights": "rows are weighted by the spread of their class, not by numbers of samples"}

    def init(self, params: Tensors, task: int = 0) -> State:
        if HEAD_WEIGHT not in params:
            raise ConfigError(
                f"variance_weighted weighs the rows of '{HEAD_WEIGHT}', which is not among its tensors: match \"head.*\" with it"
            )
        return {}

    def plan(self, state: State, round: int) -> RoundPlan:
        return RoundPlan(statistics=(StatisticRequest("class_moments", (HEAD_WEIGHT,), {"form": "scalar"}, blended=True),))

    def lift(self, update: ClientUpdate) -> dict[str, Tensor]:
        n = torch.tensor(float(update.num_samples), dtype=torch.float64)
        spread_C = contracts.statistic(update, SPREAD).double()
        out = {name: weighted(t, n) for name, t in update.params.items()} | {
            "num_samples": n,
            SPREAD: spread_C,
        }
        if HEAD_WEIGHT in update.params:
            out[HEAD_WEIGHT] = spread_C[:, None] * update.params[HEAD_WEIGHT].double()
        if HEAD_BIAS in update.params:
            out[HEAD_BIAS] = spread_C * update.params[HEAD_BIAS].double()
        return out

    def finish(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> tuple[State, Tensors]:
        spread_C = total[SPREAD]
        seen = spread_C > 0
        safe = torch.where(seen, spread_C, 1.0)
        out: dict[str, Tensor] = {}
        for name, old in params.items():
            if name not in total:
                out[name] = old
            elif name == HEAD_WEIGHT:
                out[name] = torch.where(seen[:, None], total[name] / safe[:, None], old.double()).to(old.dtype)
            elif name == HEAD_BIAS:
                out[name] = torch.where(seen, total[name] / safe, old.double()).to(old.dtype)
            else:
                out[name] = (total[name] / total["num_samples"]).to(old.dtype)
        return state, out
