"""One module goes on through all tasks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedsim.core import contracts
from fedsim.core.contracts import TaskStart, Traits
from fedsim.core.messages import State, Tensors


@dataclass(frozen=True)
class Consolidator(contracts.Consolidator):
    """A task starts from where the last one ended, and what is trained is deployed. Keeps no state, asks for nothing."""

    @property
    def traits(self) -> Traits:
        return Traits(gives={"one module goes on"})

    def start_task(self, state: State, params: Tensors, fresh: Tensors, total: Tensors) -> TaskStart:
        missing = {name: t for name, t in fresh.items() if name not in params}
        return TaskStart({**params, **missing} if missing else params)

    def end_task(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> State:
        return state

    def deployed(self, state: State, params: Tensors, finished: bool) -> Tensors:
        return params
