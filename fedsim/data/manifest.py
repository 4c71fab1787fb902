"""The manifest of a run: its stream of tasks and who holds which sample, as one file that repeats the split elsewhere.

Shape suffixes: T tasks, K clients, C classes of a task, N samples.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.core import config as configs
from fedsim.core import rng
from fedsim.core.config import SimConfig
from fedsim.core.contracts import ArraySplit, Dataset, IntArray, Partition, ShardLookup, WorkSpec
from fedsim.core.errors import ConfigError, DataError, PartitionError
from fedsim.core.files import storage_errors, write_atomic
from fedsim.data import streams
from fedsim.data.partitions._alpha import estimate_alpha as estimate_alpha

FORMAT = "fedsim-manifest-1"


@dataclass(frozen=True, eq=False)
class Manifest(ShardLookup):
    """Who holds what. Two manifests are equal when their hashes are.

    data: sha256 of the data (`fingerprint`); num_train, num_test: its samples.
    class_order: original class ids in the order of the head's rows; class_names: in the same order.
    task_classes: rows of the head per task.
    shard_indices, shard_offsets, test_indices, test_offsets: see `ShardLookup`.
    histograms: per task (K, C), training samples of the task's classes at every client.
    alpha: maximum-likelihood Dirichlet α per task; overall_alpha: of all tasks together.
    asked: the sections of the config and the seed that made it (for the reader; not part of the hash).
    """

    data: str
    num_train: int
    num_test: int
    class_order: tuple[int, ...]
    class_names: tuple[str, ...]
    task_names: tuple[str, ...]
    task_classes: tuple[tuple[int, ...], ...]
    histograms: tuple[IntArray, ...]
    alpha: tuple[float, ...]
    overall_alpha: float
    asked: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_tasks(self) -> int:
        return len(self.task_classes)

    @property
    def sizes(self) -> IntArray:
        """Training samples per task and client (T, K)."""
        return np.diff(self.shard_offsets).reshape(self.num_tasks, self.num_clients)

    def holdings(self) -> Iterator[tuple[int, int, int, str, int]]:
        """(task, client, row of the head, class name, training samples) of everything that anybody holds."""
        for t, (classes, held_KC) in enumerate(zip(self.task_classes, self.histograms, strict=True)):
            for k, c in np.argwhere(held_KC):
                yield t, int(k), classes[c], self.class_names[classes[c]], int(held_KC[k, c])

    @cached_property
    def hash(self) -> str:
        """sha256 of the canonical JSON of everything but `asked` and the α (they follow from the rest, up to rounding)."""
        content = _content(self)
        for key in ("asked", "overall_alpha"):
            del content[key]
        for task in content["tasks"]:
            del task["alpha"]
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return self.hash == other.hash if isinstance(other, Manifest) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.hash)

    def save(self, path: str | Path) -> None:
        """Write one JSON file: whole or not at all. Raises StorageError.

        {"format", "hash", "data": {"sha256", "train", "test"}, "clients", "class_order", "class_names", "overall_alpha", "asked",
        "tasks": [{"name", "classes", "alpha", "clients": [[positions]], "test": [positions], "histogram": [[counts]]}]}
        An infinite α is written as "inf", an unknown one as null.
        """
        target, advice = Path(path), "free some space, or choose another folder"
        with storage_errors(target, advice):
            target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, json.dumps({"format": FORMAT, "hash": self.hash, **_content(self)}).encode(), advice)


def make(config: SimConfig, dataset: Dataset) -> Manifest:
    """The stream and the partition of a config; read from `config.manifest` where that names a file.

    Task t is split with `rng.stream(seed, "partition", t)`. The stream and the partition's options in the config count for
    nothing when a file is given, except that the numbers of clients must agree.
    Raises ConfigError, PartitionError (with the task), DataError (a manifest of other data).
    """
    if config.manifest is not None:
        return _from_file(config, dataset)
    stream = streams.build(config.stream, dataset, config.seed)
    partition: Partition = configs.build("partitions", config.partition)
    shards: list[IntArray] = []
    for t, positions in enumerate(stream.train):
        shards += [
            positions[part] for part in _split(partition, dataset.train.labels[positions], config.seed, t, stream.task_names[t])
        ]
    row_of = streams.rows(stream.class_order, len(dataset.class_names))
    histograms = _histograms(row_of[dataset.train.labels], shards, stream.task_classes, partition.clients)
    asked = {"seed": config.seed, **{key: config.to_dict()[key] for key in ("data", "stream", "partition")}}
    return Manifest(
        data=fingerprint(dataset),
        num_train=len(dataset.train),
        num_test=len(dataset.test),
        class_order=stream.class_order,
        class_names=stream.class_names,
        task_names=stream.task_names,
        task_classes=stream.task_classes,
        num_clients=partition.clients,
        shard_indices=_joined(shards),
        shard_offsets=_offsets(shards),
        test_indices=_joined(stream.test),
        test_offsets=_offsets(stream.test),
        histograms=histograms,
        alpha=tuple(estimate_alpha(h.T) for h in histograms),
        overall_alpha=estimate_alpha(np.concatenate([h.T for h in histograms])),
        asked=asked,
    )


def load(path: str | Path) -> Manifest:
    """Read what `save` wrote. Raises DataError for a file that is missing, damaged, or changed since."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"the manifest {path} cannot be read: {e}") from e
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise DataError(f"the manifest {path} has format {content['format']!r}, this version reads {FORMAT!r}")
        manifest = _parse(content)
        stored = content["hash"]
    except (ValueError, KeyError, TypeError, OverflowError) as e:
        raise DataError(
            f"the manifest {path} is damaged ({type(e).__name__}: {' '.join(str(e).split())}): make it again from its config"
        ) from e
    if manifest.hash != stored:
        raise DataError(
            f"the manifest {path} does not match its own hash: it was changed or damaged, make it again from its config"
        )
    return manifest


def work_spec(manifest: Manifest, dataset: Dataset, config: SimConfig) -> WorkSpec:
    """What workers need: the data with labels as rows of the head (-1: a class that no task uses), and the shards."""
    row_of = streams.rows(manifest.class_order, len(dataset.class_names))
    train, test = (ArraySplit(s.inputs, row_of[s.labels], s.domains) for s in (dataset.train, dataset.test))
    return WorkSpec(
        config=config,
        train=train,
        test=test,
        task_classes=manifest.task_classes,
        num_clients=manifest.num_clients,
        shard_indices=manifest.shard_indices,
        shard_offsets=manifest.shard_offsets,
        test_indices=manifest.test_indices,
        test_offsets=manifest.test_offsets,
    )


def fingerprint(dataset: Dataset) -> str:
    """sha256 over the class names and, for both splits, labels, domains and every input: names, types, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(dataset.class_names).encode())
    for split in (dataset.train, dataset.test):
        arrays = {"labels": split.labels, **split.inputs}
        if split.domains is not None:
            arrays["domains"] = split.domains
        for name in sorted(arrays):
            array = np.ascontiguousarray(arrays[name])
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            digest.update(f"{name} {little.dtype.str} {little.shape}".encode())
            digest.update(little.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _from_file(config: SimConfig, dataset: Dataset) -> Manifest:
    manifest = load(str(config.manifest))
    if manifest.data != fingerprint(dataset):
        raise DataError(
            f"the manifest {config.manifest} is of other data ({manifest.num_train} training, {manifest.num_test} test samples; "
            f"here {len(dataset.train)} and {len(dataset.test)}, or other contents): use the data section that it was made with"
        )
    clients = config.partition.get("clients")
    if clients != manifest.num_clients:
        raise ConfigError(
            f"partition.clients is {clients}, but the manifest {config.manifest} holds {manifest.num_clients}: "
            f"set partition.clients={manifest.num_clients}"
        )
    return manifest


def _split(partition: Partition, labels: IntArray, seed: int, task: int, name: str) -> list[IntArray]:
    """The shards of one task, checked: a user's own partition may break its promise."""
    try:
        shards = partition.split(labels, rng.stream(seed, "partition", task))
    except PartitionError as e:
        raise PartitionError(f"task {task} ({name}): {e}") from e
    what = f"task {task}: partition {type(partition).__module__}"
    if len(shards) != partition.clients:
        raise PartitionError(f"{what} gave {len(shards)} shards for {partition.clients} clients")
    everything = np.sort(np.concatenate(shards)) if shards else np.zeros(0)
    if len(everything) != len(labels) or not np.array_equal(everything, np.arange(len(labels))):
        raise PartitionError(f"{what} is no disjoint cover: every one of the {len(labels)} samples must be at exactly one client")
    smallest = min(map(len, shards))
    if smallest < partition.min_samples:
        raise PartitionError(f"{what} gave a client {smallest} samples, the floor is {partition.min_samples}")
    return [np.asarray(shard, dtype=np.int64) for shard in shards]


def _joined(parts: Sequence[IntArray]) -> IntArray:
    return np.concatenate(parts).astype(np.int64)


def _offsets(parts: Sequence[IntArray]) -> IntArray:
    return np.cumsum([0, *map(len, parts)], dtype=np.int64)


def _histograms(
    row_N: IntArray, shards: Sequence[IntArray], task_classes: Sequence[Sequence[int]], clients: int
) -> tuple[IntArray, ...]:
    """Per task (K, C): samples of the task's classes at every client."""
    tables = []
    for t, classes in enumerate(task_classes):
        of_task = shards[t * clients : (t + 1) * clients]
        client_n = np.repeat(np.arange(clients), [len(shard) for shard in of_task])
        column_n = row_N[np.concatenate(of_task)] - classes[0]  # rows of a task are consecutive
        counts = np.bincount(client_n * len(classes) + column_n, minlength=clients * len(classes))
        tables.append(counts.reshape(clients, len(classes)))
    return tuple(tables)


def _content(manifest: Manifest) -> dict[str, Any]:
    """Plain lists and dicts, in the layout of the file."""
    tasks = []
    indices, bounds = manifest.shard_indices.tolist(), manifest.shard_offsets.tolist()
    for t in range(manifest.num_tasks):
        first = t * manifest.num_clients
        tasks.append(
            {
                "name": manifest.task_names[t],
                "classes": list(manifest.task_classes[t]),
                "alpha": _plain_alpha(manifest.alpha[t]),
                "clients": [indices[a:b] for a, b in pairwise(bounds[first : first + manifest.num_clients + 1])],
                "test": manifest.test_of(t).tolist(),
                "histogram": manifest.histograms[t].tolist(),
            }
        )
    return {
        "data": {"sha256": manifest.data, "train": manifest.num_train, "test": manifest.num_test},
        "clients": manifest.num_clients,
        "class_order": list(manifest.class_order),
        "class_names": list(manifest.class_names),
        "overall_alpha": _plain_alpha(manifest.overall_alpha),
        "asked": dict(manifest.asked),
        "tasks": tasks,
    }


def _parse(content: Mapping[str, Any]) -> Manifest:
    """A manifest from a file's content; ValueError, KeyError or TypeError when something does not fit."""
    tasks, clients, data = content["tasks"], int(content["clients"]), content["data"]
    if not tasks or any(len(task["clients"]) != clients for task in tasks):
        raise ValueError("the number of clients differs between tasks")
    shards = [np.array(shard, dtype=np.int64) for task in tasks for shard in task["clients"]]
    tests = [np.array(task["test"], dtype=np.int64) for task in tasks]
    _require_positions(shards, int(data["train"]), "client")
    _require_positions(tests, int(data["test"]), "test")
    return Manifest(
        data=str(data["sha256"]),
        num_train=int(data["train"]),
        num_test=int(data["test"]),
        class_order=tuple(int(c) for c in content["class_order"]),
        class_names=tuple(str(name) for name in content["class_names"]),
        task_names=tuple(str(task["name"]) for task in tasks),
        task_classes=tuple(tuple(int(c) for c in task["classes"]) for task in tasks),
        num_clients=clients,
        shard_indices=_joined(shards),
        shard_offsets=_offsets(shards),
        test_indices=_joined(tests),
        test_offsets=_offsets(tests),
        histograms=tuple(np.array(task["histogram"], dtype=np.int64).reshape(clients, len(task["classes"])) for task in tasks),
        alpha=tuple(_parse_alpha(task["alpha"]) for task in tasks),
        overall_alpha=_parse_alpha(content["overall_alpha"]),
        asked=dict(content["asked"]),
    )


def _require_positions(parts: Sequence[IntArray], limit: int, what: str) -> None:
    joined = _joined(parts)  # ValueError when a part is no list of numbers
    if len(joined) and not (joined.min() >= 0 and joined.max() < limit):
        raise ValueError(f"{what} positions must lie in 0..{limit - 1}")


def _plain_alpha(alpha: float) -> float | str | None:
    return None if math.isnan(alpha) else "inf" if math.isinf(alpha) else alpha


def _parse_alpha(value: Any) -> float:
    return math.nan if value is None else float(value)
