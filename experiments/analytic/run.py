"""All heads in closed form from sums over clients, on four streams and two splits.

    python -m experiments.analytic.run [--streams fashion omniglot …] [--alphas 0.5 0.1] [--output runs/analytic]

Nothing is trained, so the features of a sample are the same in every run: they are computed once for a stream, and remembered.
Seconds are of the process (one thread): `forward_s`, of the stream, one pass over all training and test samples; `rest_s`, all
that a run takes beside it. A real run takes their sum. Rows that are in results.csv already are not run again. Writes results.csv
beside this file and prints the README's tables.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from fedsim.core.config import load
from fedsim.core.events import Event, RunStarted
from fedsim.core.messages import Tensors
from fedsim.models.model import Model
from fedsim.simulation import run

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parents[1] / "configs"
STREAMS = {"fashion": [], "omniglot": [], "clinc150_minilm": [], "cifar100_deit": []}
METHODS = ("ncm", "simplecil", "lda", "qda", "ridge", "ranpac", "fedran", "stsa")
KEY = ["stream", "alpha", "method"]


class Remembered:
    """Features of samples that were seen before, by their bytes, in the place of a pass through the model."""

    def __init__(self) -> None:
        self.rows: dict[bytes, Tensor] = {}
        self.seconds = 0.0
        self.encode = Model._encoded

    def __call__(self, model: Model, shown: Tensors, lean: bool) -> Tensor:
        """Features (b, D) of a batch; those that are not known yet are computed."""
        keys = list(zip(*([row.numpy().tobytes() for row in tensor] for tensor in shown.values()), strict=True))
        names = [b"".join(key) for key in keys]
        new = [i for i, name in enumerate(names) if name not in self.rows]
        if new:
            start = time.process_time()
            features = self.encode(model, {n: t[new] for n, t in shown.items()}, lean)
            self.seconds += time.process_time() - start
            self.rows |= dict(zip([names[i] for i in new], features.detach().clone(), strict=True))
        return torch.stack([self.rows[name] for name in names])


def one(stream: str, alpha: float, method: str, memory: Remembered, folder: Path) -> dict[str, Any]:
    """A run's row."""
    shared = ["seed=0", f"partition.alpha={alpha}", "runtime.pool=serial", "runtime.threads=1", *STREAMS[stream]]
    config = load([CONFIGS / "streams" / f"{stream}.yaml", CONFIGS / "methods" / f"{method}.yaml"], shared)
    clock, known = [0.0], memory.seconds

    def began(event: Event) -> None:
        if isinstance(event, RunStarted):
            clock[0] = time.process_time()

    results = run(config, output=folder / f"{stream}-{alpha}-{method}-{config.identity()[:8]}", progress=began)
    spent = time.process_time() - clock[0] - (memory.seconds - known)
    moved = {way: sum(kinds.values()) / 1e6 for way, kinds in results.costs["bytes"].items()}
    return {
        "stream": stream,
        "alpha": alpha,
        "method": method,
        "accuracy": round(float(results.metrics["final_average_accuracy"] or 0), 2),
        "average_incremental": round(float(results.metrics["average_incremental_accuracy"] or 0), 2),
        "up_MB": round(moved["up"], 3),
        "down_MB": round(moved["down"], 3),
        "rest_s": round(spent, 2),
        "identity": config.identity(),
    }


def table(frame: pd.DataFrame, stream: str) -> str:
    """A stream's table, in Markdown."""
    lines = [f"| {stream} | α 0.5 | α 0.1 | MB up | MB down | s beside the forward |", "|---|---|---|---|---|---|"]
    for method, rows in frame[frame["stream"] == stream].groupby("method", sort=False):
        by = rows.set_index("alpha")
        accuracy = [f"{by['accuracy'][a]:.1f}" if a in by.index else "–" for a in (0.5, 0.1)]
        first = rows.iloc[0]
        lines.append(
            f"| `{method}` | {' | '.join(accuracy)} | {first['up_MB']:.1f} | {first['down_MB']:.1f} | {first['rest_s']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, write results.csv, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", nargs="+", default=list(STREAMS), choices=list(STREAMS))
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.5, 0.1])
    parser.add_argument("--output", type=Path, default=Path("runs/analytic"))
    args = parser.parse_args()
    file = HERE / "results.csv"
    frame = pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=[*KEY, "accuracy"])
    for stream in args.streams:
        memory = Remembered()
        Model._encoded = lambda model, shown, lean, memory=memory: memory(model, shown, lean)  # type: ignore[method-assign, misc]
        for alpha in args.alphas:
            for method in METHODS:
                if ((frame["stream"] == stream) & (frame["alpha"] == alpha) & (frame["method"] == method)).any():
                    continue
                row = one(stream, alpha, method, memory, args.output)
                print(row, flush=True)
                frame = pd.concat([frame, pd.DataFrame([row])], ignore_index=True)
                frame.to_csv(file, index=False)
        if memory.seconds:
            frame.loc[frame["stream"] == stream, "forward_s"] = round(memory.seconds, 1)
            frame.to_csv(file, index=False)
        Model._encoded = memory.encode  # type: ignore[method-assign]
        print(table(frame, stream), flush=True)


if __name__ == "__main__":
    main()
