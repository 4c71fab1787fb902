"""What a run tells about itself while it goes: frozen values that a progress display consumes.

Tasks, rounds and clients are 0-based, as in result files and error messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fedsim.core.errors import ClientFailed
from fedsim.core.messages import Tensors


@dataclass(frozen=True)
class Row:
    """Raw counts of one test: the deployed model after `round` of `task`, on the test samples of task `tested`.

    stage: "round", or "task_end" for the model after the task's consolidation, whose `round` is the number of rounds.
    correct: argmax among the classes seen so far; correct_in_task: argmax among the tested task's own classes.
    """

    task: int
    round: int
    stage: str
    tested: int
    correct: int
    correct_in_task: int
    total: int


@dataclass(frozen=True)
class ClassRow:
    """Raw counts of one class in the test that `Row` counts by task; argmax among the classes seen so far.

    class_row: row of the head; correct: predicted rightly; predicted: predicted at all, on the test samples of every task seen;
    total: test samples of the class.
    """

    task: int
    round: int
    stage: str
    class_row: int
    correct: int
    predicted: int
    total: int


@dataclass(frozen=True)
class DriftRow:
    """How far the clients of a round went from what they had received, and from each other; see `server.drift`."""

    task: int
    round: int
    group: str
    clients: int
    relative_norm: float | None
    cosine: float | None
    cosine_min: float | None
    cosine_to_mean: float | None
    diversity: float | None
    effective_rank: float | None
    product_error: float | None


@dataclass(frozen=True)
class RunDirOpened:
    """Results go to the folder `path`: from here on a run that is stopped can be resumed."""

    path: str


@dataclass(frozen=True)
class RunStarted:
    """The size of the run: `rounds` per task, `clients` in all. A resumed run says the same as a new one."""

    tasks: int
    rounds: int
    clients: int
    task_names: Sequence[str] = ()


@dataclass(frozen=True)
class ClientDone:
    """`done` of the `total` clients of this round have answered; `client_id` is the latest."""

    task: int
    round: int
    done: int
    total: int
    client_id: int


@dataclass(frozen=True)
class RoundDone:
    """A round with its evaluation. `rows` is empty where nothing was tested; `loss` is the clients' mean; `seconds` wall time."""

    task: int
    round: int
    rows: Sequence[Row]
    loss: float
    seconds: float


@dataclass(frozen=True)
class TaskDone:
    """A task with its consolidation: counts and percent on every task seen, in order; `seconds` wall time of its end."""

    task: int
    rows: Sequence[Row]
    accuracies: Sequence[float]
    seconds: float


@dataclass(frozen=True)
class TensorsKept:
    """Tensors that a run keeps beside its results, where `server.unlearning` or `server.keep` asks for it.

    name: "start" and "end" (the parameters a task starts and ends with), "module" and "total" (what the consolidator was handed
    at its end), "client-<id>" (what a client became by itself, from the task's start); of `server.keep` "deployed" (the module
    and head that are evaluated at the task's end).
    """

    task: int
    name: str
    tensors: Tensors


@dataclass(frozen=True)
class ClientSkipped:
    """A client that failed and that the round went on without."""

    failure: ClientFailed


@dataclass(frozen=True)
class Note:
    """One line that whoever reads the numbers has to know: what was left out, replaced, or done in another way than asked."""

    text: str


Event: TypeAlias = RunDirOpened | RunStarted | ClientDone | RoundDone | TaskDone | ClientSkipped | Note | TensorsKept
