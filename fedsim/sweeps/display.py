"""Shows a sweep while it goes: a live table on a terminal, one plain line per finished or failed run elsewhere."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedsim.runs.known import Known
from fedsim.runs.metrics import HEADLINE
from fedsim.runs.results import Results
from fedsim.sweeps.launch import Begun, Ended, SweepEvent
from fedsim.sweeps.plan import PlannedRun, SweepPlan
from fedsim.watch.progress import duration, lively


class SweepDisplay:
    """A callable that takes events; a context manager that gives the terminal back.

    `failed` holds the last error of every run that is given up. Accuracies are final average accuracies in percent.
    """

    def __init__(
        self,
        plan: SweepPlan,
        done: Mapping[str, Results | Known],
        console: Console | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.failed: dict[str, str] = {}
        self._plan, self._console, self._quiet, self._clock = plan, console or Console(), quiet, clock
        self._accuracy: dict[str, list[float]] = {}
        for run in plan.runs:
            there = done.get(run.entry.identity)
            if there is not None and (accuracy := there.metrics[HEADLINE]) is not None:
                self._note(run, accuracy)
        self._before = self._finished = len(done)
        self._begin = clock()
        self._going: dict[str, tuple[PlannedRun, float]] = {}
        live = lively(self._console) and not quiet
        self._live = Live(console=self._console, auto_refresh=False, transient=True) if live else None

    def __enter__(self) -> SweepDisplay:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: SweepEvent) -> None:
        """Take note of an event, and show how things are."""
        if isinstance(event, Begun):
            self._going[event.run.label] = (event.run, self._clock())
        elif isinstance(event, Ended):
            self._end(event)
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)

    def best(self) -> str:
        """The setting with the highest mean so far, over the seeds that are there."""
        if not self._accuracy:
            return ""
        setting, values = max(self._accuracy.items(), key=lambda item: sum(item[1]) / len(item[1]))
        return f"best so far {sum(values) / len(values):.1f} % {setting}"

    def _end(self, event: Ended) -> None:
        run, outcome = event.run, event.outcome
        self._going.pop(run.label, None)
        if outcome.state == "elsewhere":
            self._print(f"{run.label}: another process is at it")
            return
        if outcome.state == "finished":
            self._finished += 1
            self.failed.pop(run.label, None)
            self._note(run, outcome.accuracy)
            accuracy = "" if outcome.accuracy is None else f"accuracy {outcome.accuracy:.1f} %, "
            text = f"{accuracy}{outcome.seconds:.0f} s" + (f" ({outcome.note})" if outcome.note else "")
        elif event.again:
            text = f"failed, will be tried again: {outcome.error}"
        else:
            self.failed[run.label] = outcome.error
            text = f"FAILED: {outcome.error}"
        eta = "" if self._live is not None else self._eta()
        self._print(f"[{self._finished}/{len(self._plan.runs)}] {run.label}: {text}{eta}")

    def _eta(self) -> str:
        """From the pace so far, runs that go counted by the rounds that they have played."""
        done = self._finished - self._before + sum(share_done(self._plan.folder, run) for run, _ in self._going.values())
        left = len(self._plan.runs) - self._before - len(self.failed) - done
        if done <= 0 or left <= 0:
            return ""
        return f", ETA {duration((self._clock() - self._begin) / done * left)}"

    def _picture(self) -> Group:
        total, going = len(self._plan.runs), len(self._going)
        waiting = total - self._finished - going - len(self.failed)
        table = Table(box=None, pad_edge=False)
        for title in ("running", "rounds", "accuracy", "for"):
            table.add_column(title, justify="left" if title == "running" else "right")
        for run, since in self._going.values():
            rounds, accuracy = progress(self._plan.folder / run.entry.folder)
            of = f"/{run.config.stream.tasks * run.config.server.rounds}" if run.config.stream.tasks else ""
            table.add_row(run.label, f"{rounds}{of}", accuracy, duration(self._clock() - since))
        failed = f", {len(self.failed)} failed" if self.failed else ""
        head = (
            f"{self._plan.record.name}: {self._finished} of {total} done, {going} running, {waiting} waiting{failed}{self._eta()}"
        )
        return Group(Text(head, style="bold"), table, Text(self.best()))

    def _note(self, run: PlannedRun, accuracy: float | None) -> None:
        if accuracy is not None:
            setting = " ".join(f"{k}={v}" for k, v in run.entry.labels.items() if k != "seed")
            self._accuracy.setdefault(setting, []).append(accuracy)

    def _print(self, line: str) -> None:
        if not self._quiet:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def share_done(folder: Path, run: PlannedRun) -> float:
    """The share of its rounds that a run has played; 0 where the number of tasks is only known from the data."""
    total = (run.config.stream.tasks or 0) * run.config.server.rounds
    return progress(folder / run.entry.folder)[0] / total if total else 0.0


def progress(path: Path) -> tuple[int, str]:
    """Rounds that a run has finished, and its latest mean accuracy, from its files."""
    try:
        rows: list[Mapping[str, str]] = list(csv.DictReader(io.StringIO((path / "rounds.csv").read_text(encoding="utf-8"))))
    except OSError:
        return 0, ""
    if not rows:
        return 0, ""
    last = [
        row
        for row in rows
        if (row["task"], row["round"], row["stage"]) == (rows[-1]["task"], rows[-1]["round"], rows[-1]["stage"])
    ]
    rounds = {(row["task"], row["round"]) for row in rows if row["stage"] == "round"}
    return len(rounds), f"{sum(float(row['accuracy']) for row in last) / len(last):.1f} %"
