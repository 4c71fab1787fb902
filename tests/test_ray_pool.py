"""What only Ray can get wrong: foreign modules in the working directory, plug-ins from outside, workers that die."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from clients.pools import ray as ray_pool
from fedsim.core.errors import PoolError
from fedsim.core.events import Event, RoundDone
from fedsim.simulation import run
from tests.pages import median_rule
from tests.tiny import final_state, kept, learned, plain_vit, same_bits, tiny

pytestmark = pytest.mark.processes
ROOT = Path(__file__).resolve().parents[1]
MEDIAN = median_rule()


def python(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A process of its own, as a user starts it from some folder."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_sigterm_is_one_line_and_nothing_is_lost(tmp_path: Path) -> None:
    """What batch systems send at the end of the time; Ray by itself would abort with a stack trace."""
    config = tiny("runtime.pool=ray", "runtime.workers=1", "server.rounds=300", model=plain_vit())
    (tmp_path / "long.yaml").write_text(config.to_yaml())
    words = [sys.executable, "-m", "fedsim.cli", "run", "long.yaml", "--output", "out"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert output.strip().splitlines()[-1].startswith("fedsim: stopped")
    assert "logging.cc" not in output
    assert final_state(tmp_path / "out", config).round >= 1


def test_a_rule_and_decoys_in_the_users_folder(tmp_path: Path) -> None:
    """A rule named by path works under Ray with no install, and the folder's own clients.py and server.py do no harm."""
    for decoy in ("clients.py", "server.py"):
        (tmp_path / decoy).write_text("raise RuntimeError('the decoy was imported')\n")
    (tmp_path / "my_rule.py").write_text(MEDIAN)
    config = tiny("runtime.pool=ray", "runtime.workers=1", model=plain_vit())
    (tmp_path / "mine.yaml").write_text(config.to_yaml().replace("name: lorm", "name: ./my_rule.py"))
    plain = tiny(model=plain_vit())
    lorm_only = ("decay", "head_decay", "keep_unseen", "ridge", "gram", "train", "start", "form")
    text = (tmp_path / "mine.yaml").read_text().splitlines()
    (tmp_path / "mine.yaml").write_text("\n".join(_without_options(text, lorm_only)))
    done = python("-m", "fedsim.cli", "run", "mine.yaml", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "inal average accuracy" in done.stdout
    assert (tmp_path / "out" / "plugins" / "my_rule.py").read_text() == MEDIAN

    by_hand = run(tiny(f"server.aggregator.name={tmp_path / 'my_rule.py'}", output=tmp_path / "serial", model=plain_vit()))
    import pandas as pd

    frame = pd.read_csv(tmp_path / "out" / "rounds.csv")
    assert frame["correct"].tolist() == by_hand.frame()["correct"].tolist()
    assert plain.identity() != by_hand.config.identity()


def _without_options(lines: list[str], names: tuple[str, ...]) -> list[str]:
    """The YAML without the options of the rule that was replaced."""
    start = next(i for i, line in enumerate(lines) if line.strip().startswith("aggregator"))
    end = next(i for i, line in enumerate(lines) if line.strip().startswith("consolidator"))
    return [line for i, line in enumerate(lines) if not (start < i < end and line.strip().split(":")[0] in names)]


def test_a_worker_that_dies_is_replaced_and_its_clients_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_ray: None
) -> None:
    killed: list[int] = []
    real = ray_pool.Pool.train

    def train(self: Any, jobs: Any) -> Iterator[Any]:
        if not killed and jobs[0].task == 1:
            victim = self.worker_pids()[0]
            killed.append(victim)
            threading.Thread(target=lambda: (time.sleep(0.005), os.kill(victim, signal.SIGKILL))).start()
        yield from real(self, jobs)

    rule = {"aggregator": "fedavg", "consolidator": "none", "channel": [{"name": "topk", "share": 0.3}]}  # which has a memory
    same: dict[str, Any] = {"server": rule, "model": plain_vit()}
    serial = tiny("server.rounds=3", output=tmp_path / "serial", **same)
    on_ray = tiny("server.rounds=3", "runtime.pool=ray", "runtime.workers=2", output=tmp_path / "ray", **same)
    a = run(serial)
    monkeypatch.setattr(ray_pool.Pool, "train", train)
    b = run(on_ray)
    assert killed
    assert same_bits(learned(final_state(a.path, serial)), learned(final_state(b.path, on_ray)))
    assert same_bits(kept(a.path), kept(b.path))
    np.testing.assert_array_equal(a.accuracy, b.accuracy)


def test_a_client_over_which_workers_keep_dying_is_an_error(tmp_path: Path, no_ray: None) -> None:
    """And the Ray that the pool has started is gone."""
    deadly = tmp_path / "deadly.py"
    deadly.write_text(
        "from dataclasses import dataclass\nimport os\nfrom fedsim.core import contracts\n"
        "@dataclass(frozen=True)\nclass Learner(contracts.Learner):\n"
        "    def loss(self, state, step):\n"
        f"        if os.getpid() != {os.getpid()}:  # not where it is tried before\n            os._exit(1)\n"
    )
    config = tiny(
        "runtime.pool=ray", "runtime.workers=1", "runtime.max_restarts=1", output=tmp_path, client={"learners": [str(deadly)]}
    )
    with pytest.raises(PoolError, match=r"died 2 times over client \d, task 0, round 0"):
        run(config)
    assert not ray.is_initialized()


def test_no_cluster_at_the_address(tmp_path: Path, no_ray: None) -> None:
    config = tiny("runtime.pool=ray", "runtime.address=127.0.0.1:1", output=tmp_path)
    with pytest.raises(PoolError, match=r"no Ray cluster at '127.0.0.1:1'"):
        run(config)


def test_joining_a_cluster_that_runs_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same bits as in this process; and without an address, a cluster that happens to be there is left alone.

    In one new process, which has Ray once from outside and then of its own: this one's Ray began without a token.
    """
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # what Ray >= 2.59 starts clusters with, and what whoever joins must say
    notes = tempfile.mkdtemp(prefix="fedsim")  # where Ray notes that it runs: no other test sees it
    monkeypatch.setenv("RAY_TMPDIR", notes)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    head = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    log = (tmp_path / "head.log").open("w")
    cluster = subprocess.Popen([*head, "--include-dashboard=false"], stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in (tmp_path / "head.log").read_text():
            assert cluster.poll() is None and time.monotonic() < deadline, (tmp_path / "head.log").read_text()
            time.sleep(0.2)
        (tmp_path / "tiny.yaml").write_text(tiny("stream.tasks=1", model=plain_vit()).to_yaml())
        runs = {"joined": ["runtime.pool=ray", f"runtime.address=127.0.0.1:{port}"], "own": ["runtime.pool=ray"]}
        if importlib.util.find_spec("flwr") is not None:
            runs["flower"] = ["runtime.pool=flower"]
        words = [["run", "tiny.yaml", "runtime.workers=1", *told, "--output", output] for output, told in runs.items()]
        script = f"from fedsim.cli import main\nfor words in {words!r}:\n    assert main(words) == 0, words"
        done = python("-c", script, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    finally:
        os.killpg(cluster.pid, signal.SIGKILL)  # the head and all that it started
        cluster.wait(30)
        log.close()
        shutil.rmtree(notes, ignore_errors=True)
    serial = run(tiny("stream.tasks=1", output=tmp_path / "serial", model=plain_vit()))
    for output in runs:
        assert (tmp_path / output / "rounds.csv").read_text() == (serial.path / "rounds.csv").read_text()  # type: ignore[operator]


@pytest.fixture
def two_nodes(no_ray: None) -> Iterator[Any]:
    """A cluster of two machines of one core, the second of which can be killed."""
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 10**8}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    second = cluster.add_node(num_cpus=1, object_store_memory=10**8)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield lambda: cluster.remove_node(second, allow_graceful=False)
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_machine_that_dies_and_then_more_workers_than_places(
    two_nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool, "START_S", 2.0)
    monkeypatch.setattr(ray_pool, "PATIENCE", 60)  # where there is place, a process may be slow to start
    rounds: list[RoundDone] = []

    def kill(event: Event) -> None:
        if isinstance(event, RoundDone):
            rounds.append(event)
            if len(rounds) == 2:
                two_nodes()

    config = tiny("runtime.pool=ray", "runtime.workers=2", "server.rounds=3", output=tmp_path, model=plain_vit())
    ended = run(config, progress=kill)  # the replacement finds no place, and gets no work
    assert len(rounds) == 6
    with pytest.raises(
        PoolError,
        match=r"no place for \d of 2 workers in 2 s: each asks for CPU 1, and Ray has CPU \d \(\d free\): lower runtime.w",
    ):
        run(config)
    serial = run(tiny("server.rounds=3", output=tmp_path / "serial", model=plain_vit()))
    assert same_bits(learned(final_state(ended.path, config)), learned(final_state(serial.path, serial.config)))  # type: ignore[arg-type]
