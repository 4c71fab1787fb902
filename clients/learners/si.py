"""Synaptic intelligence (SI): numbers that made the loss fall are held where they are (Zenke, Poole & Ganguli 2017, "Continual
learning through synaptic intelligence"), summed over clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from clients.learners import _anchor
from fedsim.core import contracts
from fedsim.core.contracts import HOLDS_FACTORS, ClientWork, Context, Ending, LocalState, Step, Traits
from fedsim.core.errors import ConfigError
from fedsim.core.messages import State, Tensors
from fedsim.core.tensors import without_prefix

PATH, SAMPLES = "path/", "samples"


@dataclass(frozen=True)
class Learner(contracts.Learner):
    """For every number θ that is trained:

        loss             adds  c · Σ Ω (θ − θ*)²,   θ* what the task began with; nothing in a first task
        client's round   w_i = Σ_steps g · (θ before the step − θ after it)
        server's round   ω ← ω + Σ_i n_i w_i / Σ_i n_i
        task's end       Ω ← max(0, Ω + ω / ((θ_end − θ*)² + ξ)),   ω ← 0

    g: the gradient before clipping, without this penalty's own part, as in the paper's code; n_i: the client's samples of the
    round. Ours is the federated form: the mean of the clients' path integrals, weighted as FedAvg weighs their tensors, so that
    one client alone is the paper's method, and the server's own way θ_end − θ* below it. Where clients pull apart they walk far
    and the server does not, and Ω comes out larger than in central training.

    Up: w_i, P numbers for P that are trained. Down: Ω and θ*, once per task; θ* costs nothing to who has the first round's
    parameters, of which it is a copy. In memory: nothing. The module has to go on from task to task.

    c: 0 or more; 0: nothing is sent. xi: ξ, above 0. The paper's code has ξ = 0.001 on split data sets and 0.1 on permuted ones,
    where c is 0.1.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"c": 0.5, "xi": 1.0})
    c: float = 0.1
    xi: float = 0.001

    def __post_init__(self) -> None:
        if not self.c >= 0:
            raise ConfigError(f"c must not be negative, got {self.c}")
        if not self.xi > 0:
            raise ConfigError(f"xi must be positive, got {self.xi}")

    @property
    def traits(self) -> Traits:
        return Traits(needs=_anchor.NEEDS, refuses=HOLDS_FACTORS)

    # ------------------------------------------------ on the client

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        path = {n: torch.zeros_like(work.params[n]) for n in work.trained if self.c}
        return {**_anchor.begin(work, context), "path": path, "before": {}}

    def loss(self, state: LocalState, step: Step) -> Tensor | None:
        penalty = _anchor.penalty(state, step.params)
        return None if penalty is None else self.c * penalty

    def corrected(self, state: LocalState, gradients: Tensors, params: Tensors) -> Tensors:
        """The gradients as they are. What is kept are copies: clipping writes into them."""
        for name in (n for n in gradients if n in state["path"]):
            value = params[name].detach()
            own = gradients[name].detach() - self.c * _anchor.pull(state, name, value)
            state["before"][name] = own, value.clone()
        return gradients

    def stepped(self, state: LocalState, params: Tensors) -> None:
        for name, (gradient, before) in state["before"].items():
            state["path"][name] += gradient * (before - params[name].detach())
        state["before"] = {}

    def end(self, state: LocalState, work: ClientWork, params: Tensors, draw: torch.Generator) -> Ending:
        return Ending(statistics={PATH + n: t for n, t in state["path"].items()})

    # ------------------------------------------------ on the server

    def opened(self, state: State, params: Tensors, task: int) -> State:
        if state is None:
            return {"anchor": dict(params), "path": {}, "importance": {}}
        importance = dict(state["importance"])
        for name, path in state["path"].items():
            moved = params[name].double() - state["anchor"][name].double()
            importance[name] = (importance.get(name, 0.0) + path / (moved.square() + self.xi)).clamp(min=0)
        return {"anchor": dict(params), "path": {}, "importance": importance}

    def context(self, state: State) -> Tensors:
        return _anchor.told(state["anchor"], state["importance"])

    def lift(self, statistics: Tensors, num_samples: int) -> Tensors:
        weighted = {name: num_samples * t.double() for name, t in statistics.items()}
        return {**weighted, SAMPLES: torch.tensor(float(num_samples), dtype=torch.float64)} if weighted else {}

    def heard(self, state: State, total: Tensors, clients: int) -> State:
        means = {name: t / total[SAMPLES] for name, t in without_prefix(total, PATH).items()}
        return state | {"path": state["path"] | {n: state["path"].get(n, 0.0) + t for n, t in means.items()}}
