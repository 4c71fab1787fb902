"""Streams of tasks: which classes or domains a task brings, and which samples belong to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.core import rng
from fedsim.core.config import StreamConfig
from fedsim.core.contracts import ArraySplit, Dataset, IntArray
from fedsim.core.errors import ConfigError, DataError, did_you_mean, named
from fedsim.data.noise import Flips, flips


@dataclass(frozen=True, eq=False)
class Stream:
    """Tasks in order.

    class_order: original class ids in the order of the head's rows; only classes that are used.
    task_classes: rows of the head per task. train, test: positions into `dataset.train` and `.test` per task, ascending.
    flips: training samples with a wrong label, if noise was asked for.
    """

    class_order: tuple[int, ...]
    class_names: tuple[str, ...]
    task_names: tuple[str, ...]
    task_classes: tuple[tuple[int, ...], ...]
    train: tuple[IntArray, ...]
    test: tuple[IntArray, ...]
    flips: Flips = field(default_factory=Flips)


def build(config: StreamConfig, dataset: Dataset, seed: int) -> Stream:
    """The stream of a data set. A shuffled order is drawn from `rng.stream(seed, "stream")`.

    class_incremental, task_incremental: classes in the order asked for, cut into tasks. Without `classes_per_task` all classes
        are used; if they do not divide, the first C mod T tasks hold one class more (as `numpy.array_split` does). With it, the
        first tasks × classes_per_task classes are used; with `tasks` null all are, and the last task may be smaller.
        With `group` every group is a task (all its classes, in the data's order), and `order` is one of groups.
    domain_incremental: every domain is a task over all classes, and `order` is one of domains.
    Classes without a sample are never used: they are no rows of the head.

    With `joint` all of these tasks are one, with the wrong labels that `noise` gives them apart.

    Raises ConfigError that names the key (`stream.order`, ...), and DataError for a task without samples, or for a class that has
    test samples but none to learn from.
    """
    make = _by_domain if config.name == "domain_incremental" else _by_class
    stream = make(config, dataset, seed)
    for t, (train, test) in enumerate(zip(stream.train, stream.test, strict=True)):
        for split, positions in (("training", train), ("test", test)):
            if len(positions) == 0:
                raise DataError(
                    f"task {t} ({stream.task_names[t]}) has no {split} samples: leave it out by stream.order or stream.tasks"
                )
    row_N = rows(stream.class_order, len(dataset.class_names))[dataset.train.labels]
    stream = replace(stream, flips=flips(config.noise, row_N, stream.train, stream.task_classes, seed))
    return _joined(stream) if config.joint else stream


def _joined(stream: Stream) -> Stream:
    """All tasks as one."""
    train, test = (np.sort(np.concatenate(positions)) for positions in (stream.train, stream.test))
    classes = sorted({row for rows in stream.task_classes for row in rows})
    return replace(stream, task_names=("all tasks",), task_classes=(tuple(classes),), train=(train,), test=(test,))


def _by_class(config: StreamConfig, dataset: Dataset, seed: int) -> Stream:
    trained, tested = (occurring(split.labels, dataset) for split in (dataset.train, dataset.test))
    if config.group is None:
        usable = trained if isinstance(config.order, list) else trained | tested
        order = _ordered(config.order, dataset.class_names, "class", seed, np.flatnonzero(usable).tolist())
        tasks, names = _cut(config, order, len(dataset.class_names)), None
    else:
        tasks, names = _grouped(config, dataset, seed, trained | tested)
    _require_training([c for task in tasks for c in task], trained, dataset.class_names)
    order = [c for task in tasks for c in task]
    row_of = rows(order, len(dataset.class_names))
    task_of_row = np.repeat(np.arange(len(tasks)), [len(task) for task in tasks])
    task_of_class = np.where(row_of >= 0, task_of_row[row_of], -1)
    bounds = np.cumsum([0, *map(len, tasks)]).tolist()
    return Stream(
        class_order=tuple(order),
        class_names=tuple(dataset.class_names[c] for c in order),
        task_names=tuple(names or (f"task {t}" for t in range(len(tasks)))),
        task_classes=tuple(tuple(range(a, b)) for a, b in pairwise(bounds)),
        train=_positions(task_of_class[dataset.train.labels], len(tasks)),
        test=_positions(task_of_class[dataset.test.labels], len(tasks)),
    )


def _by_domain(config: StreamConfig, dataset: Dataset, seed: int) -> Stream:
    for key in ("group", "classes_per_task"):
        if getattr(config, key) is not None:
            raise ConfigError(
                f"stream.{key} does not go with domain_incremental: every task holds all classes, set stream.{key} to null"
            )
    if not dataset.domain_names:
        raise ConfigError(
            "stream.name is domain_incremental, but the data has no domains: use class_incremental, or data with domains"
        )
    order = _first(config, _ordered(config.order, dataset.domain_names, "domain", seed), "domains")
    task_of_domain = rows(order, len(dataset.domain_names))
    train, test = (_positions(task_of_domain[_domains(split)], len(order)) for split in (dataset.train, dataset.test))
    trained, tested = (
        occurring(split.labels[np.concatenate(positions)], dataset)
        for split, positions in ((dataset.train, train), (dataset.test, test))
    )
    classes = np.flatnonzero(trained | tested).tolist()
    _require_training(classes, trained, dataset.class_names)
    return Stream(
        class_order=tuple(classes),
        class_names=tuple(dataset.class_names[c] for c in classes),
        task_names=tuple(dataset.domain_names[d] for d in order),
        task_classes=(tuple(range(len(classes))),) * len(order),
        train=train,
        test=test,
    )


def occurring(labels: IntArray, dataset: Dataset) -> NDArray[np.bool_]:
    """Of every class of the data, whether it is among the labels."""
    return np.bincount(labels, minlength=len(dataset.class_names)) > 0


def _require_training(classes: Sequence[int], trained: NDArray[np.bool_], names: Sequence[str]) -> None:
    """Raise DataError for classes that are tested but that nobody can learn."""
    unseen = [names[c] for c in classes if not trained[c]]
    if not unseen:
        return
    alike = {_plain_name(name): name for name, known in zip(names, trained, strict=True) if known}
    near = [f"'{name}' and '{alike[_plain_name(name)]}'" for name in unseen if _plain_name(name) in alike]
    hint = f"{near[0]} differ in blanks or case only, make them one" if near else "mend the data"
    raise DataError(
        f"{named('class', unseen)} of the test samples: there are no training samples to learn from: {hint}, or list the classes "
        "to be used in stream.order"
    )


def _plain_name(name: str) -> str:
    return "".join(name.split()).casefold()


def _cut(config: StreamConfig, order: Sequence[int], known: int) -> list[list[int]]:
    """Classes in order, cut into tasks by `tasks` and `classes_per_task`. known: classes that the data names."""
    tasks, size = config.tasks, config.classes_per_task
    there = _counted(config, len(order), "classes")
    if isinstance(config.order, str) and len(order) < known:
        there += " with samples"
    if tasks is None and size is None:
        raise ConfigError(
            "stream.tasks or stream.classes_per_task must be given (stream.tasks may be null only with a grouping or domains)"
        )
    if size is None:
        assert tasks is not None
        if tasks > len(order):
            raise ConfigError(f"stream.tasks is {tasks}, but there are only {there}: use at most {len(order)} tasks")
        return [part.tolist() for part in np.array_split(np.asarray(order), tasks)]
    if tasks is None:
        return [list(order[i : i + size]) for i in range(0, len(order), size)]
    if tasks * size > len(order):
        raise ConfigError(
            f"stream.tasks × stream.classes_per_task is {tasks} × {size} = {tasks * size}, but there are only "
            f"{there}: use at most {len(order) // size} tasks of {size}"
        )
    return [list(order[t * size : (t + 1) * size]) for t in range(tasks)]


def _grouped(config: StreamConfig, dataset: Dataset, seed: int, used: NDArray[np.bool_]) -> tuple[list[list[int]], list[str]]:
    """Classes of every group that is a task, and the names of these groups."""
    group = config.group
    assert group is not None
    if group not in dataset.groups:
        known = did_you_mean(group, dataset.groups) or " The data has no groupings."
        raise ConfigError(f"stream.group '{group}' is not a grouping of the data.{known}")
    if config.classes_per_task is not None:
        raise ConfigError(
            "stream.classes_per_task does not go with stream.group: a task holds all classes of its group, set it to null"
        )
    group_of = dataset.groups[group]
    order = _ordered(config.order, dataset.group_names[group], group, seed)
    members = {g: np.flatnonzero((group_of == g) & used).tolist() for g in order}
    chosen = _first(config, [g for g in order if members[g]], "groups")
    return [members[g] for g in chosen], [dataset.group_names[group][g] for g in chosen]


def _first(config: StreamConfig, order: list[int], what: str) -> list[int]:
    """The first `tasks` of the groups or domains; all if that is null."""
    if config.tasks is not None and config.tasks > len(order):
        raise ConfigError(
            f"stream.tasks is {config.tasks}, but there are only {_counted(config, len(order), what)}: "
            f"use at most {len(order)}, or null for all"
        )
    return order[: config.tasks]


def _counted(config: StreamConfig, count: int, what: str) -> str:
    """How many there are, and whether that is because of a list in stream.order."""
    return f"{count} {what}{'' if isinstance(config.order, str) else ' in stream.order, which leaves the others out'}"


def _ordered(order: Any, names: Sequence[str], what: str, seed: int, usable: Sequence[int] | None = None) -> list[int]:
    """Ids in the order asked for: "given", "shuffle", or a list of names or ids (those not listed are left out).

    usable: the ids that are there at all (default: every one that has a name).
    """
    there = list(range(len(names))) if usable is None else list(usable)
    if order == "given":
        return there
    if order == "shuffle":
        return [there[i] for i in rng.stream(seed, "stream").permutation(len(there)).tolist()]
    if not order:
        raise ConfigError(f"stream.order is an empty list: name at least one {what}")
    ids = {name: i for i, name in enumerate(names)}
    found = [_find(item, ids, what) for item in order]
    seen: set[int] = set()
    for item, i in zip(order, found, strict=True):
        if i in seen:
            raise ConfigError(f"stream.order names {what} {item!r} twice")
        if i not in there:
            raise ConfigError(f"stream.order names {what} {item!r}, which has no training samples: leave it out")
        seen.add(i)
    return found


def _find(item: Any, ids: dict[str, int], what: str) -> int:
    if isinstance(item, str):
        if item not in ids:
            raise ConfigError(f"stream.order: the data has no {what} '{item}'.{_near(item, ids)}")
        return ids[item]
    if isinstance(item, bool) or not isinstance(item, int):
        raise ConfigError(f"stream.order must hold names or ids, got {item!r}")
    if all(name.isdecimal() for name in ids):  # a number is then what the data calls it, whatever place that has
        if str(item) not in ids:
            raise ConfigError(f"stream.order: the data has no {what} {item}.{_near(str(item), ids)}")
        return ids[str(item)]
    if not 0 <= item < len(ids):
        raise ConfigError(f"stream.order: the data has no {what} {item}, ids go from 0 to {len(ids) - 1}")
    return item


def _near(item: str, ids: dict[str, int]) -> str:
    """A hint that stays one line for data with hundreds of names."""
    hint = did_you_mean(item, ids)
    return hint if hint.startswith(" Did") or len(ids) <= 20 else f" There are {len(ids)}, e.g. '{next(iter(ids))}'."


def rows(order: Sequence[int], total: int) -> IntArray:
    """Position in `order` of every id in 0..total-1; -1 where it is not listed."""
    row_of = np.full(total, -1, dtype=np.int64)
    row_of[np.asarray(order, dtype=np.int64)] = np.arange(len(order))
    return row_of


def _positions(task_N: NDArray[np.int64], tasks: int) -> tuple[IntArray, ...]:
    """Positions of the samples of every task, ascending; samples of task -1 are left out."""
    order = np.argsort(task_N, kind="stable")
    bounds = np.searchsorted(task_N[order], np.arange(tasks + 1))
    return tuple(order[a:b] for a, b in pairwise(bounds))


def _domains(split: ArraySplit) -> IntArray:
    if split.domains is None:
        raise DataError(
            "the data names domains, but its samples have none: a source must give the domain of every sample of both splits"
        )
    return split.domains
