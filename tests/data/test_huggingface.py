"""Data of the `datasets` library as people have them: images of every mode, parquet by pandas, labels with holes, no network."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fedsim.core import hub
from fedsim.core.config import ModelConfig, SimConfig
from fedsim.core.contracts import Dataset
from fedsim.core.errors import DataError, FedsimError
from fedsim.data import door, tokenise
from fedsim.data import manifest as manifests
from fedsim.data.sources.huggingface import Source
from fedsim.models import backbone

pytestmark = pytest.mark.usefixtures("local_datasets")
IID = {"name": "iid", "clients": 2}
RAMP = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17  # 0, 17, ..., 255


def png(image: Any) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, "PNG")
    return buffer.getvalue()


def frames(tmp_path: Path, train: dict[str, Any], test: dict[str, Any] | None = None) -> dict[str, str]:
    """Parquet files as pandas writes them; the test is the training's unless given."""
    files = {}
    for split, columns in (("train", train), ("test", train if test is None else test)):
        files[split] = str(tmp_path / f"{split}.parquet")
        pd.DataFrame(columns).to_parquet(files[split])
    return files


def of_images(tmp_path: Path, images: Sequence[Any], **options: Any) -> Dataset:
    """One class per image."""
    columns = {"image": [png(i) for i in images], "label": [f"c{n}" for n in range(len(images))]}
    return Source("parquet", data_files=frames(tmp_path, columns), **options).load()


# ---------------------------------------------------------------- images by their mode


def test_sixteen_bits_are_scaled_and_grey_stays_grey(tmp_path: Path) -> None:
    ramp = RAMP.astype(np.uint16) * 257  # 0..65535
    dataset = of_images(tmp_path, [ramp, np.full((4, 4), 4095, np.uint16)])
    pixels = dataset.train.inputs["pixel_values"]
    assert pixels.shape == (2, 4, 4)
    assert np.array_equal(pixels[0], RAMP)
    assert (pixels[0] == 255).mean() == 1 / 16, "the share of white pixels stays as it is"
    assert set(pixels[1].ravel().tolist()) == {round(4095 / 65535 * 255)}
    assert dataset.notes == (
        "4 images of parquet: 16 bits scaled to 8, 65535 becomes 255 (the largest value is 65535)",
    )  # of both splits


def test_every_mode_of_grey_stays_grey_and_colour_stays_colour(tmp_path: Path) -> None:
    grey = Image.fromarray(RAMP)
    palette = grey.convert("P")
    two = grey.point(lambda v: 255 * (v > 100)).convert("1")
    opaque = Image.merge("LA", [grey, Image.new("L", (4, 4), 255)])
    dataset = of_images(tmp_path, [grey, palette, two, opaque])
    pixels = dataset.train.inputs["pixel_values"]
    assert pixels.shape == (4, 4, 4)
    for i, expected in enumerate((RAMP, RAMP, 255 * (RAMP > 100), RAMP)):
        assert np.array_equal(pixels[i], expected), i
    assert dataset.notes == (), "nothing is lost"
    coloured = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3)).astype(np.uint8))
    web = coloured.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    pixels = of_images(tmp_path, [coloured, coloured.convert("RGBA"), web]).train.inputs["pixel_values"]
    assert pixels.shape == (3, 4, 4, 3)
    assert all(np.array_equal(p, np.asarray(coloured)) for p in pixels)


def test_ink_in_the_alpha_channel_is_seen(tmp_path: Path) -> None:
    zero = Image.new("L", (4, 4), 0)
    ink = Image.merge("RGBA", [zero, zero, zero, Image.fromarray(RAMP)])
    dataset = of_images(tmp_path, [ink])
    assert np.abs(dataset.train.inputs["pixel_values"][0, :, :, 0].astype(int) - (255 - RAMP)).max() <= 1
    assert dataset.notes == ("2 images of parquet: transparent pixels laid on white",)
    with pytest.raises(DataError, match=r"image of sample 0 vanishes on black: set data.background to white"):
        of_images(tmp_path, [ink], background="black")
    white = Image.merge("LA", [Image.new("L", (4, 4), 255), Image.fromarray(RAMP)])
    with pytest.raises(DataError, match=r"image of sample 0 vanishes on white: set data.background to black"):
        of_images(tmp_path, [white])
    pixels = of_images(tmp_path, [white], background="black").train.inputs["pixel_values"]
    assert pixels.shape == (1, 4, 4)
    assert np.abs(pixels[0].astype(int) - RAMP).max() <= 1
    palette = Image.fromarray(RAMP // 17, "P")
    palette.putpalette([v for i in range(16) for v in (i, 2 * i, 3 * i)] + [0] * 720)
    palette.info["transparency"] = 3
    pixels = of_images(tmp_path, [palette]).train.inputs["pixel_values"]
    assert pixels[0].reshape(16, 3)[3].tolist() == [255, 255, 255], "a palette's transparent colour too"
    assert pixels[0].reshape(16, 3)[5].tolist() == [5, 10, 15]


def test_only_the_first_frame_is_taken(tmp_path: Path) -> None:
    film = io.BytesIO()
    frames_of = [Image.fromarray(RAMP), Image.fromarray(RAMP.T.copy())]
    frames_of[0].save(film, "TIFF", save_all=True, append_images=frames_of[1:])
    dataset = Source("parquet", data_files=frames(tmp_path, {"image": [film.getvalue()] * 2, "label": ["a", "b"]})).load()
    assert np.array_equal(dataset.train.inputs["pixel_values"][0], RAMP)
    assert dataset.notes == ("4 images of parquet: more than one frame, of which the first is taken",)


def test_images_that_cannot_be_decoded(tmp_path: Path) -> None:
    real = io.BytesIO()
    Image.fromarray(RAMP.astype(np.float32)).save(real, "TIFF")
    for content, message in (
        (real.getvalue(), "image of sample 1 holds real numbers, whose white nobody knows"),
        (b"no image at all", "image of sample 1 cannot be decoded: cannot identify image file"),
        (png(RAMP)[:40], "image of sample 1 cannot be decoded: "),
        (None, "image of sample 1 "),
    ):
        files = frames(tmp_path, {"image": [png(RAMP), content], "label": ["a", "b"]})
        with pytest.raises(DataError) as error:
            Source("parquet", data_files=files).load()
        assert message in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["bytes", "struct", "struct and path", "lists", "path"])
def test_parquet_that_pandas_wrote(form: str, tmp_path: Path) -> None:
    (tmp_path / "i.png").write_bytes(png(RAMP))
    value = {
        "bytes": png(RAMP),
        "struct": {"bytes": png(RAMP)},
        "struct and path": {"bytes": png(RAMP), "path": "elsewhere.png"},
        "lists": RAMP.tolist(),
        "path": {"bytes": None, "path": str(tmp_path / "i.png")},
    }[form]
    files = frames(tmp_path, {"image": [value] * 4, "label": [0, 1, 0, 1]})
    dataset = Source("parquet", data_files=files, image_key="image" if form == "lists" else None).load()
    assert np.array_equal(dataset.train.inputs["pixel_values"], np.stack([RAMP] * 4))
    assert dataset.class_names == ("0", "1")


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    files = frames(tmp_path, {"image": [png(RAMP)] * 2, "label": ["a", "b"]}, {"image": [], "label": []})
    with pytest.raises(DataError, match=r"cannot load split 'train' of parquet: .*test.parquet is empty, it holds no rows$"):
        Source("parquet", data_files=files).load()
    Path(files["test"]).write_bytes(b"")
    with pytest.raises(DataError, match=r"test.parquet is empty, it holds no rows$"):
        Source("parquet", data_files=files).load()
    with pytest.raises(DataError, match=r"'train\[:0\]' of parquet: .* corresponds to no data"):
        Source("parquet", data_files={"train": files["train"]}, train_split="train[:0]", test_split="train").load()


# ---------------------------------------------------------------- labels


def labelled(tmp_path: Path, train: Sequence[Any], test: Sequence[Any], **options: Any) -> Source:
    columns = [{"image": [png(RAMP)] * len(labels), "label": list(labels)} for labels in (train, test)]
    return Source("parquet", data_files=frames(tmp_path, *columns), **options)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([0, 1, -1, 1, 0], ("0", "1")),
        ([0, 1, None, 1, 0], ("0", "1")),
        (["a", "b", None, "b", "a"], ("a", "b")),
        (["a", "b", " ", "b", "a"], ("a", "b")),
    ],
)
def test_samples_without_a_label(labels: list[Any], names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        labelled(tmp_path, labels, labels[:2]).load()
    assert str(error.value) == (
        "1 of 5 samples of split 'train' of parquet have no label in column 'label' (null, empty or -1; the first is sample 2): "
        "set data.drop_unlabelled to true to leave them out (where -1 is a class: write labels as strings)"
    )
    dataset = labelled(tmp_path, labels, labels[:2], drop_unlabelled=True).load()
    assert (dataset.class_names, dataset.train.labels.tolist()) == (names, [0, 1, 1, 0])
    assert dataset.train.inputs["pixel_values"].shape == (4, 4, 4)
    assert dataset.notes == ("1 of 5 samples of split 'train' of parquet have no label and are left out",)
    with pytest.raises(
        DataError, match=r"3 of 3 samples of split 'test' .* have no label in column 'label': choose another split"
    ):
        labelled(tmp_path, ["a", "b"], ["", "", ""], drop_unlabelled=True).load()


def test_class_labels_with_holes(tmp_path: Path, local_datasets: Any) -> None:
    files = {}
    names = local_datasets.ClassLabel(names=["yes", "no", "unsure"])
    for split, labels in (("train", [0, -1, 1, None]), ("test", [0, 1])):
        features = local_datasets.Features({"image": local_datasets.Image(), "label": names})
        rows = {"image": [Image.fromarray(RAMP)] * len(labels), "label": labels}
        files[split] = str(tmp_path / f"{split}.parquet")
        local_datasets.Dataset.from_dict(rows, features=features).to_parquet(files[split])
    with pytest.raises(DataError, match=r"2 of 4 samples of split 'train'"):
        Source("parquet", data_files=files).load()
    dataset = Source("parquet", data_files=files, drop_unlabelled=True).load()
    assert dataset.class_names == ("yes", "no", "unsure")
    assert dataset.train.labels.tolist() == dataset.test.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0], [1]], "column 'label' must hold class labels, strings or integers, and sample 0 is '[0]': lists"),
        ([{"x": 1}, {"x": 2}], "strings or integers, and sample 0 is \"{'x': 1}\": dicts"),
        ([0.5, 1.0], "strings or integers, and sample 0 is '0.5': floats"),
    ],
)
def test_labels_of_another_kind(labels: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        labelled(tmp_path, labels, labels).load()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_labels_of_two_splits_are_one_set(tmp_path: Path, make_config: Callable[..., SimConfig]) -> None:
    def prepared(train: Sequence[Any], test: Sequence[Any]) -> tuple[manifests.Manifest, tuple[str, ...]]:
        source = labelled(tmp_path, train, test)
        config = make_config({"source": "huggingface", "path": "parquet", "data_files": source.data_files}, {"tasks": 1}, IID)
        dataset = door.load(config)
        split = manifests.make(config, dataset)
        return split, door.notes(dataset, split)

    split, notes = prepared([1, 2, 10] * 2, [1.0, 10.0, None][:2])
    assert (split.class_names, notes) == (
        ("1", "2", "10"),
        ("class '2': training samples but no test samples, learned and never tested",),
    )
    with pytest.raises(DataError, match=r"classes 'cat', 'cat ' differ in blanks only: make them one"):
        prepared(["cat", "dog"] * 2, ["cat ", "dog"])
    with pytest.raises(DataError, match=r"class 'cow' of the test samples: there are no training samples"):
        prepared(["cat", "dog"] * 2, ["cat", "cow"])


def test_samples_are_counted_per_class_and_domain(tmp_path: Path, make_config: Callable[..., SimConfig]) -> None:
    columns = {"image": [png(RAMP)] * 12, "label": ["a", "b"] * 6, "site": ["sea"] * 8 + ["land"] * 4}
    data = {"source": "huggingface", "path": "parquet", "data_files": frames(tmp_path, columns), "domain_key": "site",
            "train_per_class": 2}  # fmt: skip
    train = door.load(make_config(data, {"name": "domain_incremental", "tasks": None}, IID)).train
    assert train.domains is not None
    assert sorted(zip(train.labels.tolist(), train.domains.tolist(), strict=True)) == sorted([(0, 0), (0, 1), (1, 0), (1, 1)] * 2)
    assert len(door.load(make_config(data, {"tasks": 2}, IID)).train) == 4
    columns["site"][3] = None
    data["data_files"] = frames(tmp_path, columns)
    with pytest.raises(DataError, match=r"parquet: column 'site' holds nothing at sample 3"):
        door.load(make_config(data, {"tasks": 2}, IID))


def test_a_path_of_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., SimConfig]) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    frames(tmp_path, {"image": [png(RAMP)] * 2, "label": ["a", "b"]})
    files = {"train": "~/train.parquet", "test": ["~/test.parquet"]}
    assert len(door.load(make_config({"source": "huggingface", "path": "parquet", "data_files": files}, {}, IID)).train) == 2


# ---------------------------------------------------------------- a hub that cannot be reached


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, local_datasets: Any) -> Any:
    """The hub's client as if it were online, at an address where nobody answers."""
    from huggingface_hub import constants

    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(local_datasets.config, "HF_HUB_OFFLINE", False)
    return constants


def test_a_hub_that_cannot_be_reached_is_said_at_once(no_hub: Any, local_datasets: Any) -> None:
    start = time.monotonic()
    asked: tuple[Callable[[], Any], ...] = (
        lambda: Source("nobody/has-this").load(),
        lambda: tokenise.tokenise([["a"]], "nobody/has-this", 8),
        lambda: backbone.load(ModelConfig(backbone="nobody/has-this", config=None)),
    )
    for ask in asked:
        with pytest.raises(FedsimError, match=r"127.0.0.1 cannot be reached: Connection refused") as error:
            ask()
        assert "\n" not in str(error.value)
    assert time.monotonic() - start < 15, "each took half a minute"
    assert not no_hub.HF_HUB_OFFLINE, "the switch is as it was"
    assert not local_datasets.config.HF_HUB_OFFLINE


def test_a_name_that_is_looked_up_for_ever(no_hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = threading.Event()

    def connect(*args: Any, **options: Any) -> None:
        found.wait()
        raise OSError("found at last")

    monkeypatch.setattr(hub, "WAIT", 0.05)
    monkeypatch.setattr(socket, "create_connection", connect)
    with hub.reached() as why:
        assert why == "127.0.0.1 cannot be reached: no answer within 0.05 s"
        assert no_hub.is_offline_mode()
    found.set()


def test_a_hub_or_a_proxy_that_answers(no_hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "")
        with hub.reached() as why:
            assert why == ""
            assert not no_hub.is_offline_mode()
