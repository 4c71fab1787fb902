"""A finished run, with all that it takes to evaluate it again."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from clients.samples import Samples
from fedsim import simulation
from fedsim.core import config as configs
from fedsim.core.config import SimConfig
from fedsim.core.contracts import Adapter, ArraySplit, Calibrator, Consolidator
from fedsim.core.defaults import torch_defaults
from fedsim.core.errors import RunDirError
from fedsim.core.messages import Tensors
from fedsim.core.names import HEAD
from fedsim.core.tensors import matching
from fedsim.runs.directory import RunDir
from fedsim.simulation import Prepared
from server import checkpoint, sampling
from server.isolation import ALONE
from server.learners import changes_model, hearing, wants_teacher
from server.state import ServerState


class FinishedRun:
    """A finished run with all that it takes to evaluate it again. Raises RunDirError if it is missing, damaged or unfinished."""

    def __init__(self, path: str | Path) -> None:
        self.dir = RunDir.open(path)
        if not self.dir.finished:
            raise RunDirError(f"{self.dir.path} is not finished: finish it first with fedsim run --resume {self.dir.path}")
        if configs.is_python_object(self.dir.config.server.aggregator):
            raise RunDirError(f"{self.dir.path} was merged by a rule that was a Python object, which nobody can build again")
        self.config: SimConfig = self.dir.config
        self.parts: Prepared = simulation.prepare_again(self.dir)
        self.consolidator: Consolidator = configs.build("consolidators", self.config.server.consolidator)
        calibrator = self.config.server.calibrator
        self.calibrator: Calibrator | None = None if calibrator is None else configs.build("calibrators", calibrator)
        with torch_defaults(self.config.runtime.threads):
            self.state: ServerState = checkpoint.load(self.dir.checkpoint, self.dir.identity)
        self._samples: dict[int, Samples] = {}
        self.tasks = range(len(self.parts.manifest.task_names))

    @property
    def affine(self) -> bool:
        """Whether the adapter's features are affine in its tensors."""
        adapter: Adapter = configs.build("adapters", self.config.adapter)
        return "affine features" in adapter.traits.gives

    @property
    def composed(self) -> bool:
        """Whether its model holds every client's module by itself, so that leaving some out is exact."""
        return "keeps every module" in self.consolidator.traits.gives

    @property
    def deployed(self) -> Tensors:
        """What the run was evaluated with at its end."""
        with torch_defaults(self.config.runtime.threads):
            module = self.parts.rule.deployed(self.state.aggregator, self.state.params)
            return self.repaired(self.consolidator.deployed(self.state.consolidator, module, finished=True))

    def repaired(self, deployed: Tensors) -> Tensors:
        """With the rows of the head that a calibrator made for the last task's end, if it made any."""
        return deployed if self.calibrator is None else self.calibrator.deployed(self.state.calibrator, deployed)

    def participants(self, task: int) -> list[int]:
        """Clients with samples that took part in a round of the task and did not fail in it."""
        return self._participants[task]

    @cached_property
    def _participants(self) -> list[list[int]]:
        return [self._took_part(task) for task in self.tasks]

    def _took_part(self, task: int) -> list[int]:
        server, manifest, found = self.config.server, self.parts.manifest, set[int]()
        failed = {(f.round, f.client_id) for f in self.state.failures if f.task == task and not f.stage.startswith(ALONE)}
        for round in range(server.rounds):
            drawn = sampling.taking_part(self.config, task, round, manifest.num_clients)
            found.update(c for c in drawn if (round, c) not in failed)
        return [c for c in sorted(found) if manifest.sizes[task][c]]

    @cached_property
    def not_exact(self) -> str | None:
        """Why merging the task vectors of those who remain is not what a run without the others would have given; None if it is.

        It is where the vectors are the very updates that the rule merged, nothing else went into the model, and what clients of a
        task start from, as far as they look at it, does not depend on who took part before.
        """
        return _not_exact(self)

    def shares(self, task: int) -> dict[int, float]:
        """p_k = n_k / Σ n over the clients that took part in the task."""
        sizes = self.parts.manifest.sizes[task]
        part = self.participants(task)
        return {c: float(sizes[c] / sizes[part].sum()) for c in part}

    def samples(self, split: ArraySplit) -> Samples:
        """A split on the model's device, put there once."""
        if id(split) not in self._samples:
            self._samples[id(split)] = Samples(split, self.parts.model.device)
        return self._samples[id(split)]

    def vectors(self, task: int, name: str) -> dict[str, Tensor]:
        """Tensors that the run kept. Raises RunDirError if it kept none, or the file is damaged."""
        from safetensors.torch import load_file

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
        try:
            return load_file(path)
        except Exception as e:
            raise RunDirError(f"{path} is damaged ({type(e).__name__}): run it again with server.unlearning=true") from e


def _not_exact(run: FinishedRun) -> str | None:
    server, rule, consolidator = run.config.server, run.parts.rule, run.consolidator
    if server.rounds != 1:
        return "it takes one round per task: in a second one clients start from what the others did in the first"
    start = run.vectors(0, "start")
    plan = rule.plan(rule.init(start), 0)
    if plan.statistics or server.calibrator is not None:
        return "the model was merged with statistics of the clients, of which nothing is kept"
    alone = set(run.vectors(0, f"client-{run.participants(0)[0]}"))
    if not alone.issubset(matching(start, plan.train)):
        return "the rule has clients train a part of the tensors only, and by themselves they train all"
    learners = configs.build_learners(run.config.client.learners)
    if hearing(learners) or wants_teacher(learners) or any(map(changes_model, learners.values())):
        return "what the learners of clients are told comes from other clients too"
    fresh = consolidator.init()
    if consolidator.opening(fresh, start) is not None or consolidator.plan(fresh, start) is not None:
        return "the consolidator merged with statistics that are sums over clients"
    return next((why for task in run.tasks if (why := _looks_back(run, task, start))), None)


def _looks_back(run: FinishedRun, task: int, first: Tensors) -> str | None:
    """Why a task's clients see something of who took part in the tasks before; None if they do not."""
    start, rows = run.vectors(task, "start"), torch.tensor(run.parts.manifest.task_classes[task])
    if task and any(same(t, run.vectors(task - 1, "end").get(n)) for n, t in start.items() if n.startswith("adapter.")):
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
