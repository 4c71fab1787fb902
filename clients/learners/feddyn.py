"""FedDyn: a regulariser that moves with the clients, so that they agree on a minimum of all (Acar et al. 2021, "Federated
learning based on dynamic regularization"), both halves.

θ the server's parameters, θ_i those of client i after its steps, m clients in all, S those of a round.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import UNIFORM_MEAN, WHOLE_PAIRS, ClientWork, Context, Ending, LocalState, Step, Traits
from fedsim.core.errors import ConfigError
from fedsim.core.messages import State, Tensors
from fedsim.core.tensors import with_prefix, without_prefix

GRADIENT, TASK = "gradient/", "task"


@dataclass(frozen=True)
class Learner(contracts.Learner):
    """The loss         L_i(θ_i) − ⟨g_i, θ_i − θ⟩ + α/2 ‖θ_i − θ‖²
    the client's end    g_i ← g_i − α (θ_i − θ),   which is ∇L_i(θ_i) where the loss has come to its minimum
    the server          h ← h − α/m Σ_{i ∈ S} (θ_i − θ),   θ ← 1/|S| Σ_{i ∈ S} θ_i − h / α

    g_i, of P numbers for P that are trained, is the client's memory, and h, which is the mean of all g_i, stays on the server:
    nothing more travels. Both start at zero in every task, whose losses are others [ours: the paper has one task]. A tensor that
    is not trained in a round keeps its g_i and h. What is evaluated is the θ that the next round starts from; the paper's code
    evaluates the clients' mean beside it.

    α = 0 is FedAvg with uniform weights, where nothing is added or stored; α → 0 is not: h / α does not depend on α, and so the
    server goes the sum of all mean updates of the task once more in every round, which is long before clients are near a minimum.

    alpha: α, 0 or more (the paper's code has 0.01, divided by n_i m / n for clients of different sizes, which is not done here).
    """

    alpha: float = 0.01

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ConfigError(f"alpha must not be negative, got {self.alpha}")

    @property
    def traits(self) -> Traits:
        if not self.alpha:
            return Traits()
        uniform = "takes the uniform mean of its clients, which {aggregator} does not give: use aggregator: fairavg"
        several = "takes the uniform mean of all tensors, and server.aggregator is a list of rules: use aggregator: fairavg"
        return Traits(needs={UNIFORM_MEAN: uniform}, refuses={**WHOLE_PAIRS, "several rules": several})

    # ------------------------------------------------ on the client

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        known = memory if int(memory.get(TASK, torch.tensor(-1))) == work.task else {}
        return {"known": with_prefix(known, GRADIENT)}

    def loss(self, state: LocalState, step: Step) -> Tensor | None:
        if not self.alpha:
            return None
        gradients, terms = without_prefix(state["known"], GRADIENT), []
        for name, value in step.params.items():
            gone = value - step.start[name]
            terms.append(self.alpha / 2 * gone.square().sum())
            if name in gradients:
                terms.append(-(gradients[name] * gone).sum())
        return torch.stack(terms).sum() if terms else None

    def end(self, state: LocalState, work: ClientWork, params: Tensors, draw: torch.Generator) -> Ending:
        if not self.alpha:
            return Ending()
        known = state["known"]
        new = {
            GRADIENT + n: known.get(GRADIENT + n, torch.zeros_like(params[n])) - self.alpha * (params[n] - work.params[n])
            for n in work.trained
        }
        return Ending({**known, **new, TASK: torch.tensor(work.task)})

    # ------------------------------------------------ on the server

    def opened(self, state: State, params: Tensors, task: int) -> State:
        return {}

    def merged(self, state: State, before: Tensors, after: Tensors, taken: int, clients: int) -> tuple[State, Tensors]:
        moved = {n: t.double() - before[n].double() for n, t in after.items() if self.alpha and not torch.equal(t, before[n])}
        new = state | {n: state.get(n, 0.0) - self.alpha * taken / clients * way for n, way in moved.items()}
        return new, {**after, **{n: (after[n].double() - new[n] / self.alpha).to(after[n].dtype) for n in moved}}
