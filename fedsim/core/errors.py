"""Every error that fedsim raises on purpose.

    FedsimError
    ├── ConfigError          a key, a value or a combination in a config           exit code 2
    ├── PluginError          a plug-in that is not there, does not load, is wrong  exit code 2
    ├── DataError            a data file that is missing, damaged or does not fit  exit code 2
    ├── PartitionError       a split that is impossible                            exit code 2
    ├── ModelError           weights or layers that do not fit                     exit code 2
    ├── RunDirError          a run directory that is in the way or damaged         exit code 2
    ├── InUse                a folder or file that another process writes          exit code 1
    ├── StorageError         a disk that is full or cannot be written              exit code 1
    ├── AggregationError     a merge that is impossible                            exit code 1
    ├── ClientFailed         a client that raised or sent numbers that are not finite  exit code 1
    └── PoolError            workers that cannot be started or keep dying          exit code 1

A message is one line that names what failed and says what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class FedsimError(Exception):
    """Base of the tree. `exit_code` is what the command line returns."""

    exit_code = 1

    def __str__(self) -> str:
        return shown(super().__str__())


class ConfigError(FedsimError):
    exit_code = 2


class PluginError(FedsimError):
    exit_code = 2


class PluginFailed(PluginError):
    """A plug-in's code raised what nobody expected, which another attempt may not (memory, a file, chance)."""

    exit_code = 1


class DataError(FedsimError):
    exit_code = 2


class PartitionError(FedsimError):
    exit_code = 2


class ModelError(FedsimError):
    exit_code = 2


class RunDirError(FedsimError):
    exit_code = 2


class InUse(FedsimError):
    pass


class StorageError(FedsimError):
    pass


class AggregationError(FedsimError):
    pass


class PoolError(FedsimError):
    pass


class NonFinite(FedsimError):
    """A loss, a statistic or an update that holds NaN or infinity; becomes a `ClientFailed` once the client is known."""


@dataclass
class ClientFailed(FedsimError):
    """A client that raised, or whose loss or update is not finite.

    A value that a pool yields in place of an update; the server's policy decides whether it is raised.
    `stage` is one of "training", "statistics", "update", "channel", "worker", after "isolated " where the client trained by
    itself.
    """

    client_id: int
    task: int
    round: int
    stage: str
    reason: str

    def __str__(self) -> str:
        return shown(
            f"client {self.client_id} failed in task {self.task}, round {self.round}, stage {self.stage}: {self.reason} "
            f"(server.on_client_failure: skip goes on without it)"
        )

    def __reduce__(self) -> tuple[type[ClientFailed], tuple[int, int, int, str, str]]:
        return ClientFailed, (self.client_id, self.task, self.round, self.stage, self.reason)


def shown(text: str) -> str:
    """Text on one line: line breaks and all that cannot be seen are written as in a Python string."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(error: BaseException) -> str:
    """What an error says, on one line; with its type unless it is one of ours."""
    text = shown(" ".join(str(error).split()))
    return text if isinstance(error, FedsimError) else f"{type(error).__name__}: {text}"


def require_choice(key: str, value: object, known: Sequence[Any]) -> None:
    """Raise ConfigError for a value that is none of the known ones."""
    if value not in known:
        said = f"'{value}' is unknown.{nearest(value, known)}" if isinstance(value, str) else f"cannot be {value!r}."
        raise ConfigError(f"{key} {said} Choose from: {', '.join('null' if k is None else str(k) for k in known)}.")


def named(what: str, names: Sequence[str], most: int = 5) -> str:
    """class 'a' | classes 'a', 'b' | classes 'a', 'b', 'c', 'd', 'e' and 7 more."""
    plural = what if len(names) == 1 else f"{what}es" if what.endswith("s") else f"{what}s"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{plural} {', '.join(repr(n) for n in names[:most])}{more}"


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known one, or all of them. Starts with a space, for appending."""
    names = sorted(known)
    return nearest(wrong, names) or (f" Known: {', '.join(names)}." if names else "")


def nearest(wrong: str, known: Iterable[Any]) -> str:
    near = difflib.get_close_matches(wrong, [name for name in known if isinstance(name, str)], n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""
