"""Memory of the server at 10, 100 and 1 000 sampled clients, at ViT-B/16 shapes (random tensors, LoRA rank 16 everywhere).

The real loop with the Ray pool (two workers) and clients that make up their tensors and statistics at once. Reported is the
most memory that the server's process holds beyond what it held before the first round (anonymous memory, sampled every 10 ms),
and the most that lies in Ray's object store at once (every 100 ms: the parameters, and updates or sums on their way), per rule.
FedAvg: one round; LoRM: a B-round, an A-round and the statistics pass of RegMean over tasks.

    python -m experiments.benchmarks.server_memory merging

Instead: what one merge of 100 clients' 0.3 million numbers takes by rules that are no plain sum, beside FedAvg's, in one process
each (`server_merging.json`): seconds of one core's time, best of three, and the most memory beyond that of the updates.
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


CLIENTS, TENSORS, SHAPE = 100, 48, (16, 384)
RULES: dict[str, Any] = {
    "fedavg": "fedavg",
    "fedadam": "fedadam",
    "median": {"name": "merged", "rule": "median"},
    "trimmed mean, a fifth": {"name": "merged", "rule": "trimmed_mean"},
    "krum, 20 byzantine": {"name": "merged", "rule": {"name": "krum", "byzantine": 20}},
    "multi-krum, 20 byzantine, 50 kept": {"name": "merged", "rule": {"name": "krum", "byzantine": 20, "keep": 50}},
    "bulyan, 20 byzantine": {"name": "merged", "rule": {"name": "bulyan", "byzantine": 20}},
    "ties": {"name": "merged", "rule": "ties"},
}


def merge(name: str) -> dict[str, float]:
    """Seconds and memory of one merge."""
    torch.set_num_threads(1)
    rule = configs.build_aggregator(configs.expand("aggregators", RULES[name], "rule"))
    params = {f"adapter.{n}": torch.randn(SHAPE) for n in range(TENSORS)}
    updates = [ClientUpdate(k, 1 + k, {n: t + torch.randn(SHAPE) for n, t in params.items()}) for k in range(CLIENTS)]
    rule.combine(rule.init(params), params, updates, torch.Generator())
    before, most, done, seconds = held(), 0, threading.Event(), []

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, held())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        clock = time.thread_time()
        rule.combine(rule.init(params), params, updates, torch.Generator())
        seconds.append(time.thread_time() - clock)
    done.set()
    watcher.join()
    return {"seconds": min(seconds), "held_mb": (most - before) / 2**20}


def merging() -> None:
    """Every rule in a process of its own."""
    rows: dict[str, Any] = {}
    for name in RULES:
        command = [sys.executable, "-m", "experiments.benchmarks.server_memory", "merge", name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False, timeout=600)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        rows[name] = json.loads(done.stdout)
        rows[name]["over_fedavg"] = rows[name]["seconds"] / rows["fedavg"]["seconds"]
        print(f"{name}: {', '.join(f'{k} {v:.2f}' for k, v in rows[name].items())}", flush=True)
    updates = CLIENTS * TENSORS * SHAPE[0] * SHAPE[1] * 4 / 2**20
    machine.write("server_merging", {"clients": CLIENTS, "updates_mb": updates, "rules": rows})


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
    if sys.argv[1:] == ["merging"]:
        merging()
    elif sys.argv[1:2] == ["merge"]:
        print(json.dumps(merge(sys.argv[2])))
    elif len(sys.argv) > 1:
        Path(sys.argv[3]).write_text(json.dumps(play(sys.argv[1], int(sys.argv[2]))), encoding="utf-8")
    else:
        main()
