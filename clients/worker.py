"""What a pool runs in each of its processes: the model and the data, loaded once, and two kinds of work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from clients import local
from clients.samples import Samples
from fedsim.core import config as configs
from fedsim.core.contracts import IntArray, WorkSpec
from fedsim.core.errors import ClientFailed
from fedsim.core.messages import ClientJob, ClientUpdate, EvalJob, EvalResult
from fedsim.models import model as models
from fedsim.models.head import predict


class Worker:
    """Holds no client state between jobs, so any worker may run any client. Torch's threads are the pool's business."""

    def __init__(self, spec: WorkSpec) -> None:
        device = torch.device(configs.resolve_device(spec.config.runtime.device))
        self.spec = spec
        self.model = models.build(spec.config, num_classes(spec), device)
        self.objectives = [configs.build("objectives", o) for o in spec.config.client.objectives]
        self.train_samples = Samples(spec.train, device)
        self.test_samples = Samples(spec.test, device)

    def train(self, job: ClientJob) -> ClientUpdate | ClientFailed:
        """One client's round."""
        spec = self.spec
        shard = local.round_shard(spec.shard(job.task, job.client_id), spec.config, job)
        return local.train(self.model, self.train_samples, shard, spec.task_classes[job.task], job, spec.config, self.objectives)

    @torch.inference_mode()
    def evaluate(self, job: EvalJob) -> EvalResult:
        """Counts of right predictions on a slice of one task's test samples, with merged weights."""
        positions = self.spec.test_of(job.task)[job.start : job.stop]
        params = {n: t.to(self.model.device) for n, t in job.params.items()}
        inputs, labels = self.test_samples.batch(positions)
        with self.model.merged(params):
            logits = self.model.logits(self.model.features(inputs), params)
        guess, guess_in_task = (predict(logits, classes) for classes in (job.seen, self.spec.task_classes[job.task]))
        right_in_task = int((guess_in_task == labels).sum())
        by_class = class_counts(guess.cpu().numpy(), labels.cpu().numpy())
        return EvalResult(job.task, sum(c[1] for c in by_class), right_in_task, len(positions), by_class)


def num_classes(spec: WorkSpec) -> int:
    """Number of rows of the head: all classes of the stream."""
    return 1 + max(c for classes in spec.task_classes for c in classes)


def class_counts(guess_b: IntArray, labels_b: IntArray) -> tuple[tuple[int, int, int, int], ...]:
    """(class, right, predicted, total) of every class among predictions and labels, ascending."""
    size = 1 + int(max(guess_b.max(initial=0), labels_b.max(initial=0)))
    right, predicted, total = (np.bincount(c, minlength=size) for c in (labels_b[guess_b == labels_b], guess_b, labels_b))
    return tuple((int(c), int(right[c]), int(predicted[c]), int(total[c])) for c in np.flatnonzero(predicted + total))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch with this many threads for a while: a matrix product's bits depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
