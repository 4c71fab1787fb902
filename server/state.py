"""The parts that a run is made of, and all that it knows at the end of a round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedsim.core.config import SimConfig
from fedsim.core.contracts import Aggregator, Calibrator, Consolidator, IntArray, Learner, Past, Pool, TaskStart
from fedsim.core.errors import ClientFailed
from fedsim.core.events import ClassRow, DriftRow, Row
from fedsim.core.messages import State, Tensors
from fedsim.core.tensors import with_prefix
from fedsim.core.wire import Chain
from server.beneath import Beneath
from server.store import ClientStore, Stored

ROWS: Mapping[str, type[Any]] = {"rows": Row, "classes": ClassRow, "drifts": DriftRow}
PROCESSOR = "processor"  # among the seconds, but no phase: of the processors, where one process did all the work
Bytes = Mapping[str, Mapping[str, int]]  # direction -> kind of object -> bytes


@dataclass(frozen=True)
class Simulation:
    """The parts that a run is made of. `fresh_adapter(task)` draws the `adapter.*` tensors that a new module starts with;
    `grown(task, start)`: a task's start with what the task brings to the adapter, and without training what earlier ones brought;
    `shard_sizes` (T, K): training samples per task and client; `store`: what is kept of every client from round to round."""

    config: SimConfig
    pool: Pool
    aggregator: Aggregator
    consolidator: Consolidator
    calibrator: Calibrator | None
    chain: Chain
    fresh_adapter: Callable[[int], Tensors]
    grown: Callable[[int, TaskStart], TaskStart]
    task_names: tuple[str, ...]
    task_classes: tuple[tuple[int, ...], ...]
    test_sizes: tuple[int, ...]
    shard_sizes: IntArray
    num_clients: int
    store: ClientStore
    learners: Mapping[str, Learner] = field(default_factory=dict)
    sample_bytes: int = 0  # of a training sample and its label

    def when(self, state: ServerState) -> str:
        """task 0, round 2 | task 0, at its end: for errors."""
        return f"task {state.task}, " + (f"round {state.round}" if state.round < self.config.server.rounds else "at its end")


@dataclass(frozen=True)
class Delivered:
    """What clients were sent, for the ledger. Messages are numbered from 0; all clients of one are to have the same.

    since, since_past: content -> the first of the messages (of those that look through past modules) that held it, with no gap
    up to the latest. Who took part in which is in the store (`ClientStore.last`).
    """

    count: int = 0
    since: Mapping[str, int] = field(default_factory=dict)
    since_past: Mapping[str, int] = field(default_factory=dict)

    def lacked(self, content: str, last: tuple[int, int]) -> bool:
        """Whether a client has to be sent this; last: the last message that it was sent, and the last one with past modules."""
        message, with_past = last
        return self.since.get(content, self.count) > message and self.since_past.get(content, self.count) > with_past

    def after(self, contents: Sequence[str], with_past: bool) -> Delivered:
        """When one more message has gone out."""
        now = self.count
        since = {c: self.since.get(c, now) for c in contents}
        since_past = {c: self.since_past.get(c, now) for c in contents} if with_past else self.since_past
        return Delivered(now + 1, since, since_past)


@dataclass(frozen=True)
class ServerState:
    """What a checkpoint holds, and nothing else. `task` and `round` come next; round 0: the task has not begun. stored: of the
    store when the checkpoint was written, which is opened at that version; nothing else here grows with the clients."""

    task: int
    round: int
    params: Tensors
    consolidator: State
    start: TaskStart = field(default_factory=lambda: TaskStart({}))  # of the current task; its parameters have moved on
    began: int = 0  # the task in which the current module did
    beneath: Beneath = field(default_factory=Beneath)  # of the module, see `Aggregator.beneath`
    calibrator: State = None
    aggregator: State = None
    stored: Stored = field(default_factory=Stored)
    first_head: Tensors = field(default_factory=dict)  # what the head began with, where a calibrator makes rows of it
    learners: State = field(default_factory=dict)  # of the server's half of each, by name
    teacher: Tensors = field(default_factory=dict)  # what the last task's end deployed, where a learner needs it
    delivered: Delivered = field(default_factory=Delivered)
    rows: tuple[Row, ...] = ()
    classes: tuple[ClassRow, ...] = ()  # of every task's end, and of the latest round
    drifts: tuple[DriftRow, ...] = ()
    failures: tuple[ClientFailed, ...] = ()
    notes: tuple[str, ...] = ()  # see `events.Note`; each is said once
    bytes: Bytes = field(default_factory=lambda: {"down": {}, "up": {}})
    seconds: Mapping[str, float] = field(default_factory=dict)  # by phase; of the processors, under PROCESSOR
    client_rounds: int = 0

    def beginning(self, start: TaskStart) -> ServerState:
        """The state in which a task begins. What lies beneath the module goes on with it: if it is the last task's, and no fresh
        one."""
        goes_on = self.task > 0 and all(t is self.params.get(n) for n, t in with_prefix(start.params, "adapter.").items())
        beneath, began = (self.beneath, self.began) if goes_on else (Beneath(), self.task)
        return replace(self, params=start.params, start=replace(start, params={}), beneath=beneath, began=began)

    def spent(self, phase: str, seconds: float) -> Mapping[str, float]:
        """The clock with some seconds more in one phase."""
        return {**self.seconds, phase: self.seconds.get(phase, 0.0) + seconds}

    def noting(self, notes: Iterable[str]) -> ServerState:
        """The state with these notes; those that it has already are left alone."""
        return replace(self, notes=tuple(dict.fromkeys((*self.notes, *notes))))

    def to_plain(self) -> dict[str, Any]:
        """Dicts, lists, tensors, numbers and strings only: what a file can hold."""
        plain = dict(vars(self))
        for name in ROWS:
            plain[name] = [list(vars(r).values()) for r in getattr(self, name)]
        past = {**vars(self.start.past), "modules": [dict(m) for m in self.start.past.modules]}
        plain["start"] = {**vars(self.start), "past": past}
        plain["failures"] = [[f.client_id, f.task, f.round, f.stage, f.reason] for f in self.failures]
        plain |= {name: dict(getattr(self, name)) for name in ("params", "teacher", "first_head")}
        plain["beneath"] = {"module": dict(self.beneath.module), "parts": dict(self.beneath.parts)}
        plain["stored"] = dict(vars(self.stored))
        plain["bytes"] = {k: dict(v) for k, v in self.bytes.items()}
        plain["seconds"] = dict(self.seconds)
        plain["delivered"] = dict(vars(self.delivered))
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> ServerState:
        """The inverse of `to_plain`."""
        rows = {name: tuple(kind(*r) for r in plain[name]) for name, kind in ROWS.items()}
        failures = tuple(ClientFailed(*f) for f in plain["failures"])
        start = TaskStart(**{**plain["start"], "past": Past(**plain["start"]["past"])})
        sections = {"delivered": Delivered, "stored": Stored, "beneath": Beneath}
        kept = {name: kind(**plain[name]) for name, kind in sections.items()}
        return cls(**{**plain, **rows, **kept, "start": start, "failures": failures})
