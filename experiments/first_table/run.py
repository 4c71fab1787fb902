"""Final accuracy and forgetting of every preset on the embedded stream, over seeds and heterogeneity.

    python -m experiments.first_table.run [--seeds 3] [--alphas 0.5 0.1] [--jobs 2] [--output runs/first_table]

Runs that are finished are loaded, not repeated. Writes results.csv beside this file (one row per run) and prints the
table of the README: mean and standard deviation (ddof 1) over seeds, in percent.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pandas as pd

from fedsim.core.config import load
from fedsim.simulation import once

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parents[1] / "configs"
METHODS = [
    "joint",
    "lorm_variance_weighted",
    "variance_weighted",
    "lorm",
    "fedavg_mean",
    "fedavg",
    "fairavg",
    "head_only",
    "prefix",
]
COLUMNS = [
    "method",
    "alpha",
    "seed",
    "final_average_accuracy",
    "average_incremental_accuracy",
    "forgetting",
    "megabytes_up",
    "seconds",
]


def one(method: str, alpha: float, seed: int, output: str) -> dict[str, object]:
    """One run on one core, or the results of it if it is there already."""
    overrides = [f"seed={seed}", "runtime.pool=serial", "runtime.kernels=torch"]  # other kernels move last bits
    overrides += [] if method == "joint" else [f"partition.alpha={alpha}"]
    config = load(CONFIGS / f"{method}.yaml", overrides)
    folder = Path(output) / f"{method}-{alpha}-{seed}-{config.identity()[:8]}"
    results = once(config, folder)
    up = sum(results.costs["bytes"]["up"].values()) / 1e6
    values = {c: results.metrics[c] for c in COLUMNS[3:6]}
    seconds = sum(v for k, v in results.costs["seconds"].items())
    return {"method": method, "alpha": alpha, "seed": seed, **values, "megabytes_up": round(up, 2), "seconds": round(seconds, 1)}


def table(frame: pd.DataFrame) -> str:
    """The README's table, in Markdown: one row per preset, accuracy and forgetting per α."""
    alphas = list(frame["alpha"].unique())
    heads = [f"{what}, α = {alpha:g}" for alpha in alphas for what in ("accuracy", "forgetting")]
    lines = ["| preset | " + " | ".join(heads) + " | MB up |", "|---" * (len(heads) + 2) + "|"]
    for method, group in frame.groupby("method", sort=False):
        cells = [
            _cell(group.loc[group["alpha"] == alpha, column])
            for alpha in alphas
            for column in ("final_average_accuracy", "forgetting")
        ]
        lines.append(f"| `{method}` | " + " | ".join(cells) + f" | {group['megabytes_up'].mean():.0f} |")
    return "\n".join(lines)


def _cell(values: pd.Series) -> str:
    return "–" if values.dropna().empty else f"{values.mean():.1f} ± {values.std():.1f}"


def main() -> None:
    """Run what is missing, `--jobs` runs at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.5, 0.1])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", default="runs/first_table")
    args = parser.parse_args()
    wanted = [
        (method, alpha, seed, args.output)
        for method in args.methods
        for alpha in (args.alphas[:1] if method == "joint" else args.alphas)
        for seed in range(args.seeds)
    ]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(one, *zip(*wanted, strict=True)))
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame.to_csv(HERE / "results.csv", index=False, float_format="%.4f")
    print(table(frame))


if __name__ == "__main__":
    main()
