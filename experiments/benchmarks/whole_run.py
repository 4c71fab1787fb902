"""The quickstart beside a one-file loop of the same experiment (LoRM, the same stream), which knows no framework.

    python -m experiments.benchmarks.whole_run path/to/plain_loop.py [--repeats 3]

The loop has both cores as torch threads; fedsim has two one-thread Ray workers and evaluates at the end of a task, as the loop
does. The variants take turns. Compared is the time of the loop itself: start-up (imports, Ray, model, data) is apart in both.
`inside`: the share of the loop in which the model computes, in training (forward, backward), statistics and evaluation; of the
quickstart as it is, with the serial pool, where nothing else goes on meanwhile. What limits the whole: the matrix products of
the frozen layers, see `local_training`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.benchmarks import machine

ROOT = Path(__file__).resolve().parents[2]
COMMON = ["runtime.pool=ray", "runtime.workers=2", "runtime.threads=1", "server.evaluate=task"]
VARIANTS = {
    "torch": ["runtime.kernels=torch"],
    "default": [],
    "bf16": ["runtime.precision=bf16"],
}


def plain(path: Path, seed: int) -> dict[str, float]:
    """Seconds and final average accuracy that the loop prints."""
    command = [sys.executable, str(path), "--rule", "lorm", "--threads", "2", "--seed", str(seed)]
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    out = subprocess.run(command, env=env, check=True, capture_output=True, encoding="utf-8").stdout
    found = re.search(r"final average accuracy ([\d.]+), ([\d.]+) s", out)
    assert found is not None, out
    return {"accuracy": float(found[1]), "seconds": float(found[2])}


def ours(folder: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    """The same of a run, and where the seconds went."""
    command = [sys.executable, "-m", "fedsim.cli", "run", "configs/quickstart.yaml", f"seed={seed}", *COMMON, *overrides]
    subprocess.run([*command, "--output", str(folder)], cwd=ROOT, check=True, capture_output=True)
    phases = json.loads((folder / "costs.json").read_text(encoding="utf-8"))["seconds"]
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    loop = sum(seconds for phase, seconds in phases.items() if phase != "start_up")
    return {"accuracy": metrics["final_average_accuracy"], "seconds": loop, "phases": phases}


def inside() -> dict[str, float]:
    """Seconds of the loop, and of those the seconds in forward and backward passes, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, "inside"], cwd=ROOT, check=True, capture_output=True, encoding="utf-8"
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def clocked() -> dict[str, float]:
    """Run the quickstart with clocks around what computes."""
    import torch

    from fedsim.core.config import load
    from fedsim.models.model import Model
    from fedsim.simulation import run

    spent = {"forward": 0.0, "backward": 0.0}

    def timed(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent[phase] += time.perf_counter() - start

        return call

    for name in ("features", "logits"):
        setattr(Model, name, timed(getattr(Model, name), "forward"))
    torch.Tensor.backward = timed(torch.Tensor.backward, "backward")  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        results = run(load(ROOT / "configs" / "quickstart.yaml", ["runtime.pool=serial"]), output=Path(folder) / "run")
    seconds = results.costs["seconds"]
    loop = sum(value for phase, value in seconds.items() if phase != "start_up")
    return {"loop_s": loop, **{f"{phase}_s": value for phase, value in spent.items()}, "share": sum(spent.values()) / loop}


def main() -> None:
    """Measure, print, write the result file."""
    if sys.argv[1:] == ["inside"]:
        print(json.dumps(clocked()))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain_loop", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("plain loop", *VARIANTS)}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):  # a seed per repeat: the accuracies of the same seeds, beside each other
            runs["plain loop"].append(plain(args.plain_loop, repeat))
            for name, overrides in VARIANTS.items():
                runs[name].append(ours(Path(folder) / f"{name}-{repeat}", repeat, overrides))
            print({name: (round(r[-1]["seconds"], 1), round(r[-1]["accuracy"], 1)) for name, r in runs.items()}, flush=True)
    rows = {}
    for name, found in runs.items():
        ratio = statistics.median(r["seconds"] / p["seconds"] for r, p in zip(found, runs["plain loop"], strict=True))
        rows[name] = {
            "seconds": statistics.median(r["seconds"] for r in found),
            "of_the_plain_loop": ratio,
            "accuracy": statistics.mean(r["accuracy"] for r in found),
            "runs": found,
        }
        print(f"{name}: {rows[name]['seconds']:.1f} s, {ratio:.2f} of the plain loop, accuracy {rows[name]['accuracy']:.1f}")
    share = inside()
    print(f"inside forward and backward: {share['share']:.2f} of the loop")
    machine.write("whole_run", {"variants": rows, "inside": share})


if __name__ == "__main__":
    main()
