"""What a tired researcher types, and the one line it prints: exit code 2, no traceback, before any training."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients import local
from fedsim import cli
from fedsim.core import files
from fedsim.core.errors import StorageError
from fedsim.runs import directory
from fedsim.simulation import run
from tests.tiny import TINY, tiny

BAD: dict[str, tuple[list[str], str]] = {
    "misspelt section": (["partitoin.alpha=0.1"], r"unknown key 'partitoin'. Did you mean 'partition'\?"),
    "misspelt key": (["client.epoch=3"], r"unknown key 'client.epoch'. Did you mean 'epochs'\?"),
    "misspelt option of a plug-in": (["partition.alhpa=0.1"], r"unknown key 'partition.alhpa'. Did you mean 'alpha'\?"),
    "option of no rule": (
        ["server.aggregator.name=fedavg", "server.aggregator.decya=1"],
        r"unknown key 'server.aggregator.decya'",
    ),
    "a name that is a path": (["name=../oops"], r"name must be a plain word, of which the run directory's name is made, got"),
    "wrong type": (["client.lr=fast"], r"client.lr must be a number, got 'fast'"),
    "alpha 0": (["partition.alpha=0"], r"partition.alpha must be positive, got 0"),
    "alpha below 0": (["partition.alpha=-1"], r"partition.alpha must be positive"),
    "more clients than samples": (["partition.clients=100"], r"100 clients"),
    "nobody takes part": (["server.participation=0.1"], r"server.participation 0.1 of 3 clients selects nobody"),
    "participation 0": (["server.participation=0"], r"server.participation must be in \(0, 1\]"),
    "class order of strangers": (["stream.order=[0,1,2,3,4,77]"], r"stream.order.*77"),
    "class twice in the order": (["stream.order=[0,1,2,3,4,4]"], r"stream.order.*4"),
    "more tasks than classes": (["stream.tasks=7"], r"stream.tasks"),
    "unknown rule": (["server.aggregator=fedagv"], r"server.aggregator: unknown aggregator 'fedagv'. Did you mean 'fedavg'\?"),
    "unknown adapter": (["adapter=lorra"], r"adapter: unknown adapter 'lorra'. Did you mean 'lora'\?"),
    "unknown pool": (["runtime.pool=rya"], r"runtime.pool 'rya' is unknown. Did you mean 'ray'\?"),
    "unknown optimizer": (["client.optimizer=adamq"], r"client.optimizer 'adamq' is unknown. Did you mean 'adam"),
    "unknown option of the optimizer": (
        ["client.optimizer_options={momentun: 0.9}"],
        r"client.optimizer_options.momentun is no option of AdamW",
    ),
    "a second learning rate": (
        ["client.optimizer_options={lr: 0.5}"],
        r"client.optimizer_options.lr would take the place of client.lr: set client.lr",
    ),
    "a second weight decay": (
        ["client.optimizer_options={weight_decay: 0.5}"],
        r"client.optimizer_options.weight_decay would take the place of client.weight_decay",
    ),
    "weight decay that the optimizer lacks": (
        ["client.optimizer=rprop", "client.weight_decay=0.1"],
        r"client.weight_decay is no option of Rprop: set it to 0",
    ),
    "unknown schedule": (["client.schedule=cosin"], r"client.schedule 'cosin' is unknown"),
    "rank larger than a layer": (["adapter.rank=17"], r"rank 17"),
    "targets that match nothing": (["adapter.targets=[query]"], r"query.*q_proj"),
    "rule file that is not there": (["server.aggregator=./nothing.py"], r"no file .*nothing.py"),
    "missing data file": (["data.source=npz", "data.path=./nothing.npz"], r"nothing.npz"),
    "missing backbone": (["model.backbone=./nothing", "model.config=null"], r"nothing: model.backbone must be a folder"),
    "config of a backbone that has its own": (["model.backbone=./nothing"], r"model.config is for backbone 'random' only"),
    "online with epochs": (["stream.online=true", "client.epochs=2"], r"client.epochs must be 1 with stream.online"),
    "replay where no samples are kept": (
        ["stream.online=true", "stream.keep=false", "client.learners=[{name: er, size: 4}]"],
        r"learner er needs the buffer, which stream.keep: false forbids",
    ),
    "a buffer larger than the data": (["client.learners=[er]"], r"learner er: no client can fill a buffer of 200"),
    "statistic of a layer that is not there": (["server.consolidator=regmean", "adapter=none"], r"LoRA|lora"),
    "no rule in a list": (["server.aggregator=[]"], r"server.aggregator is an empty list"),
    "override without =": (["partition.alpha"], r"no config file .*partition.alpha \(an override must look like key.sub=value"),
    "negative seed": (["seed=-1"], r"seed must not be negative"),
}


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps({k: v for k, v in TINY.items() if k != "name"}))
    return path


def main(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    code = cli.main([*args])
    return code, capsys.readouterr().err.strip()


@pytest.mark.parametrize("case", BAD)
def test_one_clear_line(
    case: str, config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, expected = BAD[case]

    def trained(*args: Any) -> float:
        raise AssertionError("training began")

    monkeypatch.setattr(local, "fit", trained)
    code, err = main(capsys, "run", str(config_file), *overrides)
    assert code == 2, err
    assert len(err.splitlines()) == 1 and "Traceback" not in err, err
    import re

    assert re.search(expected, err), err
    assert not list(Path("runs").glob("*")) if Path("runs").exists() else True


def test_files_that_are_no_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    circle = tmp_path / "circle.yaml"
    circle.write_text("extends: circle.yaml\n")
    nobody = tmp_path / "nobody.yaml"
    nobody.write_text("extends: gone.yaml\n")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,\n")
    listing = tmp_path / "list.yaml"
    listing.write_text("- 1\n")
    for path, expected in [
        (tmp_path / "missing.yaml", "no config file"),
        (circle, "circle"),
        (nobody, "gone.yaml, which nobody.yaml extends"),
        (broken, "not a YAML mapping"),
        (listing, "not a YAML mapping"),
    ]:
        code, err = main(capsys, "run", str(path))
        assert code == 2 and expected in err and len(err.splitlines()) == 1, err


def test_damaged_data(tmp_path: Path, config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {
        "train_images": np.zeros((12, 8, 8), np.uint8), "train_labels": np.arange(12) % 6,
        "test_images": np.zeros((6, 8, 8), np.uint8), "test_labels": np.arange(6),
    }  # fmt: skip
    np.savez(tmp_path / "good.npz", **good)
    content = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "torn.npz").write_bytes(content[: len(content) // 2])
    np.savez(tmp_path / "keys.npz", train_images=good["train_images"])
    np.savez(tmp_path / "labels.npz", **{**good, "train_labels": np.zeros(3, np.int64)})
    for name, expected in [("torn.npz", "torn.npz"), ("keys.npz", "train_labels"), ("labels.npz", "3")]:
        code, err = main(capsys, "run", str(config_file), "data.source=npz", f"data.path={tmp_path / name}")
        assert code == 2 and expected in err and len(err.splitlines()) == 1, err


def test_a_full_disk_says_so_and_the_run_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(output=tmp_path)
    whole = run(config)
    calls: list[int] = []
    real = os.fsync

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", full)
        with pytest.raises(StorageError, match=r"full.*--resume"):
            run(config, output=tmp_path / "full")
    resumed = run(resume=tmp_path / "full")
    np.testing.assert_array_equal(resumed.accuracy, whole.accuracy)


def test_a_finished_run_is_on_the_disk_and_a_round_waits_for_its_checkpoint_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = list[tuple[str, bool]]()
    real = directory.write_atomic

    def write(path: Path, data: bytes, advice: str, lasting: bool = True) -> None:
        written.append((path.name, lasting))
        real(path, data, advice, lasting)

    monkeypatch.setattr(directory, "write_atomic", write)
    run(tiny("server.rounds=1", "stream.tasks=1", output=tmp_path))
    assert {name for name, lasting in written if not lasting} == {"rounds.csv", "classes.csv", "drift.csv", "costs.json"}
    assert all(dict(written).values()), "the last time that each is written"


def test_ctrl_c_leaves_a_run_that_can_be_resumed(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = local.fit

    def interrupted(*args: Any) -> float:
        if args[0].task == 1:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(local, "fit", interrupted)
        code, err = main(capsys, "run", str(config_file), "--output", "out")
    assert code == 130 and "fedsim run --resume" in err and len(err.splitlines()) == 1, err
    assert main(capsys, "run", "--resume", "out")[0] == 0


def test_a_failing_client_on_the_command_line(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = main(capsys, "run", str(config_file), "client.optimizer=sgd", "client.lr=1e30", "client.epochs=3")
    assert code == 1 and "client 0 failed in task 0, round 0" in err and len(err.splitlines()) == 1, err
