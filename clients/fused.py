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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from clients import local, optim
from clients.learning import Learning, asked_for, fitting, with_foreign
from clients.lower_states import Kept, queries_of
from clients.work import Work
from fedsim.core import ranks
from fedsim.core.config import ClientConfig
from fedsim.core.contracts import IntArray, Outputs, Slots
from fedsim.core.errors import ClientFailed, ModelError, one_line
from fedsim.core.messages import ClientUpdate, Tensors
from fedsim.core.tensors import require_finite
from fedsim.models.logits import masked_cross_entropies
from fedsim.models.model import Model

# Each number goes its own way, and what they share depends on nothing but the number of steps: clients may share a tensor.
ELEMENTWISE = frozenset(("adadelta", "adagrad", "adam", "adamw", "adamax", "asgd", "nadam", "radam", "rmsprop", "rprop", "sgd"))
CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_

_fitting: WeakKeyDictionary[Model, int] = WeakKeyDictionary()  # most clients that went through a model after memory ran out


def obstacle(work: Work) -> str | None:
    """Why clients cannot be trained together with this model and these learners; None if they can."""
    model = work.model
    if not model.stacks:
        return f"the adapter {type(model.adapter).__module__} has no method 'stacked'"
    for name, module in model.backbone.encoder.named_modules():
        mixes = isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
        if mixes:
            return f"layer '{name}' of the backbone normalises over the batch, so clients would see each other's samples"
    learners = {**work.learners, **asked_for(work.plan, list(work.job.params))}
    blocks = next((f"learner {n} looks at the encoder's blocks" for n, learner in learners.items() if learner.blocks), None)
    return blocks or next((f"learner {n}: {learner.alone}" for n, learner in learners.items() if learner.alone), None)


def bundles(steps: Sequence[int], most: int) -> list[list[int]]:
    """Places of clients that train together: at most `most` in as few bundles as can be, of equal size, longest first.

    Clients with like numbers of steps come together, so that few finish early. Depends on nothing else: the same clients make
    the same bundles.
    """
    order = sorted(range(len(steps)), key=lambda k: (-steps[k], k))
    if not order:
        return []
    return [part.tolist() for part in np.array_split(np.array(order), math.ceil(len(order) / most))]


def train(works: Sequence[Work], tell: Callable[[str], None] = lambda note: None) -> list[ClientUpdate | ClientFailed]:
    """What `local.train` gives for every piece of work, in their order, up to rounding.

    All are of one model, task and round: their jobs have the same `params` and `plan`. As many clients train together as fit:
    when the device's memory runs out, the bundle is halved and trained again, down to one by one, and later bundles start at what
    did fit. Whatever else goes wrong in a bundle is left to `local.train`, which says which client it was. The metric
    `together` is the number of clients that an update was trained with; `tell` is told why clients were not trained together.
    """
    if not works:
        return []
    first, results = works[0], dict[int, ClientUpdate | ClientFailed]()
    if any(work.job.params is not first.job.params or work.plan is not first.plan for work in works):
        raise ValueError("clients that train together start from the same tensors and have the same plan")
    model, apart = first.model, obstacle(first)
    if apart is not None and first.trained and len(works) > 1:
        tell(f"clients are trained one by one, whatever runtime.fused says: {apart}")
    working = [k for k, work in enumerate(works) if work.steps] if apart is None else []
    queue = [[working[k] for k in part] for part in bundles([works[k].steps for k in working], _fitting.get(model, len(works)))]
    while queue:
        places = queue.pop(0)
        if len(places) == 1:
            continue
        own, short_of_memory = [works[k] for k in places], False
        try:
            results |= zip(places, Together(own).train(), strict=True)
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
    for k, work in enumerate(works):
        if k not in results:
            results[k] = local.train(work)
    return [results[k] for k in range(len(works))]


class Together:
    """Clients that train together, longest first, so that those still training are always the first ones."""

    def __init__(self, works: Sequence[Work]) -> None:
        first = works[0]
        self.works, self.model, self.samples, self.params = works, first.model, first.samples, first.received.params
        self.client, self.classes, self.trained = first.config.client, first.classes, first.trained
        self.steps = [work.steps for work in works]
        by_group = sorted(self.trained, key=lambda n: optim.group_of(self.client, n))
        starts = [work.params for work in works]
        self.flat = Flat({n: self.params[n] for n in by_group}, len(works))
        self.flat.begin(starts, self.params)
        self.lacking_KP = self.flat.marked([ranks.beyond(self.params, work.rank) for work in works])
        self.learning = [Learning(work) for work in works]
        self.looks, self.replaces, self.corrects = (getattr(self.learning[0], what) for what in ("looks", "replaces", "corrects"))
        self.augment = [work.draw("augment", self.model.device) for work in works]
        runtime = first.config.runtime
        found = [None if self.model.augments else queries_of(self.model, self.samples, w.shard, runtime) for w in works]
        self.kept = [Kept(queries=of_client) for of_client in found]

    def train(self) -> list[ClientUpdate | ClientFailed]:
        """Every client's update, in their order. A client with numbers that are not finite fails alone."""
        start = time.perf_counter()
        losses_KS = self.fit().cpu()
        updates_KP = self.flat.values_KP.cpu()  # one transfer for all clients; it waits for the device
        seconds = time.perf_counter() - start
        return [self._finished(k, losses_KS[k], updates_KP, seconds * s / sum(self.steps)) for k, s in enumerate(self.steps)]

    def fit(self) -> Tensor:
        """Train `flat` in place; every client's loss at every one of its steps, (K, S)."""
        batches = [work.batches() for work in self.works]
        dropout = [work.draw("dropout", self.model.device) for work in self.works]
        optimizers = optimizers_of(self.client, self.flat, self.steps)
        losses_KS = self.flat.values_KP.new_zeros(len(self.works), self.steps[0])
        done = 0
        for end in sorted(set(self.steps)):  # until then the same clients train
            active = sum(s >= end for s in self.steps)
            leaves = self.flat.leaves(active)
            step_of = _Step(self, leaves, Slots(0, (), dropout=dropout[:active]))
            with step_of.frame:
                for step in range(done, end):
                    losses_K = step_of.losses([next(b) for b in batches[:active]])
                    losses_KS[:active, step] = losses_K.detach()
                    gradient_aP = self.flat.gradient(losses_K.sum(), leaves)
                    self._step(optimizers, gradient_aP)
            done = end
        return losses_KS

    def _step(self, optimizers: Sequence[Cohort], gradient_aP: Tensor) -> None:
        """Corrections, clipping and optimizer, every client by itself."""
        active = self.learning[: len(gradient_aP)]
        own = [self.flat.of(k, self.flat.values_KP) for k in range(len(active))] if self.learning[0].follows else []
        for k, tensors in enumerate(own if self.corrects else []):
            gradients = self.flat.of(k, gradient_aP)
            for name, new in active[k].corrected(gradients, tensors).items():
                if new is not gradients[name]:
                    gradients[name].copy_(new)
        if self.lacking_KP is not None:
            gradient_aP.masked_fill_(self.lacking_KP[: len(gradient_aP)], 0.0)
        if self.client.clip_norm is not None:
            norms_a1 = torch.linalg.vector_norm(gradient_aP, dim=1, keepdim=True)
            gradient_aP.mul_((self.client.clip_norm / (norms_a1 + CLIP_EPS)).clamp(max=1))
        for optimizer in optimizers:
            optimizer.step(gradient_aP)
        for k, tensors in enumerate(own):
            active[k].stepped(tensors)

    def _finished(self, k: int, losses_S: Tensor, updates_KP: Tensor, seconds: float) -> ClientUpdate | ClientFailed:
        start = time.perf_counter()
        work = self.works[k]
        job, shard = work.job, work.shard
        try:
            with local.stage("training"):
                loss = local.last_epoch(losses_S[: self.steps[k]], work.epochs)
            with local.stage("update"):
                own = {n: t.clone() for n, t in self.flat.of(k, updates_KP).items()}  # a view would travel with all the rest
                update, encoded = work.sends(own)
                require_finite(own, "trained tensor")
            with local.stage("statistics"):
                own = {**work.params, **self.flat.of(k, self.flat.values_KP)}
                memory, statistics = self.learning[k].end(own)
                memory = work.remembers(own, memory)
                statistics = {**statistics, **local.collect(work, own, self.kept[k])}
                require_finite(statistics, "statistic")
        except local.StageFailed as e:
            return ClientFailed(job.client_id, job.task, job.round, e.stage, e.reason)
        metrics = {"loss": loss, "seconds": seconds + time.perf_counter() - start, "together": float(len(self.works))}
        return ClientUpdate(job.client_id, len(shard), update, statistics, memory, metrics, encoded=encoded)


class _Step:
    """The losses of clients that train together, step by step: the first `a` of a bundle, from the same leaves."""

    def __init__(self, bundle: Together, leaves: dict[str, Tensor], slots: Slots) -> None:
        self.bundle, self.leaves, self.slots, model = bundle, leaves, slots, bundle.model
        self.params = {**bundle.params, **leaves}
        work = bundle.works[0]
        self.frame = local.Frame(work.on_past_modules, lambda: model.stacked(self.params, slots))
        self._inputs: Tensors = {}
        self._query: Tensor | None = None
        self._drawn: list[Tensor] | None = None
        self._common: dict[int, Outputs] = {}  # what the context's tensors make of all clients' samples

    def losses(self, own: Sequence[IntArray]) -> Tensor:
        """Each client's loss on its own batch, (a,). A short batch is filled with samples of its client, which do not count."""
        bundle, slots = self.bundle, self.slots
        positions, labels_ab = self._batch(own)
        looked = bundle.looks and bundle.model.augments
        self._drawn = [g.get_state() for g in bundle.augment[: len(own)]] if looked else None
        self._common = {}
        features, self._query = bundle.model.stacked_asked(self._inputs, slots, bundle.augment, self._known_queries(positions))
        features_abD = features.view(len(own), slots.width, -1)
        logits_abC = bundle.model.stacked_logits(features_abD, self.params)
        losses = [] if bundle.replaces else [self._cross_entropies(logits_abC, labels_ab, [len(p) for p in own])]
        if bundle.looks or bundle.model.has_loss:
            outputs = Outputs(features_abD, logits_abC)
            parts = {n: self.leaves[n].unbind() for n in bundle.trained}  # once: K looks cost K times as much backward
            losses.append(torch.stack([self._terms(k, positions[k], labels_ab, outputs, parts) for k in range(len(own))]))
        return sum(losses[1:], losses[0])

    def _batch(self, own: Sequence[IntArray]) -> tuple[list[IntArray], Tensor]:
        """Every client's positions, and the labels of the slots (a, b), whose inputs it notes."""
        bundle, slots = self.bundle, self.slots
        positions = [learning.joined(p) for learning, p in zip(bundle.learning, own, strict=False)]
        made = [learning.synthetic(p) for learning, p in zip(bundle.learning, positions, strict=False)]
        slots.rows = [len(p) + (len(m.labels) if m else 0) for p, m in zip(positions, made, strict=True)]
        slots.width = max(slots.rows)
        self._inputs, labels = bundle.samples.batch(np.concatenate([np.resize(p, slots.width) for p in positions]))
        for k, synthetic in enumerate(made):
            if synthetic is None:
                continue
            rows = slice(k * slots.width + len(positions[k]), k * slots.width + slots.rows[k])
            synthetic = fitting(synthetic, self._inputs, labels)
            for name, tensor in self._inputs.items():
                tensor[rows] = synthetic.inputs[name]
            labels[rows] = synthetic.labels
            positions[k] = with_foreign(positions[k], synthetic)
        return positions, labels.view(len(own), -1)

    def _known_queries(self, positions: Sequence[IntArray]) -> Tensor | None:
        """Of the whole batch, if those of all clients are at hand. What fills a slot may have any."""
        bundle, width, found = self.bundle, self.slots.width, list[Tensor]()
        for k, own in enumerate(positions):
            inputs = {n: t[k * width : (k + 1) * width] for n, t in self._inputs.items()}
            query = bundle.kept[k].query(bundle.model, inputs, np.resize(own, width))
            if query is None:
                return None
            found.append(query)
        return torch.cat(found)

    def _terms(
        self, k: int, positions: IntArray, labels_ab: Tensor, outputs: Outputs, parts: Mapping[str, Sequence[Tensor]]
    ) -> Tensor:
        """What the adapter and client k's learners add to its loss. parts: the clients' tensors."""
        rows, bundle, learning = self.slots.rows[k], self.bundle, self.bundle.learning[k]
        own = {n: clients[k] for n, clients in parts.items()}
        query = self._queries_of(k)
        of_adapter = learning.adapter_term({**bundle.params, **own}, query)
        terms = [] if of_adapter is None else [of_adapter]
        if bundle.looks:
            inputs = {n: t.view(len(self.slots.rows), -1, *t.shape[1:])[k, :rows] for n, t in self._inputs.items()}
            mine, other = Outputs(*(t[k, :rows] for t in outputs)), partial(self._other, k)
            terms += learning.terms(inputs, positions, labels_ab[k, :rows], mine, own, other, self.frame.left, query=query)
        return torch.stack(terms).sum() if terms else outputs.logits.new_zeros(())

    def _queries_of(self, k: int) -> Tensor | None:
        """Of client k's rows."""
        start = k * self.slots.width
        return None if self._query is None else self._query[start : start + self.slots.rows[k]]

    def _other(self, k: int, params: Tensors) -> Outputs:
        """Other tensors on client k's rows: in one pass for all clients where they are what all received."""
        rows, width, model, work = self.slots.rows[k], self.slots.width, self.bundle.model, self.bundle.works[k]
        received = work.received
        if any(params is told for told in (received.params, *received.context.values())):
            if id(params) not in self._common:
                self._common[id(params)] = local.through(work, self.frame, params, self._features, self.slots)
            common = self._common[id(params)]
            return Outputs(*(t[k * width : k * width + rows] for t in common))
        own = {n: t[k * width : k * width + rows] for n, t in self._inputs.items()}
        augment = None if self._drawn is None else local.redrawn(model, self._drawn[k])
        return local.through(work, self.frame, params, lambda: model.features(own, augment, True, self._queries_of(k)))

    def _features(self) -> Tensor:
        """Of the whole batch, augmented as before."""
        model = self.bundle.model
        again = [local.redrawn(model, drawn) for drawn in self._drawn or ()]
        return model.stacked_features(self._inputs, self.slots, again, self._query)

    def _cross_entropies(self, logits_abC: Tensor, labels_ab: Tensor, own: Sequence[int]) -> Tensor:
        """Each client's mean over its own samples, (a,): the first rows of its slot."""
        clients, width, _ = logits_abC.shape
        if min(own) == width:
            terms_ab = masked_cross_entropies(logits_abC.flatten(0, 1), labels_ab.flatten(), self.bundle.classes)
            return terms_ab.view(clients, width).mean(dim=1)
        rows_a1 = torch.tensor(own, device=logits_abC.device)[:, None]
        counted_ab = torch.arange(width, device=logits_abC.device) < rows_a1
        labels_ab = torch.where(counted_ab, labels_ab, labels_ab[:, :1])  # a replayed label may be none of the task's
        terms_ab = masked_cross_entropies(logits_abC.flatten(0, 1), labels_ab.flatten(), self.bundle.classes).view(clients, width)
        return (torch.where(counted_ab, terms_ab, 0) / rows_a1).sum(dim=1)


class Flat:
    """The tensors that K clients train as one matrix `values_KP`, a row per client: what goes on within a client's tensors
    (optimizer, norm) costs a few operations for all of them."""

    def __init__(self, tensors: Tensors, clients: int) -> None:
        self.shapes = {n: t.shape for n, t in tensors.items()}
        self.values_KP = torch.cat([t.detach().flatten() for t in tensors.values()]).repeat(clients, 1)

    def begin(self, starts: Sequence[Tensors], common: Tensors) -> None:
        """Every client from its own start, where that is another than the common one."""
        for k, start in enumerate(starts):
            for name, tensor in self.of(k, self.values_KP).items() if start is not common else ():
                tensor.copy_(start[name])

    def marked(self, masks: Sequence[Tensors]) -> Tensor | None:
        """Masks of some clients' tensors as one matrix (K, P); None where there are none."""
        if not any(masks):
            return None
        marked_KP = torch.zeros_like(self.values_KP, dtype=torch.bool)
        for k, of_client in enumerate(masks):
            for name, place in self.of(k, marked_KP).items():
                if name in of_client:
                    place.copy_(of_client[name])
        return marked_KP

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
