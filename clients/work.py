"""One client's round as a value: what `local.train` and `fused.train` are handed, and what learners see of it."""

# b samples, D features, C classes

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from clients.gradients import MOST_NUMBERS, MOST_TOGETHER, layer_gradients, layer_outputs, sample_gradients
from clients.lower_states import Kept, queries_of
from clients.samples import Samples
from fedsim.core import ranks, rng
from fedsim.core.config import SimConfig
from fedsim.core.contracts import TEACHER, IntArray, Learner, Outputs, Slots
from fedsim.core.errors import ConfigError
from fedsim.core.messages import BACKGROUND, BENEATH, ClientJob, RoundPlan, Tensors
from fedsim.core.names import HEAD_WEIGHT
from fedsim.core.tensors import matching, with_prefix, without_prefix
from fedsim.models.model import Model

STAYED, TASK = "stayed/", "task"  # of the tensors that stay with a client, in its memory; the task that they are of


@dataclass(frozen=True, eq=False)
class Received:
    """What all clients of a round are sent, on the device: parameters, and the context by who tells it."""

    params: Tensors
    context: Mapping[str, Tensors]

    @classmethod
    def on(cls, device: torch.device, params: Tensors, plan: RoundPlan) -> Received:
        """As a job holds it."""
        context = {name: moved(tensors, device) for name, tensors in plan.context.items()}
        return cls(moved(params, device), context)

    @property
    def background(self) -> Tensors:
        """Modules of past tasks as one, see `RoundPlan`."""
        return self.context.get(BACKGROUND, {})

    @property
    def beneath(self) -> Tensors:
        """What past rounds have left beneath the module: a part of it."""
        return self.context.get(BENEATH, {})


@dataclass(frozen=True, eq=False)
class Work:
    """Model, samples and one client's job.

    shard: positions of the round's samples; classes, seen: head rows of the task, and of all tasks so far; learners: by name;
    received: `job.params` and the plan's context on the model's device, common to all clients of the round.
    """

    model: Model
    samples: Samples
    shard: IntArray
    classes: Sequence[int]
    seen: Sequence[int]
    job: ClientJob
    config: SimConfig
    received: Received
    learners: Mapping[str, Learner] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: Model,
        samples: Samples,
        shard: IntArray,
        classes: Sequence[int],
        job: ClientJob,
        config: SimConfig,
        learners: Mapping[str, Learner] | None = None,
    ) -> Work:
        """A job by itself, of a first task: no other classes were seen."""
        received = Received.on(model.device, job.params, job.plan)
        return cls(model, samples, shard, classes, classes, job, config, received, learners or {})

    @property
    def client_id(self) -> int:
        return self.job.client_id

    @cached_property
    def own(self) -> Tensors:
        """In a further look: all tensors as this client has trained them in the round."""
        return {**self.received.params, **moved(self.job.memory, self.model.device)}

    @property
    def scale(self) -> float:
        """What the product of a LoRA pair counts for in the model."""
        return float(getattr(self.model.adapter, "scale", 1.0))

    @property
    def task(self) -> int:
        return self.job.task

    @property
    def round(self) -> int:
        return self.job.round

    @property
    def plan(self) -> RoundPlan:
        return self.job.plan

    @cached_property
    def params(self) -> Tensors:
        """All tensors, on the device, as this client begins with them: as received, but for those that have stayed with it, and
        for what is beyond its rank; in a further look as it has trained them, but for what is merged."""
        own = self.stayed
        if self.plan.merged is not None:
            own = moved({n: t for n, t in self.job.memory.items() if n not in self.plan.merged}, self.model.device)
        begun = {**self.received.params, **own} if own else self.received.params
        cut = ranks.cut(begun, self.rank)
        return {**begun, **cut} if cut else begun

    @cached_property
    def rank(self) -> int | None:
        """Of the LoRA pairs that it trains; None: all ranks. In a pass for statistics it looks through whole pairs."""
        return ranks.rank_of(self.config, self.client_id) if self.trained else None

    @cached_property
    def stayed(self) -> Tensors:
        """Tensors that have stayed with this client, on the device."""
        memory = without_prefix(self.job.memory, STAYED)
        if not self.staying or int(memory.get(TASK, torch.tensor(-1))) < self.plan.since:
            return {}
        return moved({n: t for n, t in memory.items() if n in self.job.params}, self.model.device)

    @cached_property
    def staying(self) -> tuple[str, ...]:
        """Names of the tensors that are trained and stay."""
        return tuple(matching(self.trained, self.plan.keeps)) if self.plan.keeps else ()

    def sends(self, local: Tensors) -> tuple[dict[str, Tensor], dict[str, int]]:
        """What goes up of the tensors after the last step, on the CPU, and the bytes of those of which the client has a part."""
        staying = () if self.plan.hand_in else self.staying
        sent = {n: local[n].cpu() for n in self.trained if n not in staying}
        cut = ranks.beyond(sent, self.rank)
        return sent, {n: ranks.bytes_of(n, sent[n], self.rank) for n in cut}

    def remembers(self, local: Tensors, memory: Tensors | None) -> Tensors | None:
        """What the client remembers, with the tensors that stay with it. memory: without them, None for what it was."""
        before = with_prefix(self.job.memory, STAYED)
        if not self.staying:
            return {**memory, **before} if memory is not None and before else memory
        others = {n: t for n, t in (self.job.memory if memory is None else memory).items() if n not in before}
        stays = {STAYED + n: local[n].detach().cpu() for n in self.staying} | {STAYED + TASK: torch.tensor(self.task)}
        return {**others, **(before if self.stayed else {}), **stays}

    @cached_property
    def trained(self) -> tuple[str, ...]:
        """Names of the tensors that are trained."""
        return tuple(matching(self.job.params, self.plan.train))

    @property
    def epochs(self) -> int:
        return self.config.client.epochs * self.plan.repeat

    @property
    def steps(self) -> int:
        """Optimizer steps of the round."""
        return self.epochs * math.ceil(len(self.shard) / self.config.client.batch_size) if self.trained else 0

    def draw(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """The generator of this client's round for one purpose."""
        return rng.torch_stream(self.config.seed, purpose, self.client_id, self.task, self.round, device=device)

    def batches(self) -> Iterator[IntArray]:
        """Positions of the client's own samples, step by step."""
        order = rng.stream(self.config.seed, "batches", self.client_id, self.task, self.round)
        for _ in range(self.epochs):
            yield from batches(order.permutation(self.shard), self.config.client.batch_size)

    def labels(self, positions: IntArray) -> Tensor:
        """Head rows, on the device."""
        return self.samples.labels(positions)

    @contextmanager
    def on_past_modules(self) -> Iterator[None]:
        """While open, the model has in it what clients train on top of: what past rounds have left beneath the module, and the
        modules of past tasks if the plan says so."""
        with ExitStack() as stack:
            for module in (self.received.background if self.plan.beside else {}, self.received.beneath):
                if module:
                    stack.enter_context(self.model.merged(module))
            yield

    def beneath(self, params: Tensors) -> AbstractContextManager[None]:
        """The same, for whoever looks through these tensors; the teacher's are whole by themselves."""
        return nullcontext() if self.is_teacher(params) else self.on_past_modules()

    def is_teacher(self, params: Tensors) -> bool:
        """Whether they are what the last task's end deployed: the context's own mapping, not a copy."""
        return params is self.received.context.get(TEACHER)

    @contextmanager
    def looking(self, params: Tensors, slots: Slots | None = None) -> Iterator[None]:
        """While open, features are those of these tensors, without gradients to them: with the prompts that training gives the
        samples while the client trains; in a pass of its own, and of the teacher, with those of inference. slots: see
        `Adapter.as_trained`."""
        inference = self.is_teacher(params) or not self.trained
        with self.beneath(params), self.model.merged(params) if inference else self.model.as_trained(params, slots):
            yield

    def gradients(
        self, positions: IntArray, params: Tensors, names: Sequence[str], loss: Callable[[Tensor, Tensor], Tensor]
    ) -> Iterator[tuple[IntArray, Tensors]]:
        """Every sample's own gradient of these tensors, (b, …), chunk by chunk with the samples' positions, in evaluation.

        loss: logits (b, C) and labels (b,) -> the loss of each sample, (b,). Small chunks: b copies of all tensors are held."""
        size = max(1, min(MOST_TOGETHER, MOST_NUMBERS // max(1, sum(params[n].numel() for n in names))))
        for some in batches(positions, size):
            inputs, labels = self.samples.batch(some)
            with self.beneath(params):
                found = sample_gradients(self.model, inputs, labels, params, names, loss)
            yield some, found

    def traced(
        self, positions: IntArray, subjects: Sequence[str], directions: Callable[[Tensor], Tensor]
    ) -> Iterator[Mapping[str, tuple[Tensor, Sequence[Tensor]]]]:
        """Batch by batch, of the bare backbone: what goes into the subjects' layers, and the gradients of what comes out along
        every direction in the features."""
        for some in batches(positions, self.config.client.batch_size):
            yield layer_gradients(self.model, self.samples.batch(some)[0], subjects, directions)

    @torch.no_grad()
    def passing(
        self, positions: IntArray, subjects: Sequence[str], params: Tensors
    ) -> Iterator[Mapping[str, tuple[Tensor, Tensor]]]:
        """Batch by batch, through these tensors: what goes into the subjects' layers, and what comes out."""
        for some in batches(positions, self.config.runtime.eval_batch):
            inputs = self.samples.batch(some)[0]
            with self.beneath(params), self.model.merged(params):
                found = layer_outputs(self.model, inputs, subjects, params)
            yield found  # with nothing in the model: two of these may go side by side

    def layer_shape(self, subject: str) -> tuple[int, int]:
        """Outputs and inputs of the linear layer that a tensor belongs to."""
        if subject == HEAD_WEIGHT:
            outputs, inputs = self.params[subject].shape
            return outputs, inputs
        layer = self.model.layer(subject)
        if not isinstance(layer, nn.Linear):
            raise ConfigError(f"'{subject}' belongs to no linear layer, but to a {type(layer).__name__}")
        return layer.out_features, layer.in_features

    def changes(self, params: Tensors) -> Mapping[str, Sequence[Tensor]]:
        """What the adapter's tensors add to weights."""
        return self.model.changes(params)

    @torch.no_grad()
    def outputs(self, positions: IntArray, params: Tensors) -> Outputs:
        """What these tensors make of samples, each by itself: no augmentation, no dropout, no gradient."""
        found: list[Outputs] = []
        kept = Kept(queries=queries_of(self.model, self.samples, positions, self.config.runtime))
        alone = Slots(1, ())
        with self.looking(params, alone):
            for some in batches(positions, self.config.runtime.eval_batch):
                alone.rows = (1,) * len(some)
                features_bD = kept.asked(self.model, self.samples.batch(some)[0], some, lean=True).features
                found.append(Outputs(features_bD, self.model.logits(features_bD, params)))
        return Outputs(torch.cat([o.features for o in found]), torch.cat([o.logits for o in found]))


def batches(positions: IntArray, size: int) -> Iterator[IntArray]:
    """Consecutive batches; the last one may be smaller."""
    for start in range(0, len(positions), size):
        yield positions[start : start + size]


def round_shard(shard: IntArray, config: SimConfig, job: ClientJob) -> IntArray:
    """The samples of this round: all of the task's shard, or with `stream.online` its own part of a single pass.

    The statistics pass at a task's end (round = number of rounds) sees the last part again: nothing older is kept.
    """
    if not config.stream.online:
        return shard
    once = rng.stream(config.seed, "online", job.client_id, job.task).permutation(shard)
    return np.array_split(once, config.server.rounds)[min(job.round, config.server.rounds - 1)]


def moved(tensors: Tensors, device: torch.device) -> dict[str, Tensor]:
    """The tensors on a device."""
    return {name: t.to(device) for name, t in tensors.items()}
