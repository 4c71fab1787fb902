"""A federated analytic run beside one forward pass over its data, and what its server's solution takes.

    python -m experiments.benchmarks.analytic [--repeats 3] [--stream fashion]

`runs`: seconds of a whole run (all tasks: features, statistics, sums, solutions, evaluation after every task), start-up apart,
over those of one pass of the same model over all training and test samples. In one process, one thread, seconds of the processor
(a busy machine makes both longer), the variants in turns; medians. `solver`: a fresh Cholesky factorisation of a Gram (M, M)
beside the update of a factor by k samples (the QR of the factor's rows and theirs), and beside the eigendecomposition that would
serve every penalty.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clients.samples import Samples
from experiments.benchmarks import machine
from fedsim.core.config import load
from fedsim.core.events import Event, RunStarted
from fedsim.simulation import Prepared, prepare, run

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
VARIANTS: dict[str, tuple[str, list[str]]] = {  # name -> method, what differs from it
    "ncm": ("ncm", []),
    "lda": ("lda", []),
    "qda": ("qda", []),
    "ridge": ("ridge", []),
    "ranpac 1000": ("ranpac", ["head.size=1000"]),
    "ranpac 2000": ("ranpac", []),
    "fedran 2048, rank 64": ("fedran", []),
    "stsa 2000": ("stsa", []),
}
SIZES, RANKS = (1000, 2000, 4096), (50, 200, 800)


def forward(parts: Prepared) -> float:
    """Seconds of one pass over all samples."""
    start, batch = time.process_time(), parts.config.runtime.eval_batch
    with torch.inference_mode():
        for split in (parts.spec.train, parts.spec.test):
            samples, count = Samples(split, parts.model.device), len(split.labels)
            for first in range(0, count, batch):
                inputs, _ = samples.batch(np.arange(first, min(count, first + batch)))
                parts.model.features(inputs, lean=True)
    return time.process_time() - start


def whole_run(parts: Prepared) -> dict[str, float]:
    """Seconds and accuracy of a run, from its first task on."""
    clock = [0.0]

    def began(event: Event) -> None:
        if isinstance(event, RunStarted):
            clock[0] = time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        results = run(parts.config, output=Path(folder) / "run", progress=began)
    return {"seconds": time.process_time() - clock[0], "accuracy": float(results.metrics["final_average_accuracy"] or 0)}


def runs(stream: str, repeats: int) -> dict[str, dict[str, float]]:
    """The median ratio of every variant."""
    shared = ["seed=0", "runtime.pool=serial", "runtime.threads=1"]
    torch.set_num_threads(1)
    configs = {
        name: load([CONFIGS / f"streams/{stream}.yaml", CONFIGS / f"methods/{method}.yaml"], [*shared, *more])
        for name, (method, more) in VARIANTS.items()
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in configs}
    for _ in range(repeats):
        for name, config in configs.items():
            parts = prepare(config)
            alone = forward(parts)
            told = whole_run(parts)
            found[name].append({**told, "forward": alone, "ratio": told["seconds"] / alone})
            print(name, {k: round(v, 2) for k, v in found[name][-1].items()}, flush=True)
    return {name: {k: statistics.median(row[k] for row in rows) for k in rows[0]} for name, rows in found.items()}


def clocked(work: Callable[[], Any]) -> float:
    """Seconds of the processor."""
    start = time.process_time()
    work()
    return time.process_time() - start


def solver() -> dict[str, dict[str, float]]:
    """Seconds of what a server could do when a task brings k samples."""
    rows: dict[str, dict[str, float]] = {}
    for size in SIZES:
        draw = torch.Generator().manual_seed(0)
        x_NM = torch.randn(2 * size, size, dtype=torch.float64, generator=draw)
        gram_MM = x_NM.T @ x_NM
        factor_MM = torch.linalg.cholesky(gram_MM)
        row = {"cholesky": clocked(lambda g=gram_MM: torch.linalg.cholesky(g))}  # type: ignore[misc]
        for rank in RANKS:
            both = torch.cat([factor_MM.T, x_NM[:rank]])
            row[f"update by {rank}"] = clocked(lambda b=both: torch.linalg.qr(b, mode="r"))  # type: ignore[misc]
        if size < max(SIZES):
            row["eigendecomposition"] = clocked(lambda g=gram_MM: torch.linalg.eigh(g))  # type: ignore[misc]
        rows[str(size)] = row
        print(size, {k: round(v, 2) for k, v in row.items()}, flush=True)
    return rows


def main() -> None:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stream", default="fashion")
    args = parser.parse_args()
    machine.write("analytic", {"stream": args.stream, "runs": runs(args.stream, args.repeats), "solver": solver()})


if __name__ == "__main__":
    main()
