"""One function per chart: an Altair chart over data named "rows", whose columns `fedsim.report.data` describes.

A chart holds no data, so that the page can hand it other rows: of another split, measure or run. `{{...}}` in a title follows.
Colours stand for series (see `theme`); series that differ in more than the method also differ in shape and dashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from fedsim.report import theme
from fedsim.report.data import SEEDS, Series

Tooltip = list[alt.Tooltip]
ROWS = "rows"
WIDTH = 560  # with axes, in pixels; the page sets its own
HEIGHT = 300
HEAT: Any = "viridis"
STEP = "step"  # pixels per series, in `usermeta`: whoever shows fewer series makes the chart less high
FIT = alt.AutoSizeParams(type="fit-x", contains="padding")
CELL_TEXT = 12  # beyond so many tasks, the cells of a matrix are too small for numbers


def heterogeneity(series: Sequence[Series], splits: Sequence[str], title: str, intervals: bool) -> alt.LayerChart:
    """A metric against the heterogeneity of the clients: mean, and interval over seeds or the seeds themselves."""
    x = alt.X(
        "split:N", sort=list(splits), title=title, axis=alt.Axis(labelAngle=0, ticks=True), scale=alt.Scale(paddingOuter=0.2)
    )
    aside = [alt.ExprRef(expr=f"bandwidth('x') / 2 {side} 10") for side in "-+"]  # so that intervals do not hide each other
    offset: Any = alt.XOffset("series:N", scale=alt.Scale(range=aside)) if len(series) > 1 else alt.Undefined
    base = _base().encode(x=x, xOffset=offset, color=_colour(series), opacity=_opacity(series))
    mean = alt.Y("mean:Q", title="{{metric}}", scale=alt.Scale(zero=False, nice=True))
    tips = [*_who(), *_numbers("{{metric}}")]
    return _layer(
        series,
        *([base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("from:Q", title="{{metric}}"), y2="to:Q")] if intervals else []),
        *([_seeds(base).encode(y=alt.Y("value:Q", title="{{metric}}"))] if intervals else []),
        base.mark_line().encode(y=mean, strokeDash=_dash(series)),
        base.mark_point(size=70).encode(y=mean, shape=_shape(series), tooltip=tips),
    )


def dots(series: Sequence[Series], intervals: bool) -> alt.LayerChart:
    """A metric of every series on one split, the best first: mean, and interval over seeds or the seeds themselves."""
    y = alt.Y("series:N", sort=[s.text for s in series], title=None, axis=alt.Axis(labelLimit=320, labelColor="var(--ink)"))
    base = _base().encode(y=y, color=_colour(series, legend=False), opacity=_opacity(series, legend=False))
    mean = alt.X("mean:Q", title="{{metric}}", axis=alt.Axis(grid=True), scale=alt.Scale(zero=False))
    chart = _layer(
        series,
        *([base.mark_rule(strokeWidth=2).encode(x=alt.X("from:Q", title="{{metric}}"), x2="to:Q")] if intervals else []),
        *([_seeds(base).encode(x=alt.X("value:Q", title="{{metric}}"))] if intervals else []),
        base.mark_point(size=90).encode(x=mean, shape=_shape(series, legend=False), tooltip=[*_who(), *_numbers("{{metric}}")]),
        legend=False,
    )
    return chart.properties(height=26 * len(series), usermeta={STEP: 26})


def by_task(series: Sequence[Series], intervals: bool, title: str = "Mean accuracy on tasks seen (%)") -> alt.LayerChart:
    """A curve over the tasks learned: of the mean accuracy over the tasks seen, or of forgetting."""
    base = _base().encode(
        x=alt.X("task:O", title="After task", axis=alt.Axis(labelAngle=0, ticks=True)),
        color=_colour(series),
        opacity=_opacity(series),
    )
    mean = alt.Y("mean:Q", title=title, scale=alt.Scale(zero=False))
    tips = [*_who(), alt.Tooltip("name:N", title="after task"), *_numbers(title)]
    return _layer(
        series,
        *_band(base, series, intervals),
        base.mark_line().encode(y=mean, strokeDash=_dash(series)),
        base.mark_point().encode(y=mean, shape=_shape(series), tooltip=tips),
    )


def by_round(series: Sequence[Series], tasks: int, intervals: bool) -> alt.LayerChart:
    """Mean accuracy over the tasks seen at every evaluation; larger marks at a task's end, after tasks were merged."""
    base = _base().encode(x=_time(tasks), color=_colour(series), opacity=_opacity(series))
    mean = alt.Y("mean:Q", title="Mean accuracy on tasks seen (%)", scale=alt.Scale(zero=False))
    tips = [*_who(), *_moment(), *_numbers("accuracy (%)")]
    size: Any = alt.when(alt.datum.stage == "task_end").then(alt.value(60)).otherwise(alt.value(16))
    return _layer(
        series,
        _ends(tasks),
        *_band(base, series, intervals),
        base.mark_line(strokeWidth=1.5).encode(y=mean, strokeDash=_dash(series)),
        base.mark_point().encode(y=mean, size=size, shape=_shape(series), tooltip=tips),
    )


def trade_off(series: Sequence[Series], intervals: bool) -> alt.LayerChart:
    """Plasticity against forgetting, with both intervals: best is low and to the right."""
    return _scatter(series, "Plasticity (%)", "Forgetting (%)", intervals)


def cost_accuracy(series: Sequence[Series], intervals: bool) -> alt.LayerChart:
    """What a run costs against the accuracy that it buys: best is high and to the left."""
    return _scatter(series, "{{cost}}", "Final average accuracy (%)", intervals)


def cost_bars(series: Sequence[Series], title: str, kinds: Sequence[str], directions: bool) -> alt.LayerChart:
    """Where the cost of a run goes, mean over seeds. Bytes have two bars, down and up."""
    y = alt.Y("series:N", sort=[s.text for s in series], title=None, axis=alt.Axis(labelLimit=240, labelColor="var(--ink)"))
    offset: Any = (
        alt.YOffset("direction:N", sort=["down", "up"], scale=alt.Scale(paddingInner=0.15)) if directions else alt.Undefined
    )
    base = _base().encode(y=y, yOffset=offset)
    tips: Tooltip = [alt.Tooltip("series:N"), alt.Tooltip("split:N", title="split"), alt.Tooltip("kind:N")]
    tips += [alt.Tooltip("direction:N")] if directions else []
    bars = base.mark_bar(stroke="var(--surface)", strokeWidth=1).encode(
        x=alt.X("amount:Q", title=title, axis=alt.Axis(grid=True)),
        color=alt.Color(
            "kind:N",
            sort=list(kinds),
            scale=alt.Scale(domain=list(kinds), range=_ramp(len(kinds))),
            legend=alt.Legend(title=None, columns=4),  # half the page wide
        ),
        order=alt.Order("place:Q"),
        tooltip=[*tips, alt.Tooltip("amount:Q", title=title, format=",.3~f"), alt.Tooltip("n:Q", title="seeds")],
    )
    label = (
        "(datum.direction == 'down' ? '↓ ' : '↑ ') + format(datum.total, ',.3~s')"
        if directions
        else "format(datum.total, ',.3~s')"
    )
    totals = (
        base.transform_aggregate(total="sum(amount)", groupby=["series", "direction"])
        .transform_calculate(label=label)
        .mark_text(align="left", dx=5, color="var(--soft)", fontSize=10)
        .encode(x="total:Q", text="label:N")
    )
    step = 34 if directions else 26
    room = base.mark_point(opacity=0, tooltip=None).encode(x="max(room):Q")  # for the numbers at the ends
    chart: alt.LayerChart = _over(room, bars, totals).properties(
        width=WIDTH, autosize=FIT, height=step * len(series), usermeta={STEP: step}
    )
    return chart


def drift(series: Sequence[Series], tasks: int, intervals: bool) -> alt.LayerChart:
    """How far the clients of a round go, or how much they agree, over the rounds of the stream."""
    base = _base().encode(x=_time(tasks), color=_colour(series), opacity=_opacity(series))
    mean = alt.Y("mean:Q", title="{{measure}}", scale=alt.Scale(zero=False))
    tips = [*_who(), *_moment(), *_numbers("{{measure}}", ".3f")]
    return _layer(
        series,
        _ends(tasks),
        *_band(base, series, intervals),
        base.mark_line(strokeWidth=1.5).encode(y=mean, strokeDash=_dash(series)),
        base.mark_point(size=22).encode(y=mean, shape=_shape(series), tooltip=tips),
    )


def run_rounds(tasks: int) -> alt.LayerChart:
    """Accuracy on every task of one run, from its first evaluation to the end of the stream."""
    base = _base().encode(
        x=_time(tasks),
        y=alt.Y("accuracy:Q", title="Accuracy on a task (%)", scale=alt.Scale(zero=False)),
        color=alt.Color("tested:O", title="task", scale=_order(tasks), legend=alt.Legend(title="task")),
    )
    tips = [
        alt.Tooltip("name:N", title="tested on task"),
        *_moment(),
        alt.Tooltip("accuracy:Q", title="accuracy (%)", format=".1f"),
    ]
    size: Any = alt.when(alt.datum.stage == "task_end").then(alt.value(50)).otherwise(alt.value(14))
    chart: alt.LayerChart = _over(
        _ends(tasks), base.mark_line(strokeWidth=1.5), base.mark_point().encode(size=size, tooltip=tips)
    ).properties(width=WIDTH, autosize=FIT, height=HEIGHT)
    return chart


def matrices(by: str, titles: Sequence[str], tasks: int, columns: int = 2, width: int = 240) -> alt.FacetChart:
    """Accuracy matrices side by side, one per level of `by`: row i after task i, column j on the test samples of task j."""
    base = alt.Chart().encode(
        x=alt.X("tested:O", title="Tested on task", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("after:O", title="After task", axis=alt.Axis()),
    )
    tips = [
        alt.Tooltip(f"{by}:N"),
        alt.Tooltip("after_name:N", title="after task"),
        alt.Tooltip("tested_name:N", title="tested on task"),
        *(_numbers("accuracy (%)", ".1f") if by == "series" else [alt.Tooltip("mean:Q", title="accuracy (%)", format=".1f")]),
    ]
    cells = base.mark_rect().encode(
        color=alt.Color(
            "mean:Q",
            scale=alt.Scale(scheme=HEAT, domain=[0, 100]),
            legend=alt.Legend(title="accuracy (%)", gradientLength=220, values=[0, 25, 50, 75, 100]),
        ),
        tooltip=tips,
    )
    layers: list[alt.Chart] = [cells]
    if tasks <= CELL_TEXT:
        ink: Any = alt.when(alt.datum.mean > 55).then(alt.value("#16191f")).otherwise(alt.value("#ffffff"))
        layers.append(base.mark_text(fontSize=11 if tasks <= 8 else 9).encode(text=alt.Text("mean:Q", format=".0f"), color=ink))
    inner = alt.layer(*layers, data=_rows()).properties(width=width, height=min(width, max(110, 30 * tasks)))
    facet = alt.Facet(f"{by}:N", title=None, sort=list(titles), header=alt.Header(labelLimit=width + 30))
    chart: alt.FacetChart = inner.facet(facet, columns=columns)
    return chart


def bubbles(clients: int, columns: int) -> alt.LayerChart:
    """Who has what: an area in proportion to the training samples of a class at a client; classes in the order of the tasks."""
    step = 18 if clients <= 30 else 12
    diameter = min(step * 1.15, max(7.0, 1.4 * 900 / max(1, columns)))

    def x(column: str) -> alt.X:
        return alt.X(column, axis=None, scale=alt.Scale(domain=[-0.8, columns - 0.2], nice=False))

    y = alt.Y("client:O", title="Client", axis=alt.Axis(grid=True, values=list(range(0, clients, 1 if clients <= 30 else 5))))
    tips = [
        alt.Tooltip("client:O"),
        alt.Tooltip("class_name:N", title="class"),
        alt.Tooltip("task_name:N", title="task"),
        alt.Tooltip("samples:Q", title="training samples"),
    ]
    dots = (
        _base()
        .mark_point(shape="circle", filled=True, opacity=0.85, strokeWidth=0)
        .encode(
            x=x("column:Q"),
            y=y,
            size=alt.Size(
                "samples:Q",
                scale=alt.Scale(range=[0, diameter**2 * 0.785], zero=True),
                legend=alt.Legend(title="training samples", symbolFillColor="var(--soft)", symbolStrokeColor="transparent"),
            ),
            color=alt.Color("parity:N", scale=alt.Scale(domain=[0, 1], range=["var(--c1)", "var(--c2)"]), legend=None),
            tooltip=tips,
        )
        .transform_calculate(parity="datum.task % 2")
    )
    of_task: list[Any] = ["task", "task_name"]
    names = (
        _base()
        .transform_aggregate(first="min(column)", last="max(column)", groupby=of_task)
        .transform_calculate(middle="(datum.first + datum.last) / 2", parity="datum.task % 2")
        .mark_text(baseline="bottom", y=-6, fontSize=11, limit=max(30, 880 // max(1, columns // 20 + 4)))
        .encode(
            x=x("middle:Q"),
            text="task_name:N",
            color=alt.Color("parity:N", scale=alt.Scale(domain=[0, 1], range=["var(--c1)", "var(--c2)"]), legend=None),
        )
    )
    edges = (
        _base()
        .transform_aggregate(last="max(column)", groupby=of_task)
        .transform_calculate(edge="datum.last + 0.5")
        .mark_rule(color="var(--rule)")
        .encode(x=x("edge:Q"))
    )
    chart: alt.LayerChart = _over(edges, dots, names).properties(width=WIDTH, autosize=FIT, height=step * clients)
    return chart


def clients() -> alt.Chart:
    """What a client holds against how well the final model serves it, on test samples that are distributed as its own are."""
    tips = [
        alt.Tooltip("client:O"),
        alt.Tooltip("samples:Q", title="training samples"),
        alt.Tooltip("classes:Q", title="classes held"),
        alt.Tooltip("accuracy:Q", title="accuracy (%)", format=".1f"),
    ]
    chart: alt.Chart = (
        _base()
        .mark_point(shape="circle", color="var(--c1)", opacity=0.8, size=60)
        .encode(
            x=alt.X(
                "samples:Q",
                title="Training samples of the client",
                axis=alt.Axis(grid=True, tickCount=8),
                scale=alt.Scale(zero=False, padding=10),
            ),
            y=alt.Y("accuracy:Q", title="Accuracy at the client (%)", scale=alt.Scale(zero=False, padding=10)),
            tooltip=tips,
        )
        .properties(width=WIDTH, autosize=FIT, height=HEIGHT)
    )
    return chart


def client_sizes() -> alt.Chart:
    """How many clients hold how many training samples."""
    chart: alt.Chart = (
        _base()
        .mark_bar(color="var(--c1)")
        .encode(
            x=alt.X("samples:Q", bin=alt.Bin(maxbins=30), title="Training samples of the client"),
            y=alt.Y("count():Q", title="Clients"),
            tooltip=[
                alt.Tooltip("samples:Q", bin=alt.Bin(maxbins=30), title="samples"),
                alt.Tooltip("count():Q", title="clients"),
            ],
        )
        .properties(width=WIDTH, autosize=FIT, height=220)
    )
    return chart


# ---------------------------------------------------------------- parts


def _rows() -> Any:
    return alt.NamedData(name=ROWS)


def _base() -> alt.Chart:
    chart: alt.Chart = alt.Chart(_rows())
    return chart


def _over(*layers: alt.Chart) -> Any:
    """Altair's own types cannot tell that a chart of layers is no facet."""
    return alt.layer(*layers)


def _layer(series: Sequence[Series], *layers: alt.Chart, legend: bool = True) -> alt.LayerChart:
    """Charts over each other, with the legend as a switch: a click brings a series forward, shift adds one."""
    chart: alt.LayerChart = _over(*layers).properties(width=WIDTH, autosize=FIT, height=HEIGHT)
    if len(series) > 1:
        chart = chart.add_params(_picked(legend))
    return chart


def _picked(legend: bool) -> alt.Parameter:
    bound: Any = {"bind": "legend"} if legend else {}
    return alt.selection_point(name="picked", fields=["series"], **bound)


def _scatter(series: Sequence[Series], x: str, y: str, intervals: bool) -> alt.LayerChart:
    base = _base().encode(color=_colour(series), opacity=_opacity(series))
    at_x = alt.X("x:Q", title=x, axis=alt.Axis(grid=True, tickCount=8), scale=alt.Scale(zero=False, padding=14))
    at_y = alt.Y("y:Q", title=y, scale=alt.Scale(zero=False, padding=14))
    tips = [
        *_who(),
        alt.Tooltip("x:Q", title=x, format=",.2f"),
        alt.Tooltip("y:Q", title=y, format=".2f"),
        alt.Tooltip("n:Q", title="seeds"),
    ]
    rule = base.mark_rule(strokeWidth=1.5)
    across = rule.encode(x=alt.X("x_from:Q", title=x), x2="x_to:Q", y=at_y)
    along = rule.encode(x=at_x, y=alt.Y("y_from:Q", title=y), y2="y_to:Q")
    return _layer(
        series,
        *([across, along] if intervals else []),
        base.mark_point(size=110).encode(x=at_x, y=at_y, shape=_shape(series), tooltip=tips),
    )


def _band(base: alt.Chart, series: Sequence[Series], intervals: bool) -> list[alt.Chart]:
    """The interval around a curve, if there is one."""
    if not intervals:
        return []
    opacity: Any = alt.value(0.12 if len(series) <= 4 else 0.07)
    if len(series) > 1:
        opacity = alt.when(_picked(True)).then(opacity).otherwise(alt.value(0.01))
    return [base.mark_area(line=False, strokeWidth=0).encode(y="from:Q", y2="to:Q", opacity=opacity)]


def _seeds(base: alt.Chart) -> alt.Chart:
    """The runs themselves, where they are few."""
    folded = base.transform_fold(list(SEEDS), as_=["seed", "value"]).transform_filter("isValid(datum.value)")
    chart: alt.Chart = folded.mark_point(size=16, filled=True, strokeWidth=0, shape="circle")
    return chart


def _ends(tasks: int) -> alt.Chart:
    """Where a task ends and the next begins."""
    ends = alt.Chart(alt.InlineData(values=[{"end": t} for t in range(1, tasks)], name="ends"))
    rules: alt.Chart = ends.mark_rule(strokeDash=[2, 3]).encode(x="end:Q")
    return rules


def _time(tasks: int) -> alt.X:
    """The stream as an axis: every task is as wide as every other."""
    every = max(1, round(tasks / 20))
    middles = [t + 0.5 for t in range(0, tasks, every)]
    axis = alt.Axis(values=middles, labelExpr="'task ' + floor(datum.value)", ticks=False)
    return alt.X("position:Q", title="Rounds, task by task", axis=axis, scale=alt.Scale(domain=[0, tasks], nice=False))


def _order(tasks: int) -> alt.Scale:
    """Tasks in the order of the stream."""
    return alt.Scale(domain=list(range(tasks)), range=_ramp(tasks))


def _ramp(count: int) -> list[str]:
    """Steps of the ramp, as far apart as there is room for."""
    return [f"var(--k{round(i * (theme.STEPS - 1) / max(1, count - 1)) + 1})" for i in range(count)]


def _who() -> Tooltip:
    return [alt.Tooltip("series:N"), alt.Tooltip("split:N", title="split")]


def _moment() -> Tooltip:
    return [alt.Tooltip("task:O", title="task"), alt.Tooltip("round:O", title="round"), alt.Tooltip("stage:N")]


def _numbers(title: str, digits: str = ".2f") -> Tooltip:
    return [
        alt.Tooltip("mean:Q", title=title, format=digits),
        alt.Tooltip("std:Q", title="standard deviation", format=digits),
        alt.Tooltip("low:Q", title="95 % interval from", format=digits),
        alt.Tooltip("high:Q", title="to", format=digits),
        alt.Tooltip("n:Q", title="seeds"),
    ]


def _opacity(series: Sequence[Series], legend: bool = True) -> Any:
    if len(series) < 2:
        return alt.value(1)
    return alt.when(_picked(legend)).then(alt.value(1)).otherwise(alt.value(0.12))


def _colour(series: Sequence[Series], legend: bool = True) -> alt.Color:
    colours = colours_of(series)
    return alt.Color("series:N", scale=_scale(series, [colours[s.method] for s in series]), legend=_legend(series, legend))


def _shape(series: Sequence[Series], legend: bool = True) -> alt.Shape:
    levels = list(dict.fromkeys(s.rest for s in series))
    by_method = len(levels) < 2
    levels = list(dict.fromkeys(s.method for s in series)) if by_method else levels
    marks = [theme.SHAPES[levels.index(s.method if by_method else s.rest) % len(theme.SHAPES)] for s in series]
    return alt.Shape("series:N", scale=_scale(series, marks), legend=_legend(series, legend))


def _dash(series: Sequence[Series]) -> Any:
    levels = list(dict.fromkeys(s.rest for s in series))
    if len(levels) < 2:
        return alt.Undefined
    dashes = [theme.DASHES[levels.index(s.rest) % len(theme.DASHES)] for s in series]
    return alt.StrokeDash("series:N", scale=_scale(series, dashes), legend=_legend(series, True))


def _scale(series: Sequence[Series], values: Sequence[Any]) -> alt.Scale:
    return alt.Scale(domain=[s.text for s in series], range=list(values))


def _legend(series: Sequence[Series], wanted: bool) -> Any:
    """Which series it lists, the page decides; `columns` keeps long names from running out of it."""
    if not wanted or len(series) < 2:
        return None
    longest = max(len(s.text) for s in series)
    return alt.Legend(
        title=None, values=[s.text for s in series], columns=max(1, 88 // (longest + 5)), symbolOpacity=1, symbolStrokeWidth=0
    )


def colours_of(series: Sequence[Series]) -> dict[str, str]:
    """Method -> colour: the eight best have one of their own, all others share one."""
    methods = list(dict.fromkeys(s.method for s in series))
    return {m: theme.SERIES[i] if i < len(theme.SERIES) else theme.OTHER for i, m in enumerate(methods)}
