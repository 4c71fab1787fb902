"""The command: what it prints, what it leaves behind, what it returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedsim import cli
from fedsim.runs.collection import collect
from tests.sweep.test_launch import logging, sweep


def test_what_it_prints_and_leaves(
    one_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep(tmp_path, list={"rule": {"lorm": {}, "bad": logging(tmp_path, fail="always")}}, seeds=2)
    assert cli.main(["sweep", "sweep.yaml", "--output", "out", "--retry", "1"]) == 1
    out = capsys.readouterr().out.splitlines()
    name = tmp_path.name
    assert out[:2] == [f"{name}: 4 runs, 0 finished already, 4 to make", "folder: out"]
    assert sum(": accuracy " in line for line in out) == 2
    luck = "fails: ValueError: no such luck"
    assert sum("failed, will be tried again: server.aggregator" in line and luck in line for line in out) == 2
    assert sum(line.startswith("failed: rule=bad seed=1: server.aggregator") and luck in line for line in out) == 1
    assert out[-1] == "more: fedsim results out   fedsim report out"
    record = json.loads((tmp_path / "out" / "sweeps" / f"{name}.json").read_text())
    assert [run["labels"] for run in record["runs"]] == [
        {"rule": rule, "seed": seed} for seed in (0, 1) for rule in ("lorm", "bad")
    ]

    assert (
        cli.main(["sweep", "sweep.yaml", "--output", "out", "--quiet"]) == 1
    )  # what failed is tried again, what is finished is not
    assert "accuracy " not in capsys.readouterr().out
    assert cli.main(["sweep", "sweep.yaml", "--output", "out", "server.aggregator.fial=never"]) == 2
    assert "rule=lorm seed=0: unknown key 'server.aggregator.fial'" in capsys.readouterr().err
    assert cli.main(["sweep", "sweep.yaml", "--output", "out", "server.aggregator.fail=never"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[2] == "server.aggregator.fail does not apply to rule=lorm: left out there"
    assert f"{out[2]}." in out[3:]  # below the table, too


def test_a_dry_run_changes_nothing(
    one_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    rules = {"lorm": {}, "fedavg": {"server.aggregator": "fedavg", "server.consolidator": "none"}}
    sweep(tmp_path, list={"rule": rules}, grid={"partition.alpha": [0.1, 1.0]})
    assert cli.main(["sweep", "sweep.yaml", "--output", "out", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "measuring one round of 2 kinds of runs" in out
    assert [line[:11] for line in out.splitlines() if line.startswith("[")] == ["[1/2] rule=", "[2/2] rule="]
    assert sum("to make" in line and ("kB" in line or "MB" in line) for line in out.splitlines()) == 4
    assert "about " in out.splitlines()[-1] and "with 2 at a time" in out.splitlines()[-1]
    assert not (tmp_path / "out").exists()

    assert cli.main(["sweep", "sweep.yaml", "--output", "out", "--quiet"]) == 0
    capsys.readouterr()
    assert cli.main(["sweep", "sweep.yaml", "--output", "out", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "4 finished already, 0 to make" in out
    assert sum(" finished" in line for line in out.splitlines()) == 5


def test_a_dry_run_ends_with_the_first_kind_that_fails(
    one_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep(tmp_path, list={"rule": {"bad": logging(tmp_path, fail="always"), "lorm": {}}}, seeds=1)
    assert cli.main(["sweep", "sweep.yaml", "--output", "out", "--dry-run", "--jobs", "1"]) == 2
    found = capsys.readouterr()
    assert "rule=bad seed=0 fails in its first round: server.aggregator" in found.err
    assert "fails: ValueError: no such luck" in found.err
    assert "[1/2]" not in found.out


def test_runs_of_a_table_are_not_made_again(
    one_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of four runs lie elsewhere: the others are made, and the table is that of all four, but for seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    rules = {"lorm": {}, "fedavg": {"server.aggregator": "fedavg", "server.consolidator": "none"}}
    sweep(tmp_path, list={"rule": rules}, seeds=1)
    assert cli.main(["sweep", "sweep.yaml", "--output", "there", "--quiet"]) == 0
    assert cli.main(["results", "there", "--csv", "there.csv"]) == 0
    sweep(tmp_path, list={"rule": rules}, seeds=2)
    capsys.readouterr()
    words = ["sweep", "sweep.yaml", "--output", "here", "--known", "there.csv"]
    assert cli.main([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "4 runs, 0 finished already, 2 known by a table, 2 to make" in out
    assert sum(" known " in line for line in out.splitlines()) == 3
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert sum(": accuracy " in line for line in out.splitlines()) == 2
    assert "[4/4] " in out and "2 runs of 4 as " in out
    assert out.splitlines()[-1] == "more: fedsim results here there.csv   fedsim report here"
    assert cli.main(["sweep", "sweep.yaml", "--output", "all", "--quiet"]) == 0
    joined, whole = collect(["here", "there.csv"]).frame(), collect(["all"]).frame()
    moving = [c for c in whole if c.startswith("seconds") or c in ("processor_seconds", "peak_memory", "path")]
    assert joined.drop(columns=moving).to_csv() == whole.drop(columns=moving).to_csv()

    assert cli.main([*words, "client.lr=0.5"]) == 2
    assert "none of the 4 runs of this sweep is in there.csv: a run is known by its whole config" in capsys.readouterr().err
    assert cli.main([*words[:-1], "gone.csv"]) == 2
    assert "gone.csv cannot be read: FileNotFoundError" in capsys.readouterr().err


def test_a_trial_does_not_take_the_table_of_a_sweep(
    one_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep(tmp_path, seeds=2)
    words = ["sweep", "sweep.yaml", "--output", "out", "--quiet"]
    assert cli.main(words) == 0
    for _ in range(2):
        assert cli.main([*words, "client.epochs=2", "client.lr=0.1"]) == 0
    assert "another sweep of this name lies in the folder, so this one is called " in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "sweeps").iterdir())) == 2
    assert cli.main(["results", "out", "--sweep", tmp_path.name]) == 0
    assert "2 runs" in capsys.readouterr().out
