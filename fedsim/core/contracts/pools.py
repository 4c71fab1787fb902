"""Where clients run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

from fedsim.core.contracts.plugin import Plugin
from fedsim.core.messages import Bundle, ClientJob, EvalJob, EvalResult, ServerJob, State
from fedsim.core.work import WorkSpec


class Pool(Plugin, ABC):
    """Runs clients somewhere. Made with one `WorkSpec`.

    by_manifest: clients hold the shards that the manifest says; else one of which it says that it holds nothing may hold some.
    """

    by_manifest: ClassVar[bool] = True

    @classmethod
    def check(cls, spec: WorkSpec) -> None:
        """Before there is a run directory. Raises PoolError for what this machine cannot hold."""
        return

    @abstractmethod
    def train(self, jobs: Sequence[ClientJob]) -> Iterator[Bundle]:
        """Every job's result, each job alone or in blocks of `sums.BLOCK` that lie side by side; in any order. Jobs come longest
        first. A client's own failure is a result, a pool's is raised (PoolError). A pool may leave `Reply.sums` alone: the
        server then sums the updates, to the same bits."""

    @abstractmethod
    def evaluate(self, jobs: Sequence[EvalJob]) -> Iterator[EvalResult]:
        """One result per job, in any order."""

    @abstractmethod
    def make(self, job: ServerJob) -> State:
        """The learner's state after what the server trains by itself, in any one place where clients run."""

    @abstractmethod
    def close(self) -> None:
        """Give back workers and memory. May be called twice."""

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
