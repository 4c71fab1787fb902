"""The oracle of all pools: one client after the other, in this process. Easy to debug."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

from clients.pools._bundles import bundles
from clients.worker import Worker
from fedsim.core import contracts
from fedsim.core.defaults import torch_defaults
from fedsim.core.messages import Bundle, ClientJob, EvalJob, EvalResult, ServerJob, State
from fedsim.core.work import WorkSpec


def _loaded(job: ClientJob) -> ClientJob:
    """With what the client remembers, which is read when it goes out and not before."""
    return replace(job, memory=dict(job.memory.items()))


class Pool(contracts.Pool):
    """Runs jobs in order, with the same number of torch threads as a worker of any other pool has."""

    worker: ClassVar[type[Worker]] = Worker

    def __init__(self, spec: WorkSpec) -> None:
        self._threads = spec.config.runtime.threads
        self._fused = spec.config.runtime.fused
        with torch_defaults(self._threads):
            self._worker = self.worker(spec)

    def train(self, jobs: Sequence[ClientJob]) -> Iterator[Bundle]:
        for start, some in bundles(jobs, len(jobs), self._fused):
            loaded = [job if isinstance(job.memory, dict) else _loaded(job) for job in some]
            with torch_defaults(self._threads):
                bundle = self._worker.train(start, loaded)
            yield bundle

    def evaluate(self, jobs: Sequence[EvalJob]) -> Iterator[EvalResult]:
        for job in jobs:
            with torch_defaults(self._threads):
                result = self._worker.evaluate(job)
            yield result

    def make(self, job: ServerJob) -> State:
        with torch_defaults(self._threads):
            return self._worker.make(job)

    def close(self) -> None:
        pass
