from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsim.core import config
from fedsim.core.config import SimConfig


@pytest.fixture
def make_config() -> Callable[..., SimConfig]:
    """A config of the data room alone: data, stream, partition, seed, manifest."""

    def make(data: Any, stream: dict[str, Any], partition: Any, seed: int = 0, manifest: str | None = None) -> SimConfig:
        return SimConfig(
            seed=seed,
            manifest=manifest,
            data=config.expand("sources", data, "data"),
            stream=config.typed(config.StreamConfig, stream, "stream"),
            partition=config.expand("partitions", partition, "partition"),
        )

    return make


@pytest.fixture
def local_datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The datasets library, offline, with its cache in the test's own folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return datasets
