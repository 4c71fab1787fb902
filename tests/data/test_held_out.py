"""Held-out samples: how many of every class, the same whatever the seed, and never a test sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedsim import cli
from fedsim.core import config
from fedsim.core.contracts import ArraySplit, Dataset, IntArray
from fedsim.core.errors import ConfigError, DataError
from fedsim.data import door, held_out
from tests.tiny import TINY

ROOT = Path(__file__).parents[2]


def numbered(labels: IntArray, domains: IntArray | None = None) -> Dataset:
    """Training samples that tell their place, and a test sample of each class that none of them is."""
    train = ArraySplit({"input_ids": np.arange(len(labels))[:, None]}, labels, domains)
    classes = int(labels.max()) + 1
    test = ArraySplit(
        {"input_ids": np.full((classes, 1), -1)}, np.arange(classes), None if domains is None else np.zeros(classes, int)
    )
    names = tuple(f"c{i}" for i in range(classes))
    return Dataset(train, test, names, domain_names=() if domains is None else ("a", "b"))


@given(hnp.arrays(np.int64, st.integers(2, 60), elements=st.integers(0, 4)), st.floats(0.01, 0.99))
def test_a_share_of_every_class_is_tested_on_and_the_rest_is_trained_on(labels: IntArray, share: float) -> None:
    counts = np.bincount(labels)
    if counts.max() < 2:
        with pytest.raises(DataError, match="no class has two training samples"):
            held_out.validation(numbered(labels), share)
        return
    whole = numbered(labels)
    found = held_out.validation(whole, share)
    places = [split.inputs["input_ids"][:, 0] for split in (found.train, found.test)]
    assert np.array_equal(np.sort(np.concatenate(places)), np.arange(len(labels)))  # a training sample each, and no test sample
    for split, place in zip((found.train, found.test), places, strict=True):
        assert np.array_equal(split.labels, labels[place])
        assert np.array_equal(place, np.sort(place))
    held = np.bincount(found.test.labels, minlength=len(counts))
    for count, out in zip(counts, held, strict=True):
        assert out == (min(max(1, round(share * count)), count - 1) if count > 1 else 0)


def test_every_domain_keeps_its_share_of_every_class() -> None:
    labels, domains = np.tile(np.arange(3), 20), np.repeat([0, 1], 30)
    found = held_out.validation(numbered(labels, domains), 0.3)
    assert found.test.domains is not None
    assert np.unique(np.stack([found.test.labels, found.test.domains]), axis=1, return_counts=True)[1].tolist() == [3] * 6


def test_without_a_share_it_is_the_data_and_no_identity_moves() -> None:
    whole = numbered(np.array([0, 0, 1, 1]))
    assert held_out.validation(whole, 0.0) is whole
    plain, share = (config.load("fashion", [f"stream.validation={value}"]) for value in (0, 0.25))
    assert plain.identity() == config.load("fashion").identity() != share.identity()


def test_the_same_samples_whatever_the_seed_and_the_stream() -> None:
    first, other = (
        door.load(config.load("fashion", ["stream.validation=0.25", *more])) for more in ([], ["seed=7", "stream.tasks=2"])
    )
    for one, two in ((first.train, other.train), (first.test, other.test)):
        assert np.array_equal(one.inputs["pixel_values"], two.inputs["pixel_values"])
    assert (len(first.train), len(first.test)) == (3000, 1000)
    assert first.notes == ("tested on 1000 of 4000 training samples, held out (stream.validation 0.25): not on the test samples",)
    tests = door.load(config.load("fashion")).test.inputs["pixel_values"]
    known = {image.tobytes() for image in tests}
    assert not any(image.tobytes() in known for image in first.test.inputs["pixel_values"])


def test_a_run_says_what_it_was_tested_on(one_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(config.text.write(TINY))
    assert cli.main(["run", str(path), "stream.validation=0.2", "--output", str(tmp_path / "out")]) == 0
    assert "training samples, held out (stream.validation 0.2): not on the test samples" in capsys.readouterr().out
    assert "held out" in (tmp_path / "out" / "notes.json").read_text()


@pytest.mark.parametrize("share", [1.0, -0.1])
def test_what_is_no_share(share: float) -> None:
    with pytest.raises(ConfigError, match=r"stream.validation must be in \[0, 1\)"):
        config.load("fashion", [f"stream.validation={share}"])
