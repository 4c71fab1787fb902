"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsim.core.errors import StorageError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
ADVICE = "free space, then try again (a run goes on with fedsim run --resume)"


def write_atomic(path: str | Path, data: bytes, advice: str = ADVICE) -> None:
    """Replace the file `path` by one with this content; whoever reads it, or a crash, sees the old bytes or the new.

    Written beside the target, flushed to the disk, then renamed. Raises StorageError; when the disk is full, with `advice`.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path, advice):
        try:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:  # Ctrl-C too: nothing half written stays behind
            beside.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process had begun to write in `folder` and below. Call it where nobody else writes."""
    for beside in folder.rglob(".*.tmp"):
        beside.unlink(missing_ok=True)


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
