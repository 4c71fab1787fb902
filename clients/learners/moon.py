"""MOON: features near the round's model and away from the client's own last one (Li, He & Song 2021, "Model-contrastive federated
learning")."""

# b own samples, D features

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.config import SimConfig
from fedsim.core.contracts import HOLDS_ON, ClientWork, Context, Ending, IntArray, LocalState, Step, Traits
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.core.names import HEAD
from fedsim.core.tensors import with_prefix, without_prefix

MODEL, TASK = "model/", "task"


@dataclass(frozen=True)
class Learner(contracts.Learner):
    """Adds, over the client's own batch,

        μ · 1/b Σ_samples −log ( exp(cos(f, f_g) / τ) / (exp(cos(f, f_g) / τ) + exp(cos(f, f_p) / τ)) )

    f: the features that are trained; f_g: those of the round's model, as received; f_p: those of this client's model as it was
    when it last trained. A client that trains for the first time has none, and adds nothing (as the code does in its first
    round). Two more forward passes in a step. Nothing more travels.

    Memory: what the client trained below the head, as it was after its last step, and the `task` of it: as many bytes as it sends
    of its module, and 8. With a new task it starts anew, since a task may start from a new module, and since a model of other
    classes is no negative of this task's [ours: the paper has one task].

    Features are what goes into the head: there is no projection head, which the paper puts between the two [ours: a backbone that
    is trained already needs none, and the head stays the one that all methods have].

    mu: μ, 0 or more (the paper tunes 0.1, 1, 5, 10, and takes 5 for CIFAR-10, 1 for CIFAR-100). temperature: τ.
    """

    mu: float = 1.0
    temperature: float = 0.5

    def __post_init__(self) -> None:
        if not self.mu >= 0:
            raise ConfigError(f"mu must not be negative, got {self.mu}")
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be positive, got {self.temperature}")

    @property
    def traits(self) -> Traits:
        return Traits(refuses=HOLDS_ON)

    def suits(self, config: SimConfig, sizes_TK: IntArray) -> tuple[str, ...]:
        if config.server.rounds > 1:
            return ()
        return ("learner moon: with one round per task no client has a model of an earlier round: nothing is added to the loss",)

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        known = int(memory.get(TASK, torch.tensor(-1))) == work.task
        own = with_prefix(memory, MODEL) if known else {}
        last = {**work.params, **without_prefix(own, MODEL)} if own else None
        return {"round": work.params, "own": own, "last": last if self.mu else None}

    def loss(self, state: LocalState, step: Step) -> Tensor | None:
        if state["last"] is None:
            return None
        features_bD = step.features[step.own]
        near_b, far_b = (
            F.cosine_similarity(features_bD, step.model(state[which]).features[step.own]) / self.temperature
            for which in ("round", "last")
        )
        return self.mu * F.softplus(far_b - near_b).mean()

    def end(self, state: LocalState, work: ClientWork, params: Tensors, draw: torch.Generator) -> Ending:
        if not self.mu:
            return Ending()
        trained = {MODEL + n: params[n] for n in work.trained if not n.startswith(HEAD)}
        return Ending({**state["own"], **trained, TASK: torch.tensor(work.task)})
