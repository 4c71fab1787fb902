"""The parts that a run is made of, and all that it knows at the end of a round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedsim.core.config import SimConfig
from fedsim.core.contracts import Aggregator, Calibrator, Consolidator, IntArray, Pool
from fedsim.core.errors import ClientFailed
from fedsim.core.events import ClassRow, DriftRow, Row
from fedsim.core.messages import State, Tensors
from fedsim.core.wire import Chain

ROWS: Mapping[str, type[Any]] = {"rows": Row, "classes": ClassRow, "drifts": DriftRow}
NEVER = (-1, -1)
Bytes = Mapping[str, Mapping[str, int]]  # direction -> kind of object -> bytes


@dataclass(frozen=True)
class Simulation:
    """The parts that a run is made of. `fresh_adapter(task)` draws the `adapter.*` tensors that a new module starts with;
    `shard_sizes` (T, K): training samples per task and client."""

    config: SimConfig
    pool: Pool
    aggregator: Aggregator
    consolidator: Consolidator
    calibrator: Calibrator | None
    chain: Chain
    fresh_adapter: Callable[[int], Tensors]
    task_names: tuple[str, ...]
    task_classes: tuple[tuple[int, ...], ...]
    test_sizes: tuple[int, ...]
    shard_sizes: IntArray
    num_clients: int


@dataclass(frozen=True)
class Delivered:
    """Which client was sent what, for the ledger. Messages are numbered from 0; all clients of one are to have the same.

    since, since_past: content -> the first of the messages (of those that look through past modules) that held it, with no gap
    up to the latest. last: client -> the last message that it took part in, and the last such one (`NEVER`: none); clients that
    never took part are not in it.
    """

    count: int = 0
    since: Mapping[str, int] = field(default_factory=dict)
    since_past: Mapping[str, int] = field(default_factory=dict)
    last: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    def lacked(self, content: str, last: tuple[int, int]) -> bool:
        """Whether a client with these last messages has to be sent this."""
        message, with_past = last
        return self.since.get(content, self.count) > message and self.since_past.get(content, self.count) > with_past

    def after(self, contents: Sequence[str], clients: Sequence[int], with_past: bool) -> Delivered:
        """When one more message has gone to these clients."""
        now = self.count
        since = {c: self.since.get(c, now) for c in contents}
        since_past = {c: self.since_past.get(c, now) for c in contents} if with_past else self.since_past
        new = {k: (now, now if with_past else self.last.get(k, NEVER)[1]) for k in clients}
        return Delivered(now + 1, since, since_past, {**self.last, **new})


@dataclass(frozen=True)
class ServerState:
    """What a checkpoint holds, and nothing else. `task` and `round` come next; round 0: the task has not begun."""

    task: int
    round: int
    params: Tensors
    consolidator: State
    calibrator: State = None
    aggregator: State = None
    memories: Mapping[int, Tensors] = field(default_factory=dict)
    delivered: Delivered = field(default_factory=Delivered)
    rows: tuple[Row, ...] = ()
    classes: tuple[ClassRow, ...] = ()  # of every task's end, and of the latest round
    drifts: tuple[DriftRow, ...] = ()
    failures: tuple[ClientFailed, ...] = ()
    notes: tuple[str, ...] = ()  # see `events.Note`; each is said once
    bytes: Bytes = field(default_factory=lambda: {"down": {}, "up": {}})
    seconds: Mapping[str, float] = field(default_factory=dict)
    client_rounds: int = 0

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
        plain["failures"] = [[f.client_id, f.task, f.round, f.stage, f.reason] for f in self.failures]
        plain["params"] = dict(self.params)
        plain["memories"] = {k: dict(v) for k, v in self.memories.items()}
        plain["bytes"] = {k: dict(v) for k, v in self.bytes.items()}
        plain["seconds"] = dict(self.seconds)
        last = [(k, *numbers) for k, numbers in self.delivered.last.items()]
        plain["delivered"] = {**vars(self.delivered), "last": torch.tensor(last, dtype=torch.int64, device="cpu").view(-1, 3)}
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> ServerState:
        """The inverse of `to_plain`."""
        rows = {name: tuple(kind(*r) for r in plain[name]) for name, kind in ROWS.items()}
        failures = tuple(ClientFailed(*f) for f in plain["failures"])
        last = {k: (message, past) for k, message, past in plain["delivered"]["last"].tolist()}
        return cls(**{**plain, **rows, "failures": failures, "delivered": Delivered(**{**plain["delivered"], "last": last})})
