"""DOLFIN: one LoRA per task, orthogonal to what old tasks used (after arXiv:2510.13567; InfLoRA's design, Liang & Li 2024).

Shapes: D inputs of a layer, O outputs, R rank (A_RD, B_OR, gram_DD = Σ x xᵀ), K directions that old tasks keep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import BESIDE, REWRITES, Opening, Past, TaskStart, Traits
from fedsim.core.errors import AggregationError, ConfigError, require_choice
from fedsim.core.messages import RoundPlan, State, StatisticRequest, Tensors
from fedsim.core.tensors import LORA_A, LORA_B, from_upper_triangle, lora_layers, matching, with_prefix
from server import gpm
from server.consolidators._pairs import require_pairs
from server.gpm import InputSpan

GRAM = "gram.full/"
USUAL_TASKS = 10  # of T where nobody says how many there are
SHARED = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))


@dataclass(frozen=True)
class Consolidator(contracts.Consolidator):
    """W_t = W + Σ_{s<t} B_s D_s + B_t D_t: D_t is fixed at a task's start with D_t M = 0, M the span of old inputs; B_t trains.

    A layer thus answers as before to every input in span(M), whatever B_t is, and FedAvg of B_t is FedAvg of the products, as
    D_t is common to all clients. Old tasks' modules stay as they are and act at full weight, in training too; the head's rows of
    their classes are frozen. All is deployed as one LoRA of rank T·r. What is held exactly is span(M): it has the share ε of the
    energy of old inputs, not all of it, and behind the first layers inputs of old data drift through what M left out.

    Start: H = Σ x xᵀ over the new task's inputs through all past modules; D_t = U[:, :r]ᵀ/√3, U the left singular vectors of H
    without its part in span(M). Where H leaves fewer than r of them with energy, other free directions fill up D_t.
    End: DualGPM. H anew, through the trained model; M takes singular vectors until it holds ε_t = ε_0 + (ε_1 − ε_0)·t/T of
    ‖H‖²_F (T and the first t of `tasks`). Above D/2 columns the complement is stored in its place, see `server.gpm`.

    Asks for `gram` (full) of the layers' inputs at every task's start and end: D(D+1)/2 numbers a layer, those that share their
    inputs counted once. Sums over clients decide D_t and M: exactly as if all data were in one place, as long as all clients take
    part in these passes (`server.pass_participation: all`, the default), whoever is drawn for the rounds.

    threshold, threshold_end, tasks: ε_0, ε_1 and T, the number of tasks over which the one rises towards the other (null: 10, for
        a stream of as many as its data have). Energies are squares of second moments, so inputs with a large mean reach ε with a
        few directions.
    guarantee: False keeps one vector less at the first task, as the code of InfLoRA does: less than ε_0 of the energy.
    when_full: error | shrink (use the free directions there are, the rest of D_t is zero) when fewer than r are free.
    shared_inputs: names of layers (globs) that get the same inputs where one module holds them. A wrong entry voids D_t M = 0.

    State: `task`, `past` (a list of modules), `spans` per layer (float64). Raises ConfigError when the adapter is not made of
    LoRA pairs or no direction is left, and AggregationError when nobody sent statistics.

    Sources: the method by the paper's abstract and a review of it; D_t and DualGPM by the published code of InfLoRA. Ours: the
    sum of second moments over clients. Clients could also send a few scaled singular vectors, which is not exact, or each keep
    an M and a D_t of its own, which makes an average of B_t meaningless: neither is built. That code, where the first task fills
    half of the space, goes on with the used directions as if they were the free ones; here the free ones are taken. Where a
    threshold is met exactly, its `retain` takes one vector more (at ε = 1, all).
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"threshold": 0.4, "threshold_end": 0.6, "when_full": "shrink"},
        {"threshold": 0.4, "threshold_end": 0.5, "when_full": "shrink", "guarantee": False, "tasks": 3},
    )
    threshold: float = 0.95
    threshold_end: float = 1.0
    tasks: int | None = USUAL_TASKS
    guarantee: bool = True
    when_full: str = "error"
    shared_inputs: list[list[str]] = field(default_factory=lambda: [list(names) for names in SHARED])

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= self.threshold_end <= 1:
            raise ConfigError(
                f"threshold and threshold_end must be in (0, 1], the end not below the start, got {self.threshold} and "
                f"{self.threshold_end}"
            )
        if self.tasks is not None and self.tasks < 1:
            raise ConfigError(f"tasks must be at least 1, got {self.tasks}")
        require_choice("when_full", self.when_full, ("error", "shrink"))

    @property
    def traits(self) -> Traits:
        rewritten = (
            "keeps the head's rows of old tasks as they are, which {other} trains: let that train the current task's classes "
            "only, or use another consolidator, such as sum"
        )
        return Traits(gives={BESIDE}, refuses={REWRITES: rewritten})

    def init(self) -> State:
        return {"task": 0, "past": [], "spans": {}}

    def opening(self, state: State, params: Tensors) -> Opening:
        # The last task's module is among those of the past already: `params` holds it still, so it gets no weight of its own.
        return Opening(self.plan(state, params), Past.whole(state["past"], share=0.0))

    def start_task(self, state: State, params: Tensors, fresh: Tensors, total: Tensors) -> TaskStart:
        started = {**params, **fresh}
        require_pairs(started, "dolfin designs")
        _require_rank(started)
        for first, layers in self._groups(started).items():
            span = _span(state, first, started[first + LORA_A])
            for p in layers:
                self._require_room(state["task"], p, started[p + LORA_A], span)
            directions_RD = self._directions(span, first, total, max(len(started[p + LORA_A]) for p in layers))
            for p in layers:
                started[p + LORA_A] = _first_rows(directions_RD, started[p + LORA_A])
                started[p + LORA_B] = torch.zeros_like(started[p + LORA_B])
        frozen, past = ("adapter.*" + LORA_A,), Past.whole(state["past"])
        return TaskStart(started, frozen, past, trains_beside=True, keeps_old_rows=True)

    def plan(self, state: State, params: Tensors) -> RoundPlan:
        subjects = tuple(first + LORA_A for first in self._groups(params))
        return RoundPlan(train=(), statistics=(StatisticRequest("gram", subjects, {"form": "full", "decay": 1.0}, blended=True),))

    def end_task(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> State:
        task: int = state["task"]
        threshold = self.threshold + (self.threshold_end - self.threshold) * min(task / (self.tasks or USUAL_TASKS), 1.0)
        spans = {}
        for first in self._groups(params):
            old = _span(state, first, params[first + LORA_A])
            spans[first] = dict(vars(gpm.updated(old, _sent(total, first), threshold, self.guarantee)))
        return {"task": task + 1, "past": [*state["past"], with_prefix(params, "adapter.")], "spans": spans}

    def modules(self, state: State) -> Sequence[Tensors]:
        past: Sequence[Tensors] = state["past"]
        return past

    def deployed(self, state: State, params: Tensors, finished: bool) -> Tensors:
        modules = state["past"] if finished else [*state["past"], with_prefix(params, "adapter.")]
        return {**params, **Past.whole(modules).together()}

    def _groups(self, params: Tensors) -> dict[str, list[str]]:
        """Layers that share their inputs, by the first of them."""
        firsts: dict[tuple[str, int], str] = {}
        groups: dict[str, list[str]] = {}
        for p in lora_layers(params):
            parent, _, name = p.rpartition(".")
            places = [i for i, names in enumerate(self.shared_inputs) if matching([name], names)]
            first = firsts.setdefault((parent, places[0]), p) if places else p
            if params[p + LORA_A].shape[1] != params[first + LORA_A].shape[1]:
                raise ConfigError(
                    f"layers '{_layer(first)}' and '{_layer(p)}' have inputs of different sizes: they cannot be in one group of "
                    f"server.consolidator.shared_inputs"
                )
            groups.setdefault(first, []).append(p)
        return groups

    def _require_room(self, task: int, layer: str, a_RD: Tensor, span: InputSpan) -> None:
        (rank, inputs), kept = a_RD.shape, span.basis.shape[1]
        free = inputs - kept if span.mode == gpm.REMOVE else kept
        if free >= rank or (free and self.when_full == "shrink"):
            return
        others = " or adapter.rank, or set server.consolidator.when_full: shrink" if free else ""
        raise ConfigError(
            f"task {task}: layer '{_layer(layer)}' has {free} of {inputs} input directions left, fewer than adapter.rank {rank}: "
            f"lower server.consolidator.threshold{others}"
        )

    def _directions(self, span: InputSpan, first: str, total: Tensors, rank: int) -> Tensor:
        """D of the largest rank, float64. The rows of a smaller one come first in it."""
        directions_DF = gpm.free_directions(span, _sent(total, first))[0] if total else span.free
        return directions_DF[:, :rank].T / math.sqrt(3)


def _span(state: State, layer: str, a_RD: Tensor) -> InputSpan:
    held: Mapping[str, Mapping[str, Any]] = state["spans"]
    return InputSpan(**held[layer]) if layer in held else gpm.empty(a_RD.shape[1])


def _first_rows(directions_RD: Tensor, like_RD: Tensor) -> Tensor:
    """As many rows as `like` has, zeros where there are no more directions."""
    out = torch.zeros_like(like_RD)
    rows = directions_RD[: len(like_RD)]
    out[: len(rows)] = rows.to(out.dtype)
    return out


def _sent(total: Tensors, layer: str) -> Tensor:
    key = GRAM + layer + LORA_A
    if key not in total:
        raise AggregationError(f"no client sent '{key}': the statistics pass must reach the clients")
    return from_upper_triangle(total[key])


def _require_rank(params: Tensors) -> None:
    """Raise ConfigError unless the layers have room for the rank."""
    for p in lora_layers(params):
        rank, inputs = params[p + LORA_A].shape
        if rank > inputs:
            raise ConfigError(
                f"adapter.rank {rank} is larger than the {inputs} inputs of layer '{_layer(p)}': use at most {inputs}"
            )


def _layer(prefix: str) -> str:
    return prefix.removeprefix("adapter.")
