"""Names of what a task brings to an adapter that grows: `<name>.task<number>`, so that names tell which task is current."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor

from fedsim.core.messages import Tensors

LAST = re.compile(r"\.task(\d+)$")


def of_task(name: str, task: int) -> str:
    """The name of a component of a task, 0-based."""
    return f"{name}.task{task}"


def current(names: Iterable[str]) -> int:
    """The latest task that any of the names is of; −1 if none is of a task."""
    return max((int(found[1]) for found in map(LAST.search, names) if found), default=-1)


def all_of(tensors: Tensors, name: str) -> list[Tensor]:
    """A component of every task so far, the current one's last."""
    return [tensors[of_task(name, task)] for task in range(current(tensors) + 1)]


def older(names: Iterable[str]) -> tuple[str, ...]:
    """Globs of the components of all tasks before the current one."""
    return tuple(of_task("*", task) for task in range(current(names)))
