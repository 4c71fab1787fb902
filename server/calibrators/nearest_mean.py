"""The nearest class mean as the head that is deployed: what features are worth without any training of a head.

Known as nearest class mean (Mensink et al. 2013) and, over a frozen backbone, as SimpleCIL (Zhou et al. 2023, arXiv:2303.07338),
which compares by cosine; here distances are Euclidean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.core import contracts
from fedsim.core.contracts import IntArray, Traits
from fedsim.core.messages import ClientUpdate, RoundPlan, State, Tensors
from fedsim.core.names import HEAD_WEIGHT
from server.calibrators._class_sums import asking, lifted, with_rows


@dataclass(frozen=True)
class Calibrator(contracts.Calibrator):
    """At a task's end: w_c = μ_c, b_c = −½ ‖μ_c‖², so that argmax_c (w_c x + b_c) = argmin_c ‖x − μ_c‖.

    μ_c = Σ x / n over all samples of the class under the model that is deployed (after the merge of tasks), summed over clients:
    it depends neither on the split nor on who is drawn, unless `server.pass_participation` says so. Classes of old tasks keep
    their sums; a class that comes again (domains) adds to its own. The head that clients train is not touched: training goes on
    from it, and within a task it is what is evaluated.

    With `adapter: none` and `aggregator: frozen` nothing is trained at all, and this is the reference of what the bare backbone
    knows, for any stream. Asks for `class_moments` in a pass at the task's end: count and mean of every class that a client has.
    State: `count` (C,) and `sum` (C, D), float64, of all classes.
    """

    def can_be_told(self, held_KC: IntArray) -> NDArray[np.bool_]:
        told: NDArray[np.bool_] = held_KC.sum(axis=0) >= 1
        return told

    @property
    def traits(self) -> Traits:
        return Traits()

    def closing(self, state: State, classes: Sequence[Sequence[int]]) -> RoundPlan:
        return asking("mean", classes[-1])

    def lift(self, update: ClientUpdate) -> Tensors:
        return lifted(update)

    def end_task(
        self, state: State, params: Tensors, total: Tensors, classes: Sequence[Sequence[int]], draw: torch.Generator
    ) -> State:
        like_CD = params[HEAD_WEIGHT].double()
        sums = state or {"count": like_CD.new_zeros(len(like_CD)), "sum": torch.zeros_like(like_CD)}
        at_K = torch.tensor(classes[-1], dtype=torch.long)
        return {name: sums[name].index_add(0, at_K, total[name]) for name in ("count", "sum")}

    def deployed(self, state: State, params: Tensors) -> Tensors:
        if not state:
            return params
        known = state["count"] > 0
        mean_RD = state["sum"][known] / state["count"][known][:, None]
        return with_rows(params, known.nonzero()[:, 0].tolist(), mean_RD, -0.5 * mean_RD.square().sum(dim=1))
