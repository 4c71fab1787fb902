"""What a run found out: read from its directory, written to it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedsim.core import plugins
from fedsim.core.config import SimConfig
from fedsim.core.events import ClassRow, DriftRow, Row
from fedsim.runs import display, metrics
from fedsim.runs.directory import Holding, RunDir, damage, read_text
from fedsim.runs.metrics import Counts
from fedsim.runs.rows import from_csv, table, to_csv

if TYPE_CHECKING:
    import pandas as pd

# T tasks; i task trained, j task tested
FloatArray = NDArray[np.float64]
Costs: TypeAlias = Mapping[
    str, Any
]  # {"bytes": {"down": {kind: int}, "up": {...}}, "seconds": {phase: float}, "client_rounds": int}, and if clients remember
# anything "stored": {"clients": how many do at the end, "mean": bytes of each of them then, "max": of any at any time}; and where
# one process did it all "processor_seconds", and "peak_memory": the most bytes that it held since it began or went on

# file -> the field of Results that holds its rows
TABLES = {"partition.csv": "holdings", "rounds.csv": "rows", "classes.csv": "classes", "drift.csv": "drifts"}
LINES = ("failures", "notes")  # fields of Results that are lines, each in a file of its own if there are any
COUNTS = tuple(f.name for f in dataclasses.fields(Row))
DRIFT_MEASURES = tuple(f.name for f in dataclasses.fields(DriftRow))[4:]
FORMERLY = {"newest_share": 0.0}  # metric -> what earlier versions wrote where it is undefined
COLUMNS = (*COUNTS, "accuracy", "accuracy_task_incremental")


@dataclass(frozen=True)
class Results:
    """What a run found out, live or loaded from its directory. Tasks and rounds are 0-based."""

    config: SimConfig
    rows: tuple[Row, ...]
    costs: Costs
    path: Path | None = None
    manifest_hash: str = ""
    failures: tuple[str, ...] = ()
    finished: bool = True
    classes: tuple[ClassRow, ...] = ()
    drifts: tuple[DriftRow, ...] = ()
    notes: tuple[str, ...] = ()
    holdings: tuple[Holding, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a run directory, finished or not. Raises RunDirError when it is missing or damaged."""
        run_dir = RunDir.read(path)
        tables: dict[str, Any] = {}
        for (name, field), kind in zip(TABLES.items(), (Holding, Row, ClassRow, DriftRow), strict=True):
            with damage(run_dir.path / name):
                tables[field] = from_csv(kind, read_text(run_dir.path / name, ""))
        with damage(run_dir.path / "costs.json"):
            costs = dict(json.loads(read_text(run_dir.path / "costs.json", "{}")))
        for name in LINES:
            with damage(run_dir.path / f"{name}.json"):
                tables[name] = tuple(str(line) for line in json.loads(read_text(run_dir.path / f"{name}.json", "[]")))
        found = cls(
            run_dir.config,
            costs=costs,
            path=run_dir.path,
            manifest_hash=run_dir.manifest_hash,
            finished=run_dir.finished,
            **tables,
        )
        if found.finished:
            with damage(run_dir.path / "metrics.json"):
                found._require_metrics(json.loads((run_dir.path / "metrics.json").read_text(encoding="utf-8")))
        return found

    def write_progress(self, run_dir: RunDir, lasting: bool = True) -> None:
        """Write what is known after a round; not `lasting` while a checkpoint knows it too (`write_atomic`). Raises StorageError
        when the disk is full."""
        run_dir.write("rounds.csv", to_csv(COLUMNS, self._records()), lasting)
        run_dir.write("classes.csv", table(ClassRow, [c for c in self.classes if c.stage == "task_end"]), lasting)
        run_dir.write("drift.csv", table(DriftRow, self.drifts), lasting)
        run_dir.write_json("costs.json", self.costs, lasting)
        for name in LINES:
            if getattr(self, name) or (run_dir.path / f"{name}.json").exists():
                run_dir.write_json(f"{name}.json", list(getattr(self, name)), lasting)

    def write_end(self, run_dir: RunDir) -> Results:
        """Write the outcome, mark the run as finished, and return it as it is read back."""
        self.write_progress(run_dir)
        for name in ("accuracy", "accuracy_task_incremental"):
            matrix = getattr(self, name)
            records = [(i, *("" if np.isnan(a) else repr(float(a)) for a in row)) for i, row in enumerate(matrix)]
            run_dir.write(f"{name}.csv", to_csv(("after_task", *range(len(matrix))), records))
        with damage(run_dir.path / "partition.csv"):
            holdings = from_csv(Holding, read_text(run_dir.path / "partition.csv", ""))
        complete = dataclasses.replace(self, config=run_dir.config, path=run_dir.path, holdings=holdings, finished=True)
        run_dir.write_json("metrics.json", complete.metrics)
        run_dir.write_status("finished", self.manifest_hash)
        return complete

    def __repr__(self) -> str:
        return display.headline(self)

    def __str__(self) -> str:
        """The headline metrics and the accuracy matrix as text."""
        return display.as_text(display.headline(self), display.tables(self), self._remarks())

    def _repr_html_(self) -> str:
        """The same in a notebook, with a chart of the accuracy over the rounds."""
        from fedsim.report import inline

        return display.as_html(display.headline(self), display.tables(self), self._remarks(), inline.curve(self))

    def _remarks(self) -> list[str]:
        return [f"note: {note}" for note in self.notes]

    @cached_property
    def accuracy(self) -> FloatArray:
        """(T, T) percent of task j after learning task i, NaN where j > i; T: tasks that were learned to their end.

        The argmax is over the classes seen so far, or inside the task's own classes if the stream is task_incremental.
        """
        return metrics.accuracy(self._counts("correct"), self._counts("total"))

    @cached_property
    def accuracy_task_incremental(self) -> FloatArray:
        """(T, T) percent when the task is told at test time: the argmax inside the tested task's own classes."""
        return metrics.accuracy(self._counts("correct_in_task"), self._counts("total"))

    @cached_property
    def metrics(self) -> dict[str, float | None]:
        """Those of the table `fedsim.runs.metrics.METRICS` that are computed from counts, by name; None where undefined."""
        return metrics.computed(self.counts)

    @property
    def counts(self) -> Counts:
        """What metrics are computed from."""
        return Counts(
            correct=self._counts("correct"),
            in_task=self._counts("correct_in_task"),
            total=self._counts("total"),
            predicted=self._predicted(),
            clients=self.client_accuracy,
            drifts=self._drifts(),
        )

    @property
    def client_accuracy(self) -> FloatArray:
        """(K,) percent of the final model at every client, on test samples that are distributed as its training samples are.

        NaN for a client that holds nothing of what was tested. The argmax is over all classes.
        """
        final = self._final_classes()
        rows = 1 + max([h.class_row for h in self.holdings] + [c.class_row for c in final], default=-1)
        correct_C, total_C = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64)
        for c in final:
            correct_C[c.class_row], total_C[c.class_row] = c.correct, c.total
        held = [(h.client, h.class_row, h.samples) for h in self.holdings]
        return metrics.client_accuracy(held, self.config.partition["clients"], correct_C, total_C)

    def _require_metrics(self, written: Mapping[str, float | None]) -> None:
        """Raises ValueError when the counts do not give the metrics that were written at the end: a file was cut or changed."""
        for name in {**self.metrics, **written}:
            if metrics.of(name).name not in metrics.METRICS:  # of a script that added a metric of its own
                continue
            value = self.metrics.get(name)
            then = written.get(name, value)  # a metric that came into being later
            if value is None or then is None:
                same = value is then or (value is None and then == FORMERLY.get(name))
            else:
                same = math.isclose(value, then, rel_tol=1e-6, abs_tol=1e-9)
            if not same:
                raise ValueError(f"{name} is {then}, but the counts give {value}")

    def _final_classes(self) -> list[ClassRow]:
        ends = [c for c in self.classes if c.stage == "task_end"]
        last = max((c.task for c in ends), default=0)
        return [c for c in ends if c.task == last]

    def _predicted(self) -> list[tuple[int, bool]]:
        """Per class after the last task: predictions that fall on it, whether that task brought it. Empty for a single task."""
        final = self._final_classes()
        before = {c.class_row for c in self.classes if c.stage == "task_end" and c.task < final[0].task} if final else set()
        return [(c.predicted, c.class_row not in before) for c in final] if before else []

    def _drifts(self) -> dict[str, dict[str, list[float]]]:
        """Measure -> group -> values of the rounds in which it is defined."""
        values: dict[str, dict[str, list[float]]] = {}
        for row in self.drifts:
            for measure in DRIFT_MEASURES:
                if (value := getattr(row, measure)) is not None:
                    values.setdefault(measure, {}).setdefault(row.group, []).append(value)
        return values

    def frame(self) -> pd.DataFrame:
        """A pandas frame with one row per (task trained, round, task tested): counts, and accuracies in percent. Needs the extra
        `report`."""
        plugins.require("pandas", "a frame of results", "report")
        import pandas as pd

        frame: pd.DataFrame = pd.DataFrame(self._records(), columns=list(COLUMNS))
        return frame

    def _records(self) -> list[tuple[Any, ...]]:
        return [
            (*dataclasses.astuple(row), _percent(self._correct(row), row.total), _percent(row.correct_in_task, row.total))
            for row in self.rows
        ]

    def _correct(self, row: Row) -> int:
        return row.correct_in_task if self.config.stream.name == "task_incremental" else row.correct

    def _counts(self, what: str) -> NDArray[np.int64]:
        """(T, T) counts at the tasks' ends."""
        ends = [row for row in self.rows if row.stage == "task_end"]
        tasks = 1 + max((row.task for row in ends), default=-1)
        counts = np.zeros((tasks, tasks), dtype=np.int64)
        for row in ends:
            counts[row.task, row.tested] = self._correct(row) if what == "correct" else getattr(row, what)
        return counts


def _percent(correct: int, total: int) -> float:
    return 100.0 * correct / total if total else float("nan")
