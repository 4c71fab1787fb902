"""The head of a merged model solved anew, by a calibrator that works from sums over all training samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedsim.core import config as configs
from fedsim.core import rng
from fedsim.core.contracts import Calibrator
from fedsim.core.defaults import torch_defaults
from fedsim.core.errors import ClientFailed, ConfigError
from fedsim.core.messages import ClientJob, ClientUpdate, RoundPlan, Tensors
from fedsim.core.sums import summed
from fedsim.finished import OpenedRun
from fedsim.merging.sources import Sources


def solved(sources: Sources, deployed: Tensors, calibrator: str | Mapping[str, Any]) -> Tensors:
    """The merged model with the head that a calibrator makes at a task's end, task after task, all of them through this model.

    Every client of every source that took part tells what the calibrator asks for of its samples: no old sums of other features
    are in it, as they are in a run. Samples that several runs trained on count once for each of them.
    Raises ConfigError for a calibrator that repairs in rounds only, and for runs of different tasks.
    """
    run = sources.run
    section = configs.expand("calibrators", calibrator, "calibrator")
    rule: Calibrator = configs.build("calibrators", section)
    classes = run.parts.manifest.task_classes
    for other in sources.runs:
        if other.parts.manifest.task_classes != classes:
            raise ConfigError(f"{other.dir.path} and {run.dir.path} have other tasks: a calibrator goes through them one by one")
    state: Any = rule.init()
    for task in run.tasks:
        seen = classes[: task + 1]
        plan = rule.closing(state, seen)
        if plan is None:
            raise ConfigError(
                f"calibrator {section['name']} repairs after rounds, of which there are none here: use lda or ridge"
            )
        with torch_defaults(run.config.runtime.threads):
            told = (u for other in sources.runs for u in _updates(other, task, deployed, plan))
            total = summed(map(rule.lift, told))
            draw = rng.torch_stream(run.config.seed, "calibrate", task, run.config.server.rounds)
            state = rule.end_task(state, deployed, total, seen, draw)
    return run.answering(rule.deployed(state, deployed))


def _updates(run: OpenedRun, task: int, deployed: Tensors, plan: RoundPlan) -> Iterator[ClientUpdate]:
    """What a task's clients tell. Raises the failure of the first that fails."""
    for client in run.participants(task):
        told = run.worker.train_client(ClientJob(client, task, run.config.server.rounds, deployed, plan))
        if isinstance(told, ClientFailed):
            raise told
        yield told
