"""The file: filters, bounds, the table, the fronts, and a fold per method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedsim.report import document, theme
from fedsim.report.document import ROUNDING, counted, esc, pack
from fedsim.report.figures import split_option
from fedsim.report.ledger import charts
from fedsim.report.ledger.methods import SEES, Method
from fedsim.report.ledger.rows import COLUMNS, Difference, Ledger, Mean, Setting, processors
from fedsim.report.ledger.study import ANY
from fedsim.runs.bounds import LITTLE, Bounds
from fedsim.runs.metrics import HEADLINE
from fedsim.runs.metrics import of as metric_of

HEADS: Mapping[str, str] = dict(
    zip(
        COLUMNS,
        (
            *("Final average accuracy", "Average incremental accuracy", "Forgetting", "Task told", "Worst client"),
            *("MB up", "MB down", "MB stored per client", "Seconds", "Peak memory, MB"),
        ),
        strict=True,
    )
)
COSTS = COLUMNS[COLUMNS.index("bytes_up") :]
CURVES: Mapping[str, tuple[str, str]] = {  # kind -> what the axes say
    "curve": ("After task", "Accuracy on tasks seen (%)"),
    "final": ("Task", "Accuracy after the last task (%)"),
}
MEGABYTES = ("bytes_up", "bytes_down", "stored_mean", "peak_memory")


def render(ledger: Ledger) -> str:
    """The whole file."""
    study = ledger.study
    families = _families(ledger)
    sections = {"table": _table(ledger), "charts": _charts(ledger), "bounds": _bounds(ledger), "methods": _methods(ledger)}
    sections |= {"published": _published(study.published)} if study.published else {}
    parts = {
        "kind": "Ledger",
        "first": "table",
        "unscripted": "The charts and filters need JavaScript; the tables and the methods below do not.",
        "title": esc(study.title),
        "lead": esc(study.lead),
        "tiles": _tiles(ledger),
        "notices": _notices(ledger),
        "links": "".join(f'<a href="#{name}">{name.capitalize()}</a>' for name in sections),
        "controls": _filters(ledger, families),
        "sections": "\n".join(sections.values()),
    }
    return document.written("ledger", parts, _data(ledger, families))


def _families(ledger: Ledger) -> list[str]:
    """In the order of the table of families; a family of one's own comes after."""
    known = dict.fromkeys(ledger.study.families.values())
    present = {method.family for method in ledger.methods}
    return [*(f for f in known if f in present), *sorted(present - known.keys())]


# ---------------------------------------------------------------- head


def _tiles(ledger: Ledger) -> str:
    seeds = sorted({setting.seeds for setting in ledger.settings})
    tiles = {
        "methods": str(len(ledger.methods)),
        "streams": str(len(ledger.splits)),
        "runs": str(ledger.runs),
        "seeds per setting": str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]}–{seeds[-1]}",
    }
    return f'<ul class="tiles">{"".join(f"<li><b>{esc(v)}</b><span>{esc(k)}</span></li>" for k, v in tiles.items())}</ul>'


def _notices(ledger: Ledger) -> str:
    """What a reader must know before the numbers."""
    lines = [
        f"<li><b>{esc(stream.name)}</b>, not shown: {esc(line)}</li>" for stream in ledger.study.streams for line in stream.absent
    ]
    for stream in ledger.study.streams:
        found = processors(stream.frame)
        if len(found) > 1:
            told = f"has runs of several processors, {ROUNDING}: {counted(found)}."
            lines.append(f"<li><b>{esc(stream.name)}</b> {esc(told)}</li>")
    for (name, split), bounds in ledger.bounds.items():
        if bounds.headroom is not None and bounds.headroom < LITTLE:
            told = f"joint training is {_points(bounds.headroom)} points above the nearest class mean of the bare backbone"
            lines.append(f"<li><b>{esc(name)}, {esc(split_option(split))}</b> says little about methods: {told}.</li>")
    return f'<section class="notice" aria-label="Notices"><ul>{"".join(lines)}</ul></section>' if lines else ""


def _filters(ledger: Ledger, families: Sequence[str]) -> str:
    streams = [(stream, stream) for stream in ledger.splits]
    splits = [(s, split_option(s)) for s in dict.fromkeys(s for found in ledger.splits.values() for s in found)]
    seen = [word for word in SEES if any(word in method.sees for method in ledger.methods)]
    everything = ("", "all")
    return (
        '<div class="filters">'
        + _select("stream", "Stream", streams)
        + _select("split", "Split", splits)
        + _select("family", "Family", [everything, *((f, f) for f in families)])
        + _select("sees", "Server sees", [everything, *((word, word) for word in seen)])
        + '<input type="search" id="search" aria-label="Search methods" placeholder="Search methods"></div>'
    )


def _select(name: str, label: str, options: Sequence[tuple[str, str]]) -> str:
    inner = "".join(f'<option value="{esc(value)}">{esc(text)}</option>' for value, text in options)
    return f'<label>{esc(label)} <select id="{name}">{inner}</select></label>'


# ---------------------------------------------------------------- table


def _table(ledger: Ledger) -> str:
    baselines = ledger.study.baselines
    heads = [_head("Method", "ascending", "text")]
    heads += [_head("Seeds", "descending"), _head(HEADS[HEADLINE], "descending")]
    heads += [_head(f"Difference to {baseline}", "descending") for baseline in baselines]
    rest = [c for c in ledger.columns if c != HEADLINE]
    heads += [_head(HEADS[c], "descending" if metric_of(c).sign > 0 else "ascending") for c in rest]
    heads += [_head(title, "ascending", "text") for title in ("Family", "Server sees")]
    methods = {method.name: method for method in ledger.methods}
    rows = [
        _row(methods[setting.method], setting, split, baselines, rest, _over(ledger, setting, split))
        for stream, splits in ledger.splits.items()
        for split in splits
        for setting in ledger.shown(stream, split)
    ]
    caption = (
        "Accuracies in %, mean ± standard deviation over seeds, below it the 95 % interval of the mean. Differences in points, "
        "run by run on the same split and seed, with the 95 % interval of their mean. Bytes are of all clients over the whole "
        "run; seconds are the processors' where every setting has runs that counted them, else the wall's. A click on a heading "
        "sorts."
    )
    table = _scrolled("Table of methods", caption, "".join(heads), "".join(rows))
    count = '<p class="lead" id="count" role="status"></p>'
    button = '<button type="button" class="control" id="csv">Shown rows as CSV</button>'
    return _section("table", _lines_of_bounds(ledger) + table + count, button)


def _section(name: str, content: str, tools: str = "") -> str:
    return f'<section id="{name}"><div class="head2"><h2>{name.capitalize()}</h2>{tools}</div>{content}</section>'


def _scrolled(label: str, caption: str, heads: str, rows: str) -> str:
    """A table that scrolls by itself, with its first column in place; what it says is told above it."""
    told = f"told-{label.split()[-1]}"
    table = f'<table aria-describedby="{told}"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    region = f'<div class="scroll pinned" tabindex="0" role="region" aria-label="{esc(label)}">{table}</div>'
    return f'<p class="told" id="{told}">{esc(caption)}</p>{region}'


def _lines_of_bounds(ledger: Ledger) -> str:
    """Beside the table: the bounds of the setting that it shows."""
    return "".join(
        f'<ul class="bounds" aria-label="Bounds" {_where(stream, split)}>{_items(stream, split, bounds)}</ul>'
        for (stream, split), bounds in ledger.bounds.items()
    )


def _where(stream: str, split: str) -> str:
    """What the script filters by."""
    return f'data-stream="{esc(stream)}" data-split="{esc(split)}"'


def _items(stream: str, split: str, bounds: Bounds) -> str:
    over = bounds.over and f", {bounds.over}"
    told = {f"{title}{over if name == 'joint' else ''}": _bound(bounds, name) for name, title in charts.BOUNDS.items()}
    told[f"headroom (joint training − nearest class mean{over})"] = bounds.headroom
    known = "".join(f"<li>{esc(title)} <b>{_points(value)}</b></li>" for title, value in told.items() if _known(value))
    return f"<li>{esc(stream)}, {esc(split_option(split))}:</li>{known}" if known else ""


def _bound(bounds: Bounds, name: str) -> float | None:
    value: float | None = bounds.joint_micro if name == "joint" and bounds.over else getattr(bounds, name)
    return value


def _head(title: str, first: str, kind: str = "") -> str:
    return f'<th scope="col" class="{kind}" data-first="{first}"><button type="button">{esc(title)}</button></th>'


def _over(ledger: Ledger, setting: Setting, split: str) -> str:
    """What the accuracy of joint training is taken over, where it is not the stream's tasks."""
    is_joint = setting.method == ledger.study.bounds.get("joint")
    return ledger.bounds[setting.stream, split].over if is_joint else ""


def _row(method: Method, setting: Setting, split: str, baselines: Sequence[str], rest: Sequence[str], over: str) -> str:
    sees = "; ".join(method.sees) or "–"
    link = f'<a href="#method-{esc(method.name)}">{esc(method.name)}</a>'
    cells = [
        f'<th scope="row" class="text" data-value="{esc(method.name)}">{link}</th>',
        f'<td data-value="{setting.seeds}">{setting.seeds}</td>',
        _accuracy(HEADLINE, setting.means[HEADLINE], setting.seeds, over),
        *(_difference(setting.differences.get(baseline), setting.seeds) for baseline in baselines),
        *(_cost(c, setting.means[c]) if c in COSTS else _accuracy(c, setting.means[c], setting.seeds) for c in rest),
        *(f'<td class="text" data-value="{esc(text)}">{esc(text)}</td>' for text in (method.family, sees)),
    ]
    return f'<tr {_where(setting.stream, split)} data-method="{esc(method.name)}">{"".join(cells)}</tr>'


def _accuracy(column: str, mean: Mean, seeds: int, over: str = "") -> str:
    if not mean.n:
        return _NONE
    main = f"{mean.mean:.1f}" + ("" if math.isnan(mean.std) else f" ± {mean.std:.1f}")
    low, high = metric_of(column).cut(mean.low, mean.high)
    note = "" if math.isnan(mean.low) else f"<small>{low:.1f} to {high:.1f}</small>"
    note += f"<small>of {mean.n} seeds</small>" if mean.n != seeds else ""
    note += f"<small>{over}</small>" if over else ""
    return _value(mean.mean, main + note)


def _difference(difference: Difference | None, seeds: int) -> str:
    if difference is None:
        return _NONE
    low, high = metric_of(HEADLINE).cut_difference(difference.low, difference.high)
    note = "" if math.isnan(difference.low) else f"<small>{low:+.1f} to {high:+.1f}</small>"
    note += f"<small>of {difference.n} pair{'s' if difference.n > 1 else ''}</small>" if difference.n != seeds else ""
    return _value(difference.mean, f"{difference.mean:+.1f}{note}")


def _cost(column: str, mean: Mean) -> str:
    if not mean.n:
        return _NONE
    value = mean.mean / 1e6 if column in MEGABYTES else mean.mean
    return _value(value, f"{value:,.0f}" if value >= 100 else f"{value:.3g}")


def _value(value: float, shown: str) -> str:
    return f'<td data-value="{value:.6g}">{shown.replace("-", "−")}</td>'


_NONE = '<td data-value="">–</td>'


def _known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _points(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.1f}".replace("-", "−")


# ---------------------------------------------------------------- charts and bounds


def _charts(ledger: Ledger) -> str:
    cards = [
        _card("ranking", "All methods", "Mean over seeds, 95 % interval, the best first; lines are the stream's bounds."),
        *(_card(name, title, note) for name, (title, note, _) in _fronts(ledger).items()),
    ]
    return _section("charts", f'<div class="grid">{"".join(cards)}</div>')


def _fronts(ledger: Ledger) -> dict[str, tuple[str, str, str]]:
    note = "The line joins the methods that none beats in both; joint training, which is not federated, is a line, not a point."
    present = {"bytes": "bytes_up", "seconds": "seconds"}
    titles = {
        "bytes": ("Accuracy against bytes", "Bytes up and down (log)"),
        "seconds": ("Accuracy against seconds", "Seconds (log)"),
    }
    return {name: (titles[name][0], note, titles[name][1]) for name, column in present.items() if column in ledger.columns}


def _card(name: str, title: str, note: str) -> str:
    return (
        f'<figure class="card wide" id="figure-{name}"><div class="title"><h3>{esc(title)}</h3>'
        f'<span class="chosen badge"></span></div><div class="chart" role="img" aria-label="{esc(f"{title}. {note}")}"></div>'
        f'<figcaption>{esc(note)}</figcaption><div class="tools"><button type="button" data-save="svg" '
        f'aria-label="{esc(title)} as SVG">SVG</button><button type="button" data-save="png" '
        f'aria-label="{esc(title)} as PNG">PNG</button></div></figure>'
    )


def _bounds(ledger: Ledger) -> str:
    """Of every stream and split: what a number there is worth."""
    notes = {stream.name: stream.note for stream in ledger.study.streams}
    known = [title[0].upper() + title[1:] for title in charts.BOUNDS.values()]
    heads = ["Stream", "Split", *known, "Headroom", "Order over seeds, τ"]
    rows = []
    for (stream, split), bounds in ledger.bounds.items():
        values = {name: _bound(bounds, name) for name in charts.BOUNDS} | {"headroom": bounds.headroom}
        tau = ledger.agreement[stream, split]
        over = f"<small>{bounds.over}</small>" if bounds.over else ""
        cells = "".join(f"<td>{_points(v)}{over if n in ('joint', 'headroom') else ''}</td>" for n, v in values.items())
        cells += "<td>–</td>" if math.isnan(tau) else f"<td>{tau:.2f}</td>".replace("-", "−")
        note = f"<small>{esc(notes[stream])}</small>" if notes[stream] else ""
        head = f'<th scope="row" class="text">{esc(stream)}{note}</th>'
        rows.append(f'<tr>{head}<td class="text">{esc(split_option(split))}</td>{cells}</tr>')
    caption = (
        "Final average accuracy in %: guessing; the nearest class mean of the bare backbone, for which nothing is trained; ridge "
        "regression on random features, in closed form; training on all data at once. Headroom: joint training minus nearest "
        "class mean, in points; both over all test samples where tasks have unequal test sets. A stream with less than "
        f"{LITTLE:g} says little about methods. Order over seeds: Kendall's τ of the methods' accuracies, mean over pairs of "
        "seeds; 1 where every seed puts them in the same order."
    )
    columns = "".join(f'<th scope="col" class="{"text" if i < 2 else ""}">{esc(h)}</th>' for i, h in enumerate(heads))
    return _section("bounds", _scrolled("Bounds of the streams", caption, columns, "".join(rows)))


# ---------------------------------------------------------------- methods


def _methods(ledger: Ledger) -> str:
    folds = "".join(_method(method, ledger) for method in ledger.methods)
    seen = "".join(f"<dt>{esc(word)}</dt><dd>{esc(text)}</dd>" for word, text in SEES.items())
    return _section("methods", f'<dl aria-label="What the server sees">{seen}</dl>{folds}')


def _method(method: Method, ledger: Ledger) -> str:
    scores = [s.means[HEADLINE].mean for s in ledger.settings if s.method == method.name and s.means[HEADLINE].n]
    ends = dict.fromkeys(_points(end(scores)) for end in (min, max)) if scores else {}
    score = f'<span class="value">{" to ".join(ends)} %</span>' if scores else ""
    tags = "".join(f"<li>{esc(tag)}</li>" for tag in (method.family, *method.sees))
    name = esc(method.name)
    curves = "".join(
        f'<div class="chart" data-kind="{kind}" role="img" aria-label="{esc(f"{title}: {method.name}")}"></div>'
        for kind, (_, title) in CURVES.items()
    )
    return (
        f'<details class="run" id="method-{name}" data-method="{name}"><summary><span>{name}</span>{score}</summary>'
        f'<ul class="tags">{tags}</ul><div class="grid">{curves}</div>'
        f"{''.join(_told(method))}</details>"
    )


def _told(method: Method) -> Iterator[str]:
    yield from (f"<p>{esc(text)}</p>" for text in (method.comment, method.remark) if text)
    for part in method.parts:
        yield f'<h4>{esc(part.name)}: {esc(part.kind)}</h4><p class="source">{esc(part.source)}</p>'
        yield f'<pre tabindex="0">{esc(part.text)}</pre>'
    command = {"Run it": method.command} if method.command else {}
    for i, (title, text) in enumerate({**command, **{f"Recipe: {k}": v for k, v in method.recipes.items()}}.items()):
        name = f"text-{method.name}-{i}"
        button = f'<button type="button" class="control" data-copy="{esc(name)}">Copy</button>'
        yield f'<h4>{esc(title)}{button}</h4><pre id="{esc(name)}" tabindex="0">{esc(text.rstrip())}</pre>'


def _published(figures: Sequence[Mapping[str, str]]) -> str:
    """What papers say on streams whose weights and data are not at hand, and the command that would tell."""
    heads = ["Stream", "Method", "β", "Published", "Ours", "Command", "Source"]
    rows = []
    for row in figures:
        beta = [f"partition.alpha={row['beta']}"] if row["beta"] else []
        command = f"<code>{esc(' '.join(['fedsim run', row['stream'], row['method'], *beta]))}</code>"
        texts = [esc(row["method"]), esc(row["beta"] or "–"), esc(row["figure"]), "not run here", command]
        cells = "".join(f'<td class="text">{text}</td>' for text in [*texts, esc(f"{row['source']} ({row['tag']})")])
        rows.append(f'<tr><th scope="row" class="text">{esc(row["stream"])}</th>{cells}</tr>')
    caption = "Final average accuracies in % as papers give them, on other weights and data than those above: not to be compared."
    columns = "".join(f'<th scope="col" class="text">{esc(head)}</th>' for head in heads)
    return _section("published", _scrolled("Figures published", caption, columns, "".join(rows)))


# ---------------------------------------------------------------- data


def _data(ledger: Ledger, families: Sequence[str]) -> dict[str, Any]:
    """What the script draws from."""
    import pandas as pd

    specs = {"ranking": charts.ranking(families), **{kind: charts.by_task(*titles) for kind, titles in CURVES.items()}}
    specs |= {name: charts.front(families, name, axis) for name, (_, _, axis) in _fronts(ledger).items()}
    return {
        "light": dict(theme.LIGHT),
        "file": document.file_name(ledger.study.title),
        "joint": ledger.study.bounds.get("joint", ""),
        "methods": {
            m.name: {"family": m.family, "sees": list(m.sees), "text": f"{m.name} {m.family} {m.comment}".lower()}
            for m in ledger.methods
        },
        "splits": {stream: list(splits) for stream, splits in ledger.splits.items()},
        "usual": {stream: ledger.usual(stream) for stream in ledger.splits},  # what is shown first
        "splitNames": {s: split_option(s) for found in ledger.splits.values() for s in [*found, ANY]},
        "any": ANY,
        "rows": pack(pd.DataFrame([_point(s) for s in ledger.settings])),
        "curves": pack(pd.DataFrame([row for s in ledger.settings for row in _curve(s)])),
        "bounds": pack(pd.DataFrame([row for key, bounds in ledger.bounds.items() for row in _bound_rows(key, bounds)])),
        "specs": {name: chart.to_dict() | {"config": dict(theme.CONFIG)} for name, chart in specs.items()},
    }


def _point(setting: Setting) -> dict[str, Any]:
    mean = setting.means[HEADLINE]
    up, down = setting.means["bytes_up"].mean, setting.means["bytes_down"].mean
    where = {"stream": setting.stream, "split": setting.split, "method": setting.method}
    return where | _interval(mean) | {"bytes": up + down, "seconds": setting.means["seconds"].mean}


def _curve(setting: Setting) -> Iterator[dict[str, Any]]:
    where = {"stream": setting.stream, "split": setting.split, "method": setting.method}
    for kind, means in (("curve", setting.curve), ("final", setting.final)):
        yield from (where | {"kind": kind, "task": task} | _interval(mean) for task, mean in enumerate(means))


def _interval(mean: Mean) -> dict[str, Any]:
    """low, high: as they are; from, to: what is drawn, since an accuracy does not leave 0 to 100 and one seed has no interval."""
    drawn = (mean.mean if math.isnan(end) else end for end in metric_of(HEADLINE).cut(mean.low, mean.high))
    return {**mean._asdict(), **dict(zip(("from", "to"), drawn, strict=True))}


def _bound_rows(key: tuple[str, str], bounds: Bounds) -> Iterator[dict[str, Any]]:
    for name, title in charts.BOUNDS.items():
        if _known(value := _bound(bounds, name)):
            yield {"stream": key[0], "split": key[1], "bound": title, "value": value}
