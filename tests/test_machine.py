"""What a machine cannot do is said before anything else, in one line; what was made on another one is still read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from clients import cluster
from clients.pools import _workers
from clients.pools import ray as ray_pool
from fedsim import simulation
from fedsim.core import hardware
from fedsim.core.errors import ConfigError, PoolError
from fedsim.runs.results import Results
from fedsim.simulation import run
from tests.run_dirs import write_run
from tests.tiny import tiny

GB = 10**9


@pytest.mark.parametrize(
    ("device", "line"),
    [
        ("mps", "runtime.device is mps, and torch finds 0 of this kind here: set it to cpu or auto"),
        ("cuda:99", r"runtime.device is cuda:99, and torch finds \d+ of this kind here: set it to cpu or auto"),
        ("gpu", "runtime.device 'gpu' is unknown. Choose from: auto, cpu, cuda, mps, xpu"),
        ("meta", "runtime.device 'meta' is unknown"),
        ("cuda:x", "runtime.device 'cuda:x' is unknown"),
    ],
)
def test_a_device_that_is_not_there(
    device: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_ray: None
) -> None:
    monkeypatch.setattr(simulation, "prepare", lambda *_: pytest.fail("data and model were read"))
    for pool in ("serial", "ray"):
        with pytest.raises(ConfigError, match=line):
            run(tiny(f"runtime.device={device}", f"runtime.pool={pool}", output=tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_made_on_another_machine_is_read_and_not_gone_on_with(tmp_path: Path) -> None:
    config = tiny("runtime.device=cuda:99")
    path = write_run(tmp_path, config)
    assert Results.load(path).config.runtime.device == "cuda:99"
    assert run(resume=path).finished
    status = (path / "status.json").read_text()
    (path / "status.json").write_text(status.replace("finished", "running"))
    with pytest.raises(ConfigError, match=r"runtime.device is cuda:99"):
        run(resume=path)


@pytest.mark.parametrize(
    ("cores", "free", "line"),
    [
        (
            2,
            100 * GB,
            r"would need 50 cores and at least 17.5 GB, and this machine has 2 cores and 100.0 GB free: .* to 8 at ",
        ),
        (
            64,
            2 * GB,
            r"would need 50 cores and at least 17.5 GB, and this machine has 64 cores and 2.0 GB free: .* to 5 at m",
        ),
        (1, None, r"this machine has 1 core: set it to auto, or to 4 at most"),
    ],
)
@pytest.mark.parametrize("pool", ["ray", "flower"])
def test_more_workers_than_a_machine_holds(
    cores: int, free: int | None, line: str, pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_ray: None
) -> None:
    if pool == "flower":
        pytest.importorskip("flwr")
    monkeypatch.setattr(hardware, "cores", lambda: cores)
    monkeypatch.setattr(hardware, "free_memory", lambda: free)
    monkeypatch.setattr(cluster, "start", lambda *_: pytest.fail("Ray was started"))
    with pytest.raises(PoolError, match=line):
        run(tiny("runtime.workers=50", f"runtime.pool={pool}", output=tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_number_of_workers_is_capped_by_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = simulation.prepare(tiny("partition.clients=6", "partition.min_samples=1", "runtime.pool=ray")).spec
    assert 1e4 < spec.weights < 1e5  # float32 of two blocks of width 16
    monkeypatch.setattr(cluster, "resources", lambda: {"CPU": 64.0})
    machines: list[dict[str, Any]] = [{}]
    monkeypatch.setattr(cluster, "machines", lambda: machines)
    for free, expected in ((100 * GB, 6), (1.5 * GB, 4), (0.1 * GB, 1)):
        monkeypatch.setattr(hardware, "free_memory", lambda free=free: free)
        assert ray_pool._num_workers(spec) == expected
    machines.append({})  # of another machine nothing is known
    assert ray_pool._num_workers(spec) == 6
    assert _workers.by_memory(spec) == 1


def test_more_threads_than_cores_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not changed: they are part of what a run is, and it may have begun on a larger machine."""
    monkeypatch.setattr(hardware, "cores", lambda: 1)
    results = run(tiny("runtime.threads=2", "stream.tasks=1", "server.rounds=1", output=tmp_path))
    (note,) = results.notes
    assert note.startswith("runtime.threads is 2, but this machine has 1 core: that is far slower than runtime.threads=1")
    assert Results.load(tmp_path / str(results.path)).notes == (note,)


def test_cores_and_memory_of_this_machine() -> None:
    assert hardware.cores() >= 1
    free = hardware.free_memory()
    assert free is None or 10**7 < free < 10**15


def test_peak_memory_is_what_was_held_at_once() -> None:
    """Here on Linux; elsewhere it cannot be measured anew."""
    hardware.forget_peak()
    before = hardware.peak_memory()
    block = bytearray(64 << 20)
    del block
    assert 60 << 20 < hardware.peak_memory() - before < 90 << 20
    if sys.platform == "linux":
        hardware.forget_peak()
        assert hardware.peak_memory() < before + (30 << 20)
