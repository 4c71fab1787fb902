"""A fresh module per task, and the uniform mean of all modules deployed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedsim.core import contracts
from fedsim.core.contracts import Past, TaskStart
from fedsim.core.messages import State, Tensors
from fedsim.core.tensors import with_prefix
from server.merging.mean import mean_module


@dataclass(frozen=True)
class Consolidator(contracts.Consolidator):
    """Δ = (1/T) Σ_t B_t A_t over the T tasks so far, the current one included: one LoRA of rank T·r. The head goes on.

    The modules of adapters other than LoRA (prompts) are averaged element by element. Asks for no statistics.
    State: `past`, the modules of finished tasks.
    """

    def init(self) -> State:
        return {"past": []}

    def start_task(self, state: State, params: Tensors, fresh: Tensors, total: Tensors) -> TaskStart:
        return TaskStart({**params, **fresh}, past=Past.mean(state["past"]))

    def end_task(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> State:
        return {"past": [*state["past"], with_prefix(params, "adapter.")]}

    def modules(self, state: State) -> Sequence[Tensors]:
        past: Sequence[Tensors] = state["past"]
        return past

    def deployed(self, state: State, params: Tensors, finished: bool) -> Tensors:
        return {**params, **mean_module(state["past"] if finished else [*state["past"], with_prefix(params, "adapter.")])}
