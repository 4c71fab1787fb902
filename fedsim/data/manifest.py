"""The manifest of a run: its stream of tasks and who holds which sample, as one file that repeats the split elsewhere.

Shape suffixes: T tasks, K clients, C classes of a task, N samples.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.core import config as configs
from fedsim.core import rng
from fedsim.core.config import SimConfig
from fedsim.core.contracts import ArraySplit, Dataset, IntArray, Partition
from fedsim.core.errors import ConfigError, DataError, PartitionError
from fedsim.core.files import storage_errors, write_atomic
from fedsim.core.work import ShardLookup, WorkSpec
from fedsim.data import streams
from fedsim.data.digits import json_of_lists
from fedsim.data.noise import Flips
from fedsim.data.partitions._alpha import estimate_alpha as estimate_alpha
from fedsim.data.partitions._common import Shards

FORMAT = "fedsim-manifest-1"
AT_ONCE = 1 << 16  # clients whose holdings are listed at once


@dataclass(frozen=True, eq=False)
class Manifest(ShardLookup):
    """Who holds what. Two manifests are equal when their hashes are.

    data: sha256 of the data (`fingerprint`); num_train, num_test: its samples.
    class_order: original class ids in the order of the head's rows; class_names: in the same order.
    task_classes: rows of the head per task.
    shard_indices, shard_offsets, test_indices, test_offsets: see `ShardLookup`.
    histograms: per task (K, C), training samples of the task's classes at every client, by their true classes.
    flips: training samples with a wrong label; they are part of the hash where there are any.
    alpha: maximum-likelihood Dirichlet α per task; overall_alpha: of all tasks together.
    asked: the sections of the config and the seed that made it (not part of the hash; what a config that names it says).
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
    flips: Flips = field(default_factory=Flips)
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
            for first in range(0, len(held_KC), AT_ONCE):
                some_kC = held_KC[first : first + AT_ONCE]
                client_H, column_H = np.nonzero(some_kC)
                rows_H = [classes[c] for c in column_H.tolist()]
                names_H = [self.class_names[row] for row in rows_H]
                samples_H = some_kC[client_H, column_H].tolist()
                yield from zip(repeat(t), (client_H + first).tolist(), rows_H, names_H, samples_H, strict=False)

    @cached_property
    def hash(self) -> str:
        """sha256 of the canonical JSON of everything but `asked` and the α (they follow from the rest, up to rounding)."""
        digest = hashlib.sha256()
        for part in _json(self, everything=False):
            digest.update(part)
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return self.hash == other.hash if isinstance(other, Manifest) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.hash)

    def save(self, path: str | Path) -> None:
        """Write one JSON file: whole or not at all. Raises StorageError.

        {"format", "hash", "data": {"sha256", "train", "test"}, "clients", "class_order", "class_names", "overall_alpha", "asked",
        "tasks": [{"name", "classes", "alpha", "clients": [[positions]], "test": [positions], "histogram": [[counts]]}],
        and with label noise "flips": {"positions": [positions], "rows": [rows of the head]}}
        An infinite α is written as "inf", an unknown one as null.
        """
        target, advice = Path(path), "free some space, or choose another folder"
        with storage_errors(target, advice):
            target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, b"".join(_json(self, everything=True)), advice)


def make(config: SimConfig, dataset: Dataset) -> Manifest:
    """The stream and the partition of a config; read from `config.manifest` where that names a file.

    Task t is split with `rng.stream(seed, "partition", t)`. When a file is given, nothing is drawn; that stream and partition
    of the config are those that it was made with, `core.config.splits` sees to.
    Raises ConfigError, PartitionError (with the task), DataError (a manifest of other data).
    """
    if config.manifest is not None:
        return _from_file(config, dataset)
    stream = streams.build(config.stream, dataset, config.seed)
    partition: Partition = configs.build("partitions", config.partition)
    row_of = streams.rows(stream.class_order, len(dataset.class_names))
    held, sizes, histograms = [], [], []
    for t, positions in enumerate(stream.train):
        labels = dataset.train.labels[positions]
        dealt, sizes_K = _split(partition, labels, config.seed, t, stream.task_names[t])
        held.append(positions[dealt])
        sizes.append(sizes_K)
        histograms.append(_histogram(row_of[labels[dealt]], sizes_K, stream.task_classes[t]))
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
        shard_indices=np.concatenate(held),
        shard_offsets=_offsets(np.concatenate(sizes)),
        test_indices=_joined(stream.test),
        test_offsets=_offsets([len(test) for test in stream.test]),
        histograms=tuple(histograms),
        alpha=tuple(estimate_alpha(h.T) for h in histograms),
        overall_alpha=estimate_alpha(np.concatenate([h.T for h in histograms])),
        flips=stream.flips,
        asked=asked,
    )


def load(path: str | Path) -> Manifest:
    """Read what `save` wrote. Raises DataError for a file that is missing, damaged, or changed since."""
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8")
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
    """What workers need: the data with labels as rows of the head (-1: a class that no task uses), wrong ones where the manifest
    says so, and the shards."""
    row_of = streams.rows(manifest.class_order, len(dataset.class_names))
    train, test = (ArraySplit(s.inputs, row_of[s.labels], s.domains) for s in (dataset.train, dataset.test))
    train.labels[manifest.flips.positions] = manifest.flips.rows
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


def _split(partition: Partition, labels: IntArray, seed: int, task: int, name: str) -> tuple[IntArray, IntArray]:
    """Positions of one task, client by client, and the clients' sizes; checked: a user's own partition may break its promise."""
    try:
        shards = partition.split(labels, rng.stream(seed, "partition", task))
    except PartitionError as e:
        raise PartitionError(f"task {task} ({name}): {e}") from e
    what = f"task {task}: partition {type(partition).__module__}"
    if len(shards) != partition.clients:
        raise PartitionError(f"{what} gave {len(shards)} shards for {partition.clients} clients")
    if isinstance(shards, Shards):
        dealt, sizes_K = shards.positions, shards.sizes
    else:
        dealt, sizes_K = np.concatenate(shards), np.fromiter(map(len, shards), dtype=np.int64, count=len(shards))
    if not _is_permutation(dealt, len(labels)):
        raise PartitionError(f"{what} is no disjoint cover: every one of the {len(labels)} samples must be at exactly one client")
    smallest = int(sizes_K.min())
    if smallest < partition.min_samples:
        raise PartitionError(f"{what} gave a client {smallest} samples, the floor is {partition.min_samples}")
    return dealt.astype(np.int64, copy=False), sizes_K


def _is_permutation(positions: IntArray, length: int) -> bool:
    """Whether every one of 0..length-1 is there once."""
    if not np.array_equal(positions, whole := positions.astype(np.int64)):  # a user's partition may give 1.0, but not 1.5
        return False
    positions = whole
    if len(positions) != length or (length and (positions.min() < 0 or positions.max() >= length)):
        return False
    return bool((np.bincount(positions, minlength=length) == 1).all())


def _joined(parts: Sequence[IntArray]) -> IntArray:
    return np.concatenate(parts).astype(np.int64)


def _offsets(sizes: IntArray | Sequence[int]) -> IntArray:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _histogram(row_N: IntArray, sizes_K: IntArray, classes: Sequence[int]) -> IntArray:
    """Samples of a task's classes at every client (K, C). row_N: of the samples client by client."""
    client_N = np.repeat(np.arange(len(sizes_K)), sizes_K)
    cell_N = client_N * len(classes) + (row_N - classes[0])  # rows of a task are consecutive
    return np.bincount(cell_N, minlength=len(sizes_K) * len(classes)).reshape(len(sizes_K), len(classes))


def _json(manifest: Manifest, everything: bool) -> Iterator[bytes]:
    """JSON with sorted keys and no spaces, in parts: of the whole file, or of what is hashed."""
    told: dict[str, Any] = {
        "data": {"sha256": manifest.data, "train": manifest.num_train, "test": manifest.num_test},
        "clients": manifest.num_clients,
        "class_order": manifest.class_order,
        "class_names": manifest.class_names,
        "tasks": None,
    }
    if len(manifest.flips.positions):
        told["flips"] = {name: array.tolist() for name, array in manifest.flips._asdict().items()}
    if everything:
        told |= {"format": FORMAT, "hash": manifest.hash}
        told |= {"overall_alpha": _plain_alpha(manifest.overall_alpha), "asked": dict(manifest.asked)}
    for i, key in enumerate(sorted(told)):
        yield (b"," if i else b"{") + _plain(key) + b":"
        if key == "tasks":
            for t in range(manifest.num_tasks):
                yield b"," if t else b"["
                yield from _json_of_task(manifest, t, everything)
            yield b"]"
        else:
            yield _plain(told[key])
    yield b"}"


def _json_of_task(manifest: Manifest, task: int, everything: bool) -> Iterator[bytes]:
    if everything:
        yield b'{"alpha":' + _plain(_plain_alpha(manifest.alpha[task])) + b',"classes":'
    else:
        yield b'{"classes":'
    yield _plain(manifest.task_classes[task])
    first = task * manifest.num_clients
    offsets_K = manifest.shard_offsets[first : first + manifest.num_clients + 1]
    yield b',"clients":'
    yield from json_of_lists(manifest.shard_indices[offsets_K[0] : offsets_K[-1]], np.diff(offsets_K))
    held_KC = manifest.histograms[task]
    yield b',"histogram":'
    yield from json_of_lists(held_KC.ravel(), np.full(len(held_KC), held_KC.shape[1]))
    yield b',"name":' + _plain(manifest.task_names[task]) + b',"test":' + _plain(manifest.test_of(task).tolist()) + b"}"


def _plain(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _parse(content: Mapping[str, Any]) -> Manifest:
    """A manifest from a file's content; ValueError, KeyError or TypeError when something does not fit."""
    tasks, clients, data = content["tasks"], int(content["clients"]), content["data"]
    if not tasks or any(len(task["clients"]) != clients for task in tasks):
        raise ValueError("the number of clients differs between tasks")
    held, held_offsets = _flat([shard for task in tasks for shard in task["clients"]], int(data["train"]), "client")
    tests, test_offsets = _flat([task["test"] for task in tasks], int(data["test"]), "test")
    flips = content.get("flips", {"positions": [], "rows": []})
    flipped, _ = _flat([flips["positions"]], int(data["train"]), "flipped")
    rows, _ = _flat([flips["rows"]], len(content["class_order"]), "head row of flipped")
    if len(flipped) != len(rows):
        raise ValueError("every flipped sample needs one head row")
    return Manifest(
        data=str(data["sha256"]),
        num_train=int(data["train"]),
        num_test=int(data["test"]),
        class_order=tuple(int(c) for c in content["class_order"]),
        class_names=tuple(str(name) for name in content["class_names"]),
        task_names=tuple(str(task["name"]) for task in tasks),
        task_classes=tuple(tuple(int(c) for c in task["classes"]) for task in tasks),
        num_clients=clients,
        shard_indices=held,
        shard_offsets=held_offsets,
        test_indices=tests,
        test_offsets=test_offsets,
        histograms=tuple(np.array(task["histogram"], dtype=np.int64).reshape(clients, len(task["classes"])) for task in tasks),
        alpha=tuple(_parse_alpha(task["alpha"]) for task in tasks),
        overall_alpha=_parse_alpha(content["overall_alpha"]),
        flips=Flips(flipped, rows),
        asked=dict(content["asked"]),
    )


def _flat(parts: Sequence[Sequence[int]], limit: int, what: str) -> tuple[IntArray, IntArray]:
    """Lists of positions as one array with offsets. ValueError or TypeError when a part is no list of positions."""
    if not all(isinstance(part, list) for part in parts):
        raise TypeError(f"{what} positions must be lists of numbers")
    sizes = list(map(len, parts))
    joined = np.fromiter(chain.from_iterable(parts), dtype=np.int64, count=sum(sizes))
    if len(joined) and not (joined.min() >= 0 and joined.max() < limit):
        raise ValueError(f"{what} positions must lie in 0..{limit - 1}")
    return joined, _offsets(sizes)


def _plain_alpha(alpha: float) -> float | str | None:
    return None if math.isnan(alpha) else "inf" if math.isinf(alpha) else alpha


def _parse_alpha(value: Any) -> float:
    return math.nan if value is None else float(value)
