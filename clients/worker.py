"""What a pool runs in each of its processes: the model and the data, loaded once, and two kinds of work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from clients import local
from clients.samples import Samples
from fedsim.core import config as configs
from fedsim.core.contracts import WorkSpec
from fedsim.core.errors import ClientFailed
from fedsim.core.messages import ClientJob, ClientUpdate, EvalJob, EvalResult
from fedsim.models import model as models
from fedsim.models.head import predict


class Worker:
    """Holds no client state between jobs, so any worker may run any client. Torch's threads are the pool's business."""

    def __init__(self, spec: WorkSpec) -> None:
        device = resolve_device(spec.config.runtime.device)
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
        right, right_in_task = (
            int((predict(logits, classes) == labels).sum()) for classes in (job.seen, self.spec.task_classes[job.task])
        )
        return EvalResult(job.task, right, right_in_task, len(positions))


def num_classes(spec: WorkSpec) -> int:
    """Number of rows of the head: all classes of the stream."""
    return 1 + max(c for classes in spec.task_classes for c in classes)


def resolve_device(name: str) -> torch.device:
    """The device that "auto" stands for: the GPU if there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch with this many threads for a while: a matrix product's bits depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
