"""The table on the page of `experiments/continual` is what its results give."""

from __future__ import annotations

import pandas as pd

from experiments.continual.table import HERE, in_units_of_fedavg, rewritten
from fedsim.runs.known import table


def test_the_page_shows_the_results() -> None:
    page = (HERE / "README.md").read_text(encoding="utf-8")
    frame = table(HERE / "results.csv")
    assert rewritten(page, frame) == page
    frame.loc[(frame["method"] == "er") & (frame["seed"] == 0), "final_average_accuracy"] += 1
    assert rewritten(page, frame) != page


def test_a_time_is_held_against_fedavg_on_the_same_processor() -> None:
    """A processor that is twice as fast does not make a method cheap."""
    told = [
        ("fedavg", 0, None, 100.0), ("fedavg", 1, None, 120.0), ("fedavg", 2, "new", 50.0),
        ("er", 0, None, 150.0), ("er", 1, "new", 75.0), ("er", 2, "other", 75.0), ("er", 3, None, 110.0),
    ]  # fmt: skip
    frame = pd.DataFrame(told, columns=["method", "seed", "processor", "processor_seconds"]).assign(**{"partition.alpha": 0.5})
    assert in_units_of_fedavg(frame).round(9).fillna(-1).tolist() == [1, 1, 1, 1.5, 1.5, -1, 1]
