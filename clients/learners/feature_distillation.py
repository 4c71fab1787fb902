"""Feature distillation: features stay where the last task's model had them (Jung et al. 2016, "Less-forgetting learning in deep
neural networks"; of unit vectors: Hou et al. 2019, "Learning a unified classifier incrementally via rebalancing", LUCIR)."""

# b own samples, D features

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clients.learners import _teacher
from fedsim.core import contracts
from fedsim.core.contracts import ClientWork, Context, LocalState, Step, Traits
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors


@dataclass(frozen=True)
class Learner(contracts.Learner):
    """From the second task on, adds   α · 1/b Σ_samples ‖f − f_t‖²   over the client's own batch: f its features, f_t those that
    the model of the last task's end makes of the same inputs. The head is left alone. Where features are normalised, both are
    scaled to length one, and a sample's term is 2 (1 − cos(f, f_t)).

    Down: the teacher, once per task to a client that does not have it (with a module that goes on it is the first round's
    parameters, which cost nothing more). Up and in memory: nothing.

    alpha: α, 0 or more; 0: no teacher is sent. normalised: as above. Both defaults are ours: LUCIR's weight grows with the number
    of old classes over new ones, and it takes 1 − cos, half of what is here.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"normalised": False, "alpha": 0.1})
    alpha: float = 1.0
    normalised: bool = True

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ConfigError(f"alpha must not be negative, got {self.alpha}")

    @property
    def traits(self) -> Traits:
        composed = (
            "compares features with one model's, but what {other} deploys are the clients' models side by side: use another "
            "aggregator"
        )
        return Traits(needs=_teacher.NEEDS if self.alpha else {}, refuses={"a module per client": composed})

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        return {"teacher": _teacher.teacher(context) if self.alpha else None}

    def loss(self, state: LocalState, step: Step) -> Tensor | None:
        if state["teacher"] is None:
            return None
        ours_bD, theirs_bD = (features[step.own] for features in (step.features, step.model(state["teacher"]).features))
        if self.normalised:
            ours_bD, theirs_bD = F.normalize(ours_bD, dim=1), F.normalize(theirs_bD, dim=1)
        return self.alpha * (ours_bD - theirs_bD).square().sum(dim=1).mean()
