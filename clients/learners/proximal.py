"""The proximal term of FedProx (Li et al. 2020, "Federated optimization in heterogeneous networks")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import LocalState, Step
from fedsim.core.errors import ConfigError


@dataclass(frozen=True)
class Learner(contracts.Learner):
    """μ/2 · Σ ‖w − w_g‖² over the tensors being trained is added to the loss; w_g are the server's, as received.

    mu: weight of the term, 0 or more.
    """

    mu: float = 0.01

    def __post_init__(self) -> None:
        if not self.mu >= 0:
            raise ConfigError(f"mu must not be negative, got {self.mu}")

    def loss(self, state: LocalState, step: Step) -> Tensor:
        """Zero at the first step of a round."""
        squares = [(w - step.start[name].detach()).square().sum() for name, w in step.params.items()]
        return self.mu / 2 * torch.stack(squares).sum() if squares else step.logits.new_zeros(())
