"""What results and collections show of themselves: in a terminal, and in a notebook."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from fedsim.report import inline
from fedsim.runs import display
from fedsim.runs.collection import Absent, collect
from fedsim.runs.results import Results
from tests.report.factory import fake_run
from tests.tiny import tiny


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    path = fake_run(tiny("stream.tasks=3", "server.rounds=2"), 20.0, tmp_path_factory.mktemp("fake") / "run")
    return Results.load(path)


def cells(html: str) -> list[list[str]]:
    """The rows of all tables of an element that is well formed."""
    tree = ET.fromstring(html)
    return [[cell.text or "" for cell in row] for row in tree.iter("tr")]


def test_a_result_says_in_one_line_what_it_is(results: Results) -> None:
    value = results.metrics["final_average_accuracy"]
    assert repr(results) == f"<Results 'tiny' seed 0, 3 tasks learned, final average accuracy {value:.2f} %, {results.path}>"
    begun = dataclasses.replace(results, finished=False, rows=(), drifts=(), path=None)
    assert repr(begun) == "<Results 'tiny' seed 0, 0 tasks learned, unfinished>"
    assert str(begun) == repr(begun)


def test_text_and_html_hold_the_accuracy_matrix(results: Results) -> None:
    rows = cells(display.as_html(display.headline(results), display.tables(results), []))
    place = next(i for i, row in enumerate(rows) if row[0] == "after task")
    for i in range(3):
        want = [f"{a:.1f}" for a in results.accuracy[i, : i + 1]] + [""] * (2 - i)
        assert rows[place + 1 + i] == [str(i), *want, f"{results.accuracy[i, : i + 1].mean():.1f}"]
        assert f"  {i}  " in str(results) and all(cell in str(results) for cell in want)
    summary = dict(row for row in rows[1:place] if len(row) == 2)
    assert summary["final average accuracy"] == f"{results.metrics['final_average_accuracy']:.2f} %"


def test_a_long_stream_is_cut_and_says_so(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "MOST_TASKS", 2)
    _, matrix = display.tables(results)
    assert len(matrix.rows) == 2 and matrix.title.endswith("the first 2 of 3 tasks")


def test_the_chart_draws_every_evaluation(results: Results) -> None:
    html = results._repr_html_()
    svg = html[html.index("<svg") : html.index("</svg>") + 6]
    marks = re.findall(r'aria-label="[^"]*accuracy \(%\): [^"]*"', svg)
    assert len(set(marks)) >= sum(1 for row in results.rows if row.stage == "round")
    assert ET.fromstring(svg).tag.endswith("svg")


def test_without_the_extra_there_are_tables_and_a_word(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inline, "NEEDS", ("no_such_package",))
    html = results._repr_html_()
    assert "<svg" not in html and "pip install 'fedsim[report]'" in html and "after task" in html


def test_names_are_no_markup(results: Results) -> None:
    bad = dataclasses.replace(results, config=dataclasses.replace(results.config, name="<b>&"), rows=())
    assert "&lt;b&gt;&amp;" in bad._repr_html_() and "<b>" not in bad._repr_html_()


def test_a_collection_is_a_table_of_its_runs(tmp_path: Path) -> None:
    for seed, name in ((0, "lorm"), (1, "lorm"), (0, "fedavg")):
        fake_run(tiny(f"seed={seed}", f"server.aggregator={name}"), 20.0, tmp_path / f"{name}{seed}")
    found = collect([tmp_path])
    assert repr(found) == f"<Collection '{tmp_path.name}', 3 runs>"
    rows = cells(found._repr_html_())
    assert rows[0][:2] == ["server.aggregator.name", "seed"]
    assert sorted(row[:2] for row in rows[1:]) == [["fedavg", "0"], ["lorm", "0"], ["lorm", "1"]]
    for row, run in zip(rows[1:], found.runs, strict=True):
        assert row[rows[0].index("Final average accuracy")] == f"{run.results.metrics['final_average_accuracy']:.2f}"
        assert row[2] in str(found)
    lost = dataclasses.replace(found, absent=(Absent("seed=3", "failed: <reason>"),))
    assert "1 absent" in repr(lost) and "absent: seed=3: failed: <reason>" in str(lost)
    assert "failed: &lt;reason&gt;" in lost._repr_html_()
