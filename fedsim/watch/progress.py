"""Shows the events of a run: a live line on a terminal or in a notebook, a plain line per round elsewhere, or nothing."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fedsim.core.events import ClientDone, ClientSkipped, Event, Note, RoundDone, Row, RunDirOpened, RunStarted, TaskDone


class ProgressDisplay:
    """A callable that takes events; a context manager that gives the terminal back.

    Tasks, rounds and clients have the numbers that result files and errors use (0-based); [2/15] counts finished rounds.
    `run_dir` is where the run keeps its results, once that is known.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.run_dir: str | None = None
        self._console = console or Console()
        self._quiet = quiet
        self._live = _live_line(self._console) if lively(self._console) and not quiet else None
        self._clock = clock
        self._size = RunStarted(0, 0, 0)
        self._pace: Pace | None = None

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
                self._print(f"run directory: {event.path}")
            case RunStarted():
                self._start(event)
            case ClientDone():
                stage = f"round {event.round}" if event.round < self._size.rounds else "merging"  # statistics at a task's end
                self._update(
                    description=f"task {event.task} {stage}",
                    completed=event.task * self._size.rounds + event.round,
                    clients=f"client {event.done}/{event.total}",
                )
            case RoundDone():
                self._end_round(event)
            case TaskDone():
                self._end_task(event)
            case Note():
                self._print(f"note: {event.text}")
            case ClientSkipped():
                self._print(f"skipped: {event.failure}")

    def _start(self, event: RunStarted) -> None:
        self._size = event
        self._print(f"{event.tasks} tasks, {event.rounds} rounds each, {event.clients} clients")
        if self._live is not None:
            self._live.add_task("starting", total=event.tasks * event.rounds, clients="", accuracy="", eta="")
            self._live.start()

    def _end_round(self, event: RoundDone) -> None:
        total = self._size.tasks * self._size.rounds
        finished = event.task * self._size.rounds + event.round + 1
        if self._pace is None:
            self._pace = Pace(self._clock() - event.seconds, finished - 1)
        accuracy = f"accuracy {mean_accuracy(event.rows):.1f} %" if event.rows else ""
        eta = f"ETA {duration(self._pace.seconds_left(self._clock(), finished, total))}"
        self._update(completed=finished, accuracy=accuracy.replace("accuracy", "acc"), eta=eta)
        if self._live is None:
            loss = "" if math.isnan(event.loss) else f"loss {event.loss:.3f}"
            parts = [accuracy, loss, f"{event.seconds:.1f} s", eta]
            where = f"[{finished:{len(str(total))}}/{total}] task {event.task} round {event.round}"
            self._print(f"{where}: {', '.join(p for p in parts if p)}")

    def _end_task(self, event: TaskDone) -> None:
        names, of = self._size.task_names, event.accuracies
        name = f" ({names[event.task]})" if event.task < len(names) else ""
        each = f" = mean of {' '.join(f'{a:.1f}' for a in of)}" if len(of) > 1 else ""
        self._print(f"task {event.task} learned{name}: accuracy {sum(of) / max(1, len(of)):.1f} %{each}")

    def _update(self, **fields: Any) -> None:
        if self._live is not None and self._live.task_ids:
            self._live.update(self._live.task_ids[0], **fields)

    def _print(self, line: str) -> None:
        if not self._quiet:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class Pace:
    """Wall time per round since `begin`, when `before` rounds were done (start-up is left out)."""

    def __init__(self, begin: float, before: int) -> None:
        self._begin = begin
        self._before = before

    def seconds_left(self, now: float, finished: int, total: int) -> float:
        """If the rounds to come take as long as those since `begin`."""
        return (now - self._begin) / (finished - self._before) * (total - finished)


def in_notebook() -> bool:
    """Whether Python runs in a Jupyter notebook."""
    return "ipykernel" in sys.modules and Console().is_jupyter


@contextmanager
def showing(progress: Callable[[Event], None] | bool | None) -> Iterator[Callable[[Event], None] | None]:
    """Who is told of events: a function as it is, a display for True, for None in a notebook only."""
    if callable(progress):
        yield progress
    elif progress or (progress is None and in_notebook()):
        with ProgressDisplay() as display:
            yield display
    else:
        yield None


def lively(console: Console) -> bool:
    """Whether what is shown there can change in place; in a notebook that takes ipywidgets."""
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


def mean_accuracy(rows: Sequence[Row]) -> float:
    """Percent, every task counting the same; NaN if a task has no test samples."""
    return sum(100.0 * r.correct / r.total if r.total else math.nan for r in rows) / len(rows)


def duration(seconds: float) -> str:
    """41 s, 3:05 min, 2:03 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"


def _live_line(console: Console) -> Progress:
    text = [TextColumn(f"{{task.fields[{name}]}}") for name in ("clients", "accuracy", "eta")]
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        *text,
        console=console,
        expand=True,
        transient=True,
    )
