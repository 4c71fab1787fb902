"""The runs of a sweep on Ray: one task per run, as many at a time as cores and GPUs allow.

A run that fails is tried again where that may help, and then left; the rest goes on. Whatever stops this process (Ctrl-C,
kill -9, a full disk), the runs that are finished stay, and the others go on from their last round when the sweep starts again.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import ray
from filelock import Timeout

from clients import cluster
from fedsim.core.config import SimConfig
from fedsim.core.errors import ConfigError, PoolError, StorageError
from fedsim.core.files import in_use
from fedsim.core.home import ROOT, ours_first
from fedsim.sweeps.job import Cost, JobResult, lock_of, note_failure
from fedsim.sweeps.plan import Launch, PlannedRun, SweepPlan

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
    outcome: JobResult
    attempt: int
    again: bool = False


@dataclass(frozen=True)
class Tick:
    """Nothing happened for `LOOK_S` seconds: a display may look at the runs that go."""


SweepEvent: TypeAlias = Begun | Ended | Tick


def execute(plan: SweepPlan, runs: Sequence[PlannedRun]) -> Iterator[SweepEvent]:
    """Make these runs, `launch.jobs` at a time.

    Raises PoolError when Ray does not start, StorageError for a folder that cannot be written.
    """
    with _ray(plan.launch, runs) as jobs:
        submit = _tasks("perform", plan.launch, jobs)
        waiting = deque((run, 1) for run in runs)
        elsewhere: list[PlannedRun] = []
        going: dict[Any, tuple[PlannedRun, int]] = {}
        while waiting or going or elsewhere:
            while waiting and len(going) < jobs:
                run, attempt = waiting.popleft()
                going[submit(run, plan.folder, run.entry, attempt)] = (run, attempt)
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


def measure(launch: Launch, runs: Sequence[PlannedRun], told: Callable[[PlannedRun, Cost], None]) -> int:
    """Play one round of each of these runs, side by side as the sweep would; each in a process of its own, for its memory.

    told: hears of each as it ends. Returns how many runs would go at a time. Raises ConfigError, with the error in one line, as
    soon as one fails.
    """
    with _ray(launch, runs) as jobs:
        submit = _tasks("measure", launch, jobs, max_calls=1)
        waiting, going = deque(runs), dict[Any, PlannedRun]()
        while waiting or going:
            while waiting and len(going) < jobs:
                run = waiting.popleft()
                going[submit(run)] = run
            (ref,), _ = ray.wait(list(going), num_returns=1)
            run = going.pop(ref)
            try:
                found: Cost | str = ray.get(ref)
            except ray.exceptions.RayError as e:
                found = cluster.last_line(e)
            if isinstance(found, str):
                raise ConfigError(f"{run.label} fails in its first round: {found}")
            told(run, found)
        return jobs


def num_jobs(launch: Launch, runs: Sequence[PlannedRun], resources: Mapping[str, float]) -> int:
    """Runs at a time: as asked, or as many of the largest as cores, GPUs and memory allow; one when their clients are on Ray."""
    if launch.jobs != "auto":
        return int(launch.jobs)
    if launch.pool == "ray":
        return 1
    room = [resources.get(name, 0.0) / amount for run in runs for name, amount in needs(launch, run).items() if amount]
    return max(1, math.floor(min(room) + 1e-9))


def needs(launch: Launch, run: PlannedRun) -> dict[str, float]:
    """What one run reserves of a machine, by Ray's names; with pool ray, its workers reserve for themselves."""
    if launch.pool == "ray":
        return {"CPU": 0, "GPU": 0.0, "memory": 0.0}
    gpus = float(launch.gpus) if launch.gpus != "auto" else 0.0 if run.config.runtime.device == "cpu" else 1.0
    return {"CPU": run.config.runtime.threads, "GPU": gpus, "memory": (launch.memory_gb or 0.0) * 1e9}


@contextmanager
def _ray(launch: Launch, runs: Sequence[PlannedRun]) -> Iterator[int]:
    """Ray for the time of the sweep; the number of runs at a time. Raises PoolError when a run would wait for ever."""
    owned = not ray.is_initialized()
    if owned:
        threads = max(run.config.runtime.threads for run in runs)
        cluster.start(launch.address, threads * (1 if launch.jobs == "auto" else launch.jobs), "fedsim run goes without Ray")
    try:
        machines = cluster.machines()
        for run in runs:
            need = {name: amount for name, amount in needs(launch, run).items() if amount}
            if not any(all(machine.get(name, 0.0) >= amount for name, amount in need.items()) for machine in machines):
                wanted = ", ".join(f"{name} {amount:g}" for name, amount in need.items())
                raise PoolError(
                    f"{run.label} wants {wanted}, and Ray has no such machine: lower launch.gpus, launch.memory_gb or "
                    "runtime.threads"
                )
        yield num_jobs(launch, runs, cluster.resources())
    finally:
        if owned:
            ray.shutdown()


def _on_ray(launch: Launch, run: PlannedRun, jobs: int) -> SimConfig:
    """The config with a number of workers that all runs at a time can have at once.

    A run that got some of its workers only would hold them, and wait for the others for ever.
    """
    runtime = run.config.runtime
    if launch.pool != "ray":
        return run.config
    room = int(cluster.resources().get("CPU", 1.0) // (jobs * runtime.threads))
    if room < 1 or (runtime.workers != "auto" and runtime.workers > room):
        raise PoolError(
            f"{jobs} runs at a time with runtime.workers={runtime.workers} of {runtime.threads} threads want more cores than Ray "
            "has: lower launch.jobs or runtime.workers"
        )
    workers = room if runtime.workers == "auto" else runtime.workers
    return replace(run.config, runtime=replace(runtime, workers=workers))


def _tasks(name: str, launch: Launch, jobs: int, **options: Any) -> Callable[..., Any]:
    """A function of `fedsim.sweeps.job` as a Ray task: called with a run and more, it gets the run's config and that.

    It travels by value, see `fedsim.core.home.ours_first`.
    """

    def work(root: str, put_first: Callable[[str], None], command: list[str], name: str, cores: int, *arguments: Any) -> Any:
        os.environ["OMP_NUM_THREADS"] = str(cores)  # before torch is imported
        sys.argv[:] = command  # what the run notes as its command line
        put_first(root)
        import importlib

        return getattr(importlib.import_module("fedsim.sweeps.job"), name)(*arguments)

    first, remote = ours_first(), ray.remote(**options, max_retries=0)(work)

    def submit(run: PlannedRun, *arguments: Any) -> Any:
        need = needs(launch, run)
        task = remote.options(num_cpus=need["CPU"], num_gpus=need["GPU"], memory=int(need["memory"]) or None)
        config = _on_ray(launch, run, jobs)
        return task.remote(ROOT, first, sys.argv, name, config.runtime.threads, config, *arguments)

    return submit


def _outcome(ref: Any, folder: Path, run: PlannedRun, attempt: int) -> JobResult:
    try:
        outcome: JobResult = ray.get(ref)
        return outcome
    except ray.exceptions.RayError as e:  # the process died: out of memory, or killed
        error = f"its process died: {cluster.last_line(e)} (out of memory? fewer launch.jobs)"
        note_failure(folder, run.entry, error, attempt)
        return JobResult("failed", error=error)


def _free(folder: Path, run: PlannedRun) -> bool:
    try:
        lock = lock_of(folder, run.entry)
        lock.acquire(blocking=False)
    except (Timeout, StorageError):
        return False
    lock.release()
    return not in_use(folder / run.entry.folder)
