"""Presets of papers' protocols: each is found by name, says what the protocol says, and is prepared on an encoder of the real
width and a few samples in the format that a user has. Published figures have sources; the page is what they say."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from experiments.reproduction import page
from fedsim import cli
from fedsim.core import config as configs
from fedsim.core import presets

CLASSES = {"cifar100_vit": 100, "imagenet_r_vit": 200, "eurosat_vit": 10, "cub_vit": 200, "cars_vit": 196, "clinc150_t5": 150}
FOLDERS = {"imagenet_r_vit": "IMAGENET_R", "eurosat_vit": "EUROSAT", "cub_vit": "CUB", "cars_vit": "CARS"}
EASY = "partition.alpha=100"  # so few samples leave no room for more


# ---------------------------------------------------------------- what the presets say


@pytest.mark.parametrize("method", ["paper_lorm", "paper_lora", "paper_full"])
@pytest.mark.parametrize("stream", CLASSES)
def test_the_protocol(stream: str, method: str) -> None:
    config = configs.load([stream, method])
    assert (config.partition["clients"], config.partition["min_samples"], config.server.participation) == (10, 6, 1.0)
    assert (config.server.rounds, config.client.epochs, config.client.batch_size) == (5, 5, 16)
    assert (config.client.optimizer, config.client.lr, config.client.groups) == ("adamw", 3e-4, [])
    assert config.adapter["name"] == ("full" if method == "paper_full" else "lora")
    assert config.adapter.get("rank", 16) == 16
    assert config.model.backbone in ("google/vit-base-patch16-224-in21k", "google-t5/t5-small")
    assert config.name == f"{stream}-{method}"
    assert config.partition["alpha"] in page.PROTOCOLS[stream].betas


def test_every_preset_is_in_the_page_or_a_method() -> None:
    assert set(presets.names(presets.REPRODUCTION)) == {*page.PROTOCOLS, *page.METHODS} - {"joint"}
    assert set(CLASSES) == set(page.PROTOCOLS)


# ---------------------------------------------------------------- prepared


def png(seed: int, side: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def folder_of_images(root: Path, classes: int) -> Path:
    """train/<class>/ and test/<class>/, eight samples a client and task."""
    for split, each in (("train", 80 * 5 // classes), ("test", 1)):
        for c in range(classes):
            (root / split / f"class{c:03d}").mkdir(parents=True)
            for i in range(each):
                (root / split / f"class{c:03d}" / f"{i}.png").write_bytes(png(c))
    return root


def tables(folder: Path, columns: dict[str, int], each: int, classes: int) -> str:
    """The override that reads parquet files in the place of the preset's data. columns: of labels, class // what is told."""
    files = {}
    for split, samples in (("train", each), ("test", 1)):
        files[split] = folder / f"{split}.parquet"
        labels = [c for c in range(classes) for _ in range(samples)]
        image = "img" if "fine_label" in columns else "image"
        rows = [{image: {"bytes": png(c)}, **{name: c // part for name, part in columns.items()}} for c in labels]
        pd.DataFrame(rows).to_parquet(files[split])
    return f"data.data_files={{{', '.join(f'{split}: {path}' for split, path in files.items())}}}"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block of ViT-B/16: its width, heads, patches and positions."""
    from transformers import ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("vit")
    with torch.random.fork_rng(devices=[]):
        ViTModel(ViTConfig(num_hidden_layers=1), add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block of T5-small's encoder, and a tokenizer of few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    with torch.random.fork_rng(devices=[]):
        T5EncoderModel(T5Config(num_layers=1, vocab_size=200)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, **{f"w{i}": i + 2 for i in range(150)}}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return folder


def prepared(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main(["run", *words, EASY, "runtime.pool=serial", "--dry-run", "--debug"]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("local_datasets")
@pytest.mark.parametrize("method", ["paper_lorm", "paper_lora", "paper_full"])
def test_cifar100_is_prepared(
    method: str, vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the hub's columns: the coarse label must not be taken for the class."""
    monkeypatch.setenv("FEDSIM_VIT", str(vit))
    files = tables(tmp_path, {"fine_label": 1, "coarse_label": 5}, 8, 100)
    told = prepared(["cifar100_vit", method, "data.path=parquet", files], capsys)
    assert "10 tasks of 100 classes, 800 samples to train on, 100 to test" in told
    head = 100 * 768 + 100
    block = 2 * 16 * (4 * 768 + 768 + 3072)  # rank 16: q, k, v, o are 768 to 768, and two layers between 768 and 3072
    if method != "paper_full":
        assert f"module and head of {block + head:,}," in told
    assert list(tmp_path.glob("runs")) == []


@pytest.mark.usefixtures("local_datasets")
def test_folders_of_images_are_prepared(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDSIM_VIT", str(vit))
    monkeypatch.setenv("FEDSIM_EUROSAT", str(folder_of_images(tmp_path / "data", 10)))
    assert "5 tasks of 10 classes, 400 samples" in prepared(["eurosat_vit", "paper_lorm"], capsys)
    own = configs.load(["eurosat_vit", "paper_lorm"]).data  # the others read the same, from folders of their own
    for stream, name in FOLDERS.items():
        monkeypatch.setenv(f"FEDSIM_{name}", f"/{name}")
        data = configs.load([stream, "paper_lorm"]).data
        assert data == {**own, "data_dir": f"/{name}", "image_size": data["image_size"]}


@pytest.mark.usefixtures("local_datasets")
@pytest.mark.parametrize("stream", ["imagenet_r_vit", "cub_vit", "cars_vit"])
def test_many_classes_are_prepared(
    stream: str, vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From tables in the place of folders, which take their time."""
    monkeypatch.setenv("FEDSIM_VIT", str(vit))
    classes = CLASSES[stream]
    words = [tables(tmp_path, {"label": 1}, 5, classes), "data.path=parquet", "data.data_dir=null", "data.image_size=32"]
    assert f"10 tasks of {classes} classes, {5 * classes:,} samples" in prepared([stream, "paper_lorm", *words], capsys)


def test_cars_has_a_last_task_of_sixteen() -> None:
    from fedsim.core.contracts import ArraySplit, Dataset
    from fedsim.data.streams import build

    split = ArraySplit({"pixel_values": np.zeros((196, 2, 2), np.uint8)}, np.arange(196))
    stream = build(configs.load(["cars_vit", "paper_lorm"]).stream, Dataset(split, split, tuple(map(str, range(196)))), 0)
    assert [len(classes) for classes in stream.task_classes] == [20] * 9 + [16]


def test_clinc150_is_prepared(
    t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the file of its authors, whose other lists are of no use here."""
    texts = [[f"w{c} w{i}", f"intent {c}"] for c in range(150) for i in range(6)]
    content: dict[str, Any] = {"train": texts, "val": texts[:3], "test": texts[::6], "oos_train": [["w1", "oos"]]}
    (tmp_path / "clinc150_data_full.json").write_text(json.dumps(content))
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    monkeypatch.setenv("FEDSIM_T5", str(t5))
    told = prepared(["clinc150_t5", "paper_lorm"], capsys)
    assert "10 tasks of 150 classes, 900 samples to train on, 150 to test" in told


def test_a_dry_run_writes_nothing_and_resumes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "fashion", "ncm", "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert cli.main(["run", "--resume", "runs/x", "--dry-run"]) == 2


# ---------------------------------------------------------------- the page


def test_every_published_figure_has_a_source() -> None:
    figures = page.published()
    assert figures
    for figure in figures:
        assert figure.stream in page.PROTOCOLS and figure.method in page.METHODS
        assert figure.source.strip() and figure.tag.strip()
        assert figure.beta is None or figure.beta in page.PROTOCOLS[figure.stream].betas
        assert 0 < figure.figure < 100
    assert len({(f.stream, f.method, f.beta) for f in figures}) == len(figures)


def test_the_page_is_what_the_figures_say() -> None:
    """As it is committed; and no accuracy stands in it without the number of its source."""
    text = page.TARGET.read_text(encoding="utf-8")
    assert text == page.render()
    told = re.findall(r"(\d\d\.\d\d) \[(\d)\]", text)
    assert sorted(float(figure) for figure, _ in told) == sorted(f.figure for f in page.published())
    rows = [line for line in text.splitlines() if line.startswith("| `fedsim run")]
    assert len(rows) == 24
    assert all("| not run here |" in row for row in rows)
    for row in rows:
        words = row.split("`")[1].split()[2:]
        configs.load([w for w in words if "=" not in w], [w.replace("β", "0.5") for w in words if "=" in w])


def test_operations_of_one_forward() -> None:
    """Products of matrices by hand: N tokens of width d, 4 d in the middle; patches of 16 pixels in three colours."""
    N, d = 197, 768
    block = 4 * N * d * d + 2 * N * N * d + 2 * N * d * 4 * d
    assert page.forward_flops("vit") == 2 * (12 * block + (N - 1) * d * 3 * 16 * 16)
    N, d = 32, 512
    block = 4 * N * d * d + 2 * N * N * d + 2 * N * d * 2048
    assert page.forward_flops("t5") == 2 * 6 * block
