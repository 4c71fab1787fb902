"""NAME: one line that says how tasks are merged, and the paper (authors, year, "title").

Hold it against the laws of its kind, then use it:

    fedsim check ./NAME.py
    fedsim run quickstart server.consolidator=./NAME.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedsim import Consolidator as Base
from fedsim import State, TaskStart, Tensors
from fedsim.core.contracts import Past
from fedsim.core.tensors import stack_modules, with_prefix


@dataclass(frozen=True)
class Consolidator(Base):
    """A fresh module for every task, and their uniform mean deployed. State: `past`, the modules of finished tasks."""

    def init(self) -> State:
        return {"past": []}

    def start_task(self, state: State, params: Tensors, fresh: Tensors, total: Tensors) -> TaskStart:
        """What clients start from. `fresh`: a newly drawn module; leave it out to go on with the one there is."""
        return TaskStart({**params, **fresh}, past=Past.mean(state["past"]))

    def end_task(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> State:
        return {"past": [*state["past"], with_prefix(params, "adapter.")]}

    def deployed(self, state: State, params: Tensors, finished: bool) -> Tensors:
        """What is evaluated, within a task (finished False) and at its end. LoRA pairs are stacked: their sum is exact."""
        modules = state["past"] if finished else [*state["past"], with_prefix(params, "adapter.")]
        return {**params, **stack_modules(modules, [1 / len(modules)] * len(modules))}
