"""The table on the page of `experiments/continual` is what its results give."""

from __future__ import annotations

from experiments.continual.table import HERE, rewritten
from fedsim.runs.known import table


def test_the_page_shows_the_results() -> None:
    page = (HERE / "README.md").read_text(encoding="utf-8")
    frame = table(HERE / "results.csv")
    assert rewritten(page, frame) == page
    frame.loc[(frame["method"] == "er") & (frame["seed"] == 0), "final_average_accuracy"] += 1
    assert rewritten(page, frame) != page
