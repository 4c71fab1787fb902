"""The state of a run in one file, written atomically after every round: resume is exact."""

from __future__ import annotations

import io
import re
from pathlib import Path

import torch

from fedsim.core.errors import RunDirError
from fedsim.core.files import write_atomic
from server.outcomes import require_plain
from server.state import ServerState, Simulation

VERSION = 5


def save(path: Path, state: ServerState, identity: str, advice: str = "free space") -> None:
    """Write the state beside the old file, then put it in its place. Raises StorageError, with the advice, on a full disk."""
    buffer = io.BytesIO()
    torch.save({"version": VERSION, "identity": identity, "state": state.to_plain()}, buffer)
    write_atomic(path, buffer.getvalue(), advice)


def require_kept(sim: Simulation, state: ServerState) -> None:
    """Raise PluginError for a part of the run whose state could be written and never be read again."""
    require_plain(sim.aggregator, state.aggregator)
    require_plain(sim.consolidator, state.consolidator)
    start = state.start
    require_plain(sim.consolidator, {"frozen": start.frozen, "weights": start.past.weights, "share": start.past.share})
    if sim.calibrator is not None:
        require_plain(sim.calibrator, state.calibrator)
    for name, learner in sim.learners.items():
        require_plain(learner, state.learners.get(name))


def load(path: Path, identity: str) -> ServerState:
    """Read a state back. Raises RunDirError when the file is damaged, belongs to another config, or holds more than can be read
    without running code that lies in it."""
    try:
        content = torch.load(path, weights_only=True)
        ours = content["version"] == VERSION and content["identity"] == identity  # first: another version holds other things
        state = ServerState.from_plain(content["state"]) if ours else None
    except Exception as e:
        if unsafe := re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(e)):
            raise RunDirError(
                f"{path} is whole, but holds {unsafe[1]}, from a plug-in's state that keeps more than tensors and plain numbers: "
                f"mend the plug-in (fedsim check shows what to do) and start the run again"
            ) from e
        raise RunDirError(f"{path} is damaged ({type(e).__name__}): start the run again in a new directory") from e
    if state is None:
        raise RunDirError(f"{path} belongs to another config or version of fedsim: start the run again in a new directory")
    return state
