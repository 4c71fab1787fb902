"""For all tests: one thread per process, no network, the larger data where it is at hand, and one Ray that stays."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

for name in (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
):  # before numpy and torch are loaded; workers inherit it
    os.environ.setdefault(name, "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
hypothesis.settings.register_profile("fedsim")  # a busy machine is no failure
hypothesis.settings.load_profile("fedsim")


class Unsynced(sqlite3.Connection):
    """Never waits for the disk."""

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        return super().execute("PRAGMA synchronous = OFF" if sql.startswith("PRAGMA synchronous") else sql, *values)


# nothing here has to outlive a power cut, and every round of a run would wait for the disk
os.fsync = lambda handle: None
sqlite3.connect = partial(sqlite3.connect, factory=Unsynced)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """`shared_data("tasks.json")`: a file of the folder FEDSIM_DATA (default: ../shared/data); the test is skipped without it."""
    folder = Path(os.environ.get("FEDSIM_DATA", ROOT.parent / "shared" / "data"))

    def find(name: str) -> Path:
        path = folder / name
        if not path.exists():
            pytest.skip(f"{path} is not there: set FEDSIM_DATA to the folder that holds {name}")
        return path

    return find


@pytest.fixture
def run_dirs(tmp_path: Path) -> Path:
    """An empty folder for run directories, as `runtime.output`."""
    path = tmp_path / "runs"
    path.mkdir()
    return path


@pytest.hookimpl(tryfirst=True)  # before marks choose
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on Ray and in a browser have the mark `processes`. Those on Ray come first, those that need it to run before those
    that need it not to: of two processes that share the tests one has all of them, and starts it once."""
    for item in items:
        if {"rays", "browser"} & set(getattr(item, "fixturenames", ())) and not item.get_closest_marker("always"):
            item.add_marker("processes")

    def turn(item: pytest.Item) -> int:
        needs = getattr(item, "fixturenames", ())
        return 0 if "warm_ray" in needs else 1 if "one_ray" in needs else 2 if "rays" in needs else 3

    items.sort(key=turn)


@pytest.fixture(scope="session")
def rays() -> Iterator[Callable[[bool, bool], None]]:
    """`rays(True, warm)`: Ray runs in this process, with two cores, and has them free or has warm workers; `rays(False, False)`:
    none does."""
    import ray

    import clients.cluster  # sets what Ray reads when it starts  # noqa: F401
    from tests import warm

    def wanted(running: bool, with_workers: bool) -> None:
        if not with_workers:
            warm.end()
        if running and not ray.is_initialized():
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        elif not running and ray.is_initialized():
            ray.shutdown()
        deadline, cores = time.monotonic() + 30, 2 - len(warm.idle)
        while running and ray.available_resources().get("CPU", 0) < cores and time.monotonic() < deadline:
            time.sleep(0.05)  # workers of the pool before are on their way out, and still have their cores

    yield wanted
    wanted(False, False)


@pytest.fixture
def one_ray(rays: Callable[[bool, bool], None]) -> None:
    """Ray that stays for the tests that follow: a pool joins it, and does not take the seconds that a start takes."""
    rays(True, False)


@pytest.fixture
def warm_ray(rays: Callable[[bool, bool], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, and the processes of the workers stay too: for tests of what workers do, not of how they start."""
    from clients.pools import ray as ray_pool
    from tests.warm import Pool

    rays(True, True)
    monkeypatch.setattr(ray_pool, "Pool", Pool)


@pytest.fixture
def no_ray(rays: Callable[[bool, bool], None]) -> None:
    """No Ray: for tests about its start, and for Flower, which starts its own."""
    rays(False, False)
