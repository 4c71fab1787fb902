"""The report of a folder of runs: what is in the file that `document` writes."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.report import charts, document, theme
from fedsim.report.data import Study
from fedsim.report.document import ROUNDING, counted, esc, file_name, pack
from fedsim.report.figures import DEFAULT_SERIES, Figure, Select, default_split, first_run, split_option
from fedsim.runs import bounds
from fedsim.runs.environment import noted, processor_of, version_of
from fedsim.runs.metrics import HEADLINE, Metric
from fedsim.runs.metrics import of as metric_of

if TYPE_CHECKING:
    import pandas as pd

SECTIONS = {
    "accuracy": "Accuracy",
    "forgetting": "Forgetting and plasticity",
    "cost": "Cost",
    "clients": "Clients",
    "run": "One run",
}
SHOWN_REASONS = 200
FORMATS = (("svg", "SVG"), ("png", "PNG"), ("csv", "CSV"), ("json", "Source"))


def render(study: Study, figures: Sequence[Figure]) -> str:
    """The whole file."""
    parts = {
        "kind": "Report",
        "first": "charts",
        "unscripted": "The charts need JavaScript; the table and the runs below do not.",
        "title": esc(study.title),
        "lead": esc(_lead(study)),
        "tiles": _tiles(study),
        "notices": _notices(study),
        "links": _links(figures, len(study.runs)),
        "controls": _toolbar(study),
        "sections": "\n".join([*_sections(study, figures), _table(study), _runs(study)]),
    }
    return document.written("page", parts, _data(study, figures))


# ---------------------------------------------------------------- head


def _lead(study: Study) -> str:
    """Mean of what: data, stream, clients, in one line, and what of it is not alike."""
    configs = [run.results.config for run in study.runs]
    said = {
        "backbone": {str(c.model.backbone) for c in configs},
        "data": {str(c.data["source"]) for c in configs},
        "stream": {c.stream.name.replace("_", "-") for c in configs},
        "adapter": {str(c.adapter["name"]) for c in configs},
    }
    same = [f"{name} {values.pop()}" for name, values in said.items() if len(values) == 1]
    known = bounds.common([run.results for run in study.runs])
    texts = [", ".join(same), study.collection.unlike_text.rstrip("."), *(known.lines if known else ())]
    return ". ".join(text.rstrip(".") for text in texts if text)


def _tiles(study: Study) -> str:
    return (
        ""
        if not (tiles := _figures_of(study))
        else (
            '<ul class="tiles">'
            + "".join(f"<li><b>{esc(value)}</b><span>{esc(name)}</span></li>" for name, value in tiles)
            + "</ul>"
        )
    )


def _figures_of(study: Study) -> list[tuple[str, str]]:
    configs = [run.results.config for run in study.runs]
    size = [
        ("tasks", _span(len(run.results.accuracy) for run in study.runs)),
        ("clients", _span(int(c.partition["clients"]) for c in configs)),
        ("rounds per task", _span(c.server.rounds for c in configs)),
    ]
    if len(study.runs) > 1:
        of = [("runs", str(len(study.runs))), ("series", str(len(study.series)))]
        splits = [("splits", str(len(study.splits)))] if len(study.splits) > 1 else []
        return [*of, *splits, ("seeds per setting", _span(_seeds(study).values())), *size]
    row = study.frame.iloc[0]
    metrics = [(m.title.lower(), f"{row[m.name] / m.scale:.1f} {m.unit}".rstrip()) for m in study.metrics[:4]]
    moved = [("MB up and down", f"{(row['bytes_up'] + row['bytes_down']) / 1e6:,.3g}")] if "bytes_up" in row else []
    return [*metrics, *moved, ("seconds", f"{row['seconds']:,.0f}"), *size]


def _span(values: Iterable[int]) -> str:
    known = sorted(set(values))
    return str(known[0]) if len(known) == 1 else f"{known[0]}–{known[-1]}"


def _seeds(study: Study) -> Mapping[tuple[str, str], int]:
    return Counter(zip(study.frame["series"], study.frame["split"], strict=True))


def _notices(study: Study) -> str:
    """What a reader must know before the numbers: what is missing, and what is not alike."""
    blocks = []
    absent = study.collection.absent
    if absent:
        items = [f"<li><b>{esc(a.what)}</b>: {esc(a.reason)}</li>" for a in absent[:SHOWN_REASONS]]
        items += [f"<li>and {len(absent) - SHOWN_REASONS} more</li>"] if len(absent) > SHOWN_REASONS else []
        blocks.append(f"<p><b>{_count(len(absent), 'run')} not shown:</b></p><ul>{''.join(items)}</ul>")
    seeds = _seeds(study)
    if len(set(seeds.values())) > 1:
        usual = Counter(seeds.values()).most_common(1)[0][0]
        odd = [f"<li>{esc(_setting(study, series, split))}: {n}</li>" for (series, split), n in seeds.items() if n != usual]
        blocks.append(
            f"<p><b>Seeds of unequal number.</b> Most settings have {usual}, these have not:</p><ul>{''.join(odd)}</ul>"
        )
    elif max(seeds.values()) == 1 and len(study.runs) > 1:
        blocks.append("<p><b>One seed per setting:</b> no spread and no intervals can be given.</p>")
    blocks += [f"<p>{esc(line)}</p>" for line in _differences(study)]
    return f'<section class="notice" aria-label="Notices">{"".join(blocks)}</section>' if blocks else ""


def _differences(study: Study) -> list[str]:
    lines = []
    for note in study.collection.sweep.notes if study.collection.sweep else ():
        lines.append(f"{note}: left out there.")
    others = study.collection.others
    if others:
        lines.append(
            f"{_count(others, 'other finished run')} in the folder, not of this sweep, left out (--all takes every run)."
        )
    environments = [noted(run.results.path) for run in study.runs]
    states, processors = (Counter(map(of, environments)) for of in (_code, processor_of))
    if len(states) > 1:
        lines.append(f"The runs come from different states of the code: {counted(states)}.")
    if len(processors) > 1:
        lines.append(f"The runs were made on different processors, {ROUNDING}: {counted(processors)}.")
    skipped = [run for run in study.runs if run.results.failures]
    if skipped:
        clients = sum(len(run.results.failures) for run in skipped)
        lines.append(f"{_count(len(skipped), 'run')} went on without clients that had failed, {_count(clients, 'time')} in all.")
    return lines


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _setting(study: Study, series: str, split: str) -> str:
    return f"{series}, {split_option(split)}" if len(study.splits) > 1 else series


def _links(figures: Sequence[Figure], runs: int) -> str:
    present = {f.section for f in figures}
    named = [(s, title) for s, title in SECTIONS.items() if s in present] + [
        ("table", "Table"),
        ("runs", "Runs" if runs > 1 else "Run"),
    ]
    return "".join(f'<a href="#{s}">{esc(title)}</a>' for s, title in named)


def _toolbar(study: Study) -> str:
    blocks = []
    if len(study.splits) > 1:
        options = "".join(_option(s, split_option(s), s == default_split(study)) for s in study.splits)
        blocks.append(f'<label>Split <select id="split" data-field="split">{options}</select></label>')
    if len(study.series) > 1:
        blocks.append(_picker(study))
    return f'<div class="choices">{"".join(blocks)}</div>' if blocks else ""


def _picker(study: Study) -> str:
    """Which series the charts show."""
    colours = charts.colours_of(study.series)
    items = "".join(
        f'<li data-series="{esc(s.text)}"><label><input type="checkbox"{" checked" if s.rank < DEFAULT_SERIES else ""}>'
        f'<span class="swatch" style="background: {colours[s.method]}"></span><span class="name">{esc(s.text)}</span>'
        f'<span class="value"></span></label></li>'
        for s in study.series
    )
    return (
        '<details class="picker" id="series"><summary><span>Series</span></summary><div>'
        '<div class="row"><input type="search" aria-label="Search series" placeholder="Search, e.g. lorm"></div>'
        f'<div class="row"><button type="button" data-pick="best">Best {DEFAULT_SERIES}</button>'
        '<button type="button" data-pick="all">All found</button><button type="button" data-pick="none">None</button></div>'
        f"<ul>{items}</ul></div></details>"
    )


# ---------------------------------------------------------------- charts


def _sections(study: Study, figures: Sequence[Figure]) -> list[str]:
    blocks = []
    for section, title in SECTIONS.items():
        cards = [_card(figure, wide) for figure, wide in _widths([f for f in figures if f.section == section])]
        if cards:
            head = f'<div class="head2"><h2>{esc(title)}</h2>{_run_select(study) if section == "run" else ""}</div>'
            blocks.append(f'<section id="{section}">{head}<div class="grid">{"".join(cards)}</div></section>')
    return blocks


def _widths(figures: Sequence[Figure]) -> list[tuple[Figure, bool]]:
    """Which figures go over both columns: the wide ones, and of the others one that would have no neighbour."""
    placed: list[tuple[Figure, bool]] = []
    left = False  # whether one waits in the left column
    for figure in figures:
        if figure.wide and left:
            placed[-1] = (placed[-1][0], True)
        left = not figure.wide and not left
        placed.append((figure, figure.wide))
    if left:
        placed[-1] = (placed[-1][0], True)
    return placed


def _card(figure: Figure, wide: bool) -> str:
    selects = "".join(_select(s) for s in figure.selects if s.field != "split")
    chosen = "".join(
        f'<span class="chosen{" badge" if s.field == "split" else ""}" data-field="{s.field}"></span>' for s in figure.selects
    )
    tools = "".join(
        f'<button type="button" data-save="{kind}" aria-label="{esc(figure.title)} as {name}">{name}</button>'
        for kind, name in FORMATS
    )
    return (
        f'<figure class="card{" wide" if wide else ""}" id="figure-{figure.name}">'
        f'<div class="title"><h3>{esc(figure.title)}</h3>{chosen}<span class="selects">{selects}</span></div>'
        f'<div class="chart" role="img" aria-label="{esc(f"{figure.title}. {figure.note}")}"></div>'
        f'<figcaption>{esc(figure.note)}</figcaption><div class="tools">{tools}</div></figure>'
    )


def _select(select: Select) -> str:
    if len(select.options) == 1:
        value, text = select.options[0]
        return f'<select data-field="{select.field}" hidden>{_option(value, text, True)}</select>'
    options = "".join(_option(value, text, i == 0) for i, (value, text) in enumerate(select.options))
    return f'<select class="control" data-field="{select.field}" aria-label="{esc(select.label)}">{options}</select>'


def _run_select(study: Study) -> str:
    if len(study.runs) == 1:
        return ""
    names, first = _run_names(study), first_run(study, default_split(study))
    groups: dict[str, list[str]] = {}
    for i, series in enumerate(study.frame["series"]):
        groups.setdefault(series, []).append(_option(str(i), names[i], i == first))
    options = "".join(f'<optgroup label="{esc(series)}">{"".join(found)}</optgroup>' for series, found in groups.items())
    chosen = f'<span class="chosen" id="run-name">{esc(names[first])}</span>'
    return f'<label class="control">Run <select id="which">{options}</select></label>{chosen}'


def _option(value: str, text: str, chosen: bool) -> str:
    return f'<option value="{esc(value)}"{" selected" if chosen else ""}>{esc(text)}</option>'


def _run_names(study: Study) -> list[str]:
    columns = zip(study.frame["series"], study.frame["split"], study.frame["seed"], strict=True)
    return [f"{_setting(study, series, split)}, seed {int(seed)}" for series, split, seed in columns]


def _data(study: Study, figures: Sequence[Figure]) -> dict[str, Any]:
    """What the script draws from. Runs that share a split share its rows."""
    headline = study.settings[study.settings["metric"] == HEADLINE]
    scores: dict[str, dict[str, float]] = {}
    for series, split, mean in zip(headline["series"], headline["split"], headline["mean"], strict=True):
        scores.setdefault(split, {})[series] = round(mean, 2)
    return {
        "file": file_name(study.title),
        "shown": DEFAULT_SERIES,
        "light": dict(theme.LIGHT),
        "series": [{"text": s.text} for s in study.series],
        "scores": scores,
        "runs": _run_names(study),
        "run": first_run(study, default_split(study)),
        "csv": study.table.drop(columns="path").to_csv(index=False, lineterminator="\n"),
        "figures": [_figure_data(figure) for figure in figures],
    }


def _figure_data(figure: Figure) -> dict[str, Any]:
    rows, rows_at = _distinct([pack(frame) for frame in figure.rows])
    first = {id(chart): i for i, chart in reversed(list(enumerate(figure.charts)))}
    drawn = {key: figure.spec(i) for key, i in first.items()}
    specs, spec_at = _distinct([drawn[id(chart)] for chart in figure.charts])
    shared = {"name": figure.name, "selects": [s.field for s in figure.selects], "limit": figure.limit, "perRun": figure.per_run}
    return shared | {"rows": rows, "rowsAt": rows_at, "specs": specs, "specAt": spec_at}


def _distinct(values: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """Each value once, and which one stands at each place."""
    places: dict[str, int] = {}
    at = [places.setdefault(json.dumps(value), len(places)) for value in values]
    return [json.loads(value) for value in places], at


# ---------------------------------------------------------------- table


def _table(study: Study) -> str:
    """Every setting: mean ± standard deviation, the 95 % interval below; per split the best mean in bold."""
    metrics = [m for m in study.metrics if "page" in m.shown]
    costs = [c for c in ("bytes_up", "bytes_down", "seconds") if c in study.frame and study.frame[c].max() > 0]
    cells = _cells(study.settings)
    cost_cells = _cells(study.summary(costs))
    factors = [*study.factors] or ["run"]
    heads = [_head(f, "ascending", "text") for f in factors]
    heads += [_head("split", "ascending", "text")] if len(study.splits) > 1 else []
    heads += [_head("seeds", "descending")]
    heads += [_head(m.title if m.unit == "%" else m.axis, "ascending" if m.sign < 0 else "descending") for m in metrics]
    heads += [_head(metric_of(c).axis, "ascending") for c in costs]
    seeds = _seeds(study)
    bodies = []
    for split in study.splits:
        present = [s for s in study.series if (s.text, split) in seeds]
        best = {m.name: _best(m, [cells.get((s.text, split, m.name)) for s in present]) for m in metrics}
        rows = []
        for s in present:
            names = [s.labels[f] for f in study.factors] or [s.text]
            row = [f'<th scope="row" class="text" data-value="{esc(names[0])}">{esc(names[0])}</th>']
            row += [f'<td class="text" data-value="{esc(n)}">{esc(n)}</td>' for n in names[1:]]
            if len(study.splits) > 1:
                row.append(f'<td class="text" data-value="{_split_value(split)}">{esc(split_option(split))}</td>')
            row.append(f'<td data-value="{seeds[s.text, split]}">{seeds[s.text, split]}</td>')
            for m in metrics:
                row.append(_cell(cells.get((s.text, split, m.name)), seeds[s.text, split], m, best[m.name]))
            for c in costs:
                row.append(_cell(cost_cells.get((s.text, split, c)), seeds[s.text, split], metric_of(c), None, plain=True))
            rows.append(f"<tr>{''.join(row)}</tr>")
        bodies.append(f'<tbody class="group">{"".join(rows)}</tbody>')
    caption = "In %: mean ± standard deviation over seeds, below it the 95 % interval of the mean"
    if len(study.series) > 1:
        caption += "; in bold the best mean" + (" of every split" if len(study.splits) > 1 else "")
    caption += ". A click on a heading sorts."
    button = '<button type="button" class="control" data-table="csv">All runs as CSV</button>'
    return (
        f'<section id="table"><div class="head2"><h2>Table</h2>{button}</div>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table of settings"><table><caption>{esc(caption)}</caption>'
        f"<thead><tr>{''.join(heads)}</tr></thead>{''.join(bodies)}</table></div></section>"
    )


def _cells(summary: pd.DataFrame) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    rows = [{str(k): v for k, v in row.items()} for row in summary.to_dict("records")]
    return {(row["series"], row["split"], row["metric"]): row for row in rows}


def _head(title: str, first: str, kind: str = "") -> str:
    return f'<th scope="col" class="{kind}" data-first="{first}"><button type="button">{esc(title)}</button></th>'


def _best(metric: Metric, cells: Sequence[Mapping[str, Any] | None]) -> str | None:
    """The best mean as it is shown: what looks the same is equally good."""
    means = [c["mean"] for c in cells if c is not None]
    return f"{metric.sign * max(metric.sign * m for m in means) / metric.scale:.1f}" if metric.sign and len(means) > 1 else None


def _cell(cell: Mapping[str, Any] | None, seeds: int, metric: Metric, best: str | None, plain: bool = False) -> str:
    if cell is None:
        return '<td data-value="">–</td>'
    digits = "{:,.3g}" if plain else "{:.1f}"
    cut = metric.cut(cell["low"], cell["high"])
    mean, std, low, high = (value / metric.scale for value in (cell["mean"], cell["std"], *cut))
    text = digits.format(mean) if not plain or mean < 1000 else f"{mean:,.0f}"
    main = text if math.isnan(std) or plain else f"{text} ± {std:.1f}"
    note = "" if math.isnan(low) or plain else f"<small>{low:.1f} to {high:.1f}</small>".replace("-", "−")
    note += f"<small>of {cell['n']} seeds</small>" if cell["n"] != seeds else ""
    return f'<td data-value="{mean!r}"{" class=best" if best == text else ""}>{main.replace("-", "−")}{note}</td>'


def _split_value(split: str) -> str:
    """iid sorts after every α."""
    return "1e308" if split == "iid" else esc(split)


# ---------------------------------------------------------------- runs


def _runs(study: Study) -> str:
    """The exact command, config and versions of each run."""
    names = _run_names(study)
    hint = "Search runs and configs"
    search = f'<input type="search" id="search" class="control" placeholder="{hint}" aria-label="{hint}">'
    few = len(study.runs) == 1
    blocks = [_run(study, i, names[i], few) for i in range(len(study.runs))]
    head = f'<div class="head2"><h2>{"Run" if few else "Runs"}</h2>{"" if few else search}</div>'
    return f'<section id="runs">{head}<div class="list">{"".join(blocks)}</div></section>'


def _run(study: Study, i: int, name: str, opened: bool) -> str:
    results = study.runs[i].results
    environment = noted(results.path)
    value = study.frame[HEADLINE].iloc[i]
    score = "" if math.isnan(value) else f'<span class="value"><b>{value:.1f}</b> % final average accuracy</span>'
    facts = {
        "run": study.frame["run"].iloc[i],
        "partition": study.frame["partition_hash"].iloc[i],
        "started": environment.get("started"),
        "code": _code(environment),
        "versions": ", ".join(
            f"{k} {v}" for k, v in {"Python": environment.get("python"), **_dict(environment, "packages")}.items() if v
        ),
        "machine": ", ".join(str(v) for v in (processor_of(environment), _cores(environment), environment.get("platform")) if v),
        "resumed": len(environment.get("resumed", [])) or None,
        "skipped clients": "; ".join(results.failures),
        "notes": "; ".join(results.notes),
    }
    listed = "".join(f"<dt>{esc(k)}</dt><dd>{esc(str(v))}</dd>" for k, v in facts.items() if v)
    command = _command(environment)
    texts = _copied(f"command-{i}", "Command", command) if command else ""
    texts += _copied(f"config-{i}", "Config: save it as config.yaml, then fedsim run config.yaml", _config_text(study, i))
    head = f"<summary><span>{esc(name)}</span>{score}</summary>"
    return f'<details class="run"{" open" if opened else ""}>{head}<dl>{listed}</dl>{texts}</details>'


def _copied(name: str, title: str, text: str) -> str:
    button = f'<button type="button" class="control" data-copy="{name}">Copy</button>'
    return f'<h4>{esc(title)}{button}</h4><pre id="{name}" tabindex="0">{esc(text)}</pre>'


def _config_text(study: Study, i: int) -> str:
    results = study.runs[i].results
    path = None if results.path is None else results.path / "config.yaml"
    return path.read_text(encoding="utf-8") if path is not None and path.is_file() else results.config.to_yaml()


def _dict(environment: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = environment.get(key)
    return value if isinstance(value, dict) else {}


def _code(environment: Mapping[str, Any]) -> str:
    return f"fedsim {version_of(environment, digits=12) or 'of an unknown version'}"


def _cores(environment: Mapping[str, Any]) -> str | None:
    return f"{environment['cores']} cores" if environment.get("cores") else None


def _command(environment: Mapping[str, Any]) -> str:
    words = environment.get("command")
    if not isinstance(words, list) or not words:
        return ""
    return shlex.join([Path(str(words[0])).name, *map(str, words[1:])])
