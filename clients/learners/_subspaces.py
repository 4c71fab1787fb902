"""What learners share that keep later tasks out of the span of old tasks' inputs: its bases on the server, layer by layer.

A linear map whose update is ΔW answers as before to every input x of span(U) where ΔW U = 0: rows of ΔW are projected to
ΔW (I − U Uᵀ). Of a LoRA pair both factors are such maps, A of the layer's inputs and B of A x: where neither changes what it
says to old inputs, B A x stays as it was [ours]. Once the r inputs of a B are taken up, A alone learns.

Shapes: D inputs of a map, K directions kept, U (D, K) orthonormal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import HOLDS_ON, Traits
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import RoundPlan, State, StatisticRequest, Tensors
from fedsim.core.subspace import extended, outside, root
from fedsim.core.tensors import LORA_A, LORA_B, from_upper_triangle, matching

ADAPTER = "adapter."
MAPS = tuple(f"{ADAPTER}*{kind}" for kind in (".weight", LORA_A, LORA_B))
SKETCH, GRAM = "sketch", "gram"
ENERGY, FULL = f"{SKETCH}.energy", f"{GRAM}.full"  # of what clients send, before the map's name


@dataclass(frozen=True)
class SpanLearner(contracts.Learner):
    """The server's half: at a task's end the bases are extended until they hold a share of the energy of the task's inputs.

        ε_t = min(threshold + growth · t, 1),   U ← qr [U, leading left singular vectors of (I − U Uᵀ) X]

    as many as it takes until ‖Uᵀ X‖² ≥ ε_t ‖X‖², X the inputs of all clients' samples of the task in the model that is deployed.

    form: "sketch": clients send Y_i = X_i Ω_i and ‖X_i‖², D · q + 1 numbers a map. Directions are those of the sum Y, and what
    they hold of X is estimated [ours: from columns that they were not taken from]. q directions a task are the most, and a flat
    spectrum does not come to ε_t with them. A map of less than 2 q inputs (the B of a LoRA pair) sends Σ x xᵀ, which is smaller
    there, and exact [ours]. "gram": all maps send that, D (D + 1) / 2 numbers. columns: q.
    State: `bases`, by the tensor's name, (D, K), float32, and `task`.
    """

    threshold: float
    growth: float
    form: str = SKETCH
    columns: int = 64

    def __post_init__(self) -> None:
        require_choice("form", self.form, (SKETCH, GRAM))
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold must be in [0, 1], got {self.threshold}")
        if not self.growth >= 0:
            raise ConfigError(f"growth must not be negative, got {self.growth}")
        if self.columns < 1:
            raise ConfigError(f"columns must be at least 1, got {self.columns}")

    @property
    def traits(self) -> Traits:
        return Traits(
            needs={
                "linear maps": "keeps what linear layers say to old inputs, and {adapter} trains none: use adapter: lora or full",
                "one module goes on": "protects one module that learns task after task, and {consolidator} does not leave it as "
                "it was trained: use consolidator: none",
            },
            refuses=HOLDS_ON,
        )

    def opened(self, state: State, params: Tensors, task: int) -> State:
        return {"bases": state["bases"] if state else {}, "task": task}

    def closing(self, state: State, params: Tensors) -> RoundPlan | None:
        if not self.threshold and not self.growth:
            return None
        maps = matching(params, MAPS)
        exact = [n for n in maps if self.form == GRAM or (params[n].dim() == 2 and params[n].shape[1] < 2 * self.columns)]
        others = [n for n in maps if n not in exact]
        grams = (StatisticRequest(GRAM, tuple(exact), {"form": "full"}),) if exact else ()
        sketches = (StatisticRequest(SKETCH, tuple(others), {"columns": self.columns}),) if others else ()
        return RoundPlan(train=(), statistics=(*grams, *sketches))

    def closed(self, state: State, params: Tensors, total: Tensors) -> State:
        share = min(self.threshold + self.growth * state["task"], 1.0)
        bases = dict(state["bases"])
        for key, sent in total.items():
            form, _, name = key.partition("/")
            if form == ENERGY:
                continue  # looked at beside the sketch
            exact = form == FULL
            columns_Dn, energy = (root(from_upper_triangle(sent)), None) if exact else (sent, total[f"{ENERGY}/{name}"])
            before_DK = bases.get(name, columns_Dn[:, :0])
            bases[name] = extended(before_DK, columns_Dn, share, energy).float()
        return {**state, "bases": bases}


def protected(name: str, change: Tensor, bases: Tensors) -> Tensor:
    """A tensor's change without what would answer to old inputs. What of the module is no linear map (norms, biases, embeddings)
    does not change any more, once there are bases; the head does."""
    if name in bases:
        return outside(change, bases[name].to(change))
    return torch.zeros_like(change) if bases and name.startswith(ADAPTER) else change
