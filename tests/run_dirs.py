"""Run directories made by hand in a moment: the files of a real one, with counts that were chosen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.core.config import SimConfig
from fedsim.core.events import ClassRow, Row
from fedsim.runs.collection import Collection, Entry, Run, SweepRecord
from fedsim.runs.directory import RunDir
from fedsim.runs.results import Results
from tests.tiny import tiny

TESTED = 1000  # samples per task: an accuracy in steps of 0.1 percent
SECONDS = {"start_up": 0.5, "train": 2.0}


@dataclass(frozen=True)
class Split:
    """What a run directory needs of a manifest: class i of task i, all samples at client 0."""

    hash: str
    tasks: int = 2

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"hash": self.hash}))

    def holdings(self) -> list[tuple[int, int, int, str, int]]:
        return [(t, 0, t, f"class {t}", 6) for t in range(self.tasks)]


def results(config: SimConfig, accuracy: Sequence[Sequence[float]], split: str = "") -> Results:
    """A run with this accuracy matrix in percent; every task has one class."""
    correct = [[round(a * TESTED / 100) for a in row] for row in accuracy]
    rows = [Row(i, 2, "task_end", j, c, c, TESTED) for i, row in enumerate(correct) for j, c in enumerate(row)]
    classes = [ClassRow(i, 2, "task_end", j, c, c, TESTED) for i, row in enumerate(correct) for j, c in enumerate(row)]
    costs = {"bytes": {"down": {"adapter": 2_000_000}, "up": {"adapter": 1_000_000}}, "seconds": SECONDS, "client_rounds": 6}
    return Results(config, tuple(rows), costs, manifest_hash=split, classes=tuple(classes))


def write_run(folder: Path, config: SimConfig, accuracy: Sequence[Sequence[float]] = ((90,), (60, 70)), split: str = "") -> Path:
    """A finished run in `<folder>/<16 digits of its identity>`. split: hash of its split; by default what seed and α give."""
    split = split or f"{config.seed}-{config.partition.get('alpha')}".ljust(64, "x")
    run_dir = RunDir.create(config, folder / config.identity()[:16])
    run_dir.write_start(Split(split, len(accuracy)))
    results(config, accuracy, split).write_end(run_dir)
    return run_dir.path


def method(name: str, seed: int, alpha: float = 0.5, **sections: Any) -> SimConfig:
    """A tiny config with this aggregator."""
    return tiny(f"server.aggregator={name}", f"seed={seed}", f"partition.alpha={alpha}", **sections)


def sweep(folder: Path, name: str = "study", seeds: int = 3, alphas: Sequence[float] = (0.1, 0.5)) -> SweepRecord:
    """The record of a sweep over two methods, α and seeds; no run of it is there."""
    entries = [
        Entry(method(rule, seed, alpha).identity(), {"method": rule, "alpha": alpha, "seed": seed})
        for rule in ("lorm", "fedavg")
        for alpha in alphas
        for seed in range(seeds)
    ]
    axes = {"method": ("lorm", "fedavg"), "alpha": tuple(alphas), "seed": tuple(range(seeds))}
    record = SweepRecord(name, axes, tuple(entries))
    record.save(folder)
    return record


def write_sweep(folder: Path, seeds: int = 3, alphas: Sequence[float] = (0.1, 0.5)) -> SweepRecord:
    """That sweep with all its runs. lorm is better than fedavg, every α has its level, every seed its noise."""
    record = sweep(folder, seeds=seeds, alphas=alphas)
    for entry in record.runs:
        labels = entry.labels
        noise = np.random.default_rng([int(labels["seed"] or 0), int(10 * float(labels["alpha"] or 0))]).uniform(-3, 3, 3)
        level = 50 + 20 * float(labels["alpha"] or 0) + (8 if labels["method"] == "lorm" else 0)
        final = level + noise[0] + (noise[1] if labels["method"] == "lorm" else 0)
        config = method(str(labels["method"]), int(labels["seed"] or 0), float(labels["alpha"] or 0))
        write_run(folder, config, ((final + 20,), (final - 5, final + 5 + noise[2])))
    return record


def collection(*runs: Results) -> Collection:
    """These runs, without a folder."""
    return Collection(tuple(Run(run) for run in runs))
