"""`load_model` and `fedsim predict`: inputs are read as in the run, and what they become is what the run's evaluation says."""

from __future__ import annotations

import csv
import dataclasses
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedsim import load_model
from fedsim.cli import main
from fedsim.core import config as configs
from fedsim.core.config import SimConfig
from fedsim.core.errors import ConfigError, FedsimError
from fedsim.core.messages import EvalJob
from fedsim.exports.inputs import Reader
from fedsim.exports.write import export
from fedsim.finished import OpenedRun
from fedsim.simulation import run
from tests.export.taking import loaded, same
from tests.test_texts import t5, texts
from tests.tiny import plain_vit, tiny


def config(*overrides: str, **sections: Any) -> SimConfig:
    return tiny("server.rounds=1", *overrides, **{"model": plain_vit(), **sections})


def finished(folder: Path, made: SimConfig) -> Path:
    path = run(made, output=folder).path
    assert path is not None
    return path


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose prompts are no change of weights: predicting needs none."""
    prefix = {"name": "prefix", "length": 2}
    words = ("server.keep=tasks", "server.aggregator=fedavg", "server.consolidator=mean", "model.pooling=mean", "client.lr=0.1")
    return finished(tmp_path_factory.mktemp("seeing") / "run", config(*words, adapter=prefix))


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reading")
    with torch.random.fork_rng(devices=[]):
        t5(folder / "t5")
    texts(folder / "texts.json")
    data = {"source": "text", "path": str(folder / "texts.json"), "max_length": 7}
    return finished(folder / "run", config(data=data, model={"backbone": str(folder / "t5"), "config": None}))


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, np.ndarray[Any, Any]]:
    """Grey images in folders, one saved with colours that are all the same, one of another size."""
    folder, pixels = tmp_path / "images", np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    (folder / "deep").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.bmp", "deep/c.png")):
        Image.fromarray(pixels[i]).convert("RGB" if i == 1 else "L").save(folder / name)
    Image.fromarray(np.repeat(np.repeat(pixels[3], 2, 0), 2, 1)).save(folder / "large.PNG")
    (folder / "notes.txt").write_text("not an image")
    return folder, pixels


def predicted(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, str]]:
    assert main(["predict", *map(str, words)]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_it_knows_what_the_run_counted(seeing: Path) -> None:
    """On the test split, by sample, after every task."""
    opened = OpenedRun(seeing)
    spec = opened.parts.spec
    for after in opened.tasks:
        model = load_model(seeing, after)
        positions, labels = spec.test_of(after), spec.test.labels[spec.test_of(after)]
        pixels = spec.test.inputs["pixel_values"][positions]
        found = opened.worker.evaluate(EvalJob(after, 0, len(positions), opened.deployed_after(after), model.rows))
        names = [opened.manifest.class_names[label] for label in labels]
        right = [a == b for a, b in zip(model.predict(pixels), names, strict=True)]
        told = [a == b for a, b in zip(model.predict(pixels, task=after), names, strict=True)]
        assert (sum(right), sum(told)) == (found.correct, found.correct_in_task)
        assert model.classes == opened.manifest.class_names[: 3 * (after + 1)]
        assert model.logits(pixels).shape == (len(pixels), len(model.classes))
        same(model.logits([*pixels]), model.logits(torch.from_numpy(pixels)))


def test_the_same_image_however_it_comes(seeing: Path, pictures: tuple[Path, np.ndarray[Any, Any]]) -> None:
    folder, pixels = pictures
    model = load_model(seeing)
    want = model.logits(pixels[:3])
    same(model.logits(pixels[:3, :, :, None]), want)
    same(model.logits([folder / "a.png", str(folder / "b.bmp"), Image.open(folder / "deep/c.png")]), want)
    both = model.logits([pixels[0], Image.open(folder / "large.PNG"), pixels[2]])
    same(both[[0, 2]], want[[0, 2]])
    same(both[1:], model.logits([folder / "large.PNG", pixels[2]]))


def test_images_are_read_as_the_source_reads_them(seeing: Path, tmp_path: Path) -> None:
    """Turned as the camera says, cut to `data.image_size`, transparency on `data.background`: as of Hugging Face's data sets."""
    model, pixels = load_model(seeing), np.random.default_rng(1).integers(0, 256, (8, 8), dtype=np.uint8)
    turned, exif = tmp_path / "turned.png", Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pixels)).save(turned, exif=exif)
    assert np.array_equal(model.reader.image(turned), pixels)
    wide = Image.fromarray(np.concatenate([pixels, pixels], axis=1))
    clear = Image.new("LA", wide.size, (0, 0))
    clear.paste(Image.merge("LA", [wide, wide.point(lambda v: 255 * (v > 100))]))
    clear.save(tmp_path / "clear.png")
    data = {"source": "huggingface", "path": "x", "image_size": 8, "background": "black", "max_length": 64}
    reader = Reader(dataclasses.replace(model.config, data=data), model.model.backbone)
    middle = np.concatenate([pixels, pixels], axis=1)[:, 4:12]
    assert np.array_equal(reader.image(tmp_path / "clear.png"), np.where(middle > 100, middle, 0))
    assert model.reader.image(tmp_path / "clear.png").shape == (8, 16), "other sources cut nothing"


def test_top_and_probabilities(seeing: Path, pictures: tuple[Path, np.ndarray[Any, Any]]) -> None:
    model, pixels = load_model(seeing), pictures[1]
    p = model.probabilities(pixels)
    torch.testing.assert_close(p.sum(dim=1), torch.ones(4))
    for guesses, row in zip(model.top(pixels, 2), p, strict=True):
        assert [name for name, _ in guesses] == [model.classes[c] for c in row.argsort(descending=True)[:2]]
        np.testing.assert_allclose([value for _, value in guesses], row.sort(descending=True).values[:2])
    assert {name for guesses in model.top(pixels, 9, task=1) for name, _ in guesses} == set(model.tasks[1])
    assert "classes: 6 (" in repr(model) and "prefix" in repr(model) and "average accuracy: " in repr(model)
    with pytest.raises(ConfigError, match="task 2 is none that the model has learned: it knows tasks 0 to 1"):
        model.predict(pixels, task=2)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        model.top(pixels, 0)


def test_a_table_of_images(
    seeing: Path, pictures: tuple[Path, np.ndarray[Any, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, pixels = pictures
    model = load_model(seeing)
    rows = predicted(capsys, seeing, "--images", folder, "--top", 2)
    assert [r["file"] for r in rows] == ["a.png", "b.bmp", "deep/c.png", "large.PNG"]
    assert list(rows[0]) == ["file", "class_1", "probability_1", "class_2", "probability_2"]
    assert [r["class_1"] for r in rows[:3]] == model.predict(pixels[:3])
    np.testing.assert_allclose([float(r["probability_1"]) for r in rows[:3]], model.probabilities(pixels[:3]).amax(1), atol=1e-6)
    rows = predicted(capsys, seeing, "--images", folder, "--task", 1)
    assert {r[f"class_{i}"] for r in rows for i in (1, 2, 3)} == set(model.tasks[1]) and "class_4" not in rows[0]
    rows = predicted(capsys, seeing, "--images", folder, "--after-task", 0)
    assert {r["class_1"] for r in rows} <= set(model.tasks[0])
    assert main(["predict", str(seeing), "--images", str(folder), "--output", str(tmp_path / "out.csv")]) == 0
    assert not capsys.readouterr().out
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 5


def test_a_table_of_texts_and_the_tokenizer_that_goes_along(
    reading: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes(b"the of apple\r\n\r\nbread and and and is is of of the the\n   \nflame\n")
    model = load_model(reading)
    rows = predicted(capsys, reading, "--text", file, "--top", 1)
    assert [r["line"] for r in rows] == ["1", "3", "5"]
    lines = ["the of apple", "bread and and and is is of of the the", "flame"]
    assert [r["class_1"] for r in rows] == model.predict(lines)
    cut = model.logits([lines[1], " ".join(lines[1].split()[:7])])
    assert torch.equal(cut[0], cut[1]), "cut at data.max_length"
    from transformers import AutoTokenizer

    for to in ("peft", "merged"):
        folder = export(reading, to, tmp_path / to).folder
        read = AutoTokenizer.from_pretrained(folder)(lines, return_tensors="pt", padding=True, truncation=True, max_length=7)
        inputs = {n: read[n] for n in ("input_ids", "attention_mask")}
        same(loaded(folder)["logits"](**inputs), model.logits(lines))
    same(model.logits(inputs), model.logits(lines))
    assert not (tmp_path / "peft" / "backbone" / "model.safetensors").exists(), "the folder that it came from stands for it"


def test_the_data_are_not_needed(reading: Path, tmp_path: Path) -> None:
    want = load_model(reading).logits(["the apple", "flame of"])
    data = Path(configs.load(reading / "config.yaml", begun=True).data["path"])
    moved = shutil.move(data, tmp_path / "elsewhere.json")
    try:
        same(load_model(reading).logits(["the apple", "flame of"]), want)
    finally:
        shutil.move(moved, data)


def test_bad_input_is_one_line(
    seeing: Path, reading: Path, pictures: tuple[Path, np.ndarray[Any, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, pixels = pictures
    for name in ("cut", "coloured", "empty", "scans"):
        (tmp_path / name).mkdir()
    (tmp_path / "cut" / "x.png").write_bytes((folder / "a.png").read_bytes()[:60])
    Image.fromarray(np.stack([pixels[0], pixels[1], pixels[2]], axis=-1)).save(tmp_path / "coloured" / "x.png")
    (tmp_path / "scans" / "x.pdf.txt").write_text("x")
    latin, blank = tmp_path / "latin.txt", tmp_path / "blank.txt"
    latin.write_bytes("é".encode("latin-1"))
    blank.write_text("\n \n")
    text, see, read = tmp_path / "one.txt", str(seeing), str(reading)
    text.write_text("flame\n")
    for words, says in (
        ([see, "--images", tmp_path / "cut"], r"cut/x.png cannot be read as an image: "),
        ([see, "--images", tmp_path / "coloured"], "coloured/x.png has colours, but the model takes grey images"),
        ([see, "--images", tmp_path / "empty"], "empty holds no image files (it is empty)"),
        ([see, "--images", tmp_path / "scans"], "scans holds no image files (x.pdf.txt)"),
        ([see, "--images", tmp_path / "none"], "none is not there: --images takes a folder"),
        ([see, "--images", text], "one.txt is a file: --images takes a folder"),
        ([see, "--text", text], "the model reads images ("),
        ([read, "--images", folder], "the model reads texts ("),
        ([read, "--text", latin], "latin.txt cannot be read as text: it is not UTF-8"),
        ([read, "--text", blank], "blank.txt holds no text: write one text on every line"),
        ([read, "--text", tmp_path / "none"], "cannot be read as text: No such file"),
        ([see, "--images", folder, "--task", "7"], "task 7 is none that the model has learned: it knows tasks 0 to 1"),
        ([see, "--images", folder, "--task", "1", "--after-task", "0"], "task 1 is none that the model has learned"),
        ([see, "--images", folder, "--after-task", "9"], "task 9 is not in the run, which has tasks 0 to 1"),
        ([read, "--text", text, "--after-task", "0"], "run it again with server.keep=tasks"),
        ([see, "--images", folder, "--top", "0"], "at least 1, got 0"),
        ([str(tmp_path), "--images", folder], "is no run directory"),
    ):  # fmt: skip
        assert main(["predict", *map(str, words)]) == 2, words
        told = capsys.readouterr()
        assert says in told.err and told.err.count("\n") == 1 and not told.out, told
    model = load_model(seeing)
    for inputs, says in (
        (pixels / 255, "must be uint8 in 0..255, got float64 from 0"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"put the channels last with .transpose\(0, 2, 3, 1\)"),
        (np.zeros((2, 8, 8, 4), np.uint8), "the last channel is transparency"),
        (["no-such.png"], "no-such.png cannot be read as an image"),
        ([7], "image 0 is a int: give arrays, Pillow's images or paths"),
        ("one.png", "put it in a list"),
        ([], "there are no inputs"),
        ({"input_ids": np.ones((1, 3), np.int64)}, "the model reads images"),
    ):
        with pytest.raises(FedsimError, match=says):
            model.predict(inputs)
    with pytest.raises(FedsimError, match="text 1 is a int, not a string"):
        load_model(reading).predict(["flame", 3])
