"""FedRS: a restricted softmax for classes that a client does not hold (Li & Zhan 2021, "FedRS: Federated learning with restricted
softmax for label distribution non-IID data")."""

# b own samples, S classes of the task

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import ClientWork, Context, LocalState, Step, Traits
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.models.logits import masked, masked_cross_entropy


@dataclass(frozen=True)
class Learner(contracts.Learner):
    """The cross-entropy, in which the logits of classes that the client holds no sample of are scaled down:

        L = −1/b Σ log softmax(a ⊙ z)[y],   a_c = 1 for classes of the client's samples in this round, else α

    over the task's own classes, as the cross-entropy here. The gradient that pushes away the head's rows of absent classes is α
    times smaller. α = 1 is the cross-entropy, bit for bit; so is any α for a client that holds all classes. At α = 0 absent rows
    get no gradient, but they stay in the softmax with a logit of 0, as in the paper. Nothing travels and nothing is stored.

    alpha: α, from 0 to 1 (the paper tries several, 0.5 is its middle way); null: absent classes are left out of the softmax
    [ours], so that nothing is learned from a client that holds one class.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"alpha": None})
    alpha: float | None = 0.5

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha must be between 0 and 1, or null, got {self.alpha}")

    @property
    def traits(self) -> Traits:
        return Traits(takes={contracts.CROSS_ENTROPY})

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        held = set(work.labels(work.shard).tolist())
        return {"held": [c for c in work.classes if c in held]}

    def loss(self, state: LocalState, step: Step) -> Tensor:
        held, logits_bC, labels_b = state["held"], step.logits[step.own], step.labels[step.own]
        if self.alpha is None:
            return masked_cross_entropy(logits_bC, labels_b, held)
        if self.alpha == 1 or len(held) == len(step.classes):
            return masked_cross_entropy(logits_bC, labels_b, step.classes)
        if "scale_S" not in state:
            present = set(held)
            state["scale_S"] = logits_bC.new_tensor([1.0 if c in present else self.alpha for c in step.classes])
        logits_bS, places_b = masked(logits_bC, labels_b, step.classes)
        return F.cross_entropy(logits_bS * state["scale_S"], places_b)
