"""`fedsim.run` in the words of a notebook: arrays, a model object, a method by its name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedsim
from fedsim import Results, experiment, load, run
from fedsim.core.errors import ConfigError, DataError, FedsimError, PartitionError
from fedsim.models import backbone
from server import checkpoint
from tests.tiny import VIT, final_state, learned, plain_vit, same_bits, stopping

DRAW = np.random.default_rng(0)
LABELS = np.repeat(np.arange(4), 10)
IMAGES = (DRAW.integers(0, 100, (40, 8, 8)) + 30 * LABELS[:, None, None]).astype(np.uint8)
SMALL: dict[str, Any] = {"tasks": 2, "rounds": 1, "clients": 2, "alpha": 5.0, "client": {"batch_size": 8}}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(**more: Any) -> dict[str, Any]:
    """What a notebook asks for: quick, and by itself."""
    runtime = {"pool": "serial", "device": "cpu", **more.pop("runtime", {})}
    return {"data": (IMAGES, LABELS), "model": plain_vit(), "method": "lorm", **SMALL, "runtime": runtime, **more}


def test_a_run_of_arrays_is_the_run_of_a_file_by_hand(elsewhere: Path) -> None:
    results = run(**asked(test=(IMAGES, LABELS)))
    assert results.path is not None and results.path.parent == elsewhere / "runs"
    assert results.config.name == "lorm" and results.config.partition["alpha"] == 5.0
    np.savez(
        elsewhere / "mine.npz", train_images=IMAGES, train_labels=LABELS, test_images=IMAGES, test_labels=LABELS,
        class_names=list("0123"),
    )  # fmt: skip
    by_hand = run(dataclasses.replace(results.config, data={**results.config.data, "path": str(elsewhere / "mine.npz")}))
    assert by_hand.manifest_hash == results.manifest_hash
    assert by_hand.rows == results.rows
    assert Results.load(results.path).rows == results.rows


def test_a_run_of_arrays_is_known_by_what_they_hold(elsewhere: Path) -> None:
    here = experiment(**asked())
    there = experiment(**asked(runtime={"output": "other"}))
    assert Path(there.data["path"]).parent == elsewhere / "other" / "data"
    assert here.identity() == there.identity()
    changed = IMAGES.copy()
    changed[0, 0, 0] ^= 1
    assert experiment(**asked(data=(changed, LABELS))).identity() != here.identity()
    elsewhere_named = dataclasses.replace(here, data={**here.data, "path": "/some/other.npz"})
    assert elsewhere_named.identity() != here.identity()


def test_a_run_of_arrays_goes_on_where_it_was_stopped_though_they_have_moved(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(**asked(), output="whole")
    monkeypatch.setattr(checkpoint, "save", stopping(after=1))
    with pytest.raises(KeyboardInterrupt):
        run(**asked(), output="part")
    monkeypatch.undo()
    monkeypatch.chdir(elsewhere)
    (elsewhere / "runs" / "data").rename(elsewhere / "moved")
    with pytest.raises(DataError, match=r"have the data moved\? fedsim run --resume .*part data\.path=NEW"):
        run(resume="part")
    config = whole.config
    moved = {**config.data, "path": str(elsewhere / "moved" / Path(config.data["path"]).name)}
    again = run(dataclasses.replace(config, data=moved), resume="part")
    assert again.rows == whole.rows
    states = [final_state(elsewhere / name, config) for name in ("whole", "part")]
    assert same_bits(*map(learned, states))


def test_words_are_the_keys_of_a_config() -> None:
    config = experiment(
        method="lorm", stream="fashion", clients=7, alpha=np.float64(0.3), tasks=5, rounds=2, epochs=3, lr=0.5, seed=4,
        name="mine", adapter={"rank": 3}, client={"batch_size": 5}, overrides=["client.batch_size=6"],
        **{"server.participation": 0.5},
    )  # fmt: skip
    by_keys = load(
        ["fashion", "lorm"],
        ["partition.clients=7", "partition.alpha=0.3", "stream.tasks=5", "server.rounds=2", "client.epochs=3", "client.lr=0.5",
         "seed=4", "name=mine", "adapter.rank=3", "client.batch_size=6", "server.participation=0.5"],
    )  # fmt: skip
    assert config == by_keys


def test_a_method_alone_is_on_the_usual_stream() -> None:
    assert experiment(method="lorm") == load("lorm")
    assert load("lorm", ["partition.alpha=0.1"]) == experiment(method="lorm", alpha=0.1)


def test_a_model_object_is_kept_and_is_the_backbone(elsewhere: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    options = {key: value for key, value in VIT.items() if key != "model_type"}
    model = transformers.ViTModel(transformers.ViTConfig(**options), add_pooling_layer=False).eval()
    config = experiment(**asked(model=model))
    folder = Path(config.model.backbone)
    assert folder.parent == elsewhere / "runs" / "models"
    encoder = backbone.load(config.model)
    images = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        want = model(images).last_hidden_state[:, 0]
        assert torch.allclose(encoder.image_features(images), want, atol=1e-6)
    assert experiment(**asked(model=model)).model == config.model and len(list(folder.parent.iterdir())) == 1
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert experiment(**asked(model=model)).identity() != config.identity()
    moved = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=f"/elsewhere/{folder.name}"))
    assert moved.identity() == config.identity()


def test_a_text_model_with_its_tokenizer() -> None:
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "good", "bad", "film"])}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="[PAD]", unk_token="[UNK]")
    layout = transformers.BertConfig(
        vocab_size=5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    texts, labels = ["good film", "bad film", "good", "bad"] * 5, ["good", "bad"] * 10
    results = run(
        **asked(data=(texts, labels), model=transformers.BertModel(layout), processor=tokenizer, tasks=1, test_share=0.2)
    )
    assert results.finished and "no test data were given: 20% of every class, 4 of 20 samples, are held out" in results.notes


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[Any] = []
    run(**asked(tasks=1, progress=told.append))
    run(**asked(tasks=1, seed=1))
    assert told and capsys.readouterr().out == ""
    run(**asked(tasks=1, seed=2, progress=True))
    assert "[1/1] task 0 round 0: accuracy" in capsys.readouterr().out


def wrong(**more: Any) -> dict[str, Any]:
    return asked(**more)


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (wrong(method="lrom"), ConfigError, "no config file and no preset 'lrom'. Did you mean 'lorm'?"),
        (wrong(method=7), ConfigError, "method and stream must be names of presets or files, got [7]"),
        (wrong(alpha=0), ConfigError, "partition.alpha must be positive, got 0"),
        (wrong(alpha="much"), ConfigError, "partition.alpha"),
        (wrong(alhpa=0.5), ConfigError, "unknown word 'alhpa'. Did you mean 'alpha'?"),
        (wrong(clients=500), PartitionError, "500 clients"),
        (wrong(tasks=5), ConfigError, "stream.tasks is 5, but there are only 4 classes: use at most 4 tasks"),
        (wrong(model=nn.Linear(2, 2)), ConfigError, "a folder, a hub id or a PreTrainedModel of transformers, got Linear"),
        (wrong(model="no/such folder"), FedsimError, "no/such folder"),
        (wrong(processor=3), ConfigError, "processor goes with a model object"),
        (wrong(data=None, test=(IMAGES, LABELS)), ConfigError, "test goes with data=(images, labels)"),
        (wrong(data={"source": "fashion_mnist"}, class_names=["a"]), ConfigError, "class_names goes with data=(images, labels)"),
        (wrong(data=(IMAGES, LABELS[1:])), DataError, "data: 40 images or texts for 39 labels"),
        (wrong(test=(IMAGES, LABELS + 1)), DataError, "class '4' of the test samples: there are no training samples"),
        (wrong(data=(IMAGES * np.nan, LABELS)), DataError, "40 of 40 images hold NaN or infinite values"),
        (wrong(data=(["a text", "another"] * 20, LABELS)), DataError, "set model.backbone to a text model"),
        (wrong(lr=0.1, **{"client.lr": 0.2}), ConfigError, "client.lr is there twice: lr means the same"),
        ({"config": "lorm"}, ConfigError, "config must be what load or experiment gives, got 'lorm'"),
        ({}, ConfigError, "nothing to run"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_input_is_one_line(words: dict[str, Any], error: type[FedsimError], said: str) -> None:
    with pytest.raises(error, match=r"^[^\n]*$") as found:
        run(**words)
    assert said in str(found.value)


def test_a_config_and_words_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="give a config or the words of one, not both: a config and alpha"):
        run(load("lorm"), alpha=0.1)


def test_the_face_has_it() -> None:
    assert fedsim.run is run and fedsim.experiment is experiment
