"""What a run keeps of every client from round to round: its memory, and which message it was sent last.

It is no part of the checkpoint, which is written anew after every round: a round costs what the clients that took part in it
cost, however many are registered. The two are one all the same. Every row has a version:

    commit    what the round wrote becomes durable as version v + 1; the rows that it replaces, of version v or older, stay
    (the checkpoint is written, and says v + 1)
    prune     the rows that were replaced are deleted

A checkpoint that says v is opened with all rows up to v, and newer ones are dropped: a run that is killed, before or after any of
the three, loses nothing and does nothing twice.
"""

# K registered clients, n clients of a message

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import ItemsView, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import numpy as safetensors
from torch import Tensor

from fedsim.core.contracts import IntArray
from fedsim.core.errors import FedsimError, PluginError, RunDirError, StorageError
from fedsim.core.files import ADVICE
from fedsim.core.messages import Tensors, num_bytes

FORMAT = 1
LARGEST = 10**9  # bytes that SQLite keeps in a row
CACHE_KB = 32 * 1024  # of pages that a round has changed: more of them go to the disk before its end
TABLES = """
BEGIN;
CREATE TABLE meta (format INTEGER, identity TEXT, version INTEGER);
CREATE TABLE memory (client INTEGER, version INTEGER, bytes INTEGER, crc INTEGER, tensors BLOB, PRIMARY KEY (client, version));
CREATE TABLE messages (number INTEGER PRIMARY KEY, version INTEGER, with_past INTEGER, clients BLOB);
COMMIT;
"""


@dataclass(frozen=True)
class Stored:
    """What a checkpoint says of the store that it goes with.

    version: of the rows that count; clients: how many remember something; bytes: all of them together, by their tensors; most:
    what any one of them ever had to store.
    """

    version: int = 0
    clients: int = 0
    bytes: int = 0
    most: int = 0

    def changed(self, before: int | None, now: int | None) -> Stored:
        """When one client remembers `now` bytes in place of `before`; None: nothing, not even a tensor without numbers."""
        clients = self.clients + (now is not None) - (before is not None)
        return Stored(self.version, clients, self.bytes + (now or 0) - (before or 0), max(self.most, now or 0))


class ClientStore:
    """Memories and last messages of `num_clients` clients; in a file, or without a path for as long as the process lives.

    One process at a time: whoever opens it holds the run directory. Raises RunDirError when the file is missing, damaged or does
    not go with the checkpoint, StorageError, with `advice`, when it cannot be written.
    """

    last: IntArray  # (K, 2), the last message that a client was sent, and the last one that looked at past modules; -1: none

    def __init__(
        self, num_clients: int, path: Path | None = None, identity: str = "", stored: Stored = Stored(), advice: str = ADVICE
    ) -> None:
        self.stored = stored
        self.last = np.full((num_clients, 2), -1, dtype=np.int64)
        self._path, self._advice = path, advice
        self._written: list[int] = []  # clients with a row of the version to come, or one that is not pruned yet
        begun = stored.version > 0
        if path is not None and begun and not path.is_file():
            raise RunDirError(f"{path} is missing, and the run cannot go on without it: copy it back, or {_AGAIN}")
        with self._errors():
            if path is not None and not begun:  # of a start that no checkpoint knows
                _remove(path)
            self._db = sqlite3.connect(path or ":memory:", isolation_level=None)
        try:
            with self._errors():
                self._set_up()
                if begun:
                    self._go_on(identity)
                else:
                    self._db.executescript(TABLES)
                    self._db.execute("INSERT INTO meta VALUES (?, ?, 0)", (FORMAT, identity))
        except BaseException:
            self._db.close()
            raise

    def memory(self, client: int) -> Tensors:
        """What a client remembers; empty at first. It is read when it is looked at, anew each time: look once, by `items`."""
        return _Memory(self, client) if self.stored.clients else {}

    def read(self, client: int) -> dict[str, Tensor]:
        """What a client remembers, by name in alphabetical order, in memory of its own."""
        with self._errors():
            row = self._db.execute(f"SELECT crc, tensors {_OF_CLIENT}", (client,)).fetchone()
            if row is None:
                return {}
            crc, content = row
            if zlib.crc32(content) != crc:
                raise sqlite3.DatabaseError(f"what client {client} remembers is not what was written")
        return {name: torch.from_numpy(array) for name, array in sorted(safetensors.load(content).items())}

    def remember(self, client: int, memory: Tensors, size: int | None = None) -> None:
        """Keep this in place of what the client remembers, with the version to come. Nothing of it is held here.

        size: bytes that a device stores for it; None: those of the tensors. Raises PluginError for a tensor of a type that cannot
        be kept.
        """
        with self._errors():
            row = self._db.execute(f"SELECT bytes {_OF_CLIENT}", (client,)).fetchone() if self.stored.clients else None
            if row is None and not memory:
                return
            content = _packed(client, memory)
            size = None if not memory else num_bytes(memory) if size is None else size
            self._begin()
            values = (client, self.stored.version + 1, size, zlib.crc32(content), content)
            self._db.execute("INSERT OR REPLACE INTO memory VALUES (?, ?, ?, ?, ?)", values)
        self._written.append(client)
        self.stored = self.stored.changed(row[0] if row else None, size)

    def sent(self, number: int, clients: Sequence[int], with_past: bool) -> None:
        """Note that a message went to these clients; with_past: it looks at modules of past tasks."""
        ids_n = np.sort(np.asarray(clients, dtype=np.int64))
        self._note(number, ids_n, with_past)
        content = zlib.compress(np.diff(ids_n, prepend=0).astype("<u4").tobytes())
        with self._errors():
            self._begin()
            self._db.execute("INSERT INTO messages VALUES (?, ?, ?, ?)", (number, self.stored.version + 1, with_past, content))

    def commit(self) -> Stored:
        """Make durable what was written since the last time; what a checkpoint must say to go with it."""
        version = self.stored.version + 1
        with self._errors():
            self._begin()
            self._db.execute("UPDATE meta SET version = ?", (version,))
            self._db.execute("COMMIT")
        self.stored = replace(self.stored, version=version)
        return self.stored

    def prune(self) -> None:
        """Delete what was replaced, now that the checkpoint does not need it. If that is lost, it is done when next opened."""
        rows = [(client, self.stored.version) for client in self._written]
        with self._errors():
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("BEGIN")
            self._db.executemany("DELETE FROM memory WHERE client = ? AND version < ?", rows)
            self._db.execute("COMMIT")
            self._db.execute("PRAGMA synchronous = FULL")
        self._written.clear()

    def close(self) -> None:
        """Forget what was not committed."""
        with self._errors():
            self._db.close()

    def __enter__(self) -> ClientStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _set_up(self) -> None:
        """A log of changed pages in place of a journal of old ones: a commit waits for the disk once."""
        for setting in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL", f"cache_size = -{CACHE_KB}"):
            self._db.execute(f"PRAGMA {setting}")

    def _go_on(self, identity: str) -> None:
        """Bring the file to the version that the checkpoint says."""
        version, path = self.stored.version, self._path
        found = self._db.execute("SELECT format, identity, version FROM meta").fetchone()
        if found is None:
            raise sqlite3.DatabaseError("it does not say whose it is")
        if found[:2] != (FORMAT, identity):
            raise RunDirError(f"{path} belongs to another config or version of fedsim: copy the right one back, or {_AGAIN}")
        if found[2] not in (version, version + 1):
            raise RunDirError(
                f"{path} and the checkpoint beside it are of different times (after {found[2]} and {version} steps of the run): "
                f"copy both back, or {_AGAIN}"
            )
        rows = self._db.execute("SELECT client, version FROM memory WHERE version >= ?", (version,)).fetchall()  # from the index
        self._db.execute("BEGIN")
        self._db.executemany("DELETE FROM memory WHERE client = ? AND version = ?", [r for r in rows if r[1] > version])
        self._db.execute("DELETE FROM messages WHERE version > ?", (version,))
        self._db.execute("UPDATE meta SET version = ?", (version,))
        self._db.execute("COMMIT")
        self._written = [client for client, of in rows if of == version]
        self.prune()
        for number, with_past, content in self._db.execute("SELECT number, with_past, clients FROM messages ORDER BY number"):
            gaps_n = np.frombuffer(_unpacked(content), dtype="<u4").astype(np.int64)
            self._note(number, np.cumsum(gaps_n), bool(with_past))

    def _note(self, number: int, ids_n: IntArray, with_past: bool) -> None:
        self.last[ids_n, 0] = number
        if with_past:
            self.last[ids_n, 1] = number

    def _begin(self) -> None:
        if not self._db.in_transaction:
            self._db.execute("BEGIN")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what SQLite raises into one line."""
        try:
            yield
        except sqlite3.Error as e:
            raise self._told(e) from e
        except OSError as e:
            raise StorageError(f"{self._path} could not be written: {e.strerror or e}") from e

    def _told(self, error: sqlite3.Error) -> FedsimError:
        text = str(error)
        if text == "database or disk is full":
            return StorageError(f"disk full, {self._path} could not be written: {self._advice}")
        if any(word in text for word in ("readonly", "unable to open", "disk I/O", "locked")):
            return StorageError(f"{self._path} could not be written: {text}")
        return RunDirError(f"{self._path} is damaged ({text}): {_AGAIN}")


class _Memory(Mapping[str, Tensor]):
    """What a client remembers, read from the store whenever it is looked at; so that nobody holds the memories of a round."""

    def __init__(self, store: ClientStore, client: int) -> None:
        self._store, self._client = store, client

    def __getitem__(self, name: str) -> Tensor:
        return self._store.read(self._client)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._store.read(self._client))

    def __len__(self) -> int:
        return len(self._store.read(self._client))

    def items(self) -> ItemsView[str, Tensor]:
        return self._store.read(self._client).items()

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self._store.read(self._client),)  # to other processes as what it is now


_OF_CLIENT = "FROM memory WHERE client = ? ORDER BY version DESC LIMIT 1"
_AGAIN = "start the run again in a new directory"


def _packed(client: int, memory: Tensors) -> bytes:
    """Tensors as the bytes of a safetensors file."""
    arrays = {}
    for name, tensor in memory.items():
        try:
            arrays[name] = tensor.detach().cpu().contiguous().numpy()
        except TypeError as e:
            raise PluginError(f"client {client} cannot keep '{name}' in its memory as {tensor.dtype}: make it float32") from e
    content = safetensors.save(arrays)
    if len(content) > LARGEST:
        raise PluginError(f"client {client} cannot keep {len(content) / 1e9:.1f} GB in its memory: 1 GB is the most")
    return content


def _unpacked(content: bytes) -> bytes:
    try:
        return zlib.decompress(content)
    except zlib.error as e:
        raise sqlite3.DatabaseError(f"clients of a message: {e}") from e


def _remove(path: Path) -> None:
    """The file, and what SQLite keeps beside it while it is open."""
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        path.with_name(name).unlink(missing_ok=True)
