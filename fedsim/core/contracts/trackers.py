"""Tools that are told about a run."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from fedsim.core.contracts.plugin import Plugin


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told about a run.

    name: of the run directory; id: the same whenever this run directory is gone on in, and no other's; identity: the config's
    (two runs of one config share it); path: the run directory; config: all but its `trackers`, as YAML holds it; resumed:
    whether trackers have been told of this id before.
    """

    name: str
    id: str
    identity: str
    path: Path
    config: Mapping[str, Any]
    resumed: bool

    def options(self) -> dict[str, bool | int | float | str]:
        """The config as hyper-parameters: `client.lr`, `server.aggregator.0.name`. Null and lists of values are JSON."""
        return _flat(self.config)


class Recording(Protocol):
    """One run as its tracker keeps it. Whatever it raises switches it off; the run goes on."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers by name, such as `accuracy/task_0`. A step (0-based round of the whole stream) comes once per name."""
        ...

    def close(self, outcome: Outcome) -> None:
        """The last call. A run that was interrupted or failed may be gone on in, with the same `TrackedRun.id`."""
        ...


Outcome = Literal["finished", "interrupted", "failed"]


@dataclass(frozen=True)
class Tracker(Plugin, ABC):
    """Copies what a run tells about itself to a tool of the user's. It never moves a number of the run."""

    def check(self) -> None:
        """Called before anything is loaded. Raises PluginError when a package is missing."""
        return

    @abstractmethod
    def open(self, run: TrackedRun) -> Recording:
        """Called before training, in a new run and in one that is gone on in; whatever it raises stops the run."""


def _flat(value: Any, key: str = "") -> dict[str, bool | int | float | str]:
    if isinstance(value, Mapping):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return {key: value if isinstance(value, bool | int | float | str) else json.dumps(value)}
    return {name: leaf for k, v in items for name, leaf in _flat(v, f"{key}.{k}" if key else k).items()}
