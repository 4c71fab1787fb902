"""Bounds of a stream: found by what they are, and right."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsim.cli import main
from fedsim.core.config import SimConfig, load
from fedsim.runs import bounds
from fedsim.runs.collection import Entry, SweepRecord
from fedsim.runs.results import Results
from fedsim.simulation import run
from tests import run_dirs
from tests.tiny import tiny

STREAMS = ("omniglot", "fashion", "characters")


def beside(folder: Path, config: SimConfig, **accuracy: list[list[float]]) -> Results:
    """A run, and the reference runs of its stream that are named, in one folder."""
    for name, matrix in accuracy.items():
        run_dirs.write_run(folder, bounds.reference(config, name), matrix)
    return Results.load(run_dirs.write_run(folder, config, [[90], [60, 70]]))


def test_bounds_lie_in_the_folder_of_the_run(tmp_path: Path) -> None:
    config = run_dirs.method("fedavg", seed=3)
    run = beside(tmp_path, config, ncm=[[50], [50, 54]], ranpac=[[60], [60, 70]], joint=[[82]])
    found = bounds.find(run)
    assert found is not None
    assert (found.ncm, found.ranpac) == (pytest.approx(52), pytest.approx(65))
    assert found.headroom is None  # the joint run of these tests was tested on one class alone
    assert found.chance == 50  # two classes


def test_a_run_of_another_seed_split_or_stream_is_none(tmp_path: Path) -> None:
    config = run_dirs.method("fedavg", seed=3)
    run_dirs.write_run(tmp_path, bounds.reference(config, "ncm"), [[50], [50, 54]])
    for key in ("seed=4", "partition.alpha=0.3", "stream.classes_per_task=2"):
        other = Results.load(run_dirs.write_run(tmp_path / key, tiny("server.aggregator=fedavg", "seed=3", key)))
        assert bounds.find(other) is None


@pytest.mark.parametrize("name", ["ncm", "ranpac", "joint"])
@pytest.mark.parametrize("stream", STREAMS)
def test_a_reference_is_the_preset_on_the_stream(stream: str, name: str) -> None:
    """So that a sweep that has the preset among its methods brings the bounds of the others."""
    keys = ["partition.alpha=0.1", "seed=2"]
    method = load([stream, "hgp"], keys)
    told = load([stream, name], [*([] if name == "joint" else keys[:1]), keys[1], "server.evaluate=task"])
    assert bounds.reference(method, name).identity() == told.identity()


def test_little_headroom_is_said() -> None:
    assert bounds.Bounds(10.0, 62.0, 79.3, 82.8).lines == [
        "Bounds: chance 10.0, nearest class mean of the bare backbone 62.0, ridge regression on random features of it 79.3, "
        "training on all data at once 82.8. Headroom: 20.8 points."
    ]
    assert "says little" in bounds.Bounds(10.0, 80.0, 79.3, 82.8).lines[1]
    assert bounds.Bounds(10.0, 62.0).headroom is None


def test_the_mean_over_seeds() -> None:
    found = bounds.mean([bounds.Bounds(10.0, 60.0, joint=80.0), bounds.Bounds(10.0, 64.0)])
    assert found == bounds.Bounds(10.0, 62.0, None, 80.0)
    assert bounds.mean([]) is None


def test_what_comes_with_the_package_is_what_a_run_finds(tmp_path: Path) -> None:
    """For the stream of the quickstart; a run elsewhere, with no reference beside it, is held against the same."""
    config = load("omniglot", ["runtime.pool=serial", "runtime.kernels=torch"])
    found = run(bounds.reference(config, "ncm"), output=tmp_path / "ncm")
    known = bounds.shipped(found)
    assert known is not None
    assert found.metrics["final_average_accuracy"] == pytest.approx(known.ncm, abs=1e-3)
    assert bounds.chance(found) == known.chance == 1.0
    assert {entry["name"] for entry in bounds._shipped()} <= set(STREAMS)
    held_out = replace(found, config=load("omniglot", ["stream.validation=0.2"]))
    assert bounds.shipped(held_out) is None  # other samples are tested


def test_the_command_makes_what_is_missing_and_runs_find_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(output=tmp_path / "runs")
    (tmp_path / "mine.yaml").write_text(config.to_yaml(), encoding="utf-8")
    made = []
    for _ in range(2):
        assert main(["bounds", str(tmp_path / "mine.yaml"), "--untrained", "--quiet"]) == 0
        made.append({path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/status.json")})
    assert len(made[0]) == 2 and made[1] == made[0]
    found = bounds.find(run(config))
    assert found is not None and found.ncm is not None and found.ranpac is not None
    told = capsys.readouterr().out
    assert f"{found.ncm:.2f}" in told and f"{found.ranpac:.2f}" in told and f"{found.chance:.2f}" in told
    assert main(["bounds"]) == 2
    assert "name a stream, e.g. fedsim bounds fashion" in capsys.readouterr().err


def test_a_table_is_of_one_stream(tmp_path: Path) -> None:
    """Joint runs and single passes stand beside the others; other data or tasks do not."""
    one = beside(tmp_path, run_dirs.method("fedavg", seed=3), ncm=[[50], [50, 54]])

    def other(**keys: Any) -> Results:
        return replace(one, config=replace(one.config, stream=replace(one.config.stream, **keys)))

    found = bounds.common([one, other(joint=True), other(keep=False)])
    assert found is not None and found.ncm == pytest.approx(52)
    assert bounds.common([one, other(tasks=1)]) is None


def test_bounds_are_not_said_of_some_of_the_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where runs are known by a table, those at hand would give the bounds of their own seeds beside a table of all."""
    configs = [run_dirs.method("fedavg", seed) for seed in (0, 1)]
    paths = [beside(tmp_path / "runs", config, ncm=[[50], [50, 54 + config.seed]]).path for config in configs]
    entries = [Entry(config.identity(), {"seed": config.seed}) for config in configs]
    SweepRecord("s", {"seed": (0, 1)}, tuple(entries)).save(tmp_path / "runs")
    assert main(["results", str(tmp_path / "runs"), "--csv", str(tmp_path / "rows.csv")]) == 0
    assert "nearest class mean of the bare backbone 52.2" in " ".join(capsys.readouterr().out.split())
    assert paths[0] is not None
    shutil.rmtree(paths[0])
    assert main(["results", str(tmp_path / "runs"), str(tmp_path / "rows.csv")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Bounds" not in out and "1 run of 2 as " in out
