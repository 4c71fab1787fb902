"""Shows the events of a run: a live line on a terminal, one plain line per round elsewhere, nothing when quiet."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fedsim.core.events import ClientDone, ClientSkipped, Event, RoundDone, Row, RunDirOpened, RunStarted, TaskDone


class ProgressDisplay:
    """A callable that takes events; a context manager that gives the terminal back.

    Tasks, rounds and clients have the numbers that result files and errors use (0-based); [2/15] counts finished rounds.
    `run_dir` is where the run keeps its results, once that is known.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.run_dir: str | None = None
        self._console = console or Console()
        self._quiet = quiet
        self._live = _live_line(self._console) if self._console.is_terminal and not quiet else None
        self._eta = Eta(clock)
        self._names: Sequence[str] = ()

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Take note of an event, and show it unless quiet."""
        match event:
            case RunDirOpened():
                self.run_dir = event.path
            case RunStarted():
                self._start(event)
            case ClientDone():
                self._update(f"task {event.task} round {event.round}", clients=f"clients {event.done}/{event.total}")
            case RoundDone():
                self._end_round(event)
            case TaskDone():
                self._end_task(event)
            case ClientSkipped():
                self._print(f"skipped: {event.failure}")

    def _start(self, event: RunStarted) -> None:
        self._eta.start(event.finished, event.tasks * event.rounds)
        self._names = event.task_names
        self._print(f"{event.tasks} tasks, {event.rounds} rounds each, {event.clients} clients" + (f", {event.finished} rounds done before" if event.finished else ""))
        if self._live is not None:
            self._live.add_task("starting", total=self._eta.total, completed=event.finished, clients="", accuracy="", eta="")
            self._live.start()

    def _end_round(self, event: RoundDone) -> None:
        self._eta.round_done(event.seconds)
        accuracy = f"accuracy {mean_accuracy(event.rows):.1f} %" if event.rows else ""
        eta = f"ETA {duration(self._eta.seconds)}"
        self._update(f"task {event.task} round {event.round}", accuracy=accuracy, eta=eta, completed=self._eta.finished)
        if self._live is None:
            width = len(str(self._eta.total))
            loss = "" if math.isnan(event.loss) else f"loss {event.loss:.3f}"
            parts = [accuracy, loss, f"{event.seconds:.1f} s", eta]
            where = f"[{self._eta.finished:{width}}/{self._eta.total}] task {event.task} round {event.round}"
            self._print(f"{where}: {', '.join(p for p in parts if p)}")

    def _end_task(self, event: TaskDone) -> None:
        name = f" ({self._names[event.task]})" if event.task < len(self._names) else ""
        each = f" = mean of {' '.join(f'{a:.1f}' for a in event.accuracies)}" if len(event.accuracies) > 1 else ""
        mean = sum(event.accuracies) / max(1, len(event.accuracies))
        self._print(f"task {event.task} learned{name}: accuracy {mean:.1f} %{each}")

    def _update(self, description: str, completed: int | None = None, **fields: str) -> None:
        if self._live is not None and self._live.task_ids:
            self._live.update(self._live.task_ids[0], description=description, completed=completed, **fields)

    def _print(self, line: str) -> None:
        if not self._quiet:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class Eta:
    """Seconds to go, from the mean wall time of the rounds that this process has finished."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._before = 0
        self._begin: float | None = None
        self.finished = 0
        self.total = 0

    def start(self, finished: int, total: int) -> None:
        """`finished` of `total` rounds are done already."""
        self._before = self.finished = finished
        self.total = total

    def round_done(self, seconds: float) -> None:
        """One more. Start-up is left out: the clock begins with the first round."""
        if self._begin is None:
            self._begin = self._clock() - seconds
        self.finished += 1

    @property
    def seconds(self) -> float:
        """NaN before the first round has finished."""
        if self._begin is None:
            return math.nan
        return (self._clock() - self._begin) / (self.finished - self._before) * (self.total - self.finished)


def mean_accuracy(rows: Sequence[Row]) -> float:
    """Percent, every task counting the same; NaN if a task has no test samples."""
    return sum(100.0 * r.correct / r.total if r.total else math.nan for r in rows) / len(rows)


def duration(seconds: float) -> str:
    """41 s, 3:05 min, 2:03 h."""
    if math.isnan(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"


def _live_line(console: Console) -> Progress:
    text = [TextColumn(f"{{task.fields[{name}]}}") for name in ("clients", "accuracy", "eta")]
    return Progress(TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), *text, console=console, expand=True, transient=True)
