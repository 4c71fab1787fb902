"""NAME: one line that says how the head is repaired, and the paper (authors, year, "title").

Hold it against the laws of its kind, then use it:

    fedsim check ./NAME.py
    fedsim run quickstart server.calibrator=./NAME.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim import Calibrator as Base
from fedsim import ClientUpdate, RoundPlan, State, StatisticRequest, Tensors
from fedsim.core.contracts import IntArray, statistic
from fedsim.core.names import HEAD_BIAS, HEAD_WEIGHT


@dataclass(frozen=True)
class Calibrator(Base):
    """At a task's end the rows of its classes become their mean features over all clients: w_c = μ_c, b_c = −½ ‖μ_c‖².

    What is evaluated has these rows; training goes on from the head as it was. State: `rows` (C, D) and `known` (C,).
    """

    def can_be_told(self, held_KC: IntArray) -> NDArray[np.bool_]:
        told: NDArray[np.bool_] = held_KC.sum(axis=0) >= 1
        return told

    def closing(self, state: State, classes: Sequence[Sequence[int]]) -> RoundPlan:
        """What clients are asked for in a pass through the model that is deployed."""
        request = StatisticRequest("class_moments", (HEAD_WEIGHT,), {"form": "mean", "classes": list(classes[-1])})
        return RoundPlan(train=(), statistics=(request,))

    def lift(self, update: ClientUpdate) -> Tensors:
        """One client's term of the sum: counts (K,) and sums (K, D) of the task's classes."""
        count_K = statistic(update, f"class_moments.count/{HEAD_WEIGHT}").double()
        mean_HD = statistic(update, f"class_moments.mean/{HEAD_WEIGHT}").double()
        sum_KD = mean_HD.new_zeros(len(count_K), mean_HD.shape[1])
        sum_KD[count_K > 0] = count_K[count_K > 0][:, None] * mean_HD
        return {"count": count_K, "sum": sum_KD}

    def end_task(
        self, state: State, params: Tensors, total: Tensors, classes: Sequence[Sequence[int]], draw: torch.Generator
    ) -> State:
        rows_CD = state["rows"].clone() if state else torch.zeros_like(params[HEAD_WEIGHT])
        known_C = state["known"].clone() if state else torch.zeros(len(rows_CD), dtype=torch.bool)
        told_K = total["count"] > 0
        at = torch.tensor(list(classes[-1]))[told_K]
        rows_CD[at] = (total["sum"][told_K] / total["count"][told_K][:, None]).to(rows_CD.dtype)
        known_C[at] = True
        return {"rows": rows_CD, "known": known_C}

    def deployed(self, state: State, params: Tensors) -> Tensors:
        if not state:
            return params
        known_C, rows_CD = state["known"], state["rows"]
        weight_CD = torch.where(known_C[:, None], rows_CD, params[HEAD_WEIGHT])
        bias_C = torch.where(known_C, -0.5 * rows_CD.square().sum(1), params[HEAD_BIAS])
        return {**params, HEAD_WEIGHT: weight_CD, HEAD_BIAS: bias_C}
