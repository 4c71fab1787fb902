"""A run's deployed model as an object: what goes in is read as in training, what comes out are logits and names of classes."""

# N samples, C classes that the model knows, K most likely ones

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim.core import config as configs
from fedsim.core import hardware
from fedsim.core.config import RuntimeConfig, SimConfig
from fedsim.core.defaults import torch_defaults
from fedsim.core.errors import ConfigError, DataError
from fedsim.core.messages import Tensors
from fedsim.core.names import HEAD, HEAD_UNKNOWN
from fedsim.core.tensors import with_prefix
from fedsim.core.work import seen_classes
from fedsim.exports.inputs import Reader
from fedsim.finished import DeployedRun
from fedsim.models import backbone as backbones
from fedsim.models import model as models
from fedsim.models.logits import columns
from fedsim.models.model import Model
from fedsim.runs.results import Results


class DeployedModel:
    """The model that a run deployed, at its end or after an earlier task. Made by `load_model`.

    classes: names of the classes that it knows, in the order of the logits' columns; without those of which nobody told the
    calibrator, if nobody trained their rows of the head either. tasks: by task, the names of its classes.
    after_task: the last task that it has learned, 0-based.

    Images are uint8 arrays (N, H, W) or (N, H, W, C), lists of such images of any sizes, of Pillow's or of paths; texts are
    lists of strings, or a mapping with `input_ids` and `attention_mask` (N, L). They are resized, normalised or tokenised as
    they were in the run.
    """

    def __init__(self, run: DeployedRun, config: SimConfig, model: Model, params: Tensors, after_task: int) -> None:
        manifest = run.manifest
        self.run = run
        self._config = config
        self.model = model
        self.params = params
        self.after_task = after_task
        unknown = set(params[HEAD_UNKNOWN].nonzero()[:, 0].tolist() if HEAD_UNKNOWN in params else ())
        self.rows = [row for row in seen_classes(manifest.task_classes, after_task) if row not in unknown]
        self.classes = tuple(manifest.class_names[row] for row in self.rows)
        seen = [[row for row in rows if row not in unknown] for rows in manifest.task_classes[: after_task + 1]]
        self.tasks = tuple(tuple(manifest.class_names[row] for row in rows) for rows in seen)
        self._of_task = [[self.rows.index(row) for row in rows] for rows in seen]
        self.reader = Reader(run.config, model.backbone)
        self._merged = ExitStack()
        self._moved: Tensors | None = None

    @property
    def config(self) -> SimConfig:
        """The run's, with the runtime that the model is on."""
        return self._config

    @property
    def config_as_it_was(self) -> SimConfig:
        """The run's."""
        return self.run.config

    def logits(self, inputs: Any) -> Tensor:
        """(N, C), float32 on the CPU. Raises DataError or ModelError for inputs that the model cannot read."""
        return self._each_batch(inputs, self._logits)

    def features(self, inputs: Any) -> Tensor:
        """What the head is given, (N, D), float32 on the CPU."""
        return self._each_batch(inputs, self._features)

    def probabilities(self, inputs: Any, task: int | None = None) -> Tensor:
        """The softmax of the logits, (N, C); over the classes of a task alone, (N, its classes), where it is told."""
        logits_NC = self.logits(inputs)
        return (logits_NC if task is None else columns(logits_NC, self.columns(task))).softmax(dim=1)

    def predict(self, inputs: Any, task: int | None = None) -> list[str]:
        """The name of the most likely class of every sample; among the classes of a task where it is told."""
        return [guesses[0][0] for guesses in self.top(inputs, 1, task)]

    def top(self, inputs: Any, k: int = 5, task: int | None = None) -> list[list[tuple[str, float]]]:
        """The K most likely classes of every sample with their probabilities, the likeliest first; all if there are fewer."""
        if k < 1:
            raise ConfigError(f"the number of classes to name must be at least 1, got {k}")
        names = self.classes if task is None else self.tasks[self._known(task)]
        found = self.probabilities(inputs, task).topk(min(k, len(names)), dim=1)
        return [
            [(names[c], p) for c, p in zip(places, values, strict=True)]
            for places, values in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]

    def columns(self, task: int) -> list[int]:
        """Those of the logits that are a task's classes. Raises ConfigError for a task that the model has not learned."""
        return self._of_task[self._known(task)]

    def _known(self, task: int) -> int:
        if not 0 <= task <= self.after_task:
            learned = f"tasks 0 to {self.after_task}" if self.after_task else "task 0 alone"
            raise ConfigError(f"task {task} is none that the model has learned: it knows {learned}")
        if not self.tasks[task]:
            raise ConfigError(f"of task {task} the model knows no class: nobody trained their rows of the head or told of them")
        return task

    def _each_batch(self, inputs: Any, make: Callable[[Tensors], Tensor]) -> Tensor:
        """What is made of all batches, in the order of the samples."""
        batches = self.reader.batches(inputs, self.config.runtime.eval_batch)
        found: list[tuple[Sequence[int], Tensor]] = []
        with torch_defaults(torch.get_num_threads()), torch.inference_mode():
            for places, some in batches:
                found.append((places, make({n: t.to(self.model.device) for n, t in some.items()}).float().cpu()))
        if not found:
            raise DataError("there are no inputs: give at least one")
        out = torch.empty(sum(len(places) for places, _ in found), *found[0][1].shape[1:])
        for places, made in found:
            out[list(places)] = made
        return out

    def _features(self, inputs: Tensors) -> Tensor:
        self._on_device()
        return self.model.features(inputs, lean=True)

    def _logits(self, inputs: Tensors) -> Tensor:
        return columns(self.model.logits(self._features(inputs), self._on_device()), self.rows)

    def _on_device(self) -> Tensors:
        """The tensors on the device; merged into the model the first time."""
        if self._moved is None:
            self._moved = {n: t.to(self.model.device) for n, t in self.params.items()}
            self._merged.enter_context(self.model.merged(self._moved))
        return self._moved

    def release(self) -> None:
        """The backbone as it was before anything was merged into it."""
        self._merged.close()
        self._moved = None

    def of_rows(self) -> dict[str, Tensor]:
        """The head's tensors with the rows of the classes that it knows, and those that all classes have in common."""
        own = {n: t[self.rows] for n, t in with_prefix(self.params, HEAD).items() if n != HEAD_UNKNOWN}
        return own | dict(self.model.fixed)

    def __repr__(self) -> str:
        return f"<{'; '.join(f'{what}: {value}' for what, value in self.__rich_repr__())}>"

    def __rich_repr__(self) -> Iterator[tuple[str, str]]:
        config, results = self.config, Results.load(self.run.dir.path)
        row = [a for a in results.accuracy[self.after_task, : self.after_task + 1] if a == a]
        yield "model", f"{config.adapter['name']} on {config.model.backbone}, head {config.head['name']}"
        yield "run", str(self.run.dir.path)
        yield "reads", self.reader.says
        yield "classes", f"{len(self.classes)} ({', '.join(self.classes[:5])}{', …' if len(self.classes) > 5 else ''})"
        yield "tasks", f"{self.after_task + 1} of {self.run.manifest.num_tasks} ({config.stream.name})"
        yield "average accuracy", f"{sum(row) / len(row):.2f} %" if row else "not tested"


def load_model(run: str | Path, after_task: int | None = None, device: str = "auto") -> DeployedModel:
    """The model that a finished run deployed; the data that it was trained on are not needed.

    run: its directory. after_task: as it was after that task (0-based), of a run with `server.keep: tasks`; None: at the end.
    device: cpu, cuda, …; auto: a GPU if there is one.
    Raises RunDirError for a run that is missing, damaged, unfinished or did not keep the task's model, ConfigError for a task
    that it does not have, ModelError for a backbone that is not there, RunDirError for one with other weights.
    """
    chosen = configs.resolve_device(device)
    hardware.require_device(chosen)
    return opened(run, after_task, lambda runtime: _on(runtime, chosen))


def opened(run: str | Path, after_task: int | None, runtime: Callable[[RuntimeConfig], RuntimeConfig]) -> DeployedModel:
    """The same, on the backbone as another runtime has it. A GPU's memory is taken when it is first asked."""
    found = DeployedRun(run)
    last = found.manifest.num_tasks - 1
    task = last if after_task is None else after_task
    params = found.deployed_after(task)
    config = dataclasses.replace(found.config, runtime=runtime(found.config.runtime))
    with torch_defaults(config.runtime.threads):
        backbone = backbones.load(config.model, hashed=True)
        found.dir.require_backbone(backbone.digest)
        model = models.build(config, len(found.manifest.class_order), config.runtime.device, backbone)
    return DeployedModel(found, config, model, params, task)


def _on(runtime: RuntimeConfig, device: str) -> RuntimeConfig:
    """The run's own runtime where it ran on such a device, else what suits this one."""
    if torch.device(device).type == torch.device(runtime.device).type:
        kernels = runtime.kernels if runtime.kernels == "torch" else "auto"
        return dataclasses.replace(runtime, device=device, kernels=configs.resolve_kernels(kernels, device))
    return dataclasses.replace(runtime, device=device, kernels=configs.resolve_kernels("auto", device))
