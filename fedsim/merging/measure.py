"""What a model knows: percent right on every task's test samples, as a run is evaluated at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core.defaults import torch_defaults
from fedsim.core.messages import EvalJob, Tensors
from fedsim.core.names import HEAD
from fedsim.finished import OpenedRun
from fedsim.merging.sources import Source, Sources
from server.evaluation import slices

Percent = float | None  # None: there is nothing to judge


@dataclass(frozen=True)
class Measured:
    """Percent right by task: the argmax over all classes that the model learned, and, with the task told, over the task's own.

    None for a task without test samples, and, with the task told, for one of which the model learned no class.
    """

    name: str
    class_incremental: Sequence[Percent]
    task_told: Sequence[Percent]

    @property
    def average(self) -> Percent:
        """Of class_incremental over the tasks: the final average accuracy."""
        return _mean(self.class_incremental)

    @property
    def average_told(self) -> Percent:
        """The same with the task told; None if the model did not learn all of them."""
        tested = [told for own, told in zip(self.class_incremental, self.task_told, strict=True) if own is not None]
        return None if None in tested else _mean(tested)


def measure(run: OpenedRun, name: str, deployed: Tensors, classes: Sequence[int] | None = None) -> Measured:
    """A model on the test samples of a run's tasks, in the slices in which the run itself is evaluated.

    classes: head rows that it learned, ascending (None: all that the run learned).
    """
    spec, batch = run.parts.spec, run.config.runtime.eval_batch
    known = list(run.learned if classes is None else classes)
    own, told = list[Percent](), list[Percent]()
    with torch_defaults(run.config.runtime.threads):
        for task in run.tasks:
            size = len(spec.test_of(task))
            found = [run.worker.evaluate(EvalJob(task, a, b, deployed, known)) for a, b in slices(size, batch)]
            learned = bool(set(known) & set(spec.task_classes[task]))
            own.append(100 * sum(r.correct for r in found) / size if size else None)
            told.append(100 * sum(r.correct_in_task for r in found) / size if size and learned else None)
    return Measured(name, own, told)


def measure_source(sources: Sources, source: Source) -> Measured:
    """One of those that are merged, by itself: a run over the classes that it learned, a task's module with the run's head over
    all that the run learned."""
    known = sources.classes if sources.of_tasks else source.classes
    return measure(sources.run, source.who, padded(source.params, sources.run), known)


def remarks(sources: Sources, rows: Sequence[Measured]) -> list[str]:
    """What must be said of runs that are not measured as they were at their end."""
    if sources.of_tasks:
        return []
    found = []
    for source, row in zip(sources.members, rows, strict=False):
        now, then = row.class_incremental[: len(source.run.tasks)], source.run.final
        if source.run.tasks == sources.run.tasks and list(now) != then:
            told = " and ".join(f"{_mean(values):.2f}" for values in (now, then))
            found.append(f"{source.who}: measured here and at its end, its average is {told}: another machine or version made it")
    return found


def padded(params: Tensors, run: OpenedRun) -> dict[str, Tensor]:
    """A model with as many head rows as the run has; those that it lacks are zeros, and not asked."""
    rows = run.parts.model.num_classes
    heads = {n: t for n, t in params.items() if n.startswith(HEAD) and len(t) < rows}
    return {**params, **{n: torch.cat([t, t.new_zeros(rows - len(t), *t.shape[1:])]) for n, t in heads.items()}}


def _mean(values: Sequence[Percent]) -> Percent:
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else None
