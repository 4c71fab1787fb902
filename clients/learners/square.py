"""The rescaled square loss of TMC (Liu & Soatto 2023, "Tangent Model Composition for Ensembling and Continual Fine-tuning",
arXiv:2307.08114)."""

# b samples, C classes (head rows), S classes that are kept

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import LocalState, Step, Traits
from fedsim.core.errors import ConfigError
from fedsim.models.logits import masked

TASK, ALL = "task", "all"


@dataclass(frozen=True)
class Learner(contracts.Learner):
    """The mean over samples and classes of `(z − κ·onehot(y))²`, in place of the cross-entropy.

    On a model that is linear in its weights this is least squares, and a sum of such models is again of that kind: averaging
    scales all logits alike, where logits of cross-entropy have no scale that they agree on. The loss is of the size of κ².

    kappa: κ, the logit of the right class (published: 15 for class-incremental streams, 5 for data-incremental ones);
    classes: "task", the logits of the task's classes alone, as the cross-entropy here; "all", those of all classes of the stream.
    The published code takes all, and every component of a composition has its own head; one head that goes on over the tasks
    forgets its old rows that way.
    """

    kappa: float = 15.0
    classes: str = TASK

    def __post_init__(self) -> None:
        if not self.kappa > 0:
            raise ConfigError(f"kappa must be positive, got {self.kappa}")
        if self.classes not in (TASK, ALL):
            raise ConfigError(f"classes must be '{TASK}' or '{ALL}', got '{self.classes}'")

    @property
    def traits(self) -> Traits:
        gives = {contracts.ONE_CLASS, contracts.REWRITES} if self.classes == ALL else {contracts.ONE_CLASS}
        return Traits(gives, {contracts.CROSS_ENTROPY})

    def loss(self, state: LocalState, step: Step) -> Tensor:
        """Over the client's own part of the batch. A label that is none of the task's classes is an error of torch."""
        chosen = range(step.logits.shape[1]) if self.classes == ALL else step.classes
        logits_bS, places_b = masked(step.logits[step.own], step.labels[step.own], chosen)
        wanted_bS = F.one_hot(places_b, logits_bS.shape[1]).to(logits_bS.dtype)
        return F.mse_loss(logits_bS, self.kappa * wanted_bS)
