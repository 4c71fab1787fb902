"""Exports, loaded by PEFT and transformers alone, by the very lines of their cards: the logits are fedsim's."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from fedsim.cli import main
from fedsim.core.config import SimConfig
from fedsim.core.errors import FedsimError
from fedsim.exports.deployed import load_model
from fedsim.exports.write import export, write
from fedsim.finished import DeployedRun, OpenedRun
from fedsim.runs.results import Results
from fedsim.simulation import run
from tests.export.taking import loaded, made_up, same, seen_by
from tests.models.families import FAMILIES, batch
from tests.models.zoo import BERT, VIT, images, texts
from tests.tiny import plain_vit, tiny

LORA = {"name": "lora", "rank": 2, "targets": "all-linear", "alpha": 3.0}
TASKS, RANK = 3, 2
RAW = {"vit": images(), "bert": texts()}
LAYOUTS = {"vit": VIT, "bert": BERT}


def config(*overrides: str, **sections: Any) -> SimConfig:
    return tiny(f"stream.tasks={TASKS}", "server.rounds=1", *overrides, **{"model": plain_vit(), **sections})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRM with RegMean over tasks, which deploys pairs of rank T·r, and keeps what it had after every task."""
    path = run(config("server.keep=tasks"), output=tmp_path_factory.mktemp("runs") / "lorm").path
    assert path is not None
    return path


@pytest.mark.parametrize("to", ["peft", "merged"])
@pytest.mark.parametrize("after", [None, 1])
def test_a_consolidated_run_goes_home_whole(finished: Path, after: int | None, to: str, tmp_path: Path) -> None:
    """On the whole test split, and with as many right as the run counted."""
    made = export(finished, to, tmp_path / "out", after)
    task = TASKS - 1 if after is None else after
    opened, results = OpenedRun(finished), Results.load(finished)
    logits = loaded(made.folder)["logits"]
    own = load_model(finished, after)
    spec = opened.parts.spec
    for tested in range(task + 1):
        positions = spec.test_of(tested)
        pixels, labels = spec.test.inputs["pixel_values"][positions], spec.test.labels[positions]
        got = logits(**seen_by(own, {"pixel_values": torch.from_numpy(pixels)}))
        with torch.inference_mode(), opened.parts.model.merged(dict(opened.deployed_after(task))):
            model, params = opened.parts.model, opened.deployed_after(task)
            want = model.logits(model.features({"pixel_values": torch.from_numpy(pixels)}), params)[:, own.rows]
        same(got, want)
        assert torch.equal(own.logits(pixels), want) or torch.allclose(own.logits(pixels), want, atol=1e-6)
        right = (got.argmax(dim=1).numpy() == labels).sum()
        np.testing.assert_allclose(100 * right / len(labels), results.accuracy[task, tested])
    if to == "peft":
        told = json.loads((made.folder / "adapter_config.json").read_text())
        assert told["r"] == (task + 1) * RANK, "the tasks' pairs, stacked"
        assert told["modules_to_save"] == ["classifier"]
    beside = made.folder / "backbone" if to == "peft" else made.folder
    names = json.loads((beside / "config.json").read_text())["id2label"]
    assert tuple(names.values()) == own.classes == opened.manifest.class_names[: 2 * (task + 1)]


CASES = [
    *((name, adapter, to) for name in ("vit", "bert") for adapter in ("lora", "none") for to in ("peft", "merged")),
    *((name, "full", "merged") for name in ("vit", "bert", "t5")),
    *((name, "lora", to) for name in ("dinov2", "resnet", "gpt2", "t5") for to in ("peft", "merged")),
    *((name, "lora", "merged") for name in ("deit", "swin", "clip_vision", "mamba")),
]


@pytest.mark.parametrize(("name", "adapter", "to"), CASES)
def test_families(finished: Path, name: str, adapter: str, to: str, tmp_path: Path) -> None:
    """Class tokens, two halves of a classifier's inputs, places, means, last tokens; convolutions and transposed layers."""
    layout, raw = (LAYOUTS[name], RAW[name]) if name in LAYOUTS else (FAMILIES[name].layout, batch(FAMILIES[name]))
    options = {"lora": LORA, "none": "none", "full": "full"}[adapter]
    deployed = made_up(DeployedRun(finished), layout, options)
    want = deployed.logits(raw)
    made = write(deployed, to, tmp_path / "out")
    same(loaded(made.folder)["logits"](**seen_by(deployed, raw)), want)
    same(deployed.logits(raw), want)
    if adapter != "none":
        deployed.release()
        bare = deployed.model.features(raw) @ deployed.params["head.weight"].T + deployed.params["head.bias"]
        assert (bare - want).abs().max() > 1e-2, "the adapter counts"


@pytest.mark.parametrize(
    ("name", "pooling", "beside"),
    [("vit", "mean", True), ("yolos", "mean", True), ("dinov2", "mean", False), ("bert", "cls", True), ("bert", "last", True)],
)
def test_poolings(finished: Path, name: str, pooling: str, beside: bool, tmp_path: Path) -> None:
    """Other than the family's own: the card's lines pool so, or the classifier has a place for it."""
    layout, raw = (LAYOUTS[name], RAW[name]) if name in LAYOUTS else (FAMILIES[name].layout, batch(FAMILIES[name]))
    deployed = made_up(DeployedRun(finished), layout, LORA, pooling=pooling)
    want, made = deployed.logits(raw), write(deployed, "merged", tmp_path / "out")
    same(loaded(made.folder)["logits"](**seen_by(deployed, raw)), want)
    assert made.script.head == beside


def test_what_fits_a_class_of_transformers_is_one(finished: Path, tmp_path: Path) -> None:
    for name, expected in (("vit", "ViTForImageClassification"), ("bert", "BertModel")):
        made = write(made_up(DeployedRun(finished), LAYOUTS[name], LORA), "merged", tmp_path / name)
        assert type(loaded(made.folder)["model"]).__name__ == expected
        assert (made.folder / "head.safetensors").exists() == (expected == "BertModel")


def test_the_adapter_is_one_that_peft_would_have_written(finished: Path, tmp_path: Path) -> None:
    """Ranks that differ, with a pattern for those that are not the usual one; and what PEFT writes of it is what it read."""
    from peft import AutoPeftModel
    from transformers import AutoModelForImageClassification

    deployed = made_up(DeployedRun(finished), VIT, LORA, ranks=True)
    want = deployed.logits(RAW["vit"])
    folder = write(deployed, "peft", tmp_path / "out").folder
    scope = loaded(folder)
    same(scope["logits"](**seen_by(deployed, RAW["vit"])), want)
    told = json.loads((folder / "adapter_config.json").read_text())
    assert set(told["rank_pattern"].values()) | {told["r"]} == {2, 4}
    assert told["rank_pattern"] == told["alpha_pattern"]
    scope["model"].save_pretrained(tmp_path / "again")
    first, again = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[n], again[n]) for n in first)
    merged = scope["model"].merge_and_unload()
    assert type(merged).__name__ == "ViTForImageClassification"
    for auto in (AutoPeftModel, AutoModelForImageClassification):  # which find the backbone by what the adapter says of it
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            same(auto.from_pretrained(folder).eval()(**seen_by(deployed, RAW["vit"])).logits, want)


def test_more_ranks_than_a_layer_has_are_folded(finished: Path, tmp_path: Path) -> None:
    deployed = made_up(DeployedRun(finished), VIT, LORA)
    deployed.params = {n: torch.cat([t] * 10, dim=int(n.endswith("B"))) if "lora" in n else t for n, t in deployed.params.items()}
    want = deployed.logits(RAW["vit"])
    folder = write(deployed, "peft", tmp_path / "out").folder
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 16
    same(loaded(folder)["logits"](**seen_by(deployed, RAW["vit"])), want)


@pytest.mark.parametrize(
    ("head", "beside"),
    [
        ("centres", False),
        ({"name": "centres", "root": True}, True),
        ("cosine", True),
        ("quadratic", True),
        ({"name": "random_features", "size": 12}, True),
        ({"name": "random_features", "size": 12, "activation": "none"}, False),
    ],
)
@pytest.mark.parametrize("to", ["peft", "merged"])
def test_heads(finished: Path, head: Any, beside: bool, to: str, tmp_path: Path) -> None:
    """A head that is one linear layer is in the classifier; any other lies beside it, with its formula."""
    deployed = made_up(DeployedRun(finished), VIT, LORA, head)
    want = deployed.logits(RAW["vit"])
    made = write(deployed, to, tmp_path / "out")
    assert made.script.head == beside
    got = loaded(made.folder)["logits"](**seen_by(deployed, RAW["vit"]))
    shared = head == "centres"
    same(*(z.log_softmax(dim=1) if shared else z for z in (got, want)))
    assert any("up to a number per sample" in note for note in made.notes) == shared


@pytest.mark.parametrize(
    ("calibrator", "head"),
    [
        ("lda", "linear"),
        ("ridge", {"name": "random_features", "size": 24}),
        ("nearest_mean", "centres"),
        ("nearest_mean", "cosine"),
        ("qda", "quadratic"),
    ],
)
def test_heads_in_closed_form(calibrator: str, head: Any, tmp_path: Path) -> None:
    """Predictions on the test split are those that the run counted."""
    rules = {"aggregator": "frozen", "consolidator": "none", "calibrator": calibrator, "rounds": 1}
    sections: dict[str, Any] = {"model": plain_vit(), "adapter": "none", "head": head, "server": rules}
    path = run(tiny("partition.clients=2", **sections), output=tmp_path / "run").path
    assert path is not None
    opened, own, made = OpenedRun(path), load_model(path), export(path, "merged", tmp_path / "out")
    spec, results = opened.parts.spec, Results.load(path)
    for task in opened.tasks:
        pixels = spec.test.inputs["pixel_values"][spec.test_of(task)]
        got = loaded(made.folder)["logits"](**seen_by(own, {"pixel_values": torch.from_numpy(pixels)}))
        apart, wanted = (z - z.mean(dim=1, keepdim=True) for z in (got, own.logits(pixels)))
        torch.testing.assert_close(apart / wanted.std(), wanted / wanted.std(), atol=1e-2, rtol=0)  # logits may be 10⁵ and more
        right = (got.argmax(dim=1).numpy() == spec.test.labels[spec.test_of(task)]).mean()
        np.testing.assert_allclose(100 * right, results.accuracy[-1, task])
    assert made.script.head == (head not in ("linear", "centres"))


def test_the_card_says_where_it_comes_from(finished: Path, tmp_path: Path) -> None:
    folder = export(finished, "peft", tmp_path / "out").folder
    card, results = (folder / "README.md").read_text(), Results.load(finished)
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "peft"
    for said in (
        f"| {results.accuracy[2, 0]:.2f} |", "lorm", "alpha=0.5", "- seed: 0", "class_incremental, 3 tasks, 6 classes",
        "fedsim export lorm --to peft FOLDER", results.config.identity(), "torch 2.", "Final average accuracy",
    ):  # fmt: skip
        assert said in card, said
    assert str(tmp_path) not in card
    told = yaml.safe_load((folder / "config_of_the_run.yaml").read_text())
    assert told["server"]["aggregator"]["name"] == "lorm"


@pytest.mark.parametrize("to", ["peft", "merged"])
def test_the_processor_makes_what_the_run_saw(finished: Path, to: str, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    folder = export(finished, to, tmp_path / "out").folder
    pixels = torch.randint(0, 256, (2, 8, 8), dtype=torch.uint8)
    processor = AutoImageProcessor.from_pretrained(folder)
    got = processor([p[None].numpy() for p in pixels], return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    torch.testing.assert_close(got, load_model(finished).model.shown({"pixel_values": pixels})["pixel_values"])


REFUSED = [
    (
        {"name": "prefix", "length": 2},
        "peft",
        VIT,
        r"adapter prefix is no change of weights, .*use fedsim predict, or fedsim\.load_",
    ),
    ({"name": "vpt", "length": 2}, "merged", VIT, "adapter vpt is no change of weights"),
    ({"name": "tangent", "rank": 2}, "peft", VIT, "adapter tangent is no change of weights"),
    ("full", "peft", VIT, "adapter full changes 'embeddings.cls_token' by more than a LoRA pair, .*: use --to merged"),
    (LORA, "peft", FAMILIES["mamba"].layout, r"PEFT takes no LoRA in 'layers\.0\.mixer\.out_proj' of a MambaModel.* --to merged"),
]


@pytest.mark.parametrize(("adapter", "to", "layout", "says"), REFUSED)
def test_what_a_form_cannot_hold(
    finished: Path, adapter: Any, to: str, layout: dict[str, Any], says: str, tmp_path: Path
) -> None:
    layout = {**layout, "hidden_act": "gelu", "qkv_bias": True} if layout is VIT else layout
    with pytest.raises(FedsimError, match=says) as told:
        write(made_up(DeployedRun(finished), layout, adapter), to, tmp_path / "out")
    assert "\n" not in str(told.value)
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_an_adapter_that_says_wrong_weights_is_found_out(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployed = made_up(DeployedRun(finished), VIT, LORA)
    real = type(deployed.model.adapter).weights
    monkeypatch.setattr(type(deployed.model.adapter), "weights", lambda *a: {n: 1.01 * w for n, w in real(*a).items()})
    with pytest.raises(FedsimError, match="the exported model gives other logits than the run's"):
        write(deployed, "merged", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_bad_input_is_one_line(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "thesis.tex").write_text("x")
    file.write_text("x")
    unfinished = Path(shutil.copytree(finished, tmp_path / "unfinished"))
    status = json.loads((unfinished / "status.json").read_text())
    (unfinished / "status.json").write_text(json.dumps(status | {"state": "running"}))
    out = str(tmp_path / "out")
    for words, says in (
        ([str(finished), "--to", "peft", str(full)], f"{full} is not empty: choose another folder"),
        ([str(finished), "--to", "peft", str(file)], f"{file} is a file"),
        ([str(unfinished), "--to", "peft", out], f"is not finished: finish it first with fedsim run --resume {unfinished}"),
        ([str(tmp_path / "none"), "--to", "merged", out], "no run directory"),
        ([str(finished), "--to", "merged", out, "--after-task", "3"], "task 3 is not in the run, which has tasks 0 to 2"),
        ([str(finished), "--to", "merged", out, "--after-task", "-1"], "task -1 is not in the run"),
    ):
        assert main(["export", *words]) == 2
        told = capsys.readouterr().err
        assert says in told and told.count("\n") == 1, told
    assert not Path(out).exists() and [p.name for p in full.iterdir()] == ["thesis.tex"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["export", str(finished), "--to", "merged", str(empty)]) == 0
    assert "AutoModelForImageClassification.from_pretrained(folder)" in capsys.readouterr().out
    assert dataclasses.is_dataclass(export(finished, "merged", out))
