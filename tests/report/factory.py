"""Run directories with plausible numbers, made in milliseconds: nothing is trained. The same arguments give the same bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from fedsim.core.config import SimConfig
from fedsim.core.events import ClassRow, DriftRow, Row
from fedsim.runs import directory as directory_module
from fedsim.runs.collection import Entry, SweepRecord
from fedsim.runs.directory import RunDir
from fedsim.runs.results import Results
from tests.tiny import tiny

METHODS: Mapping[str, tuple[str, float]] = {  # name -> (overrides, how good)
    "lorm": ("server.aggregator=lorm server.consolidator=regmean", 22.0),
    "variance_weighted": ("server.aggregator=variance_weighted server.consolidator=none", 26.0),
    "fedavg": ("server.aggregator=fedavg server.consolidator=none", 6.0),
    "fairavg": ("server.aggregator=fairavg server.consolidator=none", 4.0),
}
ENVIRONMENT = {
    "started": "2026-03-01T12:00:00+00:00",
    "command": ["/usr/bin/fedsim", "run", "sweep.yaml", "name=a b"],
    "fedsim": "0.2.0",
    "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
    "python": "3.11.2",
    "packages": {"torch": "2.13.0", "flwr": None},
    "platform": "Linux",
    "cpu": "A processor",
    "cores": 4,
    "processor": "A processor, AVX2",
}


@dataclass(frozen=True)
class Split:
    """Stands in for a manifest: samples held_TKC per task, client and class."""

    held_TKC: np.ndarray[Any, np.dtype[np.int64]]
    names: Sequence[str]
    hash: str

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"hash": self.hash, "tasks": [{"name": name} for name in self.names]}))

    def holdings(self) -> list[tuple[int, int, int, str, int]]:
        C = self.held_TKC.shape[2]
        return [
            (int(t), int(k), int(t * C + c), f"class {t * C + c}", int(self.held_TKC[t, k, c]))
            for t, k, c in np.argwhere(self.held_TKC)
        ]


def split_of(config: SimConfig, classes: int, names: Sequence[str] | None = None) -> Split:
    """`classes` per task with about 60 samples each, spread over the clients as the config's partition says."""
    tasks, clients = int(config.stream.tasks or 1), int(config.partition["clients"])
    rng = np.random.default_rng([config.seed, 1])
    alpha = float(config.partition.get("alpha", 1e6))
    share_TCK = rng.dirichlet(np.full(clients, alpha), size=(tasks, classes))
    held = np.array([[rng.multinomial(60, share) for share in of_task] for of_task in share_TCK]).transpose(0, 2, 1)
    return Split(held, names or [f"alphabet {t}" for t in range(tasks)], hashlib.sha256(held.tobytes()).hexdigest())


def fake_run(
    config: SimConfig, quality: float, path: Path | None = None, classes: int = 10, names: Sequence[str] | None = None
) -> Path:
    """A finished run directory. `quality`: points of accuracy that its method is worth."""
    split = split_of(config, classes, names)
    with mock.patch.object(directory_module, "environment", return_value=ENVIRONMENT):
        run_dir = RunDir.create(config, path)
        run_dir.write_start(split)
        invent(config, quality, split).write_end(run_dir)
    return run_dir.path


def invent(config: SimConfig, quality: float, split: Split) -> Results:
    """Accuracy falls with heterogeneity, with the tasks learned since, and with the seed's luck."""
    rng = np.random.default_rng([config.seed, int(10 * quality)])
    T, K, C = split.held_TKC.shape
    R, tested = config.server.rounds, 5 * C
    alpha = float(config.partition.get("alpha", 10.0))
    level = 62 + quality - 9 / np.sqrt(alpha) + rng.normal(0, 1.5)
    fade = (4 + 30 / (4 + quality)) / T
    rows, drifts, classes = [], [], []
    for t, r in product(range(T), range(R + 1)):
        stage = "task_end" if r == R else "round"
        for j in range(t + 1):
            grown = 1.0 if j < t else 1 - 0.5 * np.exp(-1.2 * (r + 1))
            share = np.clip((level - fade * (t - j) * 4 + rng.normal(0, 2)) / 100 * grown, 0.02, 0.98)
            told = min(tested, round(tested * share) + round(tested * 0.15 * t / T))
            rows.append(Row(t, r, stage, j, round(tested * share), told, tested))
            if stage == "task_end":
                classes += [ClassRow(t, r, stage, j * C + c, round(5 * share), 5, 5) for c in range(C)]
        if stage == "round":
            for group in ("adapter", "head"):
                norm = float(0.4 * np.exp(-0.3 * r) / (1 + alpha) + 0.05 * rng.random())
                cosine = float(np.clip(0.2 + 0.3 * np.log10(alpha * 10) - 0.05 * r + rng.normal(0, 0.02), -1, 1))
                moved = norm if t or group == "adapter" else None
                rest = (cosine, cosine - 0.2, min(1.0, cosine + 0.2), 0.5, K / 2, 0.1 if group == "adapter" else None)
                drifts.append(DriftRow(t, r, group, K, moved, *rest))
    size = int(4e4 * (1.6 if quality < 10 else 1))
    costs = {
        "bytes": {
            "down": {"adapter": size * T * R * K, "head": 8000 * T * R * K},
            "up": {"adapter": size * T * R * K, "head": 8000 * T * R * K, "statistics": 3000 * int(quality) * T * R * K},
        },
        "seconds": {"start_up": 1.2, "train": 20 + float(rng.random()), "merge": 0.2 + quality / 30, "evaluate": 4.1},
        "client_rounds": T * R * K,
    }
    return Results(config, tuple(rows), costs, manifest_hash=split.hash, classes=tuple(classes), drifts=tuple(drifts))


def fake_sweep(
    folder: Path,
    methods: Mapping[str, tuple[str, float]] = METHODS,
    alphas: Sequence[float] = (0.05, 0.1, 0.5, 1.0),
    seeds: Sequence[int] = (0, 1, 2),
    tasks: int = 5,
    clients: int = 10,
    rounds: int = 3,
    classes: int = 10,
    iid: bool = True,
    more: Mapping[str, Sequence[float]] | None = None,
) -> Path:
    """A sweep of methods × heterogeneity × (config keys in `more`) × seeds; heterogeneity are the alphas, then iid."""
    more, entries = more or {}, []
    splits: list[float | str] = [*alphas, *(["iid"] if iid else [])]
    for (method, (overrides, quality)), alpha, *levels, seed in product(methods.items(), splits, *more.values(), seeds):
        extra = dict(zip(more, levels, strict=True))
        partition: dict[str, Any] = {"name": "iid"} if alpha == "iid" else {"name": "dirichlet", "alpha": alpha}
        config = tiny(
            f"seed={seed}", f"stream.tasks={tasks}", f"server.rounds={rounds}", f"data.classes={tasks * classes}",
            *overrides.split(), *(f"{k}={v}" for k, v in extra.items()),
            partition={**partition, "clients": clients}, output=folder,
        )  # fmt: skip
        entry = Entry(config.identity(), {"method": method, "alpha": alpha, **extra, "seed": seed})
        fake_run(config, quality + sum(map(float, extra.values())), folder / entry.folder, classes)
        entries.append(entry)
    axes = {"method": list(methods), "alpha": splits, **more, "seed": list(seeds)}
    SweepRecord("heterogeneity", axes, tuple(entries)).save(folder)
    return folder
