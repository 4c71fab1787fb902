"""Online elastic weight consolidation (EWC): numbers that the model's answers depend on are held where they are (Kirkpatrick et
al. 2017, "Overcoming catastrophic forgetting in neural networks"; online: Schwarz et al. 2018, "Progress & compress"), with the
Fisher information summed on the server as in fed-mammoth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from clients.learners import _anchor
from fedsim.core import contracts
from fedsim.core.contracts import HOLDS_FACTORS, ClientWork, Context, LocalState, Step, Traits
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import RoundPlan, State, StatisticRequest, Tensors
from fedsim.core.tensors import without_prefix

SAMPLES = "samples"
FORMS = ("likelihood", "empirical", "expected")  # of the statistic `fisher`


@dataclass(frozen=True)
class Learner(contracts.Learner):
    """For every number θ that was trained:

        loss         adds  λ · Σ F (θ − θ*)²,   θ* what the task began with; nothing in a first task
        task's end   F ← γ F + Σ_i F_i / Σ_i n_i,   F_i summed over the n_i samples of client i (statistic `fisher`)

    F_i is of the model that is deployed at the task's end, in evaluation, sample by sample; the softmax is over the task's own
    classes, as in fed-mammoth. Where pulled, the loss has its minimum at (H + 2 λ F)⁻¹ (H a + 2 λ F θ*), for a quadratic with the
    minimum a and the second derivative H.

    Up: F_i once per task, P numbers for P that the task moved. Down: F and θ*, once per task; θ* costs nothing to who has the
    first round's parameters, of which it is a copy. In memory: nothing. The module has to go on from task to task.

    lam: λ, 0 or more; 0: nothing is asked for. gamma: γ, from 0 to 1. form: of the statistic `fisher`. λ = 1, γ = 0.9 and the
    form are fed-mammoth's (mammoth, which trains one model, has λ = 10 and γ = 1; the papers have ½ λ). Not as in these codes:
    the penalty is part of the loss, where they write its gradient into what backward adds to, so that gradient scaling of half
    precision divides it away; all rounds train, where fed-mammoth's last one does not; and F is divided by the samples that it is
    summed over, not by those of the last round.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"lam": 100.0, "gamma": 0.5, "form": "empirical"})
    lam: float = 1.0
    gamma: float = 0.9
    form: str = "likelihood"

    def __post_init__(self) -> None:
        if not self.lam >= 0:
            raise ConfigError(f"lam must not be negative, got {self.lam}")
        if not 0 <= self.gamma <= 1:
            raise ConfigError(f"gamma must be between 0 and 1, got {self.gamma}")
        require_choice("form", self.form, FORMS)

    @property
    def traits(self) -> Traits:
        other = "asks what the deployed model depends on, and {other} deploys other tensors than those that are trained"
        return Traits(needs=_anchor.NEEDS, refuses={**HOLDS_FACTORS, "other tensors deployed": other})

    # ------------------------------------------------ on the client

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        return _anchor.begin(work, context)

    def loss(self, state: LocalState, step: Step) -> Tensor | None:
        penalty = _anchor.penalty(state, step.params)
        return None if penalty is None else self.lam * penalty

    # ------------------------------------------------ on the server

    def opened(self, state: State, params: Tensors, task: int) -> State:
        return {"anchor": dict(params), "fisher": {} if state is None else state["fisher"]}

    def context(self, state: State) -> Tensors:
        return _anchor.told(state["anchor"], state["fisher"])

    def closing(self, state: State, params: Tensors) -> RoundPlan | None:
        moved = tuple(n for n, t in params.items() if not torch.equal(t, state["anchor"][n]))
        if not self.lam or not moved:
            return None
        options = {"form": self.form, "classes": "task"}
        return RoundPlan(train=(), statistics=(StatisticRequest("fisher", moved, options),))

    def lift(self, statistics: Tensors, num_samples: int) -> Tensors:
        sums = {name: t.double() for name, t in without_prefix(statistics, f"fisher.{self.form}/").items()}
        return {**sums, SAMPLES: torch.tensor(float(num_samples), dtype=torch.float64)} if sums else {}

    def closed(self, state: State, params: Tensors, total: Tensors) -> State:
        new = {name: t / total[SAMPLES] for name, t in total.items() if name != SAMPLES}
        old = {name: self.gamma * t for name, t in state["fisher"].items()}
        return state | {"fisher": old | {name: old.get(name, 0.0) + t for name, t in new.items()}}
