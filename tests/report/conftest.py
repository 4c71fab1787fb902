"""Made once for all tests of the report: a sweep of three methods, three splits and two seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.report.data import Study
from fedsim.runs.collection import Collection, collect
from tests.report.browsing import browser, visit
from tests.report.factory import METHODS, fake_sweep

__all__ = ["browser", "visit"]  # fixtures

THREE = {name: METHODS[name] for name in ("lorm", "fedavg", "variance_weighted")}


@pytest.fixture(scope="session")
def sweep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_sweep(
        tmp_path_factory.mktemp("sweep"), THREE, alphas=(0.1, 0.5), seeds=(0, 1), tasks=3, clients=5, rounds=2, classes=4
    )


@pytest.fixture(scope="session")
def sweep(sweep_folder: Path) -> Collection:
    return collect([sweep_folder])


@pytest.fixture(scope="session")
def study(sweep: Collection) -> Study:
    return Study.of(sweep)
