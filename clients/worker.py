"""What a pool runs in each of its processes: the model and the data, loaded once, and three kinds of work."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from clients import fused, local
from clients.lower_states import queries_of
from clients.samples import Samples
from clients.server_work import ServerWork
from clients.work import Received, Work, moved, round_shard
from fedsim.core import config as configs
from fedsim.core import plugins, rng
from fedsim.core.contracts import CALIBRATOR, RULE, Aggregator, Calibrator, IntArray, Learner, lifts_of
from fedsim.core.errors import ClientFailed
from fedsim.core.messages import Bundle, ClientJob, ClientUpdate, EvalJob, EvalResult, Reply, RoundPlan, ServerJob, State, Tensors
from fedsim.core.sums import PartSums
from fedsim.core.wire import Chain
from fedsim.core.work import WorkSpec, seen_classes
from fedsim.models import model as models
from fedsim.models.logits import predict


class Worker:
    """Holds no client state between jobs, so any worker may run any client. Pools call it under `torch_defaults`."""

    def __init__(self, spec: WorkSpec) -> None:
        device = torch.device(configs.resolve_device(spec.config.runtime.device))
        self.spec = spec
        self.model = models.build(spec.config, num_classes(spec), device)
        self.learners: dict[str, Learner] = configs.build_learners(spec.config.client.learners)
        self.chain = Chain.of(spec.config)
        self.train_samples = Samples(spec.train, device)
        self.test_samples = Samples(spec.test, device)
        self._told = set[str]()  # notes, without their numbers
        self._received: tuple[Tensors, RoundPlan, Received] | None = None  # of the latest round: as it came, and on the device
        self._rule: Aggregator | None = None
        self._calibrator: Calibrator | None = None
        self._source: Tensors | None = None  # what is merged into the model now, as it came and on the device
        self._deployed: Tensors | None = None
        self._merged = ExitStack()

    def train(self, start: int, jobs: Sequence[ClientJob]) -> Bundle:
        """The rounds of clients that lie side by side, the first at place `start`; summed here if they say so.

        One client alone goes as it is: its update is half the bytes of a sum in float64.
        """
        reply, totals, notes = jobs[0].reply, None, list[str]()
        together = self.spec.config.runtime.fused
        results = self._fused(jobs, notes) if together else tuple(self.train_client(job) for job in jobs)
        if len(jobs) > 1 and reply.sums:
            with suppress(Exception):  # a rule that cannot lift an update: the server will try, and say what is wrong
                totals = self._summed(results, reply)
        if totals is not None:
            results = tuple(r.summed(r.client_id in reply.observed) if is_update(r) else r for r in results)
        return Bundle(start, results, totals, tuple(notes))

    def train_client(self, job: ClientJob) -> ClientUpdate | ClientFailed:
        """One client's round."""
        self.restore()
        result = local.train(self._work(job))
        return self.chain.sent(job, result) if is_update(result) else result

    @torch.inference_mode()
    def evaluate(self, job: EvalJob) -> EvalResult:
        """Counts of right predictions on a slice of one task's test samples, with merged weights."""
        positions = self.spec.test_of(job.task)[job.start : job.stop]
        params = self._merge(job.params)
        features, labels = self._test_features(positions, params)
        logits = self.model.logits(features, params)
        guess, guess_in_task = (predict(logits, classes) for classes in (job.seen, self.spec.task_classes[job.task]))
        right_in_task = int((guess_in_task == labels).sum())
        by_class = class_counts(guess.cpu().numpy(), labels.cpu().numpy())
        return EvalResult(job.task, sum(c[1] for c in by_class), right_in_task, len(positions), by_class)

    def _test_features(self, positions: IntArray, params: Tensors) -> tuple[Tensor, Tensor]:
        """Features and labels of test samples. Where nothing is ever put into the model, features stay, and are computed once."""
        inputs, labels = self.test_samples.batch(positions)
        runtime, key = self.spec.config.runtime, ("features", positions.tobytes())
        stays = runtime.cache and self.model.untouched_blocks(params) == self.model.depth
        features: Tensor | None = self.test_samples.cache.get(key) if stays else None
        if features is None:
            known = queries_of(self.model, self.test_samples, positions, runtime)
            features = self.model.features(inputs, lean=True, query=None if known is None else known.states)
            if stays:
                self.test_samples.cache.put(key, features)
        return features, labels

    def make(self, job: ServerJob) -> State:
        """What the server trains by itself for one learner."""
        self.restore()
        spec, config = self.spec, self.spec.config
        draw = rng.torch_stream(config.seed, "server", f"learner {job.learner}", job.task)
        fresh = self.model.init_adapter(rng.torch_stream(config.seed, "adapter", 0)) | self.model.init_head()
        params, fresh = (moved(tensors, self.model.device) for tensors in (job.params, fresh))
        seen = seen_classes(spec.task_classes, job.task)
        shapes = {name: array.shape[1:] for name, array in spec.train.inputs.items()}
        work = ServerWork(self.model, config, job.task, seen, params, fresh, shapes, draw)
        return self.learners[job.learner].made(job.state, work)

    def _fused(self, jobs: Sequence[ClientJob], notes: list[str]) -> tuple[ClientUpdate | ClientFailed, ...]:
        """The rounds of several clients in one forward and backward."""
        self.restore()

        def tell(note: str) -> None:
            alike = re.sub(r"[0-9]+", "#", note)  # the same reason in bundles of other sizes is said once
            if alike not in self._told:
                self._told.add(alike)
                notes.append(note)

        results = fused.train([self._work(job) for job in jobs], tell)
        return tuple(self.chain.sent(j, r) if is_update(r) else r for j, r in zip(jobs, results, strict=True))

    def _work(self, job: ClientJob) -> Work:
        spec = self.spec
        shard = round_shard(spec.shard(job.task, job.client_id), spec.config, job)
        classes, seen = spec.task_classes[job.task], seen_classes(spec.task_classes, job.task)
        received = self._on_device(job)
        return Work(self.model, self.train_samples, shard, classes, seen, job, spec.config, received, self.learners)

    def _on_device(self, job: ClientJob) -> Received:
        """What the job was sent; moved once for all jobs of a round."""
        known = self._received
        if known is None or known[0] is not job.params or known[1] is not job.plan:
            known = self._received = job.params, job.plan, Received.on(self.model.device, job.params, job.plan)
        return known[2]

    def _summed(self, results: Sequence[ClientUpdate | ClientFailed], reply: Reply) -> dict[str, Tensors] | None:
        rule = self._known_rule() if RULE in reply.sums else None
        calibrator = self._known_calibrator() if CALIBRATOR in reply.sums else None
        lifts = lifts_of(reply.sums, rule, calibrator, self.learners)
        if lifts is None:
            return None
        sums = PartSums(lifts)
        for place, result in enumerate(results):
            sums.add(place, result if is_update(result) else None)
        return sums.result()

    def _known_rule(self) -> Aggregator | None:
        """The run's rule; None if it was given as a Python object, or its file was edited since the run began: the server, which
        has it, then sums."""
        section = self.spec.config.server.aggregator
        if self._rule is None and not configs.is_python_object(section) and self._files_are_as_they_were():
            self._rule = configs.build_aggregator(section)
        return self._rule

    def _known_calibrator(self) -> Calibrator | None:
        """The run's calibrator, under the same condition."""
        section = self.spec.config.server.calibrator
        if self._calibrator is None and section is not None and self._files_are_as_they_were():
            self._calibrator = configs.build("calibrators", section)
        return self._calibrator

    def _files_are_as_they_were(self) -> bool:
        return all(plugins.fingerprint(path) == known for path, known in self.spec.user_files)

    def _merge(self, params: Tensors) -> Tensors:
        """Merge these tensors into the model, if they are not there yet; the tensors on the device."""
        if self._deployed is None or self._source is not params:  # all slices of an evaluation come with the same mapping
            self.restore()
            on_device = {n: t.to(self.model.device) for n, t in params.items()}
            self._merged.enter_context(self.model.merged(on_device))
            self._deployed, self._source = on_device, params
        return self._deployed

    def restore(self) -> None:
        """The model as it was before anything was merged into it."""
        self._merged.close()
        self._deployed, self._source = None, None


def is_update(result: ClientUpdate | ClientFailed) -> TypeGuard[ClientUpdate]:
    """Whether a client came to its end."""
    return isinstance(result, ClientUpdate)


def num_classes(spec: WorkSpec) -> int:
    """Number of rows of the head: all classes of the stream."""
    return 1 + max(c for classes in spec.task_classes for c in classes)


def class_counts(guess_b: IntArray, labels_b: IntArray) -> tuple[tuple[int, int, int, int], ...]:
    """(class, right, predicted, total) of every class among predictions and labels, ascending."""
    size = 1 + int(max(guess_b.max(initial=0), labels_b.max(initial=0)))
    right, predicted, total = (np.bincount(c, minlength=size) for c in (labels_b[guess_b == labels_b], guess_b, labels_b))
    return tuple((int(c), int(right[c]), int(predicted[c]), int(total[c])) for c in np.flatnonzero(predicted + total))
