"""GPM, gradient projection memory: clients take no step that old tasks' inputs would notice (Saha, Garg, Roy 2021, "Gradient
projection memory for continual learning", ICLR)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from clients.learners._subspaces import SpanLearner, protected
from fedsim.core.config import SimConfig
from fedsim.core.contracts import OUTSIDE_SPAN, OWN, WHOLE_PAIRS, ClientWork, Context, IntArray, LocalState, Traits
from fedsim.core.errors import require_choice
from fedsim.core.messages import State, Tensors

GRADIENTS, STEPS = "gradients", "steps"


@dataclass(frozen=True)
class Learner(SpanLearner):
    """From the second task on, of every trained linear map with bases U of old inputs (see `_subspaces`):

        project gradients   g ← g (I − U Uᵀ) before the optimizer sees it, as published, for SGD
        project steps       W ← W_received + (W − W_received) (I − U Uᵀ) after every step: exact with any optimizer [ours]

    An optimizer that scales every number by itself (Adam), and weight decay, lead gradients' steps out of the free directions;
    `project: steps` does not let them. What of the module is no linear map (norms, biases) stays as the first task left it
    [ours]; rows of old classes in the head are left alone by the cross-entropy.

    The average of clients that kept to the free directions keeps to them too. Rules that do not average them (lorm and regmean,
    which solve for a module, fedadam, medians), and channels that treat numbers unlike (quantise, topk), leave these directions,
    and the run says so: there `fot`, which projects on the server, holds what this one does not.

    Down: the bases, D · K numbers of every map, once per task. Up: at a task's end once, what the bases are made of. In memory:
    nothing. The paper takes the inputs of some hundred samples on one machine; here they are those of all clients' [ours].

    threshold, growth: ε of the first task, and what it grows by with every task (0.97 and 0.003 in the code, on CIFAR-100).
    0 and 0: nothing is projected. project: gradients | steps.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"columns": 4}, {"form": "gram", "threshold": 0.5, "project": STEPS})
    threshold: float = 0.97
    growth: float = 0.003
    project: str = GRADIENTS

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("project", self.project, (GRADIENTS, STEPS))

    @property
    def traits(self) -> Traits:
        shared = super().traits
        leaves = "keeps clients' steps to the free directions, which {other} leaves: use fot, which projects on the server"
        minds = dict.fromkeys((OUTSIDE_SPAN, "rule remembers tasks"), leaves) if self.threshold or self.growth else {}
        return replace(shared, refuses={**shared.refuses, **WHOLE_PAIRS}, minds=minds)

    def suits(self, config: SimConfig, sizes_TK: IntArray) -> tuple[str, ...]:
        client = config.client
        decays = client.weight_decay or any(group.weight_decay for group in client.groups)
        if self.project == STEPS or (client.optimizer.lower() == "sgd" and not decays):
            return ()
        why = "there is weight decay" if client.optimizer.lower() == "sgd" else f"client.optimizer is {client.optimizer}"
        return (f"learner gpm projects gradients, but {why}: steps leave the free directions. Use project: steps, or plain sgd",)

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        return {"bases": context[OWN], "start": work.params}

    def corrected(self, state: LocalState, gradients: Tensors, params: Tensors) -> Tensors:
        if self.project == STEPS:
            return gradients
        return {name: protected(name, g, state["bases"]) for name, g in gradients.items()}

    @torch.no_grad()
    def stepped(self, state: LocalState, params: Tensors) -> None:
        if self.project == STEPS and state["bases"]:
            for name, tensor in params.items():
                start = state["start"][name]
                change = tensor - start
                kept = protected(name, change, state["bases"])
                if kept is not change:
                    tensor.copy_(start + kept)

    def context(self, state: State) -> Tensors:
        bases: Tensors = state["bases"]
        return bases
