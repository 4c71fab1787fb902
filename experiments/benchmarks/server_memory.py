"""Memory of the server at 10, 100 and 1 000 sampled clients, at ViT-B/16 shapes (random tensors, LoRA rank 16 everywhere).

The real loop with the Ray pool (two workers) and clients that make up their tensors and statistics at once. Reported is the
most memory that the server's process holds beyond what it held before the first round (anonymous memory, sampled every 10 ms),
and the most that lies in Ray's object store at once (every 100 ms: the parameters, and updates or sums on their way), per rule.
FedAvg: one round; LoRM: a B-round, an A-round and the statistics pass of RegMean over tasks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks import _idle, machine
from experiments.benchmarks._idle import Idle
from fedsim.core import config as configs
from fedsim.core.messages import ClientJob, ClientUpdate, Tensors
from fedsim.core.tensors import matching

ROOT = Path(__file__).resolve().parents[2]
WIDTH, MLP, BLOCKS, RANK, CLASSES = 768, 3072, 12, 16, 100
SAMPLED = (10, 100, 1000)
LAYERS = {
    **{f"attention.{part}_proj": (WIDTH, WIDTH) for part in "qkvo"},
    "mlp.fc1": (MLP, WIDTH),
    "mlp.fc2": (WIDTH, MLP),
}  # outputs, inputs


def parameters() -> dict[str, Tensor]:
    """LoRA in every linear layer, and a head."""
    out = {}
    for block in range(BLOCKS):
        for layer, (outputs, inputs) in LAYERS.items():
            out[f"adapter.layers.{block}.{layer}.lora_A"] = torch.randn(RANK, inputs)
            out[f"adapter.layers.{block}.{layer}.lora_B"] = torch.randn(outputs, RANK)
    return out | {"head.weight": torch.randn(CLASSES, WIDTH), "head.bias": torch.zeros(CLASSES)}


class Instant(Idle):
    """A client that sends back what it got, and statistics of the right shapes."""

    def train_client(self, job: ClientJob) -> ClientUpdate:
        trained = {n: job.params[n] for n in matching(job.params, job.plan.train)}
        statistics = {}
        for request in job.plan.statistics:
            for name in matching(job.params, request.match):
                statistics[f"gram.{request.options['form']}/{name}"] = gram(str(request.options["form"]), name, job.params)
        return ClientUpdate(job.client_id, 1, trained, statistics)


def gram(form: str, name: str, params: Tensors) -> Tensor:
    """A Gram that can be inverted: the identity in the form that was asked for."""
    if form == "projected":
        return torch.eye(params[name].shape[1])
    size = params[name].shape[1]
    return torch.ones(size) if form == "diagonal" else torch.eye(size)[tuple(torch.triu_indices(size, size))]


def held() -> int:
    """Anonymous bytes of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def stored() -> int:
    """Bytes in Ray's object store now."""
    import ray
    from ray._private.internal_api import memory_summary

    address = ray.get_runtime_context().gcs_address
    found = re.search(r"Plasma memory usage (\d+) MiB", memory_summary(address, stats_only=True))
    assert found is not None, "Ray says it in other words now"
    return int(found[1]) * 2**20


def play(rule: str, sampled: int) -> dict[str, float]:
    """Most memory over the rounds, in MB, and seconds."""
    from clients.pools import ray as ray_pool
    from server import loop
    from server.state import ServerState

    class Pool(ray_pool.Pool):
        worker = "experiments.benchmarks.server_memory:Instant"

    torch.set_num_threads(1)
    lorm = rule == "lorm"
    server = {"rounds": 2 if lorm else 1, "aggregator": rule, "consolidator": "regmean" if lorm else "none", "evaluate": "task"}
    partition = {"name": "iid", "clients": sampled}
    config = configs.from_dict({"server": server, "partition": partition, "runtime": {"pool": "ray", "workers": 2}})
    most, done = {"held": 0, "stored": 0}, threading.Event()

    def watch(what: str, look: Callable[[], int], every: float) -> None:
        while not done.is_set():
            most[what] = max(most[what], look())
            time.sleep(every)

    with Pool(_idle.work(config, sampled)) as pool:
        params = parameters()
        sim = _idle.simulation(config, pool, sampled)
        stored()
        before, clock = held(), time.perf_counter()
        watchers = [threading.Thread(target=watch, args=a) for a in (("held", held, 0.01), ("stored", stored, 0.1))]
        for watcher in watchers:
            watcher.start()
        try:
            for _ in loop.run(sim, ServerState(0, 0, params, sim.consolidator.init())):
                pass
        finally:
            seconds = time.perf_counter() - clock
            done.set()
            for watcher in watchers:
                watcher.join()
    return {
        "held_mb": (most["held"] - before) / 2**20,
        "stored_mb": most["stored"] / 2**20,
        "parameters_mb": sum(t.numel() * 4 for t in params.values()) / 2**20,
        "seconds": seconds,
    }


def main() -> None:
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rule in ("fedavg", "lorm"):
            for sampled in SAMPLED:
                target = Path(folder) / "out.json"
                command = [sys.executable, "-m", "experiments.benchmarks.server_memory", rule, str(sampled), str(target)]
                env = {**os.environ, "OMP_NUM_THREADS": "1"}
                done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, encoding="utf-8", check=False, timeout=600)
                if not target.exists():
                    raise RuntimeError(done.stderr[-2000:])
                row = json.loads(target.read_text(encoding="utf-8"))
                target.unlink()
                rows.setdefault(rule, {})[str(sampled)] = row
                print(f"{rule}, {sampled}: {', '.join(f'{k} {v:.1f}' for k, v in row.items())}", flush=True)
    machine.write("server_memory", {"rules": rows})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[3]).write_text(json.dumps(play(sys.argv[1], int(sys.argv[2]))), encoding="utf-8")
    else:
        main()
