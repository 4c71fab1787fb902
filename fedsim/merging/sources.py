"""What is merged after the fact: finished runs, or the tasks of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clients import local
from clients.learning import follows
from clients.work import Received, Work
from fedsim.core.contracts import IntArray
from fedsim.core.defaults import torch_defaults
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientJob, RoundPlan, StatisticRequest, Tensors
from fedsim.core.names import HEAD, HEAD_UNKNOWN
from fedsim.core.tensors import require_finite, with_prefix
from fedsim.core.work import seen_classes
from fedsim.finished import OpenedRun
from fedsim.merging import alike


@dataclass(frozen=True, eq=False)
class Source:
    """One of the models that are merged, with the data that it was trained on.

    who: as messages call it; key: what its own draws hang on, wherever it lies. params: its module and the head that goes with
    it. start: what the module was before it learned anything. tasks: of which its run's clients hold the training samples;
    classes: head rows that it learned; seen: those, and the rows of what its run had learned before.
    """

    who: str
    run: OpenedRun
    params: Tensors
    start: Tensors
    tasks: Sequence[int]
    classes: Sequence[int]
    seen: Sequence[int]
    key: str = ""
    _measured: dict[str, Tensors] = field(default_factory=dict, repr=False)

    def statistics(self, requests: Sequence[StatisticRequest], merged: Tensors | None = None) -> Tensors:
        """What a rule asks for, of the samples of everybody who took part in the tasks, through the source's own model: one pass
        without augmentation, as a client makes it. What was measured once is kept.

        merged: tensors that take the place of the source's own, for rules that merge part after part; then nothing is kept.

        Raises ConfigError for a statistic of the training, which is over.
        """
        found: dict[str, Tensors] = {}
        for request in requests:
            if follows(request):
                raise ConfigError(f"the rule asks for {request.name}, which follows the training: no finished run can tell it")
            key = repr(request)
            if merged is not None:
                found[key] = self._pass(request, {**self.params, **merged})
                continue
            if key not in self._measured:
                self._measured[key] = self._pass(request, self.params)
            found[key] = self._measured[key]
        return {name: t for told in found.values() for name, t in told.items()}

    def _pass(self, request: StatisticRequest, params: Tensors) -> Tensors:
        run, worker = self.run, self.run.worker
        plan = RoundPlan(train=(), statistics=(request,))
        job = ClientJob(0, self.tasks[-1], run.config.server.rounds, params, plan)
        received = Received.on(worker.model.device, params, plan)
        samples, shard = worker.train_samples, self._shard()
        work = Work(worker.model, samples, shard, self.classes, self.seen, job, run.config, received)
        with torch_defaults(run.config.runtime.threads):
            worker.restore()
            told = local.collect(work, received.params)
        require_finite(told, f"{self.who}: statistic")
        return told

    def _shard(self) -> IntArray:
        """Positions of the training samples of all who took part, client by client within a task."""
        run = self.run
        return np.concatenate([run.parts.spec.shard(t, c) for t in self.tasks for c in run.participants(t)])


@dataclass(frozen=True, eq=False)
class Sources:
    """What is merged. run: whose head, tasks and test samples are those of the result; of_tasks: whether they are its tasks."""

    run: OpenedRun
    members: Sequence[Source]
    of_tasks: bool = False

    @property
    def runs(self) -> list[OpenedRun]:
        """Those that are merged; the one, of tasks."""
        return [self.run] if self.of_tasks else [source.run for source in self.members]

    @property
    def classes(self) -> list[int]:
        """Head rows that some of them learned, ascending."""
        return sorted({c for source in self.members for c in source.classes})


def of_runs(runs: Sequence[OpenedRun | str | Path]) -> Sources:
    """Finished runs, each as it is deployed. Raises RunDirError for one that is missing, damaged or unfinished, and ConfigError
    unless they can be merged: see `fedsim.merging.alike`."""
    paths = [Path(r.dir.path if isinstance(r, OpenedRun) else r).resolve() for r in runs]
    if len(paths) < 2:
        raise ConfigError("one run alone is merged already: name two at least, or merge the tasks of one with --of tasks")
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"{path} is there twice: a run is merged with others")
    opened = [r if isinstance(r, OpenedRun) else OpenedRun(r) for r in runs]
    alike.require(opened)
    largest = max(opened, key=lambda run: len(run.parts.manifest.class_order))
    return Sources(largest, [_whole(run) for run in opened])


def of_tasks(run: OpenedRun | str | Path) -> Sources:
    """The tasks' modules of one finished run, each with the run's head. Raises ConfigError for a run whose consolidator keeps no
    module per task, and for one of a single task."""
    run = run if isinstance(run, OpenedRun) else OpenedRun(run)
    modules = run.consolidator.modules(run.state.consolidator)
    if len(modules) != len(run.tasks):
        raise ConfigError(
            f"{run.dir.path} has no module per task: its consolidator {run.config.server.consolidator['name']} keeps none; "
            "run it with server.consolidator mean, merged or regmean"
        )
    if len(modules) < 2:
        raise ConfigError(f"{run.dir.path} has one task, whose module is all there is: nothing to merge")
    head, classes = with_prefix(run.deployed, HEAD), run.parts.manifest.task_classes
    members = []
    for t, module in enumerate(modules):
        start = run.fresh_module(t)
        members.append(Source(f"task {t}", run, {**module, **head}, start, [t], classes[t], seen_classes(classes, t)))
    return Sources(run, members, of_tasks=True)


def _whole(run: OpenedRun) -> Source:
    """A run as one of those that are merged."""
    learned, tasks = run.learned, [t for t in run.tasks if run.participants(t)]
    params = {n: t for n, t in run.deployed.items() if n != HEAD_UNKNOWN}
    return Source(f"run {run.dir.path.name}", run, params, run.parts.state.params, tasks, learned, learned, run.dir.identity)
