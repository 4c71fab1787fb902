"""Two workers beside one on the quickstart, and a simulation of 8 to 512 workers from the client times that were measured.

    python -m experiments.benchmarks.scaling [--repeats 3]

Measured: the training phase of the quickstart with one and with two one-thread Ray workers, in turns. Simulated: rounds of
1 000 sampled clients whose seconds are drawn from the measured ones, handed out as the Ray pool does (blocks or single clients,
longest first, to whoever is free), with the measured cost of a message at the driver, which is what all workers share.
"""

from __future__ import annotations

import argparse
import heapq
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from clients.pools._bundles import bundles
from experiments.benchmarks import machine
from fedsim.core.messages import ClientJob, RoundPlan

ROOT = Path(__file__).resolve().parents[2]
WORKERS = (8, 16, 32, 64, 128, 256, 512)
SAMPLED = (100, 1_000, 10_000)


def phase(folder: Path, workers: int) -> float:
    """Seconds of the training phase; start-up and evaluation are apart."""
    command = [sys.executable, "-m", "fedsim.cli", "run", "configs/quickstart.yaml", "runtime.pool=ray", "server.evaluate=task"]
    command += ["stream.tasks=2", f"runtime.workers={workers}", "runtime.threads=1", "--output", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    seconds: float = json.loads((folder / "costs.json").read_text(encoding="utf-8"))["seconds"]["train"]
    return seconds


def client_seconds() -> tuple[list[int], list[float]]:
    """Samples and seconds of every client of one round of the quickstart, one thread, after a warm-up."""
    import torch

    from clients.worker import Worker
    from fedsim import simulation
    from fedsim.core.config import load
    from fedsim.core.messages import ClientUpdate

    torch.set_num_threads(1)
    parts = simulation.prepare(load(ROOT / "configs" / "quickstart.yaml", ["runtime.pool=serial"]))
    worker = Worker(parts.spec)
    plan = parts.rule.plan(parts.rule.init(parts.state.params), 0)
    jobs = [ClientJob(k, 0, 0, parts.state.params, plan) for k in range(parts.spec.num_clients)]
    samples, seconds = [], []
    for job in (*jobs[:3], *jobs):
        update = worker.train_client(job)
        assert isinstance(update, ClientUpdate)
        samples.append(update.num_samples)
        seconds.append(float(update.metrics["seconds"]))
    return samples[3:], seconds[3:]


def simulated(seconds: list[float], workers: int, message_s: float) -> dict[str, float]:
    """Speed-up over one worker without messages, and the share of the workers' time that is spent in clients."""
    order = sorted(seconds, reverse=True)
    jobs = [ClientJob(k, 0, 0, {}, RoundPlan()) for k in range(len(order))]
    free = [0.0] * workers
    driver = 0.0
    for start, some in bundles(jobs, workers, fused=False):
        driver += message_s  # one message after the other leaves and is taken in
        ready = max(heapq.heappop(free), driver)
        heapq.heappush(free, ready + sum(order[start : start + len(some)]))
    end = max(max(free), driver)
    return {"speed_up": sum(order) / end, "busy": sum(order) / end / workers}


def main() -> None:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    found: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for workers, seconds in found.items():
                seconds.append(phase(Path(folder) / f"{workers}-{repeat}", workers))
    ratios = [one / two for one, two in zip(found[1], found[2], strict=True)]
    measured = {"train_s": {str(k): v for k, v in found.items()}, "two_over_one": statistics.median(ratios), "ratios": ratios}
    print(f"two workers over one: {measured['two_over_one']:.2f} ({', '.join(f'{r:.2f}' for r in ratios)})")

    samples, seconds = client_seconds()
    engine = json.loads(Path(__file__).with_name("engine.json").read_text(encoding="utf-8"))
    blocks = statistics.median(engine["registered"]["100 of 1 000, 4 KB"]["ray"]) / 10  # seconds of a message of ten clients
    draw = np.random.default_rng(0)
    table: dict[str, Any] = {}
    for sampled in SAMPLED:
        drawn = [float(s) for s in draw.choice(seconds, sampled)]
        table[str(sampled)] = {str(w): simulated(drawn, w, blocks) for w in WORKERS}
        print(sampled, {w: f"{r['speed_up']:.0f}x" for w, r in table[str(sampled)].items()})
    clients = {"samples": samples, "seconds": seconds, "message_s": blocks}
    machine.write("scaling", {"measured": measured, "clients": clients, "simulated": table})


if __name__ == "__main__":
    main()
