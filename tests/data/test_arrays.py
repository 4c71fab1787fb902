"""Arrays and texts of a script become files that a source reads: to the same samples, by a name that says what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.core import config as configs
from fedsim.core.contracts import Dataset
from fedsim.core.errors import ConfigError, DataError
from fedsim.data import arrays, door
from fedsim.data.manifest import fingerprint

DRAW = np.random.default_rng(0)
BYTES = DRAW.integers(0, 256, (12, 5, 4, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2] * 4)
PAIR, TEST = (BYTES[:9], LABELS[:9]), (BYTES[9:], LABELS[9:])


def read(section: dict[str, Any]) -> Dataset:
    return door.taken(configs.build("sources", configs.expand("sources", section, "data")), "data", None, False)


def pixels(dataset: Dataset) -> np.ndarray[Any, Any]:
    return np.concatenate([dataset.train.inputs["pixel_values"], dataset.test.inputs["pixel_values"]])


@pytest.mark.parametrize(
    "form",
    [
        lambda a: a,
        lambda a: a.transpose(0, 3, 1, 2),
        lambda a: torch.from_numpy(a.transpose(0, 3, 1, 2).copy()),
        lambda a: torch.from_numpy(a.transpose(0, 3, 1, 2) / 255.0).float().requires_grad_(),
        lambda a: a / 255,
        lambda a: a.astype(np.float32),
        lambda a: a.astype(np.int64),
        lambda a: a.tolist(),
        lambda a: list(a),
    ],
    ids=[
        "bytes",
        "channels first",
        "torch",
        "torch floats",
        "floats to 1",
        "floats to 255",
        "integers",
        "lists",
        "list of arrays",
    ],
)
def test_images_of_every_form_are_the_same_bytes(form: Any, tmp_path: Path) -> None:
    dataset = read(arrays.section((form(PAIR[0]), PAIR[1]), tmp_path, (form(TEST[0]), TEST[1])))
    assert np.array_equal(pixels(dataset), BYTES)
    assert dataset.notes == ()


def test_grey_images_and_black_and_white_ones(tmp_path: Path) -> None:
    grey = BYTES[..., 0]
    for form in (grey, grey[:, None], grey[..., None]):
        dataset = read(arrays.section((form[:9], LABELS[:9]), tmp_path, (form[9:], LABELS[9:])))
        assert np.array_equal(pixels(dataset).reshape(12, 5, 4), grey)
    drawn = grey > 127
    dataset = read(arrays.section((drawn[:9], LABELS[:9]), tmp_path, (drawn[9:], LABELS[9:])))
    assert np.array_equal(pixels(dataset), drawn * 255)


def test_training_and_test_images_go_by_one_rule(tmp_path: Path) -> None:
    """Dark test images are not taken for images in 0..1."""
    dark = np.zeros((3, 5, 4), dtype=np.float32) + 1
    dataset = read(arrays.section((BYTES[:9, ..., 0].astype(np.float32), LABELS[:9]), tmp_path, (dark, LABELS[9:])))
    assert (dataset.test.inputs["pixel_values"] == 1).all()


@pytest.mark.parametrize("form", ["f2", "f4", "f8"])
def test_images_a_hair_above_one_are_images_in_0_to_1(form: str, tmp_path: Path) -> None:
    """As resizing and rounding leave them: they are cut, not taken for nearly black ones in 0..255."""
    unit = (BYTES[..., 0] / 255).astype(form)
    unit[0, 0, 0] = 1.0 + 5e-4 if form != "f2" else 1.0009765625
    want = BYTES[..., 0].copy()
    want[0, 0, 0] = 255
    dataset = read(arrays.section((unit[:9], LABELS[:9]), tmp_path, (unit[9:], LABELS[9:])))
    assert np.array_equal(pixels(dataset).reshape(12, 5, 4), want)


@pytest.mark.parametrize("high", [1.02, 1.2, 16.0])
def test_images_of_neither_range_are_refused(high: float, tmp_path: Path) -> None:
    told = rf"must be uint8 in 0..255, got float64 from 0 to {high:g}, which is neither 0..1 nor 0..255: clip or scale"
    with pytest.raises(DataError, match=told):
        arrays.section((np.linspace(0, high, 180).reshape(9, 5, 4), LABELS[:9]), tmp_path)


def test_what_rounding_loses_is_said(tmp_path: Path) -> None:
    dataset = read(arrays.section((DRAW.random((9, 5, 4)), LABELS[:9]), tmp_path, (DRAW.random((3, 5, 4)), LABELS[9:])))
    assert len(dataset.notes) == 1 and "are rounded to 256 levels" in dataset.notes[0]


@pytest.mark.parametrize(
    ("labels", "names", "class_names", "ids"),
    [
        ([0, 1, 2], None, ("0", "1", "2"), [0, 1, 2]),
        ([7, 3, 10], None, ("3", "7", "10"), [1, 0, 2]),
        (["b", "a", "c"], None, ("a", "b", "c"), [1, 0, 2]),
        (["b", "a", "c"], ["c", "b", "a"], ("c", "b", "a"), [1, 2, 0]),
        ([1, 0, 2], ["x", "y", "z", "never"], ("x", "y", "z", "never"), [1, 0, 2]),
        (np.array(["b", "a", "c"], dtype=object), None, ("a", "b", "c"), [1, 0, 2]),
        (torch.tensor([2, 0, 1], dtype=torch.int32), None, ("0", "1", "2"), [2, 0, 1]),
        ([torch.tensor(2), np.int8(0), 1], None, ("0", "1", "2"), [2, 0, 1]),
    ],
)
def test_labels_are_classes(labels: Any, names: Any, class_names: tuple[str, ...], ids: list[int], tmp_path: Path) -> None:
    dataset = read(arrays.section((BYTES[:3], labels), tmp_path, (BYTES[3:6], labels), class_names=names))
    assert dataset.class_names == class_names
    assert dataset.train.labels.tolist() == dataset.test.labels.tolist() == ids
    gaps = names is None and labels[0] == 7
    assert bool(dataset.notes) == gaps
    assert not gaps or dataset.notes[0] == "labels are 3 different numbers between 3 and 10: each is a class"


def test_a_share_of_every_class_is_held_out_and_never_twice(tmp_path: Path) -> None:
    labels = np.array([0] * 10 + [1] * 3 + [2] * 2 + [3])
    images = np.arange(16, dtype=np.uint8)[:, None, None] + np.zeros((16, 2, 2), dtype=np.uint8)
    dataset = read(arrays.section((images, labels), tmp_path, test_share=0.25))
    assert np.bincount(dataset.test.labels).tolist() == [2, 1, 1]  # round(2.5), at least one, none of a class of one
    assert sorted(pixels(dataset)[:, 0, 0].tolist()) == list(range(16))
    for split in (dataset.train, dataset.test):
        assert labels[split.inputs["pixel_values"][:, 0, 0]].tolist() == split.labels.tolist()
    assert dataset.notes == ("no test data were given: 25% of every class, 4 of 16 samples, are held out",)


def test_the_name_says_what_is_in_the_file(tmp_path: Path) -> None:
    first = arrays.section(PAIR, tmp_path / "a", TEST)
    assert Path(arrays.section(PAIR, tmp_path / "b", TEST)["path"]).name == Path(first["path"]).name
    other = BYTES[:9].copy()
    other[3, 2, 1, 0] ^= 1
    assert Path(arrays.section((other, PAIR[1]), tmp_path / "a", TEST)["path"]).name != Path(first["path"]).name
    assert Path(arrays.section((PAIR[0], PAIR[1][::-1]), tmp_path / "a", TEST)["path"]).name != Path(first["path"]).name


def test_a_file_that_was_damaged_is_written_again(tmp_path: Path) -> None:
    path = Path(arrays.section(PAIR, tmp_path, TEST)["path"])
    whole = path.read_bytes()
    for harm in (whole[: len(whole) // 2], whole.replace(BYTES[3].tobytes(), BYTES[4].tobytes())):
        assert harm != whole
        path.write_bytes(harm)
        arrays.section(PAIR, tmp_path, TEST)
        assert path.read_bytes() == whole
    assert path.stat().st_size < 12 * 5 * 4 * 3 + 12 * 8 + 2000, "a byte per value, and the labels"


def test_the_fingerprint_is_that_of_an_npz_by_hand(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "mine.npz", train_images=PAIR[0], train_labels=PAIR[1], test_images=TEST[0], test_labels=TEST[1],
        class_names=["0", "1", "2"],
    )  # fmt: skip
    by_hand = read({"source": "npz", "path": str(tmp_path / "mine.npz")})
    assert fingerprint(read(arrays.section(PAIR, tmp_path, TEST))) == fingerprint(by_hand)


def test_texts_keep_their_order_and_the_classes_theirs(tmp_path: Path, tokenizer_folder: str) -> None:
    section = arrays.section((["a b", "c", "d e"], [10, 2, 2]), tmp_path, (["a", "b c"], [2, 10]))
    source = configs.build("sources", configs.expand("sources", section, "data"))
    dataset = door.taken(source, "data", tokenizer_folder, False)
    assert dataset.class_names == ("2", "10")
    assert dataset.train.labels.tolist() == [1, 0, 0] and dataset.test.labels.tolist() == [0, 1]
    assert [len(row) for row in dataset.train.inputs["input_ids"]] == [4, 4, 4]
    assert dataset.notes == ("labels are 2 different numbers between 2 and 10: each is a class",)
    again = arrays.section((["a b", "c", "d e"], [10, 2, 2]), tmp_path, (["a", "b c"], [2, 10]))
    assert again == section


@pytest.mark.parametrize(
    ("data", "more", "said"),
    [
        ("images", {}, "data must be (images, labels) or (texts, labels), got str"),
        (BYTES, {}, "data must be (images, labels) or (texts, labels), got ndarray of shape (12, 5, 4, 3)"),
        ((BYTES, LABELS[:-1]), {}, "data: 12 images or texts for 11 labels"),
        ((BYTES, LABELS), {"test": (BYTES, LABELS[:1])}, "test: 12 images or texts for 1 labels"),
        ((BYTES[:0], LABELS[:0]), {}, "data: labels: there are none"),
        ((object(), LABELS), {}, "images must be an array and texts a list of strings"),
        ((BYTES, 3), {}, "data: labels must be a list or an array with one for each sample, got int"),
        ((BYTES, LABELS[:, None]), {}, "data: labels must have shape (12,), got (12, 1): use .reshape(-1)"),
        ((BYTES, np.eye(3)[LABELS]), {}, "use .argmax(axis=1), if they are one-hot"),
        ((BYTES, LABELS + 0.0), {}, "data: labels must be integers or strings, got float64"),
        ((BYTES, np.where(LABELS == 1, np.nan, 0.0)), {}, "data: labels: none at position 1 (NaN)"),
        ((BYTES, ["a", None, "b"] * 4), {}, "data: labels: none at position 1 (None)"),
        ((BYTES, ["a", 1, "b"] * 4), {}, "data: labels must be of one kind, but some are integers and some are strings"),
        ((BYTES, LABELS - 1), {}, "data: labels must not be negative, got -1 at position 0"),
        ((BYTES, LABELS), {"test": (BYTES, LABELS.astype(str))}, "must be of one kind"),
        ((BYTES, LABELS), {"class_names": ["a", "b"]}, "data: labels must be in 0..1, got 2 at position 2"),
        ((BYTES, LABELS), {"class_names": "ab"}, "class_names must be a list of strings"),
        ((BYTES, ["cat", "catt", "dog"] * 4), {"class_names": ["cat", "dog"]}, "label 'catt' at position 1 is not in class_names "
         "(4 samples have such labels). Did you mean 'cat'?"),
        ((BYTES[..., :2], LABELS), {}, "data: images must have shape (N, H, W), (N, H, W, C) or (N, C, H, W)"),
        ((BYTES[:, :3, :, :3], LABELS), {}, "may have their channels first or last"),
        (([BYTES[0], BYTES[0, :2]] * 6, LABELS), {}, "data: images must have one size"),
        ((np.where(BYTES[5, 0, 0, 0] == BYTES, np.nan, BYTES), LABELS), {}, "images hold NaN or infinite values, the first at"),
        ((BYTES / 255 - 0.5, LABELS), {}, "uint8 in 0..255, got float64 from -0.5 to 0.5: if they stand for -1..1, convert"),
        ((BYTES.astype(np.int32) * 99, LABELS), {}, "must be uint8 in 0..255, got int32 from 0 to 25245"),
        ((BYTES, LABELS), {"test": (BYTES / 255, LABELS)}, "must be of one type, got data uint8 and test float64"),
        ((["a", 3.5] * 6, LABELS), {}, "data: text 1 must be a string, got float"),
        ((["a"] * 12, LABELS), {"test": (BYTES, LABELS)}, "data and test must be of one kind"),
        ((BYTES[:3], LABELS[:3]), {}, "no class has two samples"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(data: Any, more: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^[^\n]*$") as error:
        arrays.section(data, tmp_path, **more)
    assert said in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0, 1, -0.5, "half"])
def test_a_share_that_is_none(share: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="test_share must be between 0 and 1"):
        arrays.section((BYTES, LABELS), tmp_path, test_share=share)


def test_a_class_that_is_tested_only_is_refused_by_name(tmp_path: Path) -> None:
    from fedsim.core.config import StreamConfig
    from fedsim.data import streams

    dataset = read(arrays.section((BYTES[:6], [0, 1] * 3), tmp_path, (BYTES[6:9], [0, 1, 5])))
    with pytest.raises(DataError, match="class '5' of the test samples: there are no training samples to learn from"):
        streams.build(StreamConfig(tasks=1), dataset, 0)
