"""Which charts a report holds: only those that its runs can fill. The page and the files draw the same ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedsim.report import charts, data, theme
from fedsim.report.data import Study
from fedsim.runs import metrics
from fedsim.runs.results import DRIFT_MEASURES

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

DEFAULT_SERIES = 8  # as many as have a colour
PANELS_IN_FILE = 3  # per row
PIXELS_PER_INCH = 300


@dataclass(frozen=True)
class Select:
    """A choice of rows: those whose column `field` has the chosen value. The text stands for {{field}} in titles."""

    field: str
    label: str
    options: tuple[tuple[str, str], ...]  # value, text


@dataclass(frozen=True)
class Figure:
    """A chart with its data. per_run: data and chart of every run, empty where it has none; otherwise they are of all runs."""

    name: str  # of files and anchors
    section: str
    title: str
    note: str
    rows: Sequence[pd.DataFrame]
    charts: Sequence[alt.TopLevelMixin]
    selects: tuple[Select, ...] = ()
    per_run: bool = False
    wide: bool = False
    limit: int = 0  # series that it shows at most
    _specs: dict[int, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)  # Altair takes its time

    def spec(self, place: int = 0) -> dict[str, Any]:
        """The Vega-Lite specification, without data."""
        if place not in self._specs:
            self._specs[place] = self.charts[place].to_dict()
        return self._specs[place] | {"config": dict(theme.CONFIG), "description": f"{self.title}. {self.note}"}


@dataclass(frozen=True)
class Drawing:
    """A figure for a file: a complete specification in the light colours."""

    name: str
    spec: Mapping[str, Any] = field(repr=False)


def figures(study: Study) -> list[Figure]:
    """All charts of a report, in order."""
    return [*_comparing(study), *_of_one_run(study)]


def _comparing(study: Study) -> Iterator[Figure]:
    several, splits = len(study.series) > 1, len(study.splits) > 1
    on = (Select("split", "Split", tuple((s, split_option(s)) for s in study.splits)),) if splits else ()
    known = _has_intervals(study.settings)
    intervals, bars = (f" {what}: {_spread(study)}." if known else "" for what in ("Bands", "Bars"))
    measured = (Select("metric", "Metric", tuple((m.name, m.axis) for m in study.metrics)),)
    if splits and study.metrics:
        chart: Any = charts.heterogeneity(study.series, study.splits, study.split_title, known)
        note = f"Mean over seeds, by how heterogeneous the clients are.{bars}"
        yield Figure(
            "heterogeneity", "accuracy", "Accuracy against heterogeneity", note, [study.settings], [chart], measured, wide=True
        )
    elif several and study.metrics:
        note = f"Mean over seeds, the best first.{bars}"
        yield Figure(
            "settings",
            "accuracy",
            "Accuracy by method",
            note,
            [study.settings],
            [charts.dots(study.series, known)],
            measured,
            wide=True,
        )
    if study.tasks > 1:
        note = f"Mean over all tasks seen so far, each at the end of a task.{intervals}"
        yield Figure(
            "by_task",
            "accuracy",
            "Accuracy by task learned",
            note,
            [data.by_task(study)],
            [charts.by_task(study.series, known)],
            on,
        )
    rounds = data.by_round(study)
    if (rounds["stage"] == "round").any():
        note = f"Mean over all tasks seen so far at every evaluation; larger marks: after a task's end.{intervals}"
        yield Figure(
            "by_round", "accuracy", "Accuracy by round", note, [rounds], [charts.by_round(study.series, study.tasks, known)], on
        )
    trade_off = data.trade_off(study)
    if several and len(trade_off):
        note = f"Plasticity: accuracy on a task when it was just learned. The best corner is at the lower right.{bars}"
        figure = charts.trade_off(study.series, known)
        yield Figure("forgetting_plasticity", "forgetting", "Forgetting and plasticity", note, [trade_off], [figure], on)
    forgetting = data.forgetting_by_task(study)
    if len(forgetting):
        note = f"How far the accuracy on earlier tasks lies below its best so far, mean over these tasks.{intervals}"
        chart = charts.by_task(study.series, known, metrics.METRICS["forgetting"].axis)
        yield Figure("forgetting", "forgetting", "Forgetting by task learned", note, [forgetting], [chart], on)
    if several and study.tasks > 1:
        note = "Mean over seeds. Row: after which task; column: on which task."
        chart = charts.matrices("series", [s.text for s in study.series], study.tasks)
        frame = data.matrices(study)
        yield Figure(
            "matrices", "forgetting", "Accuracy matrices", note, [frame], [chart], on, wide=True, limit=len(study.series)
        )
    yield from _cost(study, on, bars)
    drift = data.drift(study)
    if len(drift):
        present = set(drift["measure"])
        which = Select("measure", "Measure", tuple((k, metrics.of(f"drift_{k}").axis) for k in DRIFT_MEASURES if k in present))
        of = Select("group", "Tensors", tuple((g, g) for g in dict.fromkeys(drift["group"])))
        note = f"Of the clients of a round, before they are merged.{intervals}"
        chart = charts.drift(study.series, study.tasks, known)
        yield Figure("drift", "clients", "Drift between clients", note, [drift], [chart], (*on, which, of), wide=True)


def _cost(study: Study, on: tuple[Select, ...], bars: str) -> Iterator[Figure]:
    against = data.cost_accuracy(study)
    if len(against) and len(study.series) > 1:
        present = set(against["cost"])
        which = Select("cost", "Cost", tuple((k, metrics.METRICS[k].axis) for k in data.COSTS if k in present))
        note = f"Of a whole run. The best corner is at the upper left.{bars}"
        chart: Any = charts.cost_accuracy(study.series, bool(bars))
        yield Figure("cost_accuracy", "cost", "Accuracy against cost", note, [against], [chart], (*on, which), wide=True)
    frame = data.costs(study)
    titles = {"bytes": ("Bytes by kind", "MB of a whole run"), "seconds": ("Seconds by phase", "Seconds of a whole run")}
    for what, (title, axis) in titles.items():
        part = frame[frame["what"] == what].reset_index(drop=True) if len(frame) else frame
        if len(part):
            kinds = list(dict.fromkeys(part["kind"]))
            chart = charts.cost_bars(study.series, axis, kinds, directions=what == "bytes")
            note = (
                "Sent to clients (↓ down) and by them (↑ up), mean over seeds."
                if what == "bytes"
                else "Wall time, mean over seeds."
            )
            yield Figure(what, "cost", title, note, [part], [chart], on)


def _of_one_run(study: Study) -> Iterator[Figure]:
    places = range(len(study.runs))
    tasks = [len(run.results.accuracy) for run in study.runs]
    held = [data.bubbles(study, i) for i in places]
    served = [data.clients(study, i) for i in places]
    if study.tasks > 1:
        rounds = [data.run_rounds(study, i) for i in places]
        note = "A line begins when its task is learned; larger marks: after a task's end."
        yield _per_run("run_tasks", "Accuracy on every task", note, rounds, _once(charts.run_rounds, tasks), wide=False)
    if any(f["accuracy"].notna().any() for f in served if len(f)):
        note = "Of the final model, on test samples that are distributed over classes as the client's training samples are."
        yield _per_run("client_accuracy", "Accuracy at every client", note, served, [charts.clients()] * len(served), wide=False)
    if study.tasks > 1:
        frames = [data.run_matrices(study, i) for i in places]
        judged = [tuple(dict.fromkeys(f["judged"])) for f in frames]
        note = "Row: after which task; column: on which task. With the task told, only its own classes compete."
        drawn = _once(lambda key: charts.matrices("judged", *key), list(zip(judged, tasks, strict=True)))
        yield _per_run("run_matrix", "Accuracy matrix", note, frames, drawn)
    if any(map(len, held)):
        clients = [int(run.results.config.partition["clients"]) for run in study.runs]
        columns = [1 + int(f["column"].max()) if len(f) else 1 for f in held]
        note = "Area: training samples of a class at a client. Columns: classes, task by task."
        if max(clients) > data.SHOWN_CLIENTS:
            note += f" The first {data.SHOWN_CLIENTS} of {max(clients)} clients."
        shown = [min(k, data.SHOWN_CLIENTS) for k in clients]
        bubbles = _once(lambda key: charts.bubbles(*key), list(zip(shown, columns, strict=True)))
        yield _per_run("partition", "Who has what", note, held, bubbles)
        if max(clients) > data.SHOWN_CLIENTS:
            note = "How many clients hold how many training samples, all tasks together."
            yield _per_run("client_sizes", "Sizes of all clients", note, served, [charts.client_sizes()] * len(served))


def _once(make: Callable[[Any], alt.TopLevelMixin], keys: Sequence[Any]) -> list[alt.TopLevelMixin]:
    """One chart per key; equal keys share it, for charts are slow to make."""
    made = {key: make(key) for key in dict.fromkeys(keys)}
    return [made[key] for key in keys]


def _per_run(
    name: str, title: str, note: str, rows: Sequence[pd.DataFrame], drawn: Sequence[alt.TopLevelMixin], wide: bool = True
) -> Figure:
    return Figure(name, "run", title, note, rows, drawn, per_run=True, wide=wide)


# ---------------------------------------------------------------- for files


def drawings(study: Study, all_figures: Sequence[Figure]) -> Iterator[Drawing]:
    """Every figure as a file: one per split and measure; of those of one run, the best series' first run on every split."""
    for figure in all_figures:
        if figure.per_run:
            for split in study.splits:
                place = first_run(study, split)
                if len(figure.rows[place]):
                    suffix = f"-{_slug(split)}" if len(study.splits) > 1 else ""
                    yield Drawing(f"{figure.name}{suffix}", _filled(figure, place, figure.rows[place], {}))
        else:
            for chosen in _choices(figure.selects):
                rows = figure.rows[0]
                for name, (value, _) in chosen.items():
                    rows = rows[rows[name] == value]
                rows = rows[rows["series"].isin([s.text for s in study.series[: figure.limit or DEFAULT_SERIES]])]
                if len(rows):
                    name = "-".join([figure.name, *(_slug(value) for value, _ in chosen.values())])
                    yield Drawing(name, _filled(figure, 0, rows, {k: text for k, (_, text) in chosen.items()}))


def run_drawing(study: Study) -> Drawing:
    """Accuracy over the rounds of a study's first run: on every task, or on all seen where there is one."""
    if study.tasks > 1:
        rows, chart = data.run_rounds(study, 0), charts.run_rounds(study.tasks)
    else:
        rows, chart = data.by_round(study), charts.by_round(study.series, study.tasks, intervals=False)
    figure = _per_run("run_tasks", "Accuracy by round", "", [rows], [chart])
    return Drawing(figure.name, _filled(figure, 0, rows, {}))


def _filled(figure: Figure, place: int, rows: pd.DataFrame, words: Mapping[str, str]) -> dict[str, Any]:
    spec: dict[str, Any] = _with_words(theme.resolve(figure.spec(place)), words)
    present = set(rows["series"]) if "series" in rows else set()
    spec["datasets"] = {**spec.get("datasets", {}), charts.ROWS: records(rows)}
    spec |= {"columns": _balanced(rows[spec["facet"]["field"]].nunique())} if "facet" in spec else {}
    if step := spec.get("usermeta", {}).get(charts.STEP):
        spec["height"] = step * len(present)
    _limit_legends(spec, present)
    return spec | {"background": "white"}


def _balanced(panels: int) -> int:
    """Columns for so many panels, so that no row has one left over."""
    return math.ceil(panels / math.ceil(panels / PANELS_IN_FILE))


def convert(drawing: Drawing, format: str) -> bytes:
    """The bytes of a figure as svg, png or pdf; no browser is needed."""
    import vl_convert

    spec = dict(drawing.spec)
    if format == "svg":
        svg: str = vl_convert.vegalite_to_svg(spec, vl_version=vega_lite())
        return svg.encode()
    if format == "png":
        png: bytes = vl_convert.vegalite_to_png(spec, vl_version=vega_lite(), ppi=PIXELS_PER_INCH)
        return png
    pdf: bytes = vl_convert.vegalite_to_pdf(spec, vl_version=vega_lite())
    return pdf


def vega_lite() -> str:
    """Major and minor version of Vega-Lite that Altair writes for."""
    import altair

    return ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])


def records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON has them: what is undefined is null."""
    plain = rows.astype(object).where(rows.notna(), None)
    return [{str(k): v for k, v in row.items()} for row in plain.to_dict("records")]


def _with_words(spec: Any, words: Mapping[str, str]) -> Any:
    if isinstance(spec, str):
        return words.get(spec[2:-2], spec) if spec.startswith("{{") and spec.endswith("}}") else spec
    if isinstance(spec, dict):
        return {k: _with_words(v, words) for k, v in spec.items()}
    return [_with_words(v, words) for v in spec] if isinstance(spec, list) else spec


def _limit_legends(node: Any, present: set[str]) -> None:
    """Legends list the series that the file shows."""
    if isinstance(node, dict):
        legend = node.get("legend")
        if isinstance(legend, dict) and node.get("field") == "series":
            legend["values"] = [v for v in legend.get("values", []) if v in present]
        for child in node.values():
            _limit_legends(child, present)
    elif isinstance(node, list):
        for child in node:
            _limit_legends(child, present)


def _choices(selects: Sequence[Select]) -> Iterator[dict[str, tuple[str, str]]]:
    if not selects:
        yield {}
        return
    for option in selects[0].options:
        for rest in _choices(selects[1:]):
            yield {selects[0].field: option, **rest}


def default_split(study: Study) -> str:
    """The middle one."""
    return study.splits[(len(study.splits) - 1) // 2]


def first_run(study: Study, split: str) -> int:
    """Of the best series on a split, the first seed."""
    ranks = {s.text: s.rank for s in study.series}
    places = [i for i, s in enumerate(study.frame["split"]) if s == split]
    return min(places, key=lambda i: (ranks[study.frame["series"].iloc[i]], i))


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._" else "-" for c in text)


def split_option(split: str) -> str:
    """A split as words: its α has a name."""
    try:
        return f"α = {float(split):g}"
    except ValueError:
        return split


def _has_intervals(summary: pd.DataFrame) -> bool:
    return any(not math.isnan(v) for v in summary["from"])


def _spread(study: Study) -> str:
    """What bands and bars are, see `Study.summary`."""
    several = {int(n) > data.FEW for n in study.settings["n"] if n > 1}
    if several == {True}:
        return "95 % intervals of the mean over seeds, as far as the metric can go"
    few = f"of {data.FEW} seeds or fewer from the lowest to the highest"
    return few if several == {False} else f"95 % intervals of the mean over seeds, as far as the metric can go; {few}"
