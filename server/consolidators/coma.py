"""CoMA: the model after a task is averaged with the one before it (Marouf, Roy, Tartaglione, Lathuilière 2024, "Weighted ensemble
models are strong continual learners", ECCV)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import HOLDS_FACTORS, TaskStart, Traits
from fedsim.core.errors import ConfigError
from fedsim.core.messages import State, Tensors
from fedsim.core.tensors import with_prefix

ADAPTER = "adapter."


@dataclass(frozen=True)
class Consolidator(contracts.Consolidator):
    """After task t > 0, number by number: θ ← (1 − λ) θ_{t−1} + λ θ_t, on the server.

    θ_{t−1} is what the last task ended with, itself an average, and θ_t what training made of it. The average is deployed, and
    the next task trains on from it. λ = 1 keeps θ_t and is the consolidator `none`, λ = 0 goes back to θ_{t−1}.

    Averaged is the module, `adapter.*`: with `adapter: full` the whole backbone, as in the paper. Of LoRA pairs the factors are
    averaged, not their products [ours]: the next task needs a module of the same rank. The head is as it was trained: rows of the
    task's classes are θ_t's, and the cross-entropy, which is over the task's own classes, leaves those of old classes alone.
    Nothing travels for it, nothing is stored by clients. Goes with SLCA, on which the paper builds it (see the preset).

    weight: λ; 0.4 in the code of PILOT. State: `model`, the tensors of the last average; empty before the first task's end.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"weight": 1.0})
    weight: float = 0.4

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ConfigError(f"weight must be in [0, 1], got {self.weight}")

    @property
    def traits(self) -> Traits:
        onward = (
            "trains on from an average, in which the part of a client is no task vector to subtract: leave out "
            "server.unlearning, or use another consolidator, such as none"
        )
        return Traits(refuses={**HOLDS_FACTORS, "unlearning": onward})

    def init(self) -> State:
        return {"model": {}}

    def start_task(self, state: State, params: Tensors, fresh: Tensors, total: Tensors) -> TaskStart:
        missing = {name: t for name, t in fresh.items() if name not in params}
        return TaskStart({**params, **missing, **state["model"]})

    def end_task(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> State:
        old, new = state["model"], with_prefix(params, ADAPTER)
        return {"model": {n: averaged(old[n], t, self.weight) if n in old else t for n, t in new.items()}}

    def deployed(self, state: State, params: Tensors, finished: bool) -> Tensors:
        return {**params, **state["model"]} if finished else params


def averaged(old: Tensor, new: Tensor, weight: Tensor | float) -> Tensor:
    """(1 − w) old + w new, in float64; for w = 0 and w = 1 the bits of the one and of the other."""
    return ((1 - weight) * old.double() + weight * new.double()).to(new.dtype)
