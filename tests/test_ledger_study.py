"""The ledger's study: every method stands in it, and everything in it can be run."""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml  # type: ignore[import-untyped]

from experiments.ledger import again, noise
from fedsim import cli
from fedsim.core import presets
from fedsim.core.config import SimConfig, load
from fedsim.runs.known import Known
from fedsim.sweeps import plan, tune
from tests.tiny import TINY

LEDGER = Path(__file__).resolve().parents[1] / "experiments" / "ledger"
NOT_A_METHOD = {"unlearning"}  # what is removed again, by a command of its own


def methods(name: str) -> list[str]:
    return list(yaml.safe_load((LEDGER / name).read_text())["list"]["method"])


def test_every_method_is_in_the_ledger() -> None:
    assert set(methods("fashion.yaml")) == set(presets.names(presets.METHODS)) - NOT_A_METHOD


OTHERS = {"characters": "characters", "digits": "digits", "cifar100": "cifar100", "intents": "clinc150_minilm"}  # name -> preset

UPPER = [f"layers.{block}.*" for block in (8, 9, 10, 11)]  # of DeiT-tiny: the blocks below stay as they are


@pytest.mark.parametrize("name", OTHERS)
def test_a_chosen_few_on_other_streams(name: str) -> None:
    """With their bounds, as presets and as tuning left them on Fashion-MNIST, the same runs where that is the preset."""
    plain, transferred = (plan.expand(LEDGER / f"{table}.yaml") for table in (name, f"{name}_transferred"))
    chosen = {str(run.entry.labels["method"]) for run in plain.runs}
    assert {"ncm", "ranpac", "joint", "fedavg"} <= chosen < set(methods("fashion.yaml"))
    assert chosen == {str(run.entry.labels["method"]) for run in transferred.runs}
    for run in plain.runs:
        method = str(run.entry.labels["method"])
        upper = [f"adapter.targets=[{', '.join(UPPER)}]"] if run.config.adapter.get("targets") == UPPER else []
        assert upper or name != "cifar100" or method in ("codaprompt", "hgp", "lda", "ncm", "ranpac")
        assert of_method(run.config) == of_method(load([OTHERS[name], method], upper))
        tuned, own = (
            yaml.safe_load((LEDGER / "best" / table / f"{method}.yaml").read_text())
            for table in ("fashion_tuned", f"{name}_transferred")
        )
        assert own == tuned | ({"adapter": {"targets": UPPER}} if upper else {}) | {"extends": [OTHERS[name], method]}


STREAMS = {"fashion": "fashion"} | OTHERS


@pytest.mark.parametrize("name", STREAMS)
def test_all_have_the_same_small_budget(name: str) -> None:
    """On a seed that no table uses, and never by the test images; what the table of the stream has is tuned."""
    tuning = tune.read(LEDGER / f"tune_{name}.yaml")
    assert tuning.options.budget == 4 and set(tuning.options.seeds).isdisjoint({0, 1, 2})
    assert all(len(tuning.of(variant)) <= tuning.options.budget for variant in tuning.variants)
    configs = [run.config for one in tuning.candidates for run in one.runs.values()]
    assert all(config.stream.validation > 0 for config in configs)
    ledger = plan.expand(LEDGER / f"{name}.yaml").runs
    assert {config.stream.order for config in configs} == {ledger[0].config.stream.order}
    assert set(tuning.variants) == {run.entry.labels["method"] for run in ledger}


@pytest.mark.parametrize("name", STREAMS)
def test_a_preset_as_it_is_is_among_what_is_tried(name: str) -> None:
    """So tuning loses to a preset on other data only."""
    tuning = tune.read(LEDGER / f"tune_{name}.yaml")
    as_it_is = {run.entry.labels["method"]: of_method(run.config) for run in plan.expand(LEDGER / f"{name}.yaml").runs}
    for variant in tuning.variants:
        assert as_it_is[variant] in [of_method(one.runs[10].config) for one in tuning.of(variant)], variant


TUNED = ("fashion", "digits", "characters", "cifar100")  # streams of which all that was tried is a committed table


@pytest.mark.parametrize("name", TUNED)
def test_the_winners_are_those_of_the_table(name: str, tmp_path: Path) -> None:
    """Every committed file is what the committed table of all that was tried makes of it."""
    tuning = tune.read(LEDGER / f"tune_{name}.yaml")
    with (LEDGER / f"tune_{name}.csv").open(newline="") as file:  # by label: where the data lie is part of a run's identity
        tried = {
            (row["method"], row["setting"], int(row["seed"])): float(row["final_average_accuracy"])
            for row in csv.DictReader(file)
        }
    runs = {(c.variant, c.setting, seed): run.entry.identity for c in tuning.candidates for seed, run in c.runs.items()}
    winners = tuning.winners({runs[labels]: score for labels, score in tried.items()})
    assert list(winners) == list(tuning.variants)
    elsewhere = replace(tuning, options=replace(tuning.options, into=str(tmp_path)))
    best = os.path.relpath(LEDGER / "best", tmp_path)  # files that a method extends are named from the folder they are written to
    written = {path.name: path.read_text().replace(best, "..") for path in tune.write(elsewhere, winners)}
    assert written == {path.name: path.read_text() for path in (LEDGER / "best" / f"{name}_tuned").glob("*.yaml")}


@pytest.mark.parametrize("name", TUNED)
def test_the_tuned_ledger_is_of_the_same_stream(name: str) -> None:
    tuned, presets_ = (plan.expand(LEDGER / f"{table}.yaml").runs for table in (f"{name}_tuned", name))
    assert {run.entry.labels["method"] for run in tuned} == {run.entry.labels["method"] for run in presets_}
    splits = [
        {
            json.dumps([run.config.seed, run.config.to_dict()["data"], run.config.to_dict()["stream"], run.config.partition])
            for run in runs
        }
        for runs in (tuned, presets_)
    ]
    assert splits[0] == splits[1]


def of_method(config: SimConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key in ("adapter", "head", "client", "server")} | {
        "server": config.to_dict()["server"] | {"evaluate": "task"}
    }


def test_another_split_is_another_run() -> None:
    """However alike its numbers are; what a table does not say cannot differ."""
    cells = {"run": "0", "seed": 0, "partition_hash": "ab", "final_average_accuracy": 50.0, "forgetting": None, "seconds": 2.0}
    row = Known(cells, Path("my.csv"))
    assert again.differing(row, cells | {"forgetting": 1.0, "seconds": 3.0}) == {}
    assert again.differing(row, cells | {"partition_hash": "cd"}) == {"partition_hash": ("ab", "cd")}


def test_rows_that_cannot_be_repeated_are_told(
    one_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    sweep = tmp_path / "my.yaml"
    sweep.write_text(yaml.safe_dump({"base": "tiny.yaml", "grid": {"client.lr": [0.1, 0.01]}, "seeds": 2}))
    runs, table = tmp_path / "runs", tmp_path / "my.csv"
    assert cli.main(["sweep", str(sweep), "--output", str(runs), "--jobs", "1", "--quiet"]) == 0
    assert cli.main(["results", str(runs), "--csv", str(table)]) == 0
    words = [str(sweep), str(table), "--runs", "3", "--jobs", "1"]
    assert again.main([*words, "--output", str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out.endswith("3 of 3 runs made again give their rows of my.csv, to the last digit\n")
    lines = [dict(row) for row in csv.DictReader(table.read_text().splitlines())]
    for row in lines:
        row["forgetting"] = str(float(row["forgetting"]) + 1e-9)
    with table.open("w", newline="") as file:
        (out := csv.DictWriter(file, lines[0])).writeheader()
        out.writerows(lines)
    assert again.main([*words, "--output", str(tmp_path / "again")]) == 2, "nothing would be made"
    assert "again is not empty, and what lies there would not be made again" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert again.main(words) == 1
    assert len(list((tmp_path / "runs/ledger/again").glob("*/*/metrics.json"))) == 3
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == "0 of 3 runs made again give their rows of my.csv, to the last digit"
    assert sum(": forgetting is " in line for line in told) == 3


def test_noise_is_what_least_squares_leave() -> None:
    """Of a method's and a seed's part, fitted with one column each; and the F test is of the two fits."""
    draw = np.random.default_rng(0)
    scores = 40 + 3 * draw.normal(size=(7, 1)) + 5 * draw.normal(size=(1, 4)) + draw.normal(size=(7, 4))
    found = noise.noise(scores)
    methods, seeds = (np.eye(n)[np.indices((7, 4))[k].ravel()] for k, n in ((0, 7), (1, 4)))
    left = []
    for columns in ([methods, seeds], [seeds]):
        design = np.hstack(columns)
        fit, *_ = np.linalg.lstsq(design, scores.ravel(), rcond=None)
        left.append(float(((scores.ravel() - design @ fit) ** 2).sum()))
    square = left[0] / 18
    assert found.left == pytest.approx(square**0.5)
    ratio = ((left[1] - left[0]) / 6) / square
    assert found.methods_apart == pytest.approx((square * (ratio - 1) / 4) ** 0.5)
    assert found.least == pytest.approx(2.100922 * (2 * square / 4) ** 0.5, rel=1e-6)  # Student's t at 18 degrees of freedom
    assert 0 < found.p < 1e-4
    assert noise.noise(scores + 100 * np.arange(4)).left == pytest.approx(found.left), "what a seed does to all is no noise"


def test_noise_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {
            "run": f"{m}{s}{a}",
            "method": m,
            "partition.name": "joint" if m == "solved" else "dirichlet" if a else "iid",
            "seed": s,
            "partition_hash": f"{a}{s}",
            "dirichlet_alpha": a or (None if m == "solved" else math.inf),
            "final_average_accuracy": 40.0 + i + (1.5 * s if a else 0),
        }
        for i, (m, a) in enumerate([("one", 0.5), ("two", 0.5), ("solved", None), ("one", 0.1), ("far", 0.5), ("even", None)])
        for s in range(3)
        if (m, s) != ("far", 2)
    ]
    table = tmp_path / "my.csv"
    pd.DataFrame(rows).to_csv(table, index=False)
    assert noise.main([str(table)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("3 methods, 3 seeds"), "far lacks a seed; solved is joint and on every split; even is on another"
    pd.DataFrame([*rows, rows[0]]).to_csv(tmp_path / "twice.csv", index=False)
    assert noise.main([str(tmp_path / "twice.csv")]) == 2
    assert "one on the split 0.5 holds 2 runs of seed 0" in capsys.readouterr().err
    assert noise.main([str(table), "--between", "40", "41.9"]) == 2
    assert "between 40 and 41.9 %: 1; seeds: 3; two of each are needed" in capsys.readouterr().err
