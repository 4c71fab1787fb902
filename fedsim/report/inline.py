"""A chart of one run as an element of a page: what `Results` shows of itself in a notebook."""

from __future__ import annotations

from importlib.util import find_spec

from fedsim.report.data import Study
from fedsim.runs.collection import Collection, Run
from fedsim.runs.results import Results

NEEDS = ("altair", "vl_convert", "pandas", "scipy")


def curve(results: Results) -> str:
    """Accuracy over the rounds of the stream as an SVG, on white; empty where there is nothing to draw, and a line that says what
    to install where a library is missing."""
    if not results.finished or not results.rows:
        return ""
    if any(find_spec(name) is None for name in NEEDS):
        return "<div>charts: pip install 'fedsim[report]'</div>"
    from fedsim.report.figures import convert, run_drawing

    return convert(run_drawing(Study.of(Collection((Run(results),)))), "svg").decode()
