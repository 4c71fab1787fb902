"""For all tests: one thread per process, no network, and the larger data where it is at hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

for name in (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
):  # before numpy and torch are loaded; workers inherit it
    os.environ.setdefault(name, "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

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
