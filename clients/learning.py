"""The learners of one client's round: what they add to its steps, and what is left of them. `local` and `fused` share it, so that
a learner is written once."""

# b rows of a batch: the client's own, then those that learners replay, then further views of both, then synthetic ones

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clients.work import Work, moved
from fedsim.core import config as configs
from fedsim.core import contracts, plugins
from fedsim.core.contracts import (
    CROSS_ENTROPY,
    LEARNER,
    OWN,
    TEACHER,
    IntArray,
    Learner,
    LocalState,
    Outputs,
    Step,
    Synthetic,
    TrainingStatistic,
)
from fedsim.core.errors import ConfigError, ModelError
from fedsim.core.messages import RoundPlan, StatisticRequest, Tensors
from fedsim.core.tensors import matching, require_finite, without_prefix
from fedsim.models.logits import masked_cross_entropy

PREFIX = f"{LEARNER}."  # of what is a learner's in a client's memory: `learner.<name>/<tensor>`


def statistic_of(request: StatisticRequest) -> contracts.Statistic:
    """The plug-in that a request names."""
    statistic: contracts.Statistic = configs.build("statistics", {"name": request.name, **request.options})
    return statistic


def follows(request: StatisticRequest) -> bool:
    """Whether it asks for a statistic of the training itself."""
    return issubclass(plugins.load("statistics", request.name), TrainingStatistic)


def asked_for(plan: RoundPlan, names: Sequence[str]) -> dict[str, Learner]:
    """The learners that a plan's statistics of the training are made by. names: of all tensors."""
    found: dict[str, Learner] = {}
    for request in plan.statistics:
        statistic = statistic_of(request) if follows(request) else None
        if isinstance(statistic, TrainingStatistic):
            found[request.name] = statistic.learner(matching(names, request.match))
    return found


class Told(dict[str, Tensors]):
    """The context of a round, as a learner sees it."""

    def __init__(self, name: str, work: Work) -> None:
        told = work.received.context
        super().__init__({n: tensors for n, tensors in told.items() if n != f"{PREFIX}{name}"})
        self[OWN] = told.get(f"{PREFIX}{name}", {})
        self._who, self._when = name, f"task {work.task}, round {work.round}"

    def __missing__(self, name: str) -> Tensors:
        there = ", ".join(sorted(n for n in self if n != OWN)) or "nothing"
        raise ConfigError(
            f"learner {self._who} looks for the context '{name}', which nobody sends in {self._when} (there is {there}): it must "
            f"do without it, as in a first task, or need the word 'context {name}' in its traits"
        )


class Batch(NamedTuple):
    """Of a step. positions: in the training split, −1 for a synthetic sample; inputs: raw; labels: head rows."""

    positions: IntArray
    inputs: Tensors
    labels: Tensor


def fitting(made: Synthetic, inputs: Tensors, labels: Tensor) -> Synthetic:
    """Synthetic samples for a batch of such inputs and labels, on their device. Raises ModelError for another kind of samples."""
    for name in {**inputs, **made.inputs}:
        got, want = made.inputs.get(name), inputs.get(name)
        if got is None or want is None or (got.dtype, got.shape) != (want.dtype, (len(made.labels), *want.shape[1:])):
            told = " and ".join("none" if t is None else f"{t.dtype} {tuple(t.shape[1:])}" for t in (want, got))
            raise ModelError(f"synthetic samples must be as the data's are: '{name}' of the data and of theirs is {told}")
    moved_inputs = {n: made.inputs[n].to(t.device) for n, t in inputs.items()}
    return Synthetic(moved_inputs, made.labels.to(labels))


def with_foreign(positions: IntArray, made: Synthetic) -> IntArray:
    """Positions of a batch that synthetic samples have joined."""
    return np.concatenate([positions, np.full(len(made.labels), -1, positions.dtype)])


@dataclass
class _Part:
    """A learner at work. `rows`, `again`, `made`: those that it replays in the current batch, its further views, and its
    synthetic ones."""

    name: str
    learner: Learner
    draw: torch.Generator
    keeps: bool  # a memory of its own; not where a rule asked for it
    state: LocalState = field(default_factory=dict)
    rows: slice = field(default_factory=lambda: slice(0, 0))
    again: slice = field(default_factory=lambda: slice(0, 0))
    made: slice = field(default_factory=lambda: slice(0, 0))


class Learning:
    """Learners of a client's round: those of the config, and those that the plan's statistics need.

    A client that takes no step asks only the latter, which send zeros.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        asked = asked_for(work.plan, list(work.job.params))
        listed = work.learners if work.steps else {}
        self._parts = [self._begun(n, learner, n in listed) for n, learner in {**listed, **asked}.items()]
        self._start = {n: work.params[n] for n in work.trained}
        self._replay, self._again, self._make, self._loss, self._correct, self._step = (
            [p for p in self._parts if p.learner.does(method)]
            for method in ("replay", "again", "synthetic", "loss", "corrected", "stepped")
        )
        self.replaces = any(CROSS_ENTROPY in p.learner.traits.takes for p in self._parts)
        self.corrects = bool(self._correct)
        self.looks = bool(self._loss)
        self.blocks = any(p.learner.blocks for p in self._loss)
        self.follows = bool(self._correct or self._step)
        self._own = self._rehearsed = slice(0, 0)

    def _begun(self, name: str, learner: Learner, keeps: bool) -> _Part:
        work, prefix = self.work, f"{PREFIX}{name}/"
        part = _Part(name, learner, work.draw(f"learner {name}"), keeps)
        memory = without_prefix(work.job.memory, prefix) if keeps else {}
        part.state = learner.begin(work, moved(memory, work.model.device), Told(name, work), part.draw)
        return part

    def joined(self, own: IntArray) -> IntArray:
        """A batch's positions with those that learners replay, and with their further views."""
        self._own, parts, end = slice(0, len(own)), [own], len(own)
        for part in self._replay:
            added = part.learner.replay(part.state, own, part.draw)
            part.rows = slice(end, end + len(added))
            parts.append(added)
            end += len(added)
        self._rehearsed = slice(len(own), end)
        for part in self._again:
            added = part.learner.again(part.state, own, part.draw)
            part.again = slice(end, end + len(added))
            parts.append(added)
            end += len(added)
        return np.concatenate(parts) if end > len(own) else own

    def synthetic(self, positions: IntArray) -> Synthetic | None:
        """What learners make for the batch at these positions, of which `joined` gave those behind the client's own."""
        found, end = list[Synthetic](), len(positions)
        for part in self._make:
            made = part.learner.synthetic(part.state, positions[self._own], part.draw)
            part.made = slice(end, end + (len(made.labels) if made else 0))
            end = part.made.stop
            if made:
                found.append(made)
        if len(found) < 2:
            return found[0] if found else None
        inputs = {n: torch.cat([made.inputs[n] for made in found]) for n in found[0].inputs}
        return Synthetic(inputs, torch.cat([made.labels for made in found]))

    def batch(self, own: IntArray) -> Batch:
        """The client's own samples at these positions, and what learners add."""
        positions = self.joined(own)
        inputs, labels = self.work.samples.batch(positions)
        made = self.synthetic(positions)
        if made is None:
            return Batch(positions, inputs, labels)
        made = fitting(made, inputs, labels)
        inputs = {n: torch.cat([t, made.inputs[n]]) for n, t in inputs.items()}
        return Batch(with_foreign(positions, made), inputs, torch.cat([labels, made.labels]))

    def cross_entropy(self, logits_bC: Tensor, labels_b: Tensor) -> Tensor:
        """Over the client's own rows and the task's classes."""
        if len(labels_b) > self._own.stop:
            logits_bC, labels_b = logits_bC[self._own], labels_b[self._own]
        return masked_cross_entropy(logits_bC, labels_b, self.work.classes)

    def adapter_term(self, params: Tensors, query_bD: Tensor | None) -> Tensor | None:
        """The adapter's own term of the loss, over the client's own rows. params: all tensors."""
        model = self.work.model
        if not model.has_loss:
            return None
        return model.loss(params, None if query_bD is None else query_bD[self._own])

    def terms(
        self,
        inputs: Tensors,
        positions: IntArray,
        labels: Tensor,
        outputs: Outputs,
        params: Tensors,
        run: Callable[[Tensors], Outputs],
        left: Callable[[], AbstractContextManager[None]],
        blocks: Sequence[Tensor] = (),
        query: Tensor | None = None,
    ) -> list[Tensor]:
        """What learners add to the loss of a batch. run: other tensors on the same inputs; left: while open, nothing is in the
        encoder; blocks: what came out of them; query: of each sample."""
        work, once = self.work, _Once(lambda params: run(self._whole(params)))
        trained = {**work.params, **params}

        def head(features: Tensor, params: Tensors | None = None) -> Tensor:
            return work.model.logits(features, trained if params is None else self._whole(params))

        def outputs_of(positions: IntArray, params: Tensors) -> Outputs:
            with left():
                return work.outputs(positions, self._whole(params))

        terms = []
        for part in self._loss:
            step = Step(
                inputs, positions, labels, *outputs, params, self._start, work.classes, work.seen, self._own, self._rehearsed,
                part.rows, part.again, part.made, part.draw, once, head, outputs_of, blocks, query,
            )  # fmt: skip
            term = part.learner.loss(part.state, step)
            if term is not None:
                terms.append(term)
        return terms

    def _whole(self, params: Tensors) -> Tensors:
        """These tensors, and the received ones that they lack: half of a pair would be another model. The teacher lacks none."""
        received = self.work.params
        if received.keys() <= params.keys() or params is self.work.received.context.get(TEACHER):
            return params
        return {**received, **params}

    def corrected(self, gradients: Tensors, params: Tensors) -> Tensors:
        """Gradients after all learners."""
        for part in self._correct:
            names = gradients.keys()
            gradients = part.learner.corrected(part.state, gradients, params)
            if gradients.keys() != names:
                odd = sorted(gradients.keys() ^ names)[0]
                raise ModelError(
                    f"learner {part.name}: 'corrected' must give gradients of the same names, '{odd}' is not in both"
                )
        return gradients

    def stepped(self, params: Tensors) -> None:
        """The optimizer has changed the tensors."""
        for part in self._step:
            part.learner.stepped(part.state, params)

    def end(self, params: Tensors) -> tuple[Tensors | None, Tensors]:
        """Memory (None: what it was) and statistics of all of them, on the CPU, under their names. params: all tensors after the
        last step."""
        memory: dict[str, Tensor] = {}
        statistics: dict[str, Tensor] = {}
        for part in self._parts:
            ending = part.learner.end(part.state, self.work, params, part.draw)
            if part.keeps and ending.memory is not None:
                memory |= _kept(part.name, ending.memory)
            elif part.keeps:
                memory |= _prefixed(part.name, self.work.job.memory)
            statistics |= {f"{part.name}.{n}": t.detach().cpu() for n, t in ending.statistics.items()}
        require_finite(memory, "memory")
        return (memory if any(part.keeps for part in self._parts) else None), statistics


def reviewed(work: Work) -> tuple[Tensors | None, Tensors]:
    """Memory (None: what it was) and statistics, on the CPU, of the learner whose review a pass at a task's end is."""
    name, before = work.plan.review, work.job.memory
    prefix = f"{PREFIX}{name}/"
    own = moved(without_prefix(before, prefix), work.model.device)
    ending = work.learners[name].review(work, own, Told(name, work), work.draw(f"learner {name}"))
    statistics = {f"{name}.{n}": t.detach().cpu() for n, t in ending.statistics.items()}
    if ending.memory is None:
        return None, statistics
    memory = {n: t for n, t in before.items() if not n.startswith(prefix)} | _kept(name, ending.memory)
    require_finite(memory, "memory")
    return memory, statistics


def _kept(name: str, memory: Tensors) -> dict[str, Tensor]:
    """What a learner remembers, as it stands in the client's memory."""
    return {f"{PREFIX}{name}/{n}": t.detach().cpu() for n, t in memory.items()}


def _prefixed(name: str, memory: Tensors) -> dict[str, Tensor]:
    """A learner's part of the client's memory, under its whole names."""
    return {n: t for n, t in memory.items() if n.startswith(f"{PREFIX}{name}/")}


class _Once:
    """Other tensors through the model, once for each mapping."""

    def __init__(self, run: Callable[[Tensors], Outputs]) -> None:
        self._run = run
        self._known: dict[int, tuple[Mapping[str, Tensor], Outputs]] = {}  # the mapping is held, so that its id stays its own

    def __call__(self, params: Tensors) -> Outputs:
        if id(params) not in self._known:
            self._known[id(params)] = params, self._run(params)
        return self._known[id(params)][1]
