"""A finished run: opened with what it deployed, or with all that it takes to evaluate it again."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from torch import Tensor

from clients.samples import Samples
from clients.worker import Worker
from fedsim import simulation
from fedsim.core import config as configs
from fedsim.core.config import SimConfig
from fedsim.core.contracts import Aggregator, ArraySplit, Calibrator, Consolidator
from fedsim.core.defaults import torch_defaults
from fedsim.core.errors import ConfigError, DataError, RunDirError
from fedsim.core.messages import Tensors
from fedsim.core.names import HEAD_UNKNOWN
from fedsim.core.work import seen_classes
from fedsim.data import manifest as manifests
from fedsim.data.manifest import Manifest
from fedsim.runs.directory import RunDir
from fedsim.simulation import Prepared
from server import checkpoint, heads, sampling
from server.beneath import model_of
from server.isolation import ALONE
from server.state import ServerState


class DeployedRun:
    """A finished run with what it deployed; its data are not read. Raises RunDirError if it is missing, damaged or unfinished."""

    def __init__(self, path: str | Path) -> None:
        self.dir = RunDir.open(path)
        if not self.dir.finished:
            raise RunDirError(f"{self.dir.path} is not finished: finish it first with fedsim run --resume {self.dir.path}")
        if configs.is_python_object(self.dir.config.server.aggregator):
            raise RunDirError(f"{self.dir.path} was merged by a rule that was a Python object, which nobody can build again")
        self.config: SimConfig = self.dir.config
        self.consolidator: Consolidator = configs.build("consolidators", self.config.server.consolidator)
        calibrator = self.config.server.calibrator
        self.calibrator: Calibrator | None = None if calibrator is None else configs.build("calibrators", calibrator)
        with torch_defaults(self.config.runtime.threads):
            self.state: ServerState = checkpoint.load(self.dir.checkpoint, self.dir.identity)

    @cached_property
    def rule(self) -> Aggregator:
        """What merged its clients."""
        rule: Aggregator = configs.build_aggregator(self.config.server.aggregator)
        return rule

    @cached_property
    def manifest(self) -> Manifest:
        """Its tasks and classes, as they are written in its folder. Raises RunDirError for a file that was changed."""
        path = self.dir.path / "manifest.json"
        try:
            found = manifests.load(path)
        except DataError as e:
            raise RunDirError(str(e)) from e
        if found.hash != self.dir.manifest_hash:
            raise RunDirError(f"{path} is another one than the run began with: copy the run's folder again")
        return found

    @property
    def deployed(self) -> Tensors:
        """What the run was evaluated with at its end."""
        return self.repaired(self.before_repair)

    def deployed_after(self, task: int) -> Tensors:
        """What it was evaluated with at the end of a task (0-based). Raises ConfigError for a task that there is not, and
        RunDirError where the run did not keep it, or the file is damaged."""
        last = self.manifest.num_tasks - 1
        if not 0 <= task <= last:
            raise ConfigError(f"task {task} is not in the run, which has tasks 0 to {last}")
        if task == last:
            return self.deployed
        path = self.dir.vectors(task, "deployed")
        if not path.is_file():
            raise RunDirError(
                f"{self.dir.path} did not keep the model that it had after task {task}: run it again with server.keep=tasks"
            )
        return read_tensors(path, "run it again with server.keep=tasks")

    @property
    def before_repair(self) -> Tensors:
        """The same with the head as it was trained: what clients looked through in a calibrator's last pass."""
        with torch_defaults(self.config.runtime.threads):
            module = model_of(self.rule, self.state.aggregator, self.state.params, self.state.beneath)
            return self.consolidator.deployed(self.state.consolidator, module, finished=True)

    def repaired(self, deployed: Tensors) -> Tensors:
        """With what a calibrator, and learners, made of the head for the last task's end, if they made anything."""
        with torch_defaults(self.config.runtime.threads):
            if self.calibrator is not None:
                deployed = self.calibrator.deployed(self.state.calibrator, deployed)
            for name, learner in configs.build_learners(self.config.client.learners).items():
                deployed = learner.deployed(self.state.learners[name], deployed)
        return self.answering(deployed)

    def answering(self, deployed: Tensors) -> Tensors:
        """With the rows that are no answer named, see `server.heads.answering`."""
        seen = seen_classes(self.manifest.task_classes, self.manifest.num_tasks - 1)
        return heads.answering(self.state.first_head, deployed, seen)


class OpenedRun(DeployedRun):
    """A finished run with all that it takes to evaluate it again. Raises RunDirError if it is missing, damaged or unfinished."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.parts: Prepared = simulation.prepare_again(self.dir)
        self._samples: dict[int, Samples] = {}
        self.tasks = range(len(self.parts.manifest.task_names))

    @cached_property
    def worker(self) -> Worker:
        """The model and the data as a process has them that runs the run's clients, and evaluates."""
        with torch_defaults(self.config.runtime.threads):
            return Worker(self.parts.spec)

    @cached_property
    def learned(self) -> list[int]:
        """Head rows of the classes of which somebody who took part held training samples, ascending; without those that are no
        answer, since nobody trained them or told of them."""
        spec, found = self.parts.spec, set[int]()
        for task in self.tasks:
            for client in self.participants(task):
                found.update(spec.train.labels[spec.shard(task, client)].tolist())
        unknown = self.deployed.get(HEAD_UNKNOWN)
        return sorted(found if unknown is None else found.difference(unknown.nonzero()[:, 0].tolist()))

    @property
    def final(self) -> list[float | None]:
        """Percent right by task at the run's end, over all classes; None for a task without test samples."""
        ends = [r for r in self.state.rows if r.stage == "task_end" and r.task == self.tasks[-1]]
        return [100 * r.correct / r.total if r.total else None for r in sorted(ends, key=lambda r: r.tested)]

    def fresh_module(self, task: int) -> Tensors:
        """The `adapter.*` tensors that a task's new module started with."""
        return simulation.fresh_adapter(self.config, self.parts.model, task)

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

    def samples(self, split: ArraySplit) -> Samples:
        """A split on the model's device, put there once."""
        if id(split) not in self._samples:
            self._samples[id(split)] = Samples(split, self.parts.model.device)
        return self._samples[id(split)]


def read_tensors(path: Path, advice: str) -> dict[str, Tensor]:
    """The tensors of a file that a run kept. Raises RunDirError, with the advice, when it is damaged."""
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as e:
        raise RunDirError(f"{path} is damaged ({type(e).__name__}): {advice}") from e
