"""What a round costs beside the clients' own work: no-op clients that echo what they get, ours beside Flower's engine.

A round here is all of it: draw, hand out, run, send back, FedAvg. Ours through `server.loop`, serial and on Ray with two
one-thread workers; Flower through its own `FedAvg` strategy on its simulation engine (Ray backend, one core a client, the
same two cores). Each engine and case in a process of its own; seconds are medians over rounds after a warm-up.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks import _idle, machine
from experiments.benchmarks._idle import Idle
from fedsim.core.messages import ClientJob, ClientUpdate

ROOT = Path(__file__).resolve().parents[2]
CASES = {  # registered, sampled, bytes of the parameters, rounds that are measured (ours, Flower's)
    "10 of 10, 2.4 MB": (10, 10, 2_400_000, 20, 5),
    "50 of 1 000, 4 KB": (1_000, 50, 4_000, 20, 5),
    "100 of 10 000, 4 KB": (10_000, 100, 4_000, 20, 5),
    "1 000 of 1 000, 1.2 MB": (1_000, 1_000, 1_200_000, 5, 2),
}
SCALE = {"100 of 1 000, 4 KB": (1_000, 100, 4_000, 40, 0), "100 of 1 000 000, 4 KB": (1_000_000, 100, 4_000, 40, 0)}
WARM_UP, REPEATS = 3, 5


class Echo(Idle):
    """A client that sends back what it got. No model, no data."""

    def train_client(self, job: ClientJob) -> ClientUpdate:
        return ClientUpdate(job.client_id, 1, dict(job.params))


def parameters(size: int) -> dict[str, torch.Tensor]:
    """Four tensors, as a small module has."""
    return {f"adapter.{k}": torch.randn(size // 16, generator=torch.Generator().manual_seed(k)) for k in range(4)}


def ours(pool: str, registered: int, sampled: int, size: int, rounds: int) -> list[float]:
    """Seconds of each round of the loop."""
    from clients.pools import ray as ray_pool
    from clients.pools import serial
    from fedsim.core import config as configs
    from server import loop
    from server.state import ServerState

    class OnRay(ray_pool.Pool):
        worker = "experiments.benchmarks.engine:Echo"

    class InProcess(serial.Pool):
        worker = Echo

    torch.set_num_threads(1)
    config = configs.from_dict(
        {
            "server": {"rounds": rounds + WARM_UP, "participation": sampled / registered, "evaluate": "task", "drift": False},
            "partition": {"name": "iid", "clients": registered},
            "runtime": {"pool": pool, "workers": 2},
        }
    )
    with (OnRay if pool == "ray" else InProcess)(_idle.work(config, registered)) as workers:
        params = parameters(size)
        sim = _idle.simulation(config, workers, registered)
        clocks = [time.perf_counter()]
        for step in loop.run(sim, ServerState(0, 0, params, {})):
            if isinstance(step, ServerState):
                clocks.append(time.perf_counter())
                if len(clocks) > rounds + WARM_UP:
                    break
    assert all(torch.allclose(step.params[n], params[n]) for n in params), "FedAvg of echoes is what was sent"
    return [b - a for a, b in pairwise(clocks)][WARM_UP:]


def flower(registered: int, sampled: int, size: int, rounds: int) -> list[float]:
    """Seconds of each round of Flower's strategy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
        from flwr.clientapp import ClientApp
        from flwr.serverapp import Grid, ServerApp
        from flwr.serverapp.strategy import FedAvg
        from flwr.simulation import run_simulation
    clocks: list[float] = []
    client, server = ClientApp(), ServerApp()

    @client.train()
    def echo(message: Message, context: Context) -> Message:
        arrays = message.content.array_records["arrays"]
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
        return Message(content=content, reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        def clock(round: int, arrays: ArrayRecord) -> None:
            clocks.append(time.perf_counter())

        strategy = FedAvg(fraction_train=sampled / registered, fraction_evaluate=0.0, min_available_nodes=registered)
        start = ArrayRecord({n: Array(t.numpy()) for n, t in parameters(size).items()})
        strategy.start(grid, start, num_rounds=rounds + 1, train_config=ConfigRecord({}), evaluate_fn=clock)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resources = {
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": 2, "include_dashboard": False},
        }
        run_simulation(server, client, num_supernodes=registered, backend_config=resources)
    return [b - a for a, b in pairwise(clocks)][1:]


def measured(engine: str, case: tuple[int, int, int, int, int], folder: str) -> dict[str, float]:
    """Median seconds of a round, in a process of its own."""
    target = Path(folder) / "out.json"
    target.unlink(missing_ok=True)
    command = [sys.executable, "-m", "experiments.benchmarks.engine", engine, json.dumps(case), str(target)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, encoding="utf-8", check=False, timeout=600)
    if not target.exists():
        raise RuntimeError(f"{engine} {case}: {done.stderr[-2000:]}")
    seconds: list[float] = json.loads(target.read_text(encoding="utf-8"))
    return {"seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}


def main() -> Iterator[str]:
    """Measure everything, write engine.json, and give the lines of a table."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            found = {engine: measured(engine, case, folder) for engine in ("serial", "ray", "flower")}
            ratios = {pool: found["flower"]["seconds"] / found[pool]["seconds"] for pool in ("serial", "ray")}
            per_client = {pool: 1e3 * found[pool]["seconds"] / case[1] for pool in ("serial", "ray")}
            rows[name] = {**found, "flower_over": ratios, "ms_per_client": per_client}
            yield (
                f"{name}: Flower {found['flower']['seconds']:.3f} s, Ray {found['ray']['seconds']:.4f} s ({ratios['ray']:.0f}x), "
                + (f"serial {found['serial']['seconds']:.4f} s ({ratios['serial']:.0f}x)")
            )
        scale: dict[str, dict[str, list[float]]] = {name: {"serial": [], "ray": []} for name in SCALE}
        for _ in range(REPEATS):  # in turns: processes differ more than their rounds do
            for name, case in SCALE.items():
                for pool, medians in scale[name].items():
                    medians.append(measured(pool, case, folder)["seconds"])
    few, many = scale.values()
    growth = {pool: statistics.median(many[pool]) / statistics.median(few[pool]) for pool in ("serial", "ray")}
    yield f"a round at 1 000 000 registered over one at 1 000: serial {growth['serial']:.2f}, Ray {growth['ray']:.2f}"
    machine.write("engine", {"rounds": rows, "registered": {**scale, "growth": growth}})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        which, case, out = sys.argv[1:]
        registered, sampled, size, rounds_ours, rounds_flower = json.loads(case)
        rounds = rounds_flower if which == "flower" else rounds_ours
        taken = flower(registered, sampled, size, rounds) if which == "flower" else ours(which, registered, sampled, size, rounds)
        Path(out).write_text(json.dumps(taken), encoding="utf-8")
    else:
        for line in main():
            print(line, flush=True)
