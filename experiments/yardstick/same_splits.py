"""fedsim beside an independent plain loop, on exactly the loop's own splits of clients.

    python -m experiments.yardstick.same_splits path/to/plain_loop.py [--rules lorm mean continue] [--alphas 0.5 0.1] [--seeds 3]

The plain loop draws its splits and its batches from one generator. This script replays those draws (no training), writes
the split as a manifest, and runs fedsim on it. What is left of a difference is the initial A, the order of batches, and the
implementation. `--loop` runs the loop itself, too, and writes loop.csv; without it the figures there are used.
Writes results.csv beside this file and prints the means.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import multiprocessing
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim.core.config import SimConfig, build, load
from fedsim.core.contracts import Dataset
from fedsim.data import manifest as manifests
from fedsim.simulation import once

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parents[1] / "configs"
KEYS = ["rule", "alpha", "seed"]
PRESETS = {"lorm": "lorm", "mean": "fedavg_mean", "continue": "fedavg"}  # rule of the loop -> our preset


def replay(loop: Any, config: SimConfig, dataset: Dataset) -> manifests.Manifest:
    """The manifest of the splits that the loop draws with this config's seed and α."""
    stream = manifests.make(config, dataset)
    known = np.flatnonzero(dataset.train.labels < loop.TASKS * loop.PER_TASK)  # the loop's samples, in the loop's order
    labels = dataset.train.labels[known]
    draws = np.random.default_rng(config.seed)
    shards: list[np.ndarray[Any, Any]] = []
    histograms = []
    for task in range(loop.TASKS):
        parts = loop.split(labels, task, config.partition["alpha"], draws)
        for _ in range(config.server.rounds):
            for part in parts:
                for _ in range(config.client.epochs):
                    draws.permutation(part)  # what training draws for its batches
        shards += [known[part] for part in parts]
        rows = [np.bincount(labels[part] - task * loop.PER_TASK, minlength=loop.PER_TASK) for part in parts]
        histograms.append(np.stack(rows))
    offsets = np.cumsum([0, *map(len, shards)])
    alphas = tuple(manifests.estimate_alpha(h.T) for h in histograms)
    return dataclasses.replace(
        stream,
        shard_indices=np.concatenate(shards),
        shard_offsets=offsets,
        histograms=tuple(histograms),
        alpha=alphas,
        overall_alpha=manifests.estimate_alpha(np.concatenate(histograms, axis=1).T),
    )


def one(path: str, rule: str, alpha: float, seed: int, output: str, with_loop: bool) -> dict[str, object]:
    """fedsim (and the loop) on one split."""
    spec = importlib.util.spec_from_file_location("plain_loop", path)
    assert spec is not None
    assert spec.loader is not None
    loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loop)
    config = load(CONFIGS / f"{PRESETS[rule]}.yaml", [f"seed={seed}", f"partition.alpha={alpha}", "runtime.pool=serial"])
    split = Path(output) / f"split-{alpha}-{seed}-{rule}.json"
    replay(loop, config, build("sources", config.data).load()).save(split)
    results = once(dataclasses.replace(config, manifest=str(split)), Path(output) / f"{rule}-{alpha}-{seed}")
    row: dict[str, object] = {"rule": rule, "alpha": alpha, "seed": seed, "fedsim": results.metrics["final_average_accuracy"]}
    if with_loop:
        command = [sys.executable, path, "--rule", rule, "--alpha", str(alpha), "--seed", str(seed), "--threads", "1"]
        printed = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
        found = re.search(r"final average accuracy ([\d.]+)", printed)
        assert found is not None
        row["loop"] = float(found[1])
    return row


def main() -> None:
    """Run all, `--jobs` at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--rules", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.5, 0.1])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", default="runs/yardstick")
    parser.add_argument("--loop", action="store_true")
    args = parser.parse_args()
    Path(args.output).mkdir(parents=True, exist_ok=True)
    wanted = [(args.path, r, a, s, args.output, args.loop) for r in args.rules for a in args.alphas for s in range(args.seeds)]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(one, *zip(*wanted, strict=True)))
    frame = pd.DataFrame(rows)
    if args.loop:
        frame[[*KEYS, "loop"]].to_csv(HERE / "loop.csv", index=False)
    else:
        frame = frame.merge(pd.read_csv(HERE / "loop.csv"), on=KEYS, how="left")
    frame.to_csv(HERE / "results.csv", index=False, float_format="%.2f")
    print(frame.to_string(index=False))
    print(frame.groupby(["rule", "alpha"], sort=False).mean(numeric_only=True).drop(columns="seed").round(2).to_string())


if __name__ == "__main__":
    main()
