"""Ray for the tests of sweeps: two cores, whatever the machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="package")
def workers() -> Iterator[None]:
    """Ray that stays, so that its processes import us once."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
