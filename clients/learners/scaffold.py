"""SCAFFOLD: control variates against the drift of clients (Karimireddy et al. 2020, "SCAFFOLD: Stochastic controlled averaging
for federated learning"), Option II, both halves.

x the parameters of the server, y_i those of client i, K its steps, η its learning rate, N clients in all, S those of a round.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clients.optim import group_of
from fedsim.core import contracts
from fedsim.core.config import ClientConfig, SimConfig
from fedsim.core.contracts import HOLDS_FACTORS, OWN, WHOLE_PAIRS, ClientWork, Context, Ending, IntArray, LocalState, Traits
from fedsim.core.errors import ConfigError
from fedsim.core.messages import State, Tensors
from fedsim.core.tensors import with_prefix

CONTROL, TASK = "control/", "task"


@dataclass(frozen=True)
class Learner(contracts.Learner):
    """Every step   y_i ← y_i − η (g_i(y_i) − c_i + c)
    at the end      c_i⁺ = c_i − c + (x − y_i) / (K η),   sends Δc_i = c_i⁺ − c_i
    the server      c ← c + Σ_{i ∈ S} Δc_i / N

    c_i, the client's control variate, is its memory; c, the server's, is its context: 2 P numbers up and 2 P down, for P that are
    trained. How the y_i are merged is the rule's business: the paper takes their uniform mean (aggregator: fairavg). With plain
    SGD c_i⁺ is the mean of the client's gradients along its path, and with all clients in every round c is the mean of all c_i.
    All control variates start at zero in every task, since a task may start from a new module [ours: the paper has one task].
    A tensor that is not trained in a round keeps its control variates. A client without samples keeps its own.

    η is `client.lr`, or that of the tensor's group. It stands for the true step with plain SGD only: with momentum, another
    optimizer, weight decay or clipped gradients the update is a heuristic, and the run says so. Raises ConfigError for a schedule
    of learning rates, of which there is no one η.
    """

    @property
    def traits(self) -> Traits:
        return Traits(refuses={**HOLDS_FACTORS, **WHOLE_PAIRS})

    def suits(self, config: SimConfig, sizes_TK: IntArray) -> tuple[str, ...]:
        client = config.client
        if client.schedule is not None:
            raise ConfigError(
                "learner scaffold divides by the learning rate, and client.schedule changes it from step to step: set it to null"
            )
        odd = _not_plain_sgd(client)
        return () if odd is None else (f"learner scaffold: {odd}, so that control variates are no mean gradients: a heuristic",)

    # ------------------------------------------------ on the client

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        known = memory if int(memory.get(TASK, torch.tensor(-1))) == work.task else {}
        zeros = {n: torch.zeros_like(t) for n, t in work.params.items()}
        own, common = ({n: side.get(CONTROL + n, zeros[n]) for n in work.trained} for side in (known, context[OWN]))
        correction = {n: common[n] - own[n] for n in work.trained}
        return {"own": own, "correction": correction, "others": with_prefix(known, CONTROL)}

    def corrected(self, state: LocalState, gradients: Tensors, params: Tensors) -> Tensors:
        return {n: g + state["correction"][n] for n, g in gradients.items()}

    def end(self, state: LocalState, work: ClientWork, params: Tensors, draw: torch.Generator) -> Ending:
        client, memory, change = work.config.client, dict(state["others"]), {}
        for name, own in state["own"].items():
            path = (work.params[name] - params[name]) / (work.steps * _rate(client, name))
            memory[CONTROL + name] = path - state["correction"][name]
            change[CONTROL + name] = memory[CONTROL + name] - own
        return Ending({**memory, TASK: torch.tensor(work.task)}, change)

    # ------------------------------------------------ on the server

    def opened(self, state: State, params: Tensors, task: int) -> State:
        return {}

    def context(self, state: State) -> Tensors:
        return {name: c.float() for name, c in state.items()}

    def heard(self, state: State, total: Tensors, clients: int) -> State:
        return state | {name: state.get(name, 0.0) + change / clients for name, change in total.items()}


def _rate(client: ClientConfig, name: str) -> float:
    """The learning rate of a tensor."""
    place = group_of(client, name)
    own = client.groups[place].lr if place < len(client.groups) else None
    return client.lr if own is None else own


def _not_plain_sgd(client: ClientConfig) -> str | None:
    if client.optimizer.lower() != "sgd":
        return f"client.optimizer is {client.optimizer}"
    odd = [k for k in ("momentum", "dampening", "nesterov", "maximize") if client.optimizer_options.get(k)]
    if odd:
        return f"client.optimizer_options.{odd[0]} is set"
    if client.weight_decay or any(group.weight_decay for group in client.groups):
        return "there is weight decay"
    return "client.clip_norm is set" if client.clip_norm is not None else None
