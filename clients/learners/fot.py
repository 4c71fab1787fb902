"""FOT: the server projects every round's update out of the span of old tasks' inputs (Bakman, Yaldiz, Ezzeldin, Avestimehr 2024,
"Federated orthogonal training: mitigating global catastrophic forgetting in continual federated learning", ICLR)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from clients.learners._subspaces import SpanLearner, protected
from fedsim.core.messages import State, Tensors


@dataclass(frozen=True)
class Learner(SpanLearner):
    """Clients train as they would. From the second task on the server changes what a round's merge gives, map by map:

        W ← W_before + (W_merged − W_before) (I − U Uᵀ)

    so that every trained linear map W says to inputs in span(U) what it said at the last task's end, whatever optimizer, weight
    decay or rule of merging there is. At a task's end U takes in what the new inputs use (see `_subspaces`).

    Up: at a task's end once, D · q + 1 numbers of every map (form sketch, see `_subspaces`). Down: nothing beside the model. In
    memory: nothing.

    By the paper's abstract, reviews of it and a port: with convolutions, on whose filters nothing is built here. Ours: of LoRA
    both factors are projected, each on its own inputs; what of the module is no linear map stays as the first task left it, or
    old inputs would be answered otherwise; the head is not projected (the cross-entropy leaves rows of old classes alone).

    threshold, growth: ε of the first task, and what it grows by with every task. 0 and 0: nothing is kept, it is the merge alone.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"columns": 4}, {"form": "gram", "threshold": 0.5})
    threshold: float = 0.9
    growth: float = 0.02

    def merged(self, state: State, before: Tensors, after: Tensors, taken: int, clients: int) -> tuple[State, Tensors]:
        bases = state["bases"]
        if not bases:
            return state, after
        out = {}
        for name, new in after.items():
            change = new.double() - before[name].double()
            kept = protected(name, change, bases)
            out[name] = new if kept is change else (before[name].double() + kept).to(new.dtype)
        return state, out
