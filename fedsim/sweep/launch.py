"""The runs of a sweep on Ray: one task per run, as many at a time as cores and GPUs allow.

A run that fails is tried again where that may help, and then left; the rest goes on. Whatever stops this process (Ctrl-C,
kill -9, a full disk), the runs that are finished stay, and the others go on from their last round when the sweep starts again.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import ray
from filelock import Timeout

from clients import cluster
from fedsim.core.errors import PoolError, RunDirError
from fedsim.results import Results, RunDir
from fedsim.sweep.job import Cost, Outcome, lock_of, note_failure
from fedsim.sweep.plan import Launch, PlannedRun, SweepPlan

LOOK_S = 1.0  # how often runs are looked at that another sweep is making, and the display is given a turn


@dataclass(frozen=True)
class Begun:
    """A run was handed out; `attempt` counts from 1."""

    run: PlannedRun
    attempt: int


@dataclass(frozen=True)
class Ended:
    """What became of an attempt; `again`: it is going to be tried once more."""

    run: PlannedRun
    outcome: Outcome
    attempt: int
    again: bool = False


@dataclass(frozen=True)
class Tick:
    """Nothing happened for `LOOK_S` seconds: a display may look at the runs that go."""


Event: TypeAlias = Begun | Ended | Tick


def finished(plan: SweepPlan) -> list[PlannedRun]:
    """The runs of a sweep that need not be made: they lie in the folder, finished."""

    def there(run: PlannedRun) -> bool:
        path = plan.folder / run.entry.folder
        try:
            return RunDir.open(path).finished and Results.load(path).finished
        except RunDirError:
            return False

    return [run for run in plan.runs if there(run)]


def execute(plan: SweepPlan, runs: Sequence[PlannedRun]) -> Iterator[Event]:
    """Make these runs, `launch.jobs` at a time.

    Raises PoolError when Ray does not start, StorageError for a folder that cannot be written.
    """
    with _ray(plan.launch, runs[0]) as jobs:
        task = _task("perform", plan.launch, runs[0])
        waiting = deque((run, 1) for run in runs)
        elsewhere: list[PlannedRun] = []
        going: dict[Any, tuple[PlannedRun, int]] = {}
        while waiting or going or elsewhere:
            while waiting and len(going) < jobs:
                run, attempt = waiting.popleft()
                going[task(run.config, plan.folder, run.entry, attempt)] = (run, attempt)
                yield Begun(run, attempt)
            done, _ = ray.wait(list(going), num_returns=1, timeout=LOOK_S) if going else ([], [])
            for ref in done:
                run, attempt = going.pop(ref)
                outcome = _outcome(ref, plan.folder, run, attempt)
                if outcome.state == "elsewhere":
                    elsewhere.append(run)
                again = outcome.state == "failed" and not outcome.final and attempt <= plan.launch.retry
                if again:
                    waiting.append((run, attempt + 1))
                yield Ended(run, outcome, attempt, again)
            if not done:
                yield Tick()
                if not going:
                    time.sleep(LOOK_S)
            for run in [run for run in elsewhere if _free(plan.folder, run)]:  # its maker ended, well or not
                elsewhere.remove(run)
                waiting.append((run, 1))


def measure(launch: Launch, runs: Sequence[PlannedRun]) -> tuple[int, list[Cost | str]]:
    """Play one round of each of these runs, side by side as the sweep would; each in a process of its own, for its memory.

    Returns how many runs would go at a time, and per run its cost or the error, in one line.
    """
    with _ray(launch, runs[0]) as jobs:
        task = _task("measure", launch, runs[0], max_calls=1)
        waiting, going = deque(range(len(runs))), dict[Any, int]()
        costs: list[Cost | str] = [""] * len(runs)
        while waiting or going:
            while waiting and len(going) < jobs:
                index = waiting.popleft()
                going[task(runs[index].config)] = index
            (ref,), _ = ray.wait(list(going), num_returns=1)
            index = going.pop(ref)
            try:
                costs[index] = ray.get(ref)
            except ray.exceptions.RayError as e:
                costs[index] = cluster.last_line(e)
        return jobs, costs


def num_jobs(launch: Launch, run: PlannedRun, resources: Mapping[str, float]) -> int:
    """Runs at a time: as asked, or what cores, GPUs and memory allow."""
    if launch.jobs != "auto":
        return int(launch.jobs)
    if launch.pool == "ray":
        return 1
    room = [resources.get("CPU", 1) // run.config.runtime.threads]
    gpus = num_gpus(launch, run)
    if gpus:
        room.append(resources.get("GPU", 0) // gpus)
    if launch.memory_gb:
        room.append(resources.get("memory", 0) // (launch.memory_gb * 1e9))
    return max(1, int(min(room)))


def num_gpus(launch: Launch, run: PlannedRun) -> float:
    """GPUs that one run reserves."""
    if launch.gpus == "auto":
        return 0.0 if run.config.runtime.device == "cpu" or launch.pool == "ray" else 1.0
    return float(launch.gpus)


@contextmanager
def _ray(launch: Launch, run: PlannedRun) -> Iterator[int]:
    """Ray for the time of the sweep; the number of runs at a time."""
    owned = not ray.is_initialized()
    if owned:
        jobs = 0 if launch.jobs == "auto" else launch.jobs
        cluster.start(launch.address, jobs * run.config.runtime.threads, "a single run goes without Ray: fedsim run")
    try:
        resources = cluster.resources()
        if num_gpus(launch, run) > resources.get("GPU", 0.0):
            raise PoolError(
                f"each run wants {num_gpus(launch, run):g} GPUs, but Ray has {resources.get('GPU', 0.0):g}: set launch.gpus, or "
                f"runtime.device=cpu"
            )
        yield num_jobs(launch, run, resources)
    finally:
        if owned:
            ray.shutdown()


def _task(name: str, launch: Launch, run: PlannedRun, **options: Any) -> Callable[..., Any]:
    """A function of `fedsim.sweep.job` as a Ray task. It travels by value, see `cluster.ours_first`."""

    def work(root: str, put_first: Callable[[str], None], command: list[str], name: str, cores: int, *arguments: Any) -> Any:
        os.environ["OMP_NUM_THREADS"] = str(cores)  # before torch is imported
        sys.argv[:] = command  # what the run notes as its command line
        put_first(root)
        import importlib

        return getattr(importlib.import_module("fedsim.sweep.job"), name)(*arguments)

    threads = run.config.runtime.threads
    options |= {"num_cpus": 0 if launch.pool == "ray" else threads, "num_gpus": num_gpus(launch, run), "max_retries": 0}
    if launch.memory_gb:
        options["memory"] = int(launch.memory_gb * 1e9)
    remote = ray.remote(**options)(work)
    first = cluster.ours_first()
    return lambda *arguments: remote.remote(cluster.ROOT, first, sys.argv, name, threads, *arguments)


def _outcome(ref: Any, folder: Path, run: PlannedRun, attempt: int) -> Outcome:
    try:
        outcome: Outcome = ray.get(ref)
        return outcome
    except ray.exceptions.RayError as e:  # the process died: out of memory, or killed
        error = f"its process died: {cluster.last_line(e)} (out of memory? fewer launch.jobs)"
        note_failure(folder, run.entry, error, attempt)
        return Outcome("failed", error=error)


def _free(folder: Path, run: PlannedRun) -> bool:
    lock = lock_of(folder, run.entry)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    lock.release()
    return True
