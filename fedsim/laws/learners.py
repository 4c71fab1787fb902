"""The laws that every learner keeps, or says in its `exempt` why it cannot.

A learner is played through two small tasks of two rounds with three clients, both of its halves, as the server's loop does: a
small random ViT with LoRA, synthetic images, the mean of the clients' tensors after every round.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clients import fused, local
from clients.samples import Samples
from clients.server_work import ServerWork
from clients.work import Received, Work
from fedsim.core import config as configs
from fedsim.core.config import SimConfig
from fedsim.core.contracts import CLOSING, TEACHER, ArraySplit, IntArray, Learner, lifts_of
from fedsim.core.errors import ClientFailed
from fedsim.core.messages import ClientJob, ClientUpdate, RoundPlan, State, Tensors
from fedsim.core.names import HEAD
from fedsim.core.rng import torch_stream
from fedsim.core.tensors import without_prefix
from fedsim.data.sources.synthetic import Source as Synthetic
from fedsim.laws.comparing import (
    EXACT,
    ROUNDED,
    expect_bits,
    expect_close,
    expect_finite,
    expect_layout,
    expect_unchanged,
    same,
    sum_of_lifts,
    through_file,
)
from fedsim.laws.frame import Law, LawBroken, once
from fedsim.models import backbone, pretrained, vit
from fedsim.models import model as models
from fedsim.models.model import Model

NAME = "it"  # the learner's, in memory and context
TASKS: tuple[tuple[int, ...], ...] = ((0, 1, 2), (3, 4, 5))
ROUNDS, CLIENTS, PER_CLASS = 2, 3, 5
RUN: Mapping[str, Any] = {
    "data": {"source": "synthetic", "classes": 6, "train_per_class": PER_CLASS, "image_size": 8},
    "stream": {"tasks": len(TASKS)},
    "partition": {"name": "iid", "clients": CLIENTS},
    "model": {
        "backbone": "random",
        "config": {
            "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
            "image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_act": "gelu", "qkv_bias": True, "layer_norm_eps": 1e-6,
        },
    },
    "adapter": {"name": "lora", "rank": 2, "targets": "all-linear"},
    "client": {"epochs": 1, "batch_size": 2, "lr": 0.05, "optimizer": "sgd", "weight_decay": 0.0},
    "server": {"rounds": ROUNDS},
    "runtime": {"pool": "serial", "device": "cpu", "kernels": "torch"},
}  # fmt: skip


class Watched(Samples):
    """Samples that note which of them were looked at."""

    def __init__(self, split: ArraySplit) -> None:
        super().__init__(split, torch.device("cpu"))
        self.seen = set[int]()

    def batch(self, positions: IntArray) -> tuple[dict[str, Tensor], Tensor]:
        self.seen |= set(positions.tolist())
        return super().batch(positions)

    def labels(self, positions: IntArray) -> Tensor:
        self.seen |= set(positions.tolist())
        return super().labels(positions)


@dataclass(frozen=True, eq=False)
class Place:
    """Where clients run: a model and the data, as in one worker process."""

    config: SimConfig
    model: Model
    samples: Watched

    @classmethod
    def new(cls) -> Place:
        config, split = _run()
        return cls(config, deepcopy(_model()), Watched(split))


@cache
def _run() -> tuple[SimConfig, ArraySplit]:
    return configs.from_dict(RUN), Synthetic(classes=6, train_per_class=PER_CLASS, image_size=8).load().train


@cache
def _model() -> Model:
    """As it is built, for copies. On our own ViT: transformers' takes longer to load, to run and to copy."""
    config, draw = _run()[0], torch_stream(0, "backbone")
    with pretrained.unseeded():
        encoder = vit.ViT(vit.Layout(**{key: (config.model.config or {})[key] for key in vit.REQUIRED}))
    for name, parameter in encoder.named_parameters():
        scale = "norm" in name and name.endswith("weight")
        parameter.data = torch.ones_like(parameter) if scale else torch.randn(parameter.shape, generator=draw) * 0.1
    return models.build(config, sum(map(len, TASKS)), backbone=backbone.made_of(encoder, config.model, {}))


def shard(split: ArraySplit, task: int, client: int) -> IntArray:
    """Positions of a client's samples of a task: unequal parts of every class."""
    own = [np.flatnonzero(split.labels == c)[client::CLIENTS] for c in TASKS[task]]
    return np.concatenate(own)[: 5 - client]


@dataclass(frozen=True, eq=False)
class Round:
    """One round of a task: what clients were sent and sent back, and the server's half before and after (closing: a pass)."""

    task: int
    round: int
    works: Sequence[Work]
    updates: Sequence[ClientUpdate]
    state: State
    total: Tensors
    after: State

    def __str__(self) -> str:
        return f"task {self.task}, round {self.round}"


Train = Callable[[Sequence[Work]], Sequence[ClientUpdate | ClientFailed]]


def one_by_one(works: Sequence[Work]) -> list[ClientUpdate | ClientFailed]:
    """Client after client."""
    return [local.train(work) for work in works]


def elsewhere(works: Sequence[Work]) -> list[ClientUpdate | ClientFailed]:
    """Every client in a new worker, which knows the learners from their pickles; the last one first."""
    moved = []
    for work in reversed(works):
        place = Place.new()
        known = {n: pickle.loads(pickle.dumps(one)) for n, one in work.learners.items()}
        moved.append(replace(work, model=place.model, samples=place.samples, learners=known))
    return one_by_one(moved)[::-1]


@dataclass(eq=False)
class Watch:
    """Client after client, noting who looks at a sample that it never held, and who changes what it was given."""

    strangers: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    def __call__(self, works: Sequence[Work]) -> list[ClientUpdate | ClientFailed]:
        return [self._train(work) for work in works]

    def _train(self, work: Work) -> ClientUpdate | ClientFailed:
        when, samples = f"task {work.task}, round {work.round}: client {work.client_id}", Watched(_run()[1])
        given = {"parameters": work.params, "memory": work.job.memory, "context": dict(work.received.context)}
        before = deepcopy(given)
        result = local.train(replace(work, samples=samples))
        try:
            expect_unchanged(given, before, when)
        except LawBroken as e:
            self.changed.append(str(e))
        held = {p for task in range(work.task + 1) for p in shard(_run()[1], task, work.client_id).tolist()}
        if strange := sorted(samples.seen - held):
            self.strangers.append(f"{when} looks at sample {strange[0]}, which it has never held")
        return result


@dataclass(eq=False)
class Game:
    """A learner played through both tasks. train: how clients are trained; kept: what becomes of memories and states between
    rounds; beside: further learners."""

    learner: Learner
    train: Train = one_by_one
    kept: Callable[[Any, str, str], Any] = lambda value, what, when: value
    beside: Mapping[str, Learner] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)

    def play(self) -> list[Round]:
        place = Place.new()
        state, memories = None, dict[int, Tensors]()
        params: Tensors = place.model.init_adapter(torch_stream(0, "adapter")) | place.model.init_head()
        teacher: Tensors = {}
        for task in range(len(TASKS)):
            state = self.learner.opened(deepcopy(state), deepcopy(params), task)
            for number in range(ROUNDS):
                when = f"task {task}, round {number}"
                state = self.kept(state, "server's state", when)
                plan = RoundPlan(context=self._context(state, teacher))
                jobs = [ClientJob(k, task, number, params, plan, memory=memories.get(k, {})) for k in range(CLIENTS)]
                works = self._works(place, jobs)
                updates = _all_there(self.train(works), when)
                memories |= {u.client_id: self.kept(u.memory, "memory", when) for u in updates if u.memory is not None}
                total = summed(self.learner, updates, f"{NAME}.")
                after = self.learner.heard(deepcopy(state), deepcopy(total), CLIENTS)
                self.rounds.append(Round(task, number, works, updates, state, total, after))
                merged = _mean(params, updates)
                state, params = self.learner.merged(deepcopy(after), params, merged, len(updates), CLIENTS)
                expect_layout(params, merged, when)
            state, updates = self._closed(place, state, params, teacher, memories, task)
            memories |= {u.client_id: self.kept(u.memory, "memory", f"the end of task {task}") for u in updates if u.memory}
            if task + 1 < len(TASKS):
                state = self._made(place, state, params, task)
            teacher = params
            deployed = self.learner.deployed(deepcopy(state), params)
            expect_layout(deployed, params, f"the end of task {task}, what is deployed")
            if odd := [n for n, t in params.items() if not n.startswith(HEAD) and not torch.equal(deployed[n], t)]:
                raise LawBroken(f"the end of task {task}: '{odd[0]}' is deployed changed, but only the head may differ")
        return self.rounds

    def _context(self, state: State, teacher: Tensors) -> dict[str, Tensors]:
        told = {f"learner.{NAME}": self.learner.context(deepcopy(state))}
        needs = f"context {TEACHER}" in self.learner.traits.needs
        return told | ({TEACHER: teacher} if needs and teacher else {})

    def _works(self, place: Place, jobs: Sequence[ClientJob]) -> list[Work]:
        received = Received.on(place.model.device, jobs[0].params, jobs[0].plan)
        out = []
        for job in jobs:
            positions, seen = shard(_run()[1], job.task, job.client_id), [c for task in TASKS[: job.task + 1] for c in task]
            learners = {NAME: self.learner, **self.beside}
            out.append(Work(place.model, place.samples, positions, TASKS[job.task], seen, job, place.config, received, learners))
        return out

    def _made(self, place: Place, state: State, params: Tensors, task: int) -> State:
        fresh = place.model.init_adapter(torch_stream(0, "adapter")) | place.model.init_head()
        seen, draw = [c for classes in TASKS[: task + 1] for c in classes], torch_stream(0, "server", task)
        server = ServerWork(place.model, place.config, task, seen, deepcopy(params), fresh, {"pixel_values": (8, 8)}, draw)
        return self.learner.made(deepcopy(state), server)

    def _closed(
        self, place: Place, state: State, params: Tensors, teacher: Tensors, memories: Mapping[int, Tensors], task: int
    ) -> tuple[State, list[ClientUpdate]]:
        plan = self.learner.closing(deepcopy(state), deepcopy(params))
        if plan is not None and plan.train:
            raise LawBroken(f"the end of task {task}: its plan trains {', '.join(plan.train)}: it is a pass, with train=()")
        if self.learner.does("review"):
            plan = replace(plan or RoundPlan(train=()), review=NAME)
        total, updates = {}, list[ClientUpdate]()
        if plan is not None:
            plan = replace(plan, context={**plan.context, **self._context(state, teacher)})
            jobs = [ClientJob(k, task, ROUNDS, params, plan, memory=memories.get(k, {})) for k in range(CLIENTS)]
            updates = _all_there(self.train(self._works(place, jobs)), f"the end of task {task}")
            lifted = lifts_of([f"{CLOSING}.{NAME}"], None, None, {NAME: self.learner}) or {}
            total = sum_of_lifts([parts for u in updates for lift in lifted.values() if (parts := lift(u)) is not None])
        return self.learner.closed(deepcopy(state), deepcopy(params), total), updates


@once
def watched(learner: Learner) -> tuple[list[Round], Watch]:
    """As it is played without anything odd, and what was seen by the way."""
    watch = Watch()
    return Game(learner, watch).play(), watch


def plain(learner: Learner) -> list[Round]:
    """The rounds alone."""
    return watched(learner)[0]


def summed(learner: Learner, updates: Sequence[ClientUpdate], prefix: str) -> Tensors:
    """The sum of what `lift` makes of the clients' statistics. Raises LawBroken where there is none."""
    return sum_of_lifts([learner.lift(without_prefix(u.statistics, prefix), u.num_samples) for u in updates])


def _all_there(results: Sequence[ClientUpdate | ClientFailed], when: str) -> list[ClientUpdate]:
    out = []
    for result in results:
        if isinstance(result, ClientFailed):
            raise LawBroken(f"{when}: client {result.client_id} fails in the stage {result.stage}: {result.reason}")
        out.append(result)
    return out


def _mean(params: Tensors, updates: Sequence[ClientUpdate]) -> Tensors:
    return {n: torch.stack([u.params.get(n, t) for u in updates]).mean(0) for n, t in params.items()}


def expect_same(got: Sequence[Round], want: Sequence[Round], what: str, tolerance: float | None = None) -> None:
    """The clients' tensors, statistics and memories of all rounds, bit for bit or to a tolerance."""
    for ours, theirs in zip(got, want, strict=True):
        for a, b in zip(ours.updates, theirs.updates, strict=True):
            when = f"{ours}, client {a.client_id}, {what}"
            for part in ("params", "statistics", "memory"):
                one, other = getattr(a, part) or {}, getattr(b, part) or {}
                if tolerance is None:
                    expect_bits(one, other, f"{when}, its {part}")
                else:
                    expect_close(one, other, f"{when}, its {part}", tolerance)


# ---------------------------------------------------------------- the laws


def _works(learner: Learner) -> None:
    for number, done in enumerate(plain(learner)):
        for update in done.updates:
            expect_finite(update.params, f"{done}, client {update.client_id}")
            if not np.isfinite(update.metrics["loss"]):
                raise LawBroken(f"{done}, client {update.client_id}: the loss is {update.metrics['loss']} in round {number}")


@once
def _all_at_once(learner: Learner) -> bool:
    """Whether nothing changes where everything is odd at once, so that none of it needs a game of its own."""
    try:
        expect_same(Game(learner, elsewhere, through_file, {"null": Learner()}).play(), plain(learner), "all at once")
    except Exception:  # each by itself says what it is
        return False
    return True


def _deterministic(learner: Learner) -> None:
    last = plain(learner)[-1]
    again = _all_there(one_by_one(last.works), f"{last}, trained twice")
    expect_same([replace(last, updates=again)], [last], "trained twice")
    if not _all_at_once(learner):
        expect_same(Game(learner).play(), plain(learner), "played twice")


def _beside(learner: Learner) -> None:
    """The engine's own: what is not there moves no bit."""
    if not _all_at_once(learner):
        expect_same(Game(learner, beside={"null": Learner()}).play(), plain(learner), "beside a learner that does nothing")


def _any_worker(learner: Learner) -> None:
    if not _all_at_once(learner):
        expect_same(Game(learner, elsewhere).play(), plain(learner), "in a worker of its own")


def _fused(learner: Learner) -> None:
    if learner.alone or learner.blocks:
        return
    for done in plain(learner):
        notes: list[str] = []
        results = _all_there(fused.train(done.works, notes.append), f"{done}, trained together")
        if notes:
            raise LawBroken(f"{done}: {notes[0]} (say so in `alone`)")
        expect_same([replace(done, updates=results)], [done], "together against one by one", ROUNDED)


def _memory_file(learner: Learner) -> None:
    for done in plain(learner):
        for update in done.updates:
            for name, value in (update.memory or {}).items():
                if not isinstance(value, Tensor) or value.device.type != "cpu":
                    raise LawBroken(f"{done}, client {update.client_id}: memory '{name}' is no tensor on the CPU")
    if not _all_at_once(learner):
        stopped = Game(learner, kept=through_file).play()
        expect_same(stopped, plain(learner), "with memory and server's state from files")


def _held(learner: Learner) -> None:
    for odd in watched(learner)[1].strangers:
        raise LawBroken(odd)


def _no_mutation(learner: Learner) -> None:
    for odd in watched(learner)[1].changed:
        raise LawBroken(odd)
    for done in plain(learner):
        given = {"state": done.state, "total": done.total, "parameters": done.works[0].params}
        before = deepcopy(given)
        learner.context(given["state"])
        learner.heard(given["state"], given["total"], CLIENTS)
        learner.opened(given["state"], given["parameters"], done.task + 1)
        learner.merged(given["state"], given["parameters"], given["parameters"], CLIENTS, CLIENTS)
        learner.closing(given["state"], given["parameters"])
        learner.deployed(given["state"], given["parameters"])
        expect_unchanged(given, before, f"{done}, the server's half")


def _order(learner: Learner) -> None:
    for done in plain(learner):
        turned = summed(learner, list(reversed(done.updates)), f"{NAME}.")
        expect_close(turned, done.total, f"{done}, clients summed in reversed order", EXACT)
        again = learner.heard(deepcopy(done.state), deepcopy(done.total), CLIENTS)
        if not same(again, done.after):
            raise LawBroken(f"{done}, heard twice: the new states differ")


LAWS: tuple[Law[Learner], ...] = (
    Law("works", "clients train in every round, the first without teacher and memory among them, to finite tensors", _works),
    Law("deterministic", "the same rounds give the same bits", _deterministic),
    Law("beside", "a learner that does nothing beside it changes no bit", _beside),
    Law("any_worker", "a client gives the same bits in a worker of its own, whoever trained there before", _any_worker),
    Law("fused", "clients that train together give what each gives alone, up to rounding, unless it trains `alone`", _fused),
    Law("memory_file", "memory and the server's state, written to a file and read back, go on with the same bits", _memory_file),
    Law("held", "a client looks at no sample that it has not held in this task or before", _held),
    Law("no_mutation", "parameters, memory, context, states and totals that go in are not changed", _no_mutation),
    Law("order", "what clients send adds up in any order, and the same total gives the same state", _order),
)
