"""One run of a sweep, as the process does it that the run is given to: held by a lock, so that no run is made twice."""

from __future__ import annotations

import json
import time
import traceback
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from fedsim import simulation
from fedsim.core import hardware
from fedsim.core.config import SimConfig
from fedsim.core.errors import ConfigError, FedsimError, InUse, PluginFailed, RunDirError, one_line
from fedsim.core.files import storage_errors, write_atomic
from fedsim.runs.collection import Entry, failure_file, verified
from fedsim.runs.metrics import HEADLINE
from fedsim.runs.results import Results


@dataclass(frozen=True)
class JobResult:
    """What became of an attempt. "elsewhere": another process is at it. `final`: another attempt would fail alike."""

    state: Literal["finished", "failed", "elsewhere"]
    seconds: float = 0.0
    accuracy: float | None = None
    error: str = ""
    final: bool = False
    note: str = ""


@dataclass(frozen=True)
class Cost:
    """What one round took: the results of `simulation.rehearse`, and the most memory that the process has held, in bytes."""

    results: Results
    peak_bytes: int


def perform(config: SimConfig, folder: Path, entry: Entry, attempt: int) -> JobResult:
    """Make a run, go on with it, or find it finished. A failure is kept in the folder until the run succeeds."""
    start = time.perf_counter()
    try:
        with lock_of(folder, entry).acquire(blocking=False):
            results, note = _in_its_folder(config, folder, entry)
            failure_file(folder, entry).unlink(missing_ok=True)
            return JobResult("finished", time.perf_counter() - start, results.metrics[HEADLINE], note=note)
    except (Timeout, InUse):  # a sweep that makes the same run, or `fedsim run --resume`
        return JobResult("elsewhere")
    except Exception as e:
        final = isinstance(e, FedsimError) and e.exit_code == 2
        told = isinstance(e, FedsimError) and not isinstance(e, PluginFailed)  # says by itself what was wrong
        note_failure(folder, entry, one_line(e), attempt, "" if told else traceback.format_exc())
        return JobResult("failed", time.perf_counter() - start, error=one_line(e), final=final)


def lock_of(folder: Path, entry: Entry) -> FileLock:
    """The lock that is held while a run goes. The system lets go of it when the process dies."""
    path = folder / ".locks" / f"{entry.folder}.lock"
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


def note_failure(folder: Path, entry: Entry, error: str, attempt: int, details: str = "") -> None:
    """Keep why a run failed. A disk that is too full for that is not worth a second failure."""
    path = failure_file(folder, entry)
    note = {"labels": dict(entry.labels), "error": error, "attempts": attempt, "traceback": details}
    note["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(note, indent=1) + "\n").encode())
    except FedsimError:
        pass


def measure(config: SimConfig) -> Cost | str:
    """Play one round and evaluate it, whenever the run itself evaluates; or the error, in one line."""
    try:
        results = simulation.rehearse(replace(config, server=replace(config.server, evaluate="round")), rounds=1)
    except Exception as e:
        return one_line(e)
    return Cost(results, hardware.peak_memory())


def _in_its_folder(config: SimConfig, folder: Path, entry: Entry) -> tuple[Results, str]:
    """The results, and a note when a run directory that cannot be used was in the way. It is set aside, not deleted."""
    if config.identity() != entry.identity:
        raise ConfigError("a file that the config names was changed since the sweep began: start the sweep again")
    path = folder / entry.folder
    try:
        simulation.once(config, path)
        return verified(path)[0], ""
    except RunDirError as e:
        if not path.is_dir():
            raise
        reason = e
    aside = folder / "damaged" / f"{entry.folder}-{datetime.now(timezone.utc):%Y%m%dT%H%M%S%f}"
    with storage_errors(aside):
        aside.parent.mkdir(exist_ok=True)
        path.rename(aside)
    return simulation.once(config, path), f"run again, what was there is now in {aside}: {reason}"
