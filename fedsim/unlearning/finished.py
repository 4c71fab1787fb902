"""A finished run, with what it kept of its clients."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fedsim import suitable
from fedsim.core import config as configs
from fedsim.core.contracts import BESIDE, Adapter
from fedsim.core.errors import RunDirError
from fedsim.core.messages import Tensors
from fedsim.core.names import HEAD
from fedsim.core.tensors import matching
from fedsim.finished import OpenedRun, read_tensors
from server import sampling
from server.isolation import ALONE
from server.learners import of_others


class FinishedRun(OpenedRun):
    """A finished run with what it kept of its clients. Raises RunDirError if it is missing, damaged or unfinished."""

    @property
    def affine(self) -> bool:
        """Whether the adapter's features are affine in its tensors."""
        adapter: Adapter = configs.build("adapters", self.config.adapter)
        return "affine features" in adapter.traits.gives

    @property
    def composed(self) -> bool:
        """Whether its model holds every client's module by itself, so that some can be left out."""
        return "keeps every module" in self.consolidator.traits.gives

    def classes(self, task: int) -> list[Sequence[int]]:
        """Head rows of every task up to this one."""
        return list(self.parts.manifest.task_classes[: task + 1])

    def told(self, task: int) -> list[int]:
        """Clients with samples that a calibrator heard in the pass at the task's end."""
        if self.calibrator is None or self.calibrator.closing(self.state.calibrator, self.classes(task)) is None:
            return []
        manifest, server = self.parts.manifest, self.config.server
        drawn = sampling.taking_part(self.config, task, server.rounds, manifest.num_clients, in_pass=True)
        return [c for c in drawn if manifest.sizes[task][c]]

    def contributors(self, task: int) -> list[int]:
        """Clients of which something is in the model: they took part in a round, or were heard at the task's end."""
        return sorted({*self.participants(task), *self.told(task)})

    def orphans(self, clients: Collection[int], tasks: Collection[int] | None = None) -> list[str]:
        """Names of the classes of which nobody is left who held samples and contributed, without these clients in these tasks
        (None: in all)."""
        found: dict[bool, set[int]] = {True: set(), False: set()}
        manifest = self.parts.manifest
        for task in self.tasks:
            for client in self.contributors(task):
                gone = client in clients and (tasks is None or task in tasks)
                held = manifest.histograms[task][client].nonzero()[0]
                found[gone].update(manifest.task_classes[task][int(k)] for k in held)
        return [manifest.class_names[row] for row in sorted(found[True] - found[False])]

    @cached_property
    def not_exact(self) -> str | None:
        """Why leaving clients out, or merging the task vectors of those who remain, is not what a run without the others would
        have given; None if it is.

        It is where learners tell clients nothing of each other, if the model is composed of clients. If it is merged, the vectors
        must be the very updates that the rule merged too, nothing else may have gone into the model, and what clients of a task
        start from, as far as they look at it, must not depend on who took part before.
        """
        told = of_others(configs.build_learners(self.config.client.learners))
        if told:
            return f"by learner {told[0]} clients learn of each other, so that who remains knows something of those who leave"
        return None if self.composed else _not_exact(self)

    def shares(self, task: int) -> dict[int, float]:
        """p_k = n_k / Σ n over the clients that took part in the task."""
        sizes = self.parts.manifest.sizes[task]
        part = self.participants(task)
        return {c: float(sizes[c] / sizes[part].sum()) for c in part}

    def vectors(self, task: int, name: str) -> dict[str, Tensor]:
        """Tensors that the run kept, in its parameters' order. Raises RunDirError if it kept none, or the file is damaged."""
        path = self.dir.vectors(task, name)
        alone = [f for f in self.state.failures if f.task == task and f.stage.startswith(ALONE)]
        if not path.is_file() and name in {f"client-{f.client_id}" for f in alone}:
            raise RunDirError(f"{name} failed when it trained by itself in task {task}, so {self.dir.path} has no vector of it")
        if not path.is_file():
            why = "a file is missing" if self.config.server.unlearning else "it was not told to"
            raise RunDirError(
                f"{self.dir.path} kept no vectors of its clients ({why}: {path.relative_to(self.dir.path)}): "
                "run it again with server.unlearning=true"
            )
        found = read_tensors(path, "run it again with server.unlearning=true")
        place = {name: i for i, name in enumerate(self.state.params)}  # files know no order, rules may go by it
        return dict(sorted(found.items(), key=lambda item: place.get(item[0], len(place))))


def _not_exact(run: FinishedRun) -> str | None:
    server, rule, consolidator = run.config.server, run.parts.rule, run.consolidator
    if server.rounds != 1:
        return "it takes one round per task: in a second one clients start from what the others did in the first"
    start = run.vectors(0, "start")
    plan = rule.plan(rule.init(start), 0)
    if plan.statistics or server.calibrator is not None:
        return "the model was merged with statistics of the clients, of which nothing is kept"
    if any("rule remembers tasks" in part.traits.gives for part in suitable.chosen_parts(run.config, rule)):
        return "the rule goes on in every task from what it knows of the clients of earlier ones"
    alone = set(run.vectors(0, f"client-{run.participants(0)[0]}"))
    if not alone.issubset(matching(start, plan.train)):
        return "the rule has clients train a part of the tensors only, and by themselves they train all"
    if len(run.tasks) > 1 and BESIDE in consolidator.traits.gives:
        return "clients train on top of the modules of past tasks, which are made of all clients"
    fresh = consolidator.init()
    if consolidator.opening(fresh, start) is not None or consolidator.plan(fresh, start) is not None:
        return "the consolidator merged with statistics that are sums over clients"
    return next((why for task in run.tasks if (why := _looks_back(run, task, start))), None)


def _looks_back(run: FinishedRun, task: int, first: Tensors) -> str | None:
    """Why a task's clients see something of who took part in the tasks before; None if they do not."""
    start, rows = run.vectors(task, "start"), torch.tensor(run.parts.manifest.task_classes[task])
    fresh = run.fresh_module(task)
    if task and any(not same(t, fresh.get(n)) for n, t in start.items() if n.startswith("adapter.")):
        return "its modules do not start anew in every task"
    heads = [n for n in start if n.startswith(HEAD)]
    if any(not torch.equal(start[n][rows], first[n][rows]) for n in heads):
        return "tasks share classes, so that a task starts from what the client left in the head"
    for client in run.participants(task):
        own = run.vectors(task, f"client-{client}")
        for name in heads:
            moved = (own[name] != start[name]).flatten(1).any(1) if own[name].dim() > 1 else own[name] != start[name]
            moved[rows] = False
            if bool(moved.any()):
                return "clients changed the head's rows of other tasks (by their loss, or by weight decay)"
    return None


def same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and torch.equal(a, b)
