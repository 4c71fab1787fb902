"""Keeps the sources of all tasks, every client's module and head by itself, and deploys them together (for À-la-carte Prompt
Tuning, APT, Bowman et al., 2023, arXiv:2302.07994)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import TaskStart, Traits
from fedsim.core.errors import AggregationError, ConfigError
from fedsim.core.messages import State, Tensors
from fedsim.core.names import SOURCE_CLIENT, SOURCE_TASK


@dataclass(frozen=True)
class Consolidator(contracts.Consolidator):
    """All sources of all tasks along one leading axis, task after task; the head makes one prediction of them (`head.logits`).

    Every task starts from a fresh module, and from the head that the run began with, which nobody changes: zeros. Asks for no
    statistics, has no options: how sources are weighted is up to what they carry. A source is forgotten exactly by leaving it
    out (`without`), since no other knows of it. State: `tasks`, how many there were, and `sources`, their tensors with
    `source.client` and `source.task` (S,). It grows with the number of sources, and with it the time of an evaluation.
    """

    @property
    def traits(self) -> Traits:
        merged = (
            "composes what every client learned by itself, but {aggregator} merges it: use aggregator: collect, or another "
            "consolidator"
        )
        return Traits(gives={"keeps every module"}, needs={"a module per client": merged})

    def init(self) -> State:
        return {"tasks": 0, "sources": {}}

    def start_task(self, state: State, params: Tensors, fresh: Tensors, total: Tensors) -> TaskStart:
        return TaskStart({**params, **fresh})

    def end_task(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> State:
        return {"tasks": state["tasks"] + 1, "sources": _with_task(state, params)}

    def deployed(self, state: State, params: Tensors, finished: bool) -> Tensors:
        return state["sources"] if finished else _with_task(state, params)

    def without(self, state: State, clients: Collection[int], tasks: Collection[int]) -> State:
        """Raises ConfigError if no source is left."""
        sources: Tensors = state["sources"]
        if not sources:
            return state
        gone_S = torch.tensor([c in clients and t in tasks for c, t in zip(*_origins(sources), strict=True)])
        if bool(gone_S.all()):
            raise ConfigError("without these clients and tasks no source is left to compose a model of: keep one at least")
        return {**state, "sources": {n: t[~gone_S] for n, t in sources.items()}}


def _with_task(state: State, params: Tensors) -> dict[str, Tensor]:
    """The sources so far and those of the current task."""
    if SOURCE_CLIENT not in params:
        raise AggregationError(
            f"compose takes one source per client, and '{SOURCE_CLIENT}' is not there: let the aggregator collect them"
        )
    new = {**params, SOURCE_TASK: torch.full_like(params[SOURCE_CLIENT], state["tasks"])}
    past: Tensors = state["sources"]
    return {n: torch.cat([past[n], t]) for n, t in new.items()} if past else new


def _origins(sources: Tensors) -> tuple[list[int], list[int]]:
    """Client and task of every source."""
    return sources[SOURCE_CLIENT].tolist(), sources[SOURCE_TASK].tolist()
