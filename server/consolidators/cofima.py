"""CoFiMA: CoMA with every number weighed by its Fisher information (Marouf, Roy, Tartaglione, Lathuilière 2024, "Weighted
ensemble models are strong continual learners", ECCV)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core.errors import AggregationError, ConfigError, require_choice
from fedsim.core.messages import RoundPlan, State, StatisticRequest, Tensors
from fedsim.core.tensors import with_prefix
from server.consolidators import coma
from server.consolidators.coma import ADAPTER, averaged

FORMS = ("empirical", "likelihood", "expected")


@dataclass(frozen=True)
class Consolidator(coma.Consolidator):
    """After task t > 0, number by number: θ ← ((1 − λ) F_{t−1} θ_{t−1} + λ F_t θ_t) / ((1 − λ) F_{t−1} + λ F_t).

    F_t is the mean over all clients' samples of the task of the squared gradient of the log-likelihood, at θ_t, before the
    average; where F_{t−1} and F_t are both zero, CoMA's average is taken. Equal F give CoMA. All else is as in `coma`.

    At every task's end clients send `fisher` of the module in a pass through θ_t: as many numbers up as the module has. Sums add
    up where clients run: F is that of all data in one place. A device stores nothing.

    weight: λ. form: of the Fisher information, see the statistic. clip: F is at most that, null: no bound. The code of PILOT has
    1e-4 there, which with a small module nearly every F exceeds, and then the average is CoMA's.
    Unlike that code: F is of single samples (there the square of a batch's mean gradient), the softmax is over the task's classes
    as in training, and rows of new classes in the head are θ_t's (there they are multiplied by F_t as well, a fault).
    State: `model`, and `fisher` of the last task, float32.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"weight": 0.7, "clip": None, "form": "likelihood"})
    form: str = "empirical"
    clip: float | None = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("form", self.form, FORMS)
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"clip must be positive, or null, got {self.clip}")

    def init(self) -> State:
        return {**super().init(), "fisher": {}}

    def plan(self, state: State, params: Tensors) -> RoundPlan:
        request = StatisticRequest("fisher", (ADAPTER + "*",), {"form": self.form, "classes": "task"})
        return RoundPlan(train=(), statistics=(request,))

    def end_task(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> State:
        new = with_prefix(params, ADAPTER)
        fisher = {n: self._mean(total, n) for n in new}
        old, before, model = state["model"], state["fisher"], {}
        for n, t in new.items():
            model[n] = averaged(old[n], t, self._weight(before[n], fisher[n])) if n in old else t
        return {"model": model, "fisher": fisher}

    def _mean(self, total: Tensors, name: str) -> Tensor:
        key = f"fisher.{self.form}/{name}"
        if key not in total:
            raise AggregationError(f"no client sent '{key}': the statistics pass must reach the clients")
        mean = total[key] / total["num_samples"]
        return (mean if self.clip is None else mean.clamp_max(self.clip)).float()

    def _weight(self, old: Tensor, new: Tensor) -> Tensor:
        """Of θ_t, number by number."""
        ours, all_ = self.weight * new.double(), (1 - self.weight) * old.double() + self.weight * new.double()
        return torch.where(all_ > 0, ours / all_.clamp_min(torch.finfo(torch.float64).tiny), self.weight)
