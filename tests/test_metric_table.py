"""One table of metrics: a record that is added to it is computed, compared, tabled, drawn and printed without another edit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from fedsim import cli, report
from fedsim.cli.run import show_results
from fedsim.runs import compare, metrics, tables
from fedsim.runs.collection import collect
from fedsim.runs.metrics import EVERYWHERE, METRICS, Metric
from fedsim.runs.results import Results
from tests.run_dirs import write_run, write_sweep
from tests.tiny import tiny

MADE_UP = Metric(
    "worst_task",
    "Distance of the worst task",
    lambda counts: 100.0 - float(counts.accuracy[-1].min()),
    "lower",
    "two tasks",
    short="DWT",
    alias="dwt",
    unit="points",
    shown=EVERYWHERE,
)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Metric:
    monkeypatch.setitem(METRICS, MADE_UP.name, MADE_UP)
    return MADE_UP


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_sweep(folder, seeds=2, alphas=(0.5,))
    return folder


def test_a_new_metric_is_in_the_results(tmp_path: Path, made_up: Metric) -> None:
    path = write_run(tmp_path, tiny(), ((90,), (60, 70)))
    assert Results.load(path).metrics["worst_task"] == pytest.approx(40.0)
    one_task = write_run(tmp_path, tiny("seed=1"), ((90,),))
    assert Results.load(one_task).metrics["worst_task"] is None  # needs two tasks


def test_a_run_outlives_the_metric_of_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as script:
        script.setitem(METRICS, MADE_UP.name, MADE_UP)
        path = write_run(tmp_path, tiny(), ((90,), (60, 70)))
    assert "worst_task" not in Results.load(path).metrics


def test_a_new_metric_is_compared(study: Path, made_up: Metric) -> None:
    """Less is better: who has the lower numbers wins."""
    collection = collect([study])
    frame, by = collection.frame(), list(collection.factors)
    lower = frame.groupby("method")["worst_task"].mean().idxmin()
    other = next(m for m in ("lorm", "fedavg") if m != lower)
    pairs = compare.paired(frame, by, {"method": other}, ["worst_task"])
    assert pairs["wins"].tolist() == [2]
    long = compare.summary(frame, by, ["worst_task"])
    text = tables.to_markdown(long)
    assert text.splitlines()[0] == "| method | DWT ↓, alpha = 0.5 |"
    assert text.rstrip().endswith("DWT: distance of the worst task.")
    assert next(line for line in text.splitlines() if line.startswith(f"| {lower}")).count("**") == 2


def test_a_new_metric_is_on_the_page(study: Path, made_up: Metric, tmp_path: Path) -> None:
    report.write(collect([study]), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<button type="button">Distance of the worst task (points)</button>' in page  # the table
    assert ">Distance of the worst task (points)</option>" in page  # the choice above the chart


def test_commands_show_a_new_metric(study: Path, made_up: Metric, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["results", str(study)]) == 0
    assert "DWT ↓" in capsys.readouterr().out
    assert cli.main(["results", str(study), "--metrics", "dwt"]) == 0
    out = capsys.readouterr().out
    assert "DWT ↓" in out
    assert "FAA" not in out
    console = Console(width=100)
    show_results(Results.load(next(study.glob("*/status.json")).parent), console)
    assert "distance of the worst task (points)" in capsys.readouterr().out


# ---------------------------------------------------------------- the table itself


def every(what: str) -> Iterator[str]:
    return (value for m in METRICS.values() if (value := getattr(m, what)))


@pytest.mark.parametrize("what", ["title", "short", "alias"])
def test_names_are_of_one_metric(what: str) -> None:
    found = list(every(what))
    assert len(found) == len(set(found))


def test_a_column_that_nobody_knows_is_not_judged() -> None:
    assert metrics.of("accuracy_of_things").name == "accuracy_of_things"  # "accuracy" has no parts
    assert metrics.of("accuracy_of_things").sign == 0
    assert metrics.of("bytes_up_adapter").scale == 1e6
    assert metrics.of("drift_cosine_min_head").name == "drift_cosine_min"
