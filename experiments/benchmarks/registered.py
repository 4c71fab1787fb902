"""Setting up 1 000, 100 000 and 1 000 000 registered clients: seconds and peak memory.

    python -m experiments.benchmarks.registered [--repeats 3]

Each in a process of its own: read the data (made up, a few samples per client, of 2 x 2 pixels), split them, build model and
rules, and write what a run directory holds before the first round (manifest.json, its hash, partition.csv). The seconds are
wall time without imports, the memory is the most that the process ever held, imports included. What limits it: the split's
permutations and sorts, then a line of partition.csv per client and class.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.benchmarks import machine

CLIENTS = (1_000, 100_000, 1_000_000)
CLASSES = 10
SPLITS: dict[str, tuple[dict[str, Any], int]] = {  # partition, samples per client
    "iid": ({"name": "iid"}, 2),
    "dirichlet": ({"name": "dirichlet", "alpha": 100.0}, 16),  # enough that a draw leaves nobody without a sample
}


def set_up(split: str, clients: int, folder: Path) -> dict[str, float]:
    """Set one run up; seconds by step, and peak memory in MB. To be called once per process."""
    from fedsim import simulation
    from fedsim.core import config as configs
    from fedsim.core.defaults import torch_defaults
    from fedsim.models import model as models
    from fedsim.runs.directory import RunDir

    partition, each = SPLITS[split]
    per_class = clients * each // CLASSES
    config = configs.from_dict(
        {
            "data": {
                "source": "synthetic",
                "classes": CLASSES,
                "train_per_class": per_class,
                "test_per_class": 1,
                "image_size": 2,
            },
            "stream": {"tasks": 1},
            "partition": {**partition, "clients": clients, "min_samples": 1},
            "server": {"participation": 50 / clients},
            "runtime": {"pool": "serial", "device": "cpu", "output": str(folder)},
        }
    )
    models.build(config, CLASSES)  # imports belong to start-up, which has a benchmark of its own
    imported = peak_mb()
    with torch_defaults(1):
        clock = time.perf_counter()
        parts = simulation.prepare(config)
        prepared = time.perf_counter()
        RunDir.create(config).write_start(parts.manifest)
        written = time.perf_counter()
    return {
        "prepare_s": round(prepared - clock, 3),
        "write_s": round(written - prepared, 3),
        "seconds": round(written - clock, 3),
        "imports_mb": round(imported),
        "peak_mb": round(peak_mb()),
    }


def peak_mb() -> float:
    """The most memory that this process ever held."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (1e6 if sys.platform == "darwin" else 1e3) * (1 if sys.platform == "darwin" else 1.024)


def in_own_process(split: str, clients: int) -> dict[str, float]:
    """`set_up` in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "experiments.benchmarks.registered", "--one", split, str(clients), folder]
        done = subprocess.run(words, check=True, capture_output=True, encoding="utf-8")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=3, metavar=("SPLIT", "CLIENTS", "FOLDER"), help="measure one in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(set_up(args.one[0], int(args.one[1]), Path(args.one[2]))))
        return
    results: dict[str, Any] = {}
    for split, (_, each) in SPLITS.items():
        for clients in CLIENTS:
            found = [in_own_process(split, clients) for _ in range(args.repeats)]
            middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
            results[f"{split}, {clients} clients"] = {"samples": clients * each, **middle}
            print(split, clients, middle, flush=True)
    print(machine.write("registered", {"repeats": args.repeats, "set_up": results}))


if __name__ == "__main__":
    main()
