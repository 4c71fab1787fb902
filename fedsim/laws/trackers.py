"""The laws that every tracker keeps: it takes what it is told, of a run that is stopped and gone on in too, and moves nothing.

A tracker is told of made-up runs of a few rounds, in empty folders that are deleted afterwards. It does what it does with any
run: one that sends to a server sends.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from fedsim.core.contracts import Outcome, Recording, TrackedRun, Tracker
from fedsim.laws.comparing import expect_unchanged, same
from fedsim.laws.frame import Law, LawBroken

ROUNDS = 3
CONFIG: Mapping[str, Any] = {
    "name": "made up: π, α = 0.5",
    "seed": 3,
    "data": {"source": "synthetic", "path": None, "words": ["a", "b"]},
    "client": {"lr": 1e-3, "learners": [{"name": "er", "size": 20}, {"name": "lwf", "labels": "x" * 600}]},
    "server": {"aggregator": [{"match": "*", "name": "fedavg"}], "unlearning": False},
}
VALUES: Mapping[str, float] = {
    "accuracy/task_0": 97.5,
    "round/loss": 1e-30,
    "traffic/up": 3e12,
    "drift/cosine/head": -1.0,
    "none": 0,
}


@contextmanager
def a_folder() -> Iterator[Path]:
    """For the run directories of a law."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            yield Path(folder) / "runs"
        finally:
            os.chdir(before)


def a_run(folder: Path, name: str = "one") -> TrackedRun:
    """A new run, in a directory of its own."""
    (folder / name).mkdir(parents=True)
    return TrackedRun(name, f"0123abcd-{uuid.uuid4().hex[:8]}", "0123abcd" * 8, folder / name, deepcopy(CONFIG), False)


def log(recording: Recording, first: int, last: int) -> None:
    """Some rounds; in the last one a task ends."""
    for step in range(first, last):
        recording.log(step, dict(VALUES))
    recording.log(last - 1, {f"task_end/{name}": value for name, value in VALUES.items()})


# ---------------------------------------------------------------- the laws


def _takes(tracker: Tracker) -> None:
    tracker.check()
    with a_folder() as folder:
        for outcome in get_args(Outcome):
            recording = tracker.open(a_run(folder, outcome))
            log(recording, 0, ROUNDS)
            recording.close(outcome)


def _goes_on(tracker: Tracker) -> None:
    with a_folder() as folder:
        run = a_run(folder)
        for resumed, outcome in ((False, "interrupted"), (True, "failed"), (True, "finished")):
            again = TrackedRun(run.name, run.id, run.identity, run.path, deepcopy(CONFIG), resumed)
            recording = tracker.open(again)
            log(recording, ROUNDS * resumed, ROUNDS * (1 + resumed))
            recording.close(outcome)  # type: ignore[arg-type]


def _nothing_said(tracker: Tracker) -> None:
    with a_folder() as folder:
        tracker.open(a_run(folder)).close("interrupted")


def _side_by_side(tracker: Tracker) -> None:
    with a_folder() as folder:
        recordings = [tracker.open(a_run(folder, name)) for name in ("one", "other")]
        for step in range(ROUNDS):
            for recording in recordings:
                recording.log(step, dict(VALUES))
        for recording in recordings:
            recording.close("finished")


def _no_mutation(tracker: Tracker) -> None:
    with a_folder() as folder:
        run, values = a_run(folder), dict(VALUES)
        recording = tracker.open(run)
        recording.log(0, values)
        recording.close("finished")
        expect_unchanged({"config": run.config, "values": values}, {"config": CONFIG, "values": dict(VALUES)}, "one round")


def _no_trace(tracker: Tracker) -> None:
    """In this process, which is the run's."""
    before = _process()
    with a_folder() as folder:
        recording = tracker.open(a_run(folder))
        log(recording, 0, ROUNDS)
        told = _process()
        recording.close("finished")
        closed = _process()
    for when, found in (("while it is told", told), ("once it is closed", closed)):
        if odd := [name for name, value in before.items() if not same(found[name], value)]:
            raise LawBroken(f"{when}, {odd[0]} is no more what it was: it moves what the run draws or does")


def _process() -> dict[str, Any]:
    """What all of a process shares, and a run's numbers or its end may depend on."""
    return {
        "Python's generator": list(random.getstate()[1]),
        "numpy's generator": np.random.get_state(legacy=False)["state"],  # noqa: NPY002 (a tracker's package may use it)
        "torch's generator": torch.get_rng_state(),
        "the number of torch's threads": torch.get_num_threads(),
        "torch's default type": str(torch.get_default_dtype()),
        "the working directory": os.getcwd(),
        "the handler of Ctrl-C": repr(signal.getsignal(signal.SIGINT)),
        "the handler of SIGTERM": repr(signal.getsignal(signal.SIGTERM)),
    }


LAWS: tuple[Law[Tracker], ...] = (
    Law("takes", "it opens a run, takes any finite number of any name, and every outcome", _takes),
    Law("goes_on", "a run that was interrupted or failed is opened again under the same id, and goes on", _goes_on),
    Law("nothing_said", "a run that ends before its first round is closed without trouble", _nothing_said),
    Law("side_by_side", "two runs are recorded at once", _side_by_side),
    Law("no_mutation", "the config and the numbers that it is handed are not changed", _no_mutation),
    Law("no_trace", "generators, torch's settings, working directory and signal handlers stay as they are", _no_trace),
)
