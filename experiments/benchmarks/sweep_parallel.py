"""A sweep of 12 short runs beside the same runs one after the other through `fedsim run`.

    python -m experiments.benchmarks.sweep_parallel [--repeats 2]

Each run is the quickstart with 2 tasks, 1 round and 1 epoch. One after the other: a process per run, once with the serial pool
and once as the quickstart has it (Ray, a worker per core). The sweep: one command, serial pools, a run per core. The three take
turns, and wall time from start to exit is compared. What limits it: the sweep pays for the imports once per core and for Ray
once; the runs themselves need as many core-seconds as before, so with c cores no less than 1/c of the serial pools' training.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.benchmarks import machine

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
SHORT = ["stream.tasks=2", "server.rounds=1", "client.epochs=1"]
ALPHAS, SEEDS = (0.1, 0.5, 1.0), (0, 1, 2, 3)
SWEEP = f"base: {CONFIG}\ngrid: {{partition.alpha: {list(ALPHAS)}}}\nseeds: {list(SEEDS)}\n"


def fedsim(*words: str) -> float:
    """Seconds of one command."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fedsim.cli", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def one_by_one(folder: Path, *overrides: str) -> float:
    """Seconds of all runs, a command each."""
    each = [(alpha, seed) for alpha in ALPHAS for seed in SEEDS]
    return sum(
        fedsim("run", str(CONFIG), *SHORT, *overrides, f"partition.alpha={a}", f"seed={s}", "--output", str(folder / f"{a}-{s}"))
        for a, s in each
    )


def as_sweep(folder: Path) -> float:
    """Seconds of all runs in one sweep."""
    folder.mkdir()
    (folder / "sweep.yaml").write_text(SWEEP, encoding="utf-8")
    return fedsim("sweep", str(folder / "sweep.yaml"), *SHORT, "--output", str(folder / "runs"))


def main() -> None:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {"one by one, serial pool": [], "one by one, Ray pool": [], "sweep": []}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            seconds["one by one, serial pool"].append(one_by_one(folder / "serial", "runtime.pool=serial"))
            seconds["one by one, Ray pool"].append(one_by_one(folder / "ray"))
            seconds["sweep"].append(as_sweep(folder / "sweep"))
            print({k: round(v[-1], 1) for k, v in seconds.items()}, flush=True)
    middle = {k: statistics.median(v) for k, v in seconds.items()}
    ratios = {k: round(middle["sweep"] / v, 3) for k, v in middle.items() if k != "sweep"}
    print("sweep / one by one:", ratios)
    print(machine.write("sweep_parallel", {"runs": len(ALPHAS) * len(SEEDS), "seconds": seconds, "sweep_over": ratios}))


if __name__ == "__main__":
    main()
