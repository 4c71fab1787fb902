"""Label noise: how many labels are wrong, which ones they become, and where it is written down."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedsim.core import config
from fedsim.core.config import NoiseConfig, SimConfig
from fedsim.core.contracts import IntArray
from fedsim.core.errors import ConfigError, DataError
from fedsim.data import door, manifest, noise

Make = Callable[..., SimConfig]
DATA = {"source": "synthetic", "image_size": 4, "classes": 12, "train_per_class": 15, "test_per_class": 3}
IID = {"name": "iid", "clients": 3, "min_samples": 1}


def spec_of(made: SimConfig) -> Any:
    dataset = config.build("sources", made.data).load()
    return manifest.work_spec(manifest.make(made, dataset), dataset, made)


def noisy(make_config: Make, kind: str, share: float, **stream: Any) -> tuple[Any, Any]:
    """What workers get without noise and with it."""
    options = {"tasks": 3, "order": "shuffle", **stream}
    clean = spec_of(make_config(DATA, options, IID))
    return clean, spec_of(make_config(DATA, {**options, "noise": {"kind": kind, "share": share}}, IID))


@pytest.mark.parametrize(("kind", "share"), [("symmetric", 0.4), ("asymmetric", 0.4), ("symmetric", 0.9)])
def test_the_share_of_every_class_is_wrong_within_its_task(make_config: Make, kind: str, share: float) -> None:
    clean, dirty = noisy(make_config, kind, share)
    assert np.array_equal(clean.test.labels, dirty.test.labels)
    assert np.array_equal(clean.shard_indices, dirty.shard_indices)  # dealt by the true classes
    for classes in clean.task_classes:
        for row in classes:
            became = dirty.train.labels[clean.train.labels == row]
            assert (became != row).sum() == round(share * 15)
            assert set(became.tolist()) <= set(classes)
            if kind == "asymmetric":
                after = classes[(classes.index(row) + 1) % len(classes)]
                assert set(became.tolist()) == {row, after}


def test_symmetric_noise_takes_every_other_class_alike() -> None:
    """χ² of 3 × 4,000 flipped labels over the three other classes."""
    row_N = np.repeat(np.arange(4), 8000)
    found = noise.flips(NoiseConfig(share=0.5), row_N, [np.arange(len(row_N))], [(0, 1, 2, 3)], seed=0)
    for row in range(4):
        counts = np.bincount(found.rows[row_N[found.positions] == row], minlength=4)
        assert counts[row] == 0
        assert counts.sum() == 4000
        assert stats.chisquare(np.delete(counts, row)).pvalue > 0.001


def test_a_task_is_flipped_alike_whatever_comes_after_it_and_if_all_are_joined(make_config: Make) -> None:
    def labels(**stream: Any) -> IntArray:
        found: IntArray = noisy(make_config, "symmetric", 0.4, order="given", classes_per_task=4, **stream)[1].train.labels
        return found

    one, all_three = labels(tasks=1), labels(tasks=3)
    assert np.array_equal(one[one >= 0], all_three[one >= 0])
    assert np.array_equal(all_three, labels(tasks=3, joint=True))


def test_it_is_part_of_the_manifest_and_of_what_a_run_is(make_config: Make, tmp_path: Path) -> None:
    made = make_config(DATA, {"tasks": 3, "noise": {"share": 0.2}}, IID)
    dataset = config.build("sources", made.data).load()
    found = manifest.make(made, dataset)
    found.save(tmp_path / "m.json")
    again = manifest.load(tmp_path / "m.json")
    assert again == found
    assert again.flips.positions.tolist() == found.flips.positions.tolist() != []
    spec = manifest.work_spec(found, dataset, made)
    read = dataclasses.replace(make_config(DATA, {"tasks": 3}, IID), manifest=str(tmp_path / "m.json"))
    assert np.array_equal(spec_of(read).train.labels, spec.train.labels)
    assert door.notes(dataset, found) == ("label noise: 36 of 180 training labels are wrong on purpose, no test label is",)
    others = [
        make_config(DATA, {"tasks": 3, "noise": {"share": s, "kind": k}}, IID)
        for s, k in ((0.0, "symmetric"), (0.2, "asymmetric"))
    ]
    assert len({found.hash, *(manifest.make(other, dataset).hash for other in others)}) == 3


def test_without_noise_nothing_is_written_and_no_identity_moves(make_config: Make, tmp_path: Path) -> None:
    def identity(*overrides: str) -> str:
        return config.load(Path(__file__).parents[2] / "configs" / "fedavg.yaml", list(overrides)).identity()

    assert identity() == identity("stream.noise.kind=asymmetric") == identity("stream.noise.share=0")
    assert (
        len({identity("stream.noise.share=0.2", f"stream.noise.kind={k}") for k in ("symmetric", "asymmetric")} | {identity()})
        == 3
    )
    none = make_config(DATA, {"tasks": 3, "noise": {"kind": "asymmetric"}}, IID)
    found = manifest.make(none, config.build("sources", none.data).load())
    found.save(tmp_path / "m.json")
    assert "flips" not in json.loads((tmp_path / "m.json").read_text())
    assert len(found.flips.positions) == 0


def test_what_cannot_be(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stream.noise.share must be in \[0, 1\), got 1.0"):
        make_config(DATA, {"noise": {"share": 1.0}}, IID)
    with pytest.raises(ConfigError, match=r"stream.noise: task 0 has a single class, and no other label to flip to"):
        spec_of(make_config(DATA, {"tasks": 12, "noise": {"share": 0.1}}, IID))
    made = make_config(DATA, {"tasks": 3, "noise": {"share": 0.2}}, IID)
    path = tmp_path / "m.json"
    manifest.make(made, config.build("sources", made.data).load()).save(path)
    content = json.loads(path.read_text())
    content["flips"]["rows"][0] = 12
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"is damaged \(ValueError: head row of flipped positions must lie in 0..11\)"):
        manifest.load(path)
