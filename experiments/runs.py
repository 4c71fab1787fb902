"""What the studies share: a run is loaded if it is finished, resumed if it was stopped, and else made."""

from __future__ import annotations

from pathlib import Path

from fedsim.core.config import SimConfig
from fedsim.core.errors import RunDirError
from fedsim.results import Results
from fedsim.simulation import run


def finished(config: SimConfig, folder: Path) -> Results:
    """The results of a config in a folder of its own. Raises RunDirError when the folder belongs to another config."""
    try:
        found = Results.load(folder)
    except RunDirError:
        return run(config, output=folder)
    if found.finished and found.config.identity() == config.identity():
        return found
    return run(config, resume=folder)
