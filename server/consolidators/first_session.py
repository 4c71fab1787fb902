"""First-session adaptation: the first task trains the module, and the features stay as they are from then on (FSA, Panos et al.
2023, "First session adaptation: a strong replay-free baseline for class-incremental learning"; RanPAC and TEEN begin alike)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedsim.core import contracts
from fedsim.core.contracts import TaskStart, Traits
from fedsim.core.messages import State, Tensors


@dataclass(frozen=True)
class Consolidator(contracts.Consolidator):
    """The first task trains the module and the head; afterwards the module is frozen, and so is the head, which a calibrator
    makes from statistics at every task's end (`lda`, `ridge`, `nearest_mean`, `teen`).

    In the rounds of later tasks clients then train nothing and send nothing, and nothing is merged, whatever the aggregator: all
    that they send in such a task is what the calibrator asks for in the pass at its end (or after a round, if it works there). As
    features stay, sums that were measured in old tasks stay true. Asks for no statistics. State: the number of `tasks`.

    train_head: clients go on training the head in later tasks, on features that stay; no calibrator is needed then.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"train_head": True})
    train_head: bool = False

    @property
    def traits(self) -> Traits:
        why = (
            "freezes the head after the first task, and nobody makes one for later classes: use server.calibrator: lda, or set "
            "server.consolidator.train_head"
        )
        return Traits(needs={} if self.train_head else {"calibrator": why})

    def init(self) -> State:
        return {"tasks": 0}

    def start_task(self, state: State, params: Tensors, fresh: Tensors, total: Tensors) -> TaskStart:
        if not state["tasks"]:
            return TaskStart({**params, **fresh})
        return TaskStart(params, frozen=("adapter.*",) if self.train_head else ("*",))

    def end_task(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> State:
        return {"tasks": state["tasks"] + 1}

    def deployed(self, state: State, params: Tensors, finished: bool) -> Tensors:
        return params
