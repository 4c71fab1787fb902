"""What a round with client memory costs: 100 clients a round of 1 000 and of 1 000 000 registered ones, all of which remember.

    python -m experiments.benchmarks.memory [--rounds 40] [--numbers 256] [--repeats 3]

Clients without model and data read what they remember and write as much anew. A round is all of it: draw, read, run, write,
FedAvg, commit, checkpoint, prune; in the run's own loop, serial, with the files of a run directory. Every case in a process of
its own; seconds are medians over rounds after a warm-up, bytes are what the process has handed to the disk per round. What limits
it at a million: 100 clients lie on 100 pages of the file and of its index, each of which is written twice (log, then file).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks import _idle, machine
from fedsim.core.messages import ClientJob, ClientUpdate

REGISTERED = (1_000, 1_000_000)
SAMPLED, WARM_UP = 100, 5


class Remembering(_idle.Idle):
    """A client that sends back what it got, and counts in every number that it remembers."""

    def train_client(self, job: ClientJob) -> ClientUpdate:
        return ClientUpdate(job.client_id, 1, dict(job.params), memory={n: t + 1 for n, t in job.memory.items()})


def filled(path: Path, registered: int, numbers: int) -> tuple[Any, float]:
    """A store in which every client remembers so many numbers, opened as a run that goes on opens it; and the seconds of that."""
    from server.store import ClientStore

    with ClientStore(registered, path, "benchmark") as store:
        for clients in (range(registered), range(SAMPLED)):  # the last round is like all that follow
            for client in clients:
                store.remember(client, {"learner.counting/numbers": torch.zeros(numbers)})
            store.sent(store.stored.version, clients, with_past=False)
            said = store.commit()
            store.prune()
    clock = time.perf_counter()
    return ClientStore(registered, path, "benchmark", said), time.perf_counter() - clock


def play(registered: int, numbers: int, rounds: int, folder: Path) -> dict[str, float]:
    """Median seconds and mean bytes of a round."""
    from clients.pools import serial
    from fedsim.core import config as configs
    from server import checkpoint, loop
    from server.state import Delivered, ServerState

    class InProcess(serial.Pool):
        worker = Remembering

    torch.set_num_threads(1)
    server = {"rounds": rounds + WARM_UP, "participation": SAMPLED / registered, "evaluate": "task", "drift": False}
    config = configs.from_dict(
        {"server": server, "partition": {"name": "iid", "clients": registered}, "runtime": {"pool": "serial"}}
    )
    store, opening = filled(folder / "clients.sqlite", registered, numbers)
    params = {"adapter.a": torch.randn(1000, generator=torch.Generator().manual_seed(0))}
    state = ServerState(0, 0, params, {}, stored=store.stored, delivered=Delivered(count=2))
    saving, clocks, written = list[float](), list[float](), list[int]()
    with store, InProcess(_idle.work(config, registered)) as pool:
        sim = _idle.simulation(config, pool, registered, store)
        for step in loop.run(sim, state):
            if isinstance(step, ServerState):
                clock = time.perf_counter()
                checkpoint.save(folder / "checkpoint.pt", _said(step, store.commit()), "benchmark")
                store.prune()
                clocks.append(time.perf_counter())
                saving.append(clocks[-1] - clock)
                written.append(_written())
                if len(clocks) > rounds + WARM_UP:
                    break
        read = float(store.read(0)["learner.counting/numbers"][0])
    assert 0 <= read <= len(clocks), "a client counts the rounds in which it took part"
    return {
        "seconds": statistics.median(b - a for a, b in pairwise(clocks[WARM_UP:])),
        "saving_s": statistics.median(saving[WARM_UP:]),
        "bytes": (written[-1] - written[WARM_UP]) / (len(written) - WARM_UP - 1),
        "checkpoint_bytes": (folder / "checkpoint.pt").stat().st_size,
        "store_bytes": (folder / "clients.sqlite").stat().st_size,
        "opening_s": opening,
    }


def _said(state: Any, stored: Any) -> Any:
    from dataclasses import replace

    return replace(state, stored=stored)


def _written() -> int:
    """Bytes that this process has handed to the disk."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines())
    return int(lines["write_bytes"])


def main() -> None:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--numbers", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("REGISTERED", "FOLDER"), help="measure one in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(play(int(args.one[0]), args.numbers, args.rounds, Path(args.one[1]))))
        return
    found: dict[int, list[dict[str, float]]] = {registered: [] for registered in REGISTERED}
    for _ in range(args.repeats):  # in turns: what else the machine does changes slowly
        for registered, runs in found.items():
            with tempfile.TemporaryDirectory() as folder:
                words = ["--rounds", str(args.rounds), "--numbers", str(args.numbers), "--one", str(registered), folder]
                env = {**os.environ, "OMP_NUM_THREADS": "1"}
                command = [sys.executable, "-m", "experiments.benchmarks.memory", *words]
                done = subprocess.run(command, env=env, check=True, capture_output=True, encoding="utf-8")
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            print(registered, runs[-1], flush=True)
    rows = {f"{r} clients": {name: statistics.median(run[name] for run in runs) for name in runs[0]} for r, runs in found.items()}
    few, many = rows.values()
    growth = {name: many[name] / few[name] for name in ("seconds", "bytes", "checkpoint_bytes")}
    print(f"a million over a thousand: {growth}")
    told = {
        "sampled": SAMPLED,
        "bytes_each": 4 * args.numbers,
        "rounds": args.rounds,
        "repeats": args.repeats,
        "registered": rows,
        "growth": growth,
    }
    print(machine.write("memory", told))


if __name__ == "__main__":
    main()
