"""RegMean over tasks, in low-rank form (the cross-task merge of LoRM, Salami et al. 2025).

Shapes: T tasks, O outputs, I inputs, R rank (A_RI, B_OR, gram_II).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import Past, TaskStart
from fedsim.core.errors import AggregationError
from fedsim.core.messages import RoundPlan, State, Tensors
from fedsim.core.tensors import LORA_A, LORA_B, lora_layers, with_prefix
from server.consolidators._pairs import require_pairs
from server.merging.mean import mean_module
from server.merging.regmean import gram_request, require_in_unit, resolve_form, stacked_factors


@dataclass(frozen=True)
class Consolidator(contracts.Consolidator):
    """Δ = Σ_t B_t (A_t G_t Q⁺), Q = Σ_t G_t: minimises Σ_t ‖(Δ − B_t A_t) X_t‖². One LoRA of rank T·r; no m×d matrix is formed.

    Every task trains a fresh module on the pretrained backbone; the head goes on. G_t = Σ_i Ĝ_i, off-diagonals × decay, from
    a statistics pass at the task's end through the mean of all modules so far. After the first task Δ is B_0 A_0 as it is;
    during a task the uniform mean of past modules and the current one is deployed. Inputs that no task has get Δ = 0.
    Asks for `gram` of the layers' inputs: d numbers a layer in the diagonal form, d(d+1)/2 in the full one.

    decay: of the off-diagonals, in [0, 1]. form: full | diagonal | auto (diagonal when decay is 0).
    State: `past` modules and their `grams` (float64). Raises ConfigError when the adapter is not made of LoRA pairs, and
    AggregationError when nobody sent statistics.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"decay": 0.5}, {"form": "full"})
    decay: float = 0.0
    form: str = "auto"

    def __post_init__(self) -> None:
        resolve_form(self.form, self.decay)
        require_in_unit("decay", self.decay)

    def init(self) -> State:
        return {"past": [], "grams": []}

    def start_task(self, state: State, params: Tensors, fresh: Tensors, total: Tensors) -> TaskStart:
        merged = {**params, **fresh}
        require_pairs(merged, "regmean merges")
        return TaskStart(merged, past=Past.mean(state["past"]))

    def plan(self, state: State, params: Tensors) -> RoundPlan:
        request = gram_request(("*" + LORA_A,), resolve_form(self.form, self.decay), self.decay, blended=True)
        return RoundPlan(train=(), statistics=(request,))

    def end_task(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> State:
        form = resolve_form(self.form, self.decay)
        grams = {p: _sent(total, f"gram.{form}/{p}{LORA_A}") for p in lora_layers(params)}
        return {"past": [*state["past"], with_prefix(params, "adapter.")], "grams": [*state["grams"], grams]}

    def modules(self, state: State) -> Sequence[Tensors]:
        past: Sequence[Tensors] = state["past"]
        return past

    def deployed(self, state: State, params: Tensors, finished: bool) -> Tensors:
        past: list[Tensors] = state["past"]
        if not finished:
            return {**params, **mean_module([*past, with_prefix(params, "adapter.")])}
        if len(past) == 1:
            return {**params, **past[0]}
        out = dict(params)
        for p in lora_layers(past[0]):
            grams = [task[p] for task in state["grams"]]
            out[p + LORA_A] = stacked_factors([module[p + LORA_A] for module in past], grams)
            out[p + LORA_B] = torch.cat([module[p + LORA_B] for module in past], dim=1)
        return out


def _sent(total: Tensors, key: str) -> Tensor:
    if key not in total:
        raise AggregationError(f"no client sent '{key}': the statistics pass at the task's end must reach the clients")
    return total[key]
