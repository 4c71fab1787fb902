"""A fresh module per task beside the frozen ones of past tasks, and the sum of all deployed (as in PILoRA, Guo et al. 2024,
"PILoRA: Prototype guided incremental LoRA for federated class-incremental learning")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedsim.core import contracts
from fedsim.core.contracts import BESIDE, REWRITES, Past, TaskStart, Traits
from fedsim.core.messages import State, Tensors
from fedsim.core.tensors import with_prefix
from server.consolidators._pairs import require_pairs


@dataclass(frozen=True)
class Consolidator(contracts.Consolidator):
    """Δ = Σ_t B_t A_t over the T tasks so far, the current one included: one LoRA of rank T·r. The head goes on.

    Clients train the current module while those of past tasks act beside it at full weight and stay as they are. Nothing keeps
    the modules apart but what the loss says (`learners: [pilora]`). Asks for no statistics.
    The reference adds the module of the task before to the new one when it stores it, so that old modules count several times: an
    artefact that is not followed.

    keep_old_rows: the head's rows of old tasks' classes stay as they are, bit for bit (PILoRA freezes old centres).
    State: `past`, the modules of finished tasks. Raises ConfigError when the adapter is not made of LoRA pairs.
    """

    keep_old_rows: bool = False

    @property
    def traits(self) -> Traits:
        rewritten = (
            "keeps the head's rows of old tasks as they are, which {other} trains: set server.consolidator.keep_old_rows to false"
        )
        return Traits(gives={BESIDE}, refuses={REWRITES: rewritten} if self.keep_old_rows else {})

    def init(self) -> State:
        return {"past": []}

    def start_task(self, state: State, params: Tensors, fresh: Tensors, total: Tensors) -> TaskStart:
        started = {**params, **fresh}
        require_pairs(started, "sum adds up")
        return TaskStart(started, past=Past.whole(state["past"]), trains_beside=True, keeps_old_rows=self.keep_old_rows)

    def end_task(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> State:
        return {"past": [*state["past"], with_prefix(params, "adapter.")]}

    def modules(self, state: State) -> Sequence[Tensors]:
        past: Sequence[Tensors] = state["past"]
        return past

    def deployed(self, state: State, params: Tensors, finished: bool) -> Tensors:
        modules = state["past"] if finished else [*state["past"], with_prefix(params, "adapter.")]
        return {**params, **Past.whole(modules).together()}
