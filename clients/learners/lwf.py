"""Learning without forgetting (LwF): the last task's model teaches its classes (Li & Hoiem 2016, "Learning without forgetting");
in federated form as in fed-mammoth, and with sigmoids as the LwF.MC of Rebuffi et al. 2017 ("iCaRL")."""

# b own samples, C classes (head rows)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from clients.learners import _teacher
from fedsim.core import contracts
from fedsim.core.config import SimConfig
from fedsim.core.contracts import ClientWork, Context, IntArray, LocalState, Step, Traits
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import Tensors

SOFTMAX, SIGMOIDS = "softmax", "sigmoids"
OLD, TASK = "old", "task"


@dataclass(frozen=True)
class Learner(contracts.Learner):
    """From the second task on, the logits z of the client's own batch follow those of the teacher, t: the model that the last
    task's end deployed.

        softmax    adds  α · 1/b Σ_samples −Σ_c softmax(t / T)_c · log softmax(z / T)_c,   over the classes of earlier tasks
        sigmoids   in place of the cross-entropy, from the first task on: the mean over samples and all classes seen of the binary
                   cross-entropy of σ(z_c), with the label as target for the task's classes and σ(t_c) for those of earlier tasks

    Down: the teacher, once per task to a client that does not have it (with a module that goes on it is the first round's
    parameters, which cost nothing more). Up and in memory: nothing.

    The softmax form is fed-mammoth's: no factor T². Where a task brings no new class (domain_incremental) it is over all classes
    [ours], and sigmoids are refused, since no class is left for the labels.

    form: softmax | sigmoids.
    alpha: α, 0 or more; 0: no teacher is sent. temperature: T. Both belong to the softmax form. classes: "old", those of earlier
    tasks; "task": the current task's own, as in fed-mammoth's code, which so distils what the teacher has not learned yet.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"classes": "task", "temperature": 1.0}, {"form": "sigmoids"})
    alpha: float = 0.5
    temperature: float = 2.0
    form: str = SOFTMAX
    classes: str = OLD

    def __post_init__(self) -> None:
        require_choice("form", self.form, (SOFTMAX, SIGMOIDS))
        require_choice("classes", self.classes, (OLD, TASK))
        if not self.alpha >= 0:
            raise ConfigError(f"alpha must not be negative, got {self.alpha}")
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be positive, got {self.temperature}")

    @property
    def traits(self) -> Traits:
        if self.form == SIGMOIDS:
            return Traits({contracts.ONE_CLASS, contracts.REWRITES}, {contracts.CROSS_ENTROPY}, needs=_teacher.NEEDS)
        return Traits({contracts.REWRITES}, needs=_teacher.NEEDS) if self.alpha else Traits()

    def suits(self, config: SimConfig, sizes_TK: IntArray) -> tuple[str, ...]:
        if self.form == SIGMOIDS and config.stream.name == "domain_incremental":
            raise ConfigError(
                "learner lwf with sigmoids has the teacher's word for classes of earlier tasks, and with domain_incremental "
                "these are all: use form: softmax"
            )
        return ()

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        return {"teacher": _teacher.teacher(context) if self.traits.needs else None}

    def loss(self, state: LocalState, step: Step) -> Tensor | None:
        teacher, logits_bC = state["teacher"], step.logits[step.own]
        taught_bC = None if teacher is None else step.model(teacher).logits[step.own]
        if self.form == SIGMOIDS:
            return _teacher.sigmoid_distillation(logits_bC, step.labels[step.own], taught_bC, step.classes, step.seen)
        if taught_bC is None:
            return None
        chosen = step.classes if self.classes == TASK else _teacher.old_classes(step.classes, step.seen)
        return self.alpha * _teacher.distillation(logits_bC, taught_bC, chosen, self.temperature)
