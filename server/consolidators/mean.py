"""A fresh module per task, and the uniform mean of all modules deployed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedsim.core import contracts
from fedsim.core.messages import State, Tensors
from fedsim.core.tensors import stack_modules, with_prefix


@dataclass(frozen=True)
class Consolidator(contracts.Consolidator):
    """Δ = (1/T) Σ_t B_t A_t over the T tasks so far, the current one included: one LoRA of rank T·r. The head goes on.

    The modules of adapters other than LoRA (prompts) are averaged element by element. Asks for no statistics.
    State: `past`, the modules of finished tasks.
    """

    def init(self) -> State:
        return {"past": []}

    def start_task(self, state: State, params: Tensors, fresh: Tensors, total: Tensors) -> Tensors:
        return {**params, **fresh}

    def background(self, state: State) -> tuple[Tensors, float]:
        return mean_background(state["past"])

    def modules(self, state: State) -> Sequence[Tensors]:
        past: Sequence[Tensors] = state["past"]
        return past

    def end_task(self, state: State, params: Tensors, total: Tensors) -> State:
        return {"past": [*state["past"], with_prefix(params, "adapter.")]}

    def deployed(self, state: State, params: Tensors, finished: bool) -> Tensors:
        return {**params, **mean_module(state["past"] if finished else [*state["past"], with_prefix(params, "adapter.")])}


def mean_background(past: Sequence[Tensors]) -> tuple[Tensors, float]:
    """Past modules and the weight of the current one, all of them 1/(t + 1)."""
    if not past:
        return {}, 1.0
    share = 1 / (len(past) + 1)
    return stack_modules(past, [share] * len(past)), share


def mean_module(modules: Sequence[Tensors]) -> dict[str, Tensor]:
    """One module that acts as the uniform mean of several."""
    return stack_modules(modules, [1 / len(modules)] * len(modules))
