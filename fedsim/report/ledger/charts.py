"""The charts of a ledger, over data named "rows" and "bounds" that the page hands them. Colours and shapes stand for families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from fedsim.report import theme
from fedsim.report.charts import FIT, HEIGHT, ROWS, STEP, WIDTH

BOUNDS: Mapping[str, str] = {  # name in the rows -> title
    "chance": "chance",
    "ncm": "nearest class mean",
    "ranpac": "ridge on random features",
    "joint": "joint training",
}
ROW = 17  # pixels per method
BETTER = "!isValid(datum.before) || datum.best > datum.before"
ACCURACY = "Final average accuracy (%)"


def ranking(families: Sequence[str]) -> alt.LayerChart:
    """Every method, the best first: mean and 95 % interval, with the stream's bounds as lines."""
    axis = alt.Axis(labelLimit=220, labelColor="var(--ink)", labelOverlap=False)
    y = alt.Y("method:N", sort=alt.EncodingSortField("mean", order="descending"), title=None, axis=axis)
    x = alt.X("mean:Q", title=ACCURACY, axis=alt.Axis(grid=True), scale=alt.Scale(zero=True))
    base = _base().encode(y=y, color=_colour(families))
    return _over(
        _lines("x"),
        base.mark_rule(strokeWidth=2).encode(x=alt.X("from:Q", title=ACCURACY), x2="to:Q"),
        base.mark_point(size=70).encode(x=x, shape=_shape(families), tooltip=[*_who(), *_number("mean", ACCURACY)]),
    ).properties(usermeta={STEP: ROW})


def front(families: Sequence[str], column: str, title: str) -> alt.LayerChart:
    """What a run costs against the accuracy that it buys. The line joins those methods that no other beats in both."""
    base = _base().transform_filter(alt.datum[column] > 0)
    x = alt.X(
        f"{column}:Q", title=title, scale=alt.Scale(type="log", padding=16), axis=alt.Axis(grid=True, format="~s", tickCount=6)
    )
    y = alt.Y("mean:Q", title=ACCURACY, scale=alt.Scale(zero=True))
    cheapest: Any = [alt.SortField(column), alt.SortField("mean", order="descending")]
    best = base.transform_window(best="max(mean)", frame=[None, 0], sort=cheapest)
    best = best.transform_window(before="lag(best)", sort=cheapest).transform_filter(BETTER)
    tips = [*_who(), *_number("mean", ACCURACY), alt.Tooltip(f"{column}:Q", title=title, format=",.3~s")]
    return _over(
        _lines("y"),
        best.mark_line(interpolate="step-after", color="var(--axis)").encode(x=x, y=y, order=f"{column}:Q"),
        base.mark_point(size=80, opacity=0.9).encode(x=x, y=y, color=_colour(families), shape=_shape(families), tooltip=tips),
        best.mark_text(align="left", dx=7, dy=-7, fontSize=10).encode(x=x, y=y, text="method:N"),
    ).properties(height=380)


def by_task(x: str, title: str) -> alt.LayerChart:
    """An accuracy for every task, of one method on the splits of a stream."""
    legend = alt.Legend(title=None, symbolOpacity=1)
    colour: Any = alt.Color("split:N", scale=alt.Scale(range=[*theme.SERIES]), legend=legend)
    shape: Any = alt.Shape("split:N", scale=alt.Scale(range=[*theme.SHAPES]), legend=legend)
    base = _base().encode(x=alt.X("task:O", title=x, axis=alt.Axis(labelAngle=0)), color=colour)
    y = alt.Y("mean:Q", title=title, scale=alt.Scale(zero=False, nice=True))
    tips = [alt.Tooltip("split:N"), alt.Tooltip("task:O", title=x.lower()), *_number("mean", "accuracy (%)")]
    return _over(
        _lines("y"),
        base.mark_area(opacity=0.12, line=False).encode(y=alt.Y("from:Q", title=title), y2="to:Q"),
        base.mark_line().encode(y=y),
        base.mark_point().encode(y=y, shape=shape, tooltip=tips),
    ).properties(height=220)


def _base() -> alt.Chart:
    chart: alt.Chart = alt.Chart(alt.NamedData(name=ROWS))
    return chart


def _over(*layers: Any) -> alt.LayerChart:
    layered: Any = alt.layer(*layers)  # Altair's own types cannot tell that a chart of layers is no facet
    chart: alt.LayerChart = layered.properties(width=WIDTH, height=HEIGHT, autosize=FIT)
    return chart


def _lines(axis: str) -> alt.Chart:
    """The bounds of the stream."""
    legend = alt.Legend(title=None, orient="bottom", symbolType="stroke", symbolStrokeColor="var(--soft)")
    looks = alt.Scale(domain=[*BOUNDS.values()], range=[[1, 3], [3, 3], [8, 3], [1, 0]])
    dash = alt.StrokeDash("bound:N", scale=looks, legend=legend)
    tips = [alt.Tooltip("bound:N"), alt.Tooltip("value:Q", title=ACCURACY, format=".1f")]
    bounds = alt.Chart(alt.NamedData(name="bounds")).mark_rule(color="var(--soft)", strokeWidth=1.4)
    place: Any = {axis: alt.X("value:Q") if axis == "x" else alt.Y("value:Q")}
    chart: alt.Chart = bounds.encode(**place, strokeDash=dash, tooltip=tips)
    return chart


def _who() -> list[alt.Tooltip]:
    return [alt.Tooltip("method:N"), alt.Tooltip("family:N"), alt.Tooltip("sees:N", title="server sees")]


def _number(column: str, title: str) -> list[alt.Tooltip]:
    return [
        alt.Tooltip(f"{column}:Q", title=title, format=".1f"),
        alt.Tooltip("low:Q", title="95 % interval from", format=".1f"),
        alt.Tooltip("high:Q", title="to", format=".1f"),
        alt.Tooltip("n:Q", title="seeds"),
    ]


def looks(families: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Family -> colour and shape; no two families share both."""
    colours, shapes = theme.SERIES, theme.SHAPES
    return {f: (colours[i % len(colours)], shapes[(i + i // len(colours)) % len(shapes)]) for i, f in enumerate(families)}


def _colour(families: Sequence[str]) -> alt.Color:
    return alt.Color("family:N", scale=_scale(families, 0), legend=_legend())


def _shape(families: Sequence[str]) -> alt.Shape:
    return alt.Shape("family:N", scale=_scale(families, 1), legend=_legend())


def _scale(families: Sequence[str], what: int) -> alt.Scale:
    return alt.Scale(domain=[*families], range=[look[what] for look in looks(families).values()])


def _legend() -> alt.Legend:
    return alt.Legend(title=None, columns=6, symbolOpacity=1)
