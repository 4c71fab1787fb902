"""Files that are either whole or not there, and folders that one process writes at a time."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from fedsim.core.errors import InUse, StorageError

LOCK = ".lock"  # in a folder: held while a process writes there
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
ADVICE = "free space, then try again (a run goes on with fedsim run --resume)"


def write_atomic(path: str | Path, data: bytes | memoryview, advice: str = ADVICE, lasting: bool = True) -> None:
    """Replace the file `path` by one with this content; whoever reads it, or a crash, sees the old bytes or the new.

    Written beside the target, flushed to the disk, then renamed. Not `lasting`: without waiting for the disk, which makes no
    difference to a process that is killed, for what can be written again after a power cut. Raises StorageError; when the disk is
    full, with `advice`.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path, advice):
        try:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                if lasting:
                    os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:  # Ctrl-C too: nothing half written stays behind
            beside.unlink(missing_ok=True)
            raise
        if lasting:
            _sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process had begun to write in `folder` and below. Call it where nobody else writes."""
    for beside in folder.rglob(".*.tmp"):
        beside.unlink(missing_ok=True)


@contextmanager
def held(path: str | Path, doing: str, file: bool = False) -> Iterator[None]:
    """Keep a folder (made if it is not there), or a `file` that is to be written, to this process; `doing`: what it is at.

    The system lets go of the lock when the process ends, however it ends. Raises InUse, in one line that names who holds it, and
    StorageError where no lock can be made.
    """
    path = Path(path)
    place = path.with_name(f".{path.name}{LOCK}") if file else path / LOCK
    with storage_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise InUse(f"{path} is in use by {_holder(place)}: wait until it has ended, or stop it") from None
    try:
        who = {"process": os.getpid(), "host": socket.gethostname(), "doing": doing}
        who["since"] = datetime.now(timezone.utc).isoformat(sep=" ", timespec="seconds")
        with suppress(OSError):  # a disk that is full is found by what is written next
            _told(place).write_text(json.dumps(who), encoding="utf-8")
        yield
    finally:
        for left in (_told(place), place):  # while it is held: whoever opens it later makes a new one
            with suppress(OSError):
                left.unlink()
        lock.release()


def in_use(folder: Path) -> bool:
    """Whether a process holds the folder now."""
    if not (folder / LOCK).exists():
        return False
    try:
        with held(folder, "a look"):
            return False
    except InUse:
        return True


def _told(lock: Path) -> Path:
    """Who holds a lock; beside it, since some systems empty a locked file or let nobody read it."""
    return lock.with_name(f"{lock.name}.json")


def _holder(lock: Path) -> str:
    try:
        who = json.loads(_told(lock).read_text(encoding="utf-8"))
        return f"{who['doing']} (process {who['process']} on {who['host']}, since {who['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just taken it
        return "another process"


@contextmanager
def storage_errors(path: str | Path, advice: str = ADVICE) -> Iterator[None]:
    """Turn an OSError from writing `path` into a StorageError of one line."""
    try:
        yield
    except OSError as e:
        if e.errno in DISK_FULL:
            raise StorageError(f"disk full, {path} could not be written: {advice}") from e
        raise StorageError(f"{path} could not be written: {e.strerror or e}") from e


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable. Only POSIX can open a folder."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(handle)
