"""Several clients of a round in one forward and backward. The oracle is `local.train`, client by client.

K clients share the frozen backbone, so their batches go through it as one, sample k's adapter and head being those of its
client; the sum of the clients' losses is differentiated, so that each gets exactly its own gradient. Every random draw comes
from the client's own streams, so inputs are the same as one by one, and results differ only by rounding. It pays where one
client's batch does not fill the device: on a GPU, not on a CPU.
"""

# K clients (a of them still training), P numbers that one client trains, b samples of a slot, D features, C classes, S steps

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from clients import local, optim
from clients.samples import Samples
from fedsim.core import contracts, rng
from fedsim.core.config import ClientConfig, SimConfig
from fedsim.core.contracts import IntArray, Slots, TrainStep
from fedsim.core.errors import ClientFailed, ModelError, one_line
from fedsim.core.messages import ClientJob, ClientUpdate, Tensors
from fedsim.core.tensors import matching, require_finite
from fedsim.models.logits import masked_cross_entropies
from fedsim.models.model import Model

# Each number goes its own way, and what they share depends on nothing but the number of steps: clients may share a tensor.
ELEMENTWISE = frozenset(("adadelta", "adagrad", "adam", "adamw", "adamax", "asgd", "nadam", "radam", "rmsprop", "rprop", "sgd"))
CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_

_fitting: WeakKeyDictionary[Model, int] = WeakKeyDictionary()  # most clients that went through a model after memory ran out


def obstacle(model: Model) -> str | None:
    """Why clients cannot be trained together with this model; None if they can."""
    if type(model.adapter).stacked is contracts.Adapter.stacked:
        return f"the adapter {type(model.adapter).__module__} has no method 'stacked'"
    for name, module in model.backbone.encoder.named_modules():
        mixes = isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
        if mixes:
            return f"layer '{name}' of the backbone normalises over the batch, so clients would see each other's samples"
    return None


def bundles(steps: Sequence[int], most: int) -> list[list[int]]:
    """Places of clients that train together: at most `most` in as few bundles as can be, of equal size, longest first.

    Clients with like numbers of steps come together, so that few finish early. Depends on nothing else: the same clients make
    the same bundles.
    """
    order = sorted(range(len(steps)), key=lambda k: (-steps[k], k))
    if not order:
        return []
    return [part.tolist() for part in np.array_split(np.array(order), math.ceil(len(order) / most))]


def train(
    model: Model,
    samples: Samples,
    shards: Sequence[IntArray],
    classes: Sequence[int],
    jobs: Sequence[ClientJob],
    config: SimConfig,
    objectives: Sequence[contracts.Objective] = (),
    tell: Callable[[str], None] = lambda note: None,
) -> list[ClientUpdate | ClientFailed]:
    """What `local.train` gives for every job and its shard, in the order of the jobs, up to rounding.

    All jobs are of one task and round, so they have the same `params` and `plan`. As many clients train together as fit: when
    the device's memory runs out, the bundle is halved and trained again, down to one by one, and later bundles start at what
    did fit. Whatever else goes wrong in a bundle is left to `local.train`, which says which client it was. The metric
    `together` is the number of clients that an update was trained with; `tell` is told why clients were not trained together.
    """
    if not jobs:
        return []
    first, results = jobs[0], dict[int, ClientUpdate | ClientFailed]()
    if any(job.params is not first.params or job.plan is not first.plan for job in jobs):
        raise ValueError("clients that train together start from the same tensors and have the same plan")
    longer = local.repeated(config, first.plan)
    trained = bool(matching(first.params, first.plan.train))
    followed = next((r.name for r in first.plan.statistics if local.follows(r)), None)
    apart = obstacle(model) if followed is None else f"the statistic {followed} follows the training of each"
    if apart is not None and trained and len(jobs) > 1:
        tell(f"clients are trained one by one, whatever runtime.fused says: {apart}")
    working = [k for k in range(len(jobs)) if len(shards[k])] if trained and apart is None else []
    steps = [num_steps(shards[k], longer.client) for k in working]
    queue = [[working[k] for k in part] for part in bundles(steps, _fitting.get(model, len(jobs)))]
    while queue:
        places = queue.pop(0)
        if len(places) == 1:
            continue
        own_shards, own_jobs, short_of_memory = [shards[k] for k in places], [jobs[k] for k in places], False
        try:
            updates = Bundle(model, samples, own_shards, classes, own_jobs, longer, objectives).train()
            results |= zip(places, updates, strict=True)
        except torch.OutOfMemoryError:
            short_of_memory = True  # acted upon below, where the error no longer holds on to what it ran out with
        except Exception as e:
            tell(f"clients that were to train together were trained one by one, which is slower: {one_line(e)}")
            continue
        if short_of_memory:
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
            half = math.ceil(len(places) / 2)
            _fitting[model] = half
            tell(f"memory is short for {len(places)} clients at once: fewer train together, which moves their last digits")
            queue[:0] = [places[:half], places[half:]]
    for k, job in enumerate(jobs):
        if k not in results:
            results[k] = local.train(model, samples, shards[k], classes, job, config, objectives)
    return [results[k] for k in range(len(jobs))]


def num_steps(shard: IntArray, client: ClientConfig) -> int:
    """Optimizer steps of one client's round."""
    return client.epochs * math.ceil(len(shard) / client.batch_size)


class Bundle:
    """Clients that train together, longest first, so that those still training are always the first ones."""

    def __init__(
        self,
        model: Model,
        samples: Samples,
        shards: Sequence[IntArray],
        classes: Sequence[int],
        jobs: Sequence[ClientJob],
        config: SimConfig,
        objectives: Sequence[contracts.Objective],
    ) -> None:
        self.model, self.samples, self.classes, self.config, self.objectives = model, samples, classes, config, objectives
        self.shards, self.jobs = shards, jobs
        self.steps = [num_steps(shard, config.client) for shard in shards]
        self.params = {n: t.to(model.device) for n, t in jobs[0].params.items()}
        self.trained = matching(self.params, jobs[0].plan.train)
        by_group = sorted(self.trained, key=lambda n: optim.group_of(config.client, n))
        self.flat = Flat({n: self.params[n] for n in by_group}, len(jobs))

    def train(self) -> list[ClientUpdate | ClientFailed]:
        """Every client's update, in their order. A client with numbers that are not finite fails alone."""
        start = time.perf_counter()
        losses_KS = self.fit().cpu()
        updates_KP = self.flat.values_KP.cpu()  # one transfer for all clients; it waits for the device
        seconds = time.perf_counter() - start
        return [self._finished(k, losses_KS[k], updates_KP, seconds * s / sum(self.steps)) for k, s in enumerate(self.steps)]

    def fit(self) -> Tensor:
        """Train `flat` in place; every client's loss at every one of its steps, (K, S)."""
        client, seed = self.config.client, self.config.seed
        addresses = [(job.client_id, job.task, job.round) for job in self.jobs]
        batches = [self._batches(rng.stream(seed, "batches", *a), shard) for a, shard in zip(addresses, self.shards, strict=True)]
        augment = [rng.torch_stream(seed, "augment", *a, device=self.model.device) for a in addresses]
        dropout = [rng.torch_stream(seed, "dropout", *a, device=self.model.device) for a in addresses]
        optimizers = optimizers_of(client, self.flat, self.steps)
        losses_KS = self.flat.values_KP.new_zeros(len(self.jobs), self.steps[0])
        done = 0
        for end in sorted(set(self.steps)):  # until then the same clients train
            active = sum(s >= end for s in self.steps)
            leaves = self.flat.leaves(active)
            slots = Slots(0, (), dropout=dropout[:active])
            with local.beside(self.model, self.jobs[0].plan), self.model.stacked(self.params | leaves, slots):
                for step in range(done, end):
                    losses_K = self._losses([next(b) for b in batches[:active]], slots, augment, leaves)
                    losses_KS[:active, step] = losses_K.detach()
                    gradient_aP = self.flat.gradient(losses_K.sum(), leaves)
                    if client.clip_norm is not None:
                        norms_a1 = torch.linalg.vector_norm(gradient_aP, dim=1, keepdim=True)
                        gradient_aP.mul_((client.clip_norm / (norms_a1 + CLIP_EPS)).clamp(max=1))
                    for optimizer in optimizers:
                        optimizer.step(gradient_aP)
            done = end
        return losses_KS

    def _batches(self, order: np.random.Generator, shard: IntArray) -> Iterator[IntArray]:
        for _ in range(self.config.client.epochs):
            yield from local.batches(order.permutation(shard), self.config.client.batch_size)

    def _losses(
        self, positions: Sequence[IntArray], slots: Slots, augment: Sequence[torch.Generator], leaves: dict[str, Tensor]
    ) -> Tensor:
        """Each client's loss on its own batch, (a,). A short batch is filled with samples of its client, which do not count."""
        slots.rows = [len(p) for p in positions]
        slots.width = max(slots.rows)
        slots_ab = np.concatenate([np.resize(p, slots.width) for p in positions])
        inputs, labels = self.samples.batch(slots_ab)
        features = self.model.stacked_features(inputs, slots, augment)
        logits_abC = self.model.stacked_logits(features.view(len(positions), slots.width, -1), self.params | leaves)
        if not self.objectives:
            return self._cross_entropies(logits_abC, labels, slots)
        start = {n: self.params[n] for n in self.trained}
        parts = {n: t.unbind() for n, t in leaves.items()}
        labels_ab = labels.view(len(positions), -1)
        extra = []
        for k, rows in enumerate(slots.rows):
            own = {n: parts[n][k] for n in self.trained}
            step = TrainStep(own, start, logits_abC[k, :rows], labels_ab[k, :rows], self.classes)
            extra.append(torch.stack([objective.term(step) for objective in self.objectives]).sum())
        if local.replaced(self.objectives):
            return torch.stack(extra)
        return self._cross_entropies(logits_abC, labels, slots) + torch.stack(extra)

    def _cross_entropies(self, logits_abC: Tensor, labels: Tensor, slots: Slots) -> Tensor:
        """Each client's mean over its own samples, (a,)."""
        clients, width, _ = logits_abC.shape
        terms_ab = masked_cross_entropies(logits_abC.flatten(0, 1), labels, self.classes).view(clients, width)
        if min(slots.rows) == width:
            return terms_ab.mean(dim=1)
        rows_a1 = torch.tensor(slots.rows, device=terms_ab.device)[:, None]
        counted_ab = torch.arange(width, device=terms_ab.device) < rows_a1
        return (torch.where(counted_ab, terms_ab, 0) / rows_a1).sum(dim=1)

    def _finished(self, k: int, losses_S: Tensor, updates_KP: Tensor, seconds: float) -> ClientUpdate | ClientFailed:
        start = time.perf_counter()
        job, shard, plan = self.jobs[k], self.shards[k], self.jobs[k].plan
        try:
            with local.stage("training"):
                loss = local.last_epoch(losses_S[: self.steps[k]], self.config.client.epochs)
            with local.stage("update"):
                own = self.flat.of(k, updates_KP)
                update = {n: own[n].clone() for n in self.trained}  # a view would travel with all the rest
                require_finite(update, "trained tensor")
            with local.stage("statistics"):
                own = self.params | self.flat.of(k, self.flat.values_KP)
                statistics = local.collect(self.model, self.samples, shard, own, plan, self.config.runtime.eval_batch)
                require_finite(statistics, "statistic")
        except local.StageFailed as e:
            return ClientFailed(job.client_id, job.task, job.round, e.stage, e.reason)
        metrics = {"loss": loss, "seconds": seconds + time.perf_counter() - start, "together": float(len(self.jobs))}
        return ClientUpdate(job.client_id, len(shard), update, statistics, metrics=metrics)


class Flat:
    """The tensors that K clients train as one matrix `values_KP`, a row per client: what goes on within a client's tensors
    (optimizer, norm) costs a few operations for all of them."""

    def __init__(self, tensors: Tensors, clients: int) -> None:
        self.shapes = {n: t.shape for n, t in tensors.items()}
        self.values_KP = torch.cat([t.detach().flatten() for t in tensors.values()]).repeat(clients, 1)

    def of(self, k: int, matrix_KP: Tensor) -> dict[str, Tensor]:
        """Client k's row of a matrix as tensors, which share its memory."""
        parts = torch.split(matrix_KP[k], [s.numel() for s in self.shapes.values()])
        return {n: part.view(shape) for part, (n, shape) in zip(parts, self.shapes.items(), strict=True)}

    def columns(self, matrix: Tensor, heads: Sequence[str]) -> list[Tensor]:
        """A matrix cut before the tensors of these names, the first of them its own first."""
        names = list(self.shapes)
        ends = [names.index(n) for n in heads[1:]] + [len(names)]
        sizes = [sum(self.shapes[n].numel() for n in names[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
        return list(torch.split(matrix, sizes, dim=1))

    def leaves(self, active: int) -> dict[str, Tensor]:
        """The first clients' tensors, (a, …), for the model: they want gradients, and see what optimizers do to the matrix."""
        parts = torch.split(self.values_KP[:active], [s.numel() for s in self.shapes.values()], dim=1)
        named = zip(parts, self.shapes.items(), strict=True)
        return {n: part.reshape(active, *shape).detach().requires_grad_() for part, (n, shape) in named}

    def gradient(self, loss: Tensor, leaves: Tensors) -> Tensor:
        """(a, P). Raises ModelError if the loss leaves a tensor out: an optimizer must not touch it then."""
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for name, g in zip(leaves, gradients, strict=True):
            if g is None:
                raise ModelError(f"'{name}' is to be trained, but the loss does not depend on it")
        return torch.cat([g.flatten(1) for g in gradients], dim=1)


def optimizers_of(client: ClientConfig, flat: Flat, steps: Sequence[int]) -> list[Cohort]:
    """Optimizers for clients with these numbers of steps, longest first.

    One for all of them, where the optimizer treats every number by itself and its options are the same for all; one for each
    number of steps, where an option says "steps"; and one for each client and over its tensors as they are, where an optimizer
    looks at whole tensors.
    """
    if client.optimizer.lower() not in ELEMENTWISE:
        return [Cohort(client, flat, k, k + 1, s, whole=True) for k, s in enumerate(steps)]
    if "steps" not in (*client.optimizer_options.values(), *client.schedule_options.values()):
        return [Cohort(client, flat, 0, len(steps), steps[0])]
    return [Cohort(client, flat, steps.index(s), steps.index(s) + steps.count(s), s) for s in dict.fromkeys(steps)]


class Cohort:
    """One optimizer and its schedule, over the rows first … last − 1 of a matrix of parameters.

    whole: over the single row's tensors, in place of the rows as one tensor for each group of parameters, whose tensors lie side
    by side.
    """

    def __init__(self, client: ClientConfig, flat: Flat, first: int, last: int, steps: int, whole: bool = False) -> None:
        self.flat, self.first, self.last, self.whole = flat, first, last, whole
        groups = {n: optim.group_of(client, n) for n in flat.shapes}
        self.heads = [n for i, n in enumerate(groups) if i == 0 or groups[n] != list(groups.values())[i - 1]]
        self.parameters = self._parts(flat.values_KP)
        self.optimizer, self.schedule = optim.build(client, self.parameters, steps)

    def step(self, gradient_aP: Tensor) -> None:
        """A step of those rows that have a gradient: the first a of the matrix."""
        if len(gradient_aP) <= self.first:
            return
        if len(gradient_aP) < self.last:
            self._shrink(len(gradient_aP))
        for name, gradient in self._parts(gradient_aP).items():
            self.parameters[name].grad = gradient
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()

    def _parts(self, matrix: Tensor) -> dict[str, Tensor]:
        """What the optimizer sees of a matrix, by the name of the first tensor in it."""
        if self.whole:
            return self.flat.of(self.first, matrix)
        return dict(zip(self.heads, self.flat.columns(matrix[self.first : self.last], self.heads), strict=True))

    def _shrink(self, last: int) -> None:
        """Go on with the first rows: those of the state, where it has rows."""
        self.last, before = last, self.parameters
        self.parameters = self._parts(self.flat.values_KP)
        for group, (name, new) in zip(self.optimizer.param_groups, self.parameters.items(), strict=True):
            old = before[name]
            self.optimizer.state[new] = {
                key: value[: len(new)] if isinstance(value, Tensor) and value.shape == old.shape else value
                for key, value in self.optimizer.state.pop(old, {}).items()
            }
            group["params"] = [new]
