"""The state of a run in one file, written atomically after every round: resume is exact."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from fedsim.core.errors import RunDirError
from fedsim.core.files import write_atomic
from server.state import ServerState

VERSION = 5


def save(path: Path, state: ServerState, identity: str, advice: str = "free space") -> None:
    """Write the state beside the old file, then put it in its place. Raises StorageError, with the advice, on a full disk."""
    buffer = io.BytesIO()
    torch.save({"version": VERSION, "identity": identity, "state": state.to_plain()}, buffer)
    write_atomic(path, buffer.getvalue(), advice)


def load(path: Path, identity: str) -> ServerState:
    """Read a state back. Raises RunDirError when the file is damaged or belongs to another config."""
    try:
        content = torch.load(path, weights_only=True)
        ours = content["version"] == VERSION and content["identity"] == identity  # first: another version holds other things
        state = ServerState.from_plain(content["state"]) if ours else None
    except Exception as e:
        raise RunDirError(f"{path} is damaged ({type(e).__name__}): start the run again in a new directory") from e
    if state is None:
        raise RunDirError(f"{path} belongs to another config or version of fedsim: start the run again in a new directory")
    return state
