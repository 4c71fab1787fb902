"""Passes on what a run tells about itself to the trackers of its config, and keeps their troubles away from the run.

    every round       accuracy/task_0, ..., accuracy/mean (percent), round/loss, round/seconds,
                      traffic/up, traffic/down (bytes since the start), drift/<measure>/<group>
    every task's end  the accuracies, seconds and traffic with the prefix task_end/, and task_end/forgetting (so far)
    the run's end     metrics/<name>, bytes/<direction>/<kind>, seconds/<phase>, stored/<clients, mean or max> (bytes)

all over the 0-based round of the whole stream; a task's end and the run's stand at the round that came last. What is undefined
is left out. An event is passed on once the checkpoint holds it, so a run that is gone on in never says anything twice; one that
is killed in the moment between the two leaves that round out.
"""

from __future__ import annotations

import json
import math
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedsim.core import config as configs
from fedsim.core.config import SimConfig
from fedsim.core.contracts import Outcome, Recording, TrackedRun, Tracker
from fedsim.core.errors import PluginError, RunDirError
from fedsim.core.events import Event, RoundDone, Row, TaskDone
from fedsim.core.files import write_atomic
from fedsim.runs.directory import RunDir
from fedsim.runs.results import DRIFT_MEASURES, Results
from server.state import ServerState

ID_FILE = "tracking.json"


def check(config: SimConfig) -> None:
    """Raise PluginError when a tracker's package is missing."""
    for _, tracker in _trackers(config):
        tracker.check()


@contextmanager
def tracked(config: SimConfig, run_dir: RunDir) -> Iterator[Recorder]:
    """Open the trackers of a config, and close them with what became of the run.

    Raises PluginError when one cannot be opened, RunDirError when what they were told of the run before is damaged.
    """
    recorder = Recorder(config)
    outcome: Outcome = "failed"
    try:
        if config.trackers:
            run = _describe(config, run_dir)
            for name, tracker in _trackers(config):
                try:
                    recorder.recordings[name] = tracker.open(run)
                except Exception as e:
                    raise PluginError(f"tracker '{name}' cannot be opened: {_reason(e)} (trackers=[] goes without)") from e
        yield recorder
        outcome = "finished"
    except KeyboardInterrupt:
        outcome = "interrupted"
        raise
    finally:
        recorder.close(outcome)


class Recorder:
    """Takes every step of a run: events wait for the state that follows and holds them, the results come last."""

    def __init__(self, config: SimConfig) -> None:
        self.recordings: dict[str, Recording] = {}
        self._config = config
        self._waiting: list[RoundDone | TaskDone] = []

    def __call__(self, step: Event | ServerState | Results) -> None:
        """Take note; pass on what is safe."""
        if not self.recordings:
            return
        rounds = self._config.server.rounds
        match step:
            case RoundDone() | TaskDone():
                self._waiting.append(step)
            case ServerState():
                for event in self._waiting:
                    if isinstance(event, RoundDone):
                        self._log(event.task * rounds + event.round, of_round(event, step, self._config))
                    else:
                        self._log((event.task + 1) * rounds - 1, of_task(event, step, self._config))
                self._waiting.clear()
            case Results():
                self._log(len(step.accuracy) * rounds - 1, of_run(step))

    def close(self, outcome: Outcome) -> None:
        """Tell the trackers what became of the run."""
        for name in list(self.recordings):
            with self._guarded(name):
                self.recordings.pop(name).close(outcome)

    def _log(self, step: int, values: Mapping[str, float | None]) -> None:
        finite = {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}
        for name, recording in list(self.recordings.items()):
            with self._guarded(name):
                recording.log(step, finite)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Whatever a tracker raises switches it off, with one line; a run is worth more than its copy."""
        try:
            yield
        except Exception as e:
            sys.stderr.write(f"fedsim: tracker '{name}' failed and is off; the run goes on: {_reason(e)}\n")
            if name in self.recordings:
                with suppress(Exception):
                    self.recordings.pop(name).close("failed")


def of_round(event: RoundDone, state: ServerState, config: SimConfig) -> dict[str, float | None]:
    """What a round showed."""
    drifts = [d for d in state.drifts if (d.task, d.round) == (event.task, event.round)]
    return {
        **_accuracies("", event.rows, config),
        "round/loss": event.loss,
        "round/seconds": event.seconds,
        **_traffic("", state),
        **{f"drift/{measure}/{d.group}": getattr(d, measure) for d in drifts for measure in DRIFT_MEASURES},
    }


def of_task(event: TaskDone, state: ServerState, config: SimConfig) -> dict[str, float | None]:
    """What a task's end showed."""
    return {
        **_accuracies("task_end/", event.rows, config),
        "task_end/forgetting": Results(config, state.rows, {}).metrics["forgetting"],
        "task_end/seconds": event.seconds,
        **_traffic("task_end/", state),
    }


def of_run(results: Results) -> dict[str, float | None]:
    """What a run showed."""
    costs = results.costs
    return {
        **{f"metrics/{name}": value for name, value in results.metrics.items()},
        **{f"bytes/{direction}/{kind}": n for direction, kinds in costs["bytes"].items() for kind, n in kinds.items()},
        **{f"seconds/{phase}": seconds for phase, seconds in costs["seconds"].items()},
        **{f"stored/{name}": value for name, value in costs.get("stored", {}).items()},
    }


def _accuracies(prefix: str, rows: Sequence[Row], config: SimConfig) -> dict[str, float | None]:
    """Percent per task tested, as `Results.accuracy` counts, and their mean."""
    told = config.stream.name == "task_incremental"
    each = [100.0 * (r.correct_in_task if told else r.correct) / r.total if r.total else math.nan for r in rows]
    named: dict[str, float | None] = {f"{prefix}accuracy/task_{r.tested}": a for r, a in zip(rows, each, strict=True)}
    return named | {f"{prefix}accuracy/mean": sum(each) / len(each) if each else None}


def _traffic(prefix: str, state: ServerState) -> dict[str, float | None]:
    return {f"{prefix}traffic/{direction}": sum(kinds.values()) for direction, kinds in state.bytes.items()}


def _trackers(config: SimConfig) -> list[tuple[str, Tracker]]:
    return [(section["name"], configs.build("trackers", section)) for section in config.trackers]


def _describe(config: SimConfig, run_dir: RunDir) -> TrackedRun:
    """The run, with an id that its directory keeps: two runs of one config are two runs to a tracker."""
    path = run_dir.path / ID_FILE
    resumed = path.exists()
    if not resumed:
        run_id = f"{run_dir.identity[:8]}-{uuid.uuid4().hex[:8]}"
        write_atomic(path, (json.dumps({"id": run_id}) + "\n").encode())
    plain = config.to_dict()
    del plain["trackers"]
    return TrackedRun(run_dir.path.name, _read_id(path), run_dir.identity, run_dir.path, plain, resumed)


def _read_id(path: Path) -> str:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return str(found["id"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise RunDirError(f"{path} is damaged: delete it, then the trackers begin a run of their own ({_reason(e)})") from e


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
