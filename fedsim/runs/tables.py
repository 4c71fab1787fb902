"""Files for others: the tidy frame as CSV and Parquet, and what `fedsim.runs.compare.summary` gives as a table for a paper, in
Markdown, and in LaTeX for the package booktabs.

One factor goes down, the levels of the others times the metrics go across. A cell is "mean ± std" over runs (the mean alone of a
single run, – of none). The best mean of a column is bold: the highest or the lowest, as the metric has it
(`fedsim.runs.metrics`, the arrow in its head); means that print alike are alike, so all of them are bold. n is said
once below the table, and in every cell that has another n.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, product
from typing import TYPE_CHECKING, TypeAlias

from fedsim.core import plugins
from fedsim.core.errors import ConfigError, did_you_mean
from fedsim.runs import metrics
from fedsim.runs.compare import label, settings
from fedsim.runs.known import Label

if TYPE_CHECKING:
    import pandas as pd

Levels: TypeAlias = Mapping[str, Sequence[Label]]  # factor -> levels in order

ARROWS = {1: "↑", -1: "↓", 0: ""}
LATEX = {
    **{c: f"\\{c}" for c in "#$%&_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"},
    **{"↑": r"$\uparrow$", "↓": r"$\downarrow$", "α": r"$\alpha$"},
}


@dataclass(frozen=True)
class Cell:
    """Mean and standard deviation as text, None where there are none; `n`: runs, None where the table's n holds."""

    mean: str | None = None
    std: str | None = None
    n: int | None = None
    best: bool = False


@dataclass(frozen=True)
class Grid:
    """`heads`: per column the setting of the other factors ("" without any) and the metric; `n`: of most cells."""

    corner: str
    heads: Sequence[tuple[str, str]]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    n: int


def to_csv(frame: pd.DataFrame, path: bool = False) -> str:
    """The frame as CSV: the same frame gives the same bytes; a float is the shortest text that gives it back, NaN and None are
    empty. `path`: keep the column that says where a run lies."""
    text: str = _published(frame, path).to_csv(index=False, lineterminator="\n")
    return text


def to_parquet(frame: pd.DataFrame, path: bool = False) -> bytes:
    """The frame as Parquet. A column of both words and numbers, which Parquet does not know, becomes words."""
    plugins.require("pyarrow", "a Parquet file", "report")
    frame = _published(frame, path).copy()
    for name in frame.columns:
        values = frame[name].dropna()
        if len({isinstance(v, str) for v in values}) > 1:
            frame[name] = frame[name].map(lambda v: None if v is None or v != v else label(v))
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def to_markdown(
    long: pd.DataFrame, rows: str | None = None, digits: int = 1, levels: Levels | None = None, head: str = ""
) -> str:
    """A GitHub table. `rows`: the factor that goes down (default: the first); `digits`: decimals; `levels`: factor -> its levels
    in the order of the columns, e.g. `collection.factors` (default: as they come); `head`: what a reader must know first,
    e.g. `collection.unlike_text`."""
    table = grid(long, rows, digits, levels)
    heads = [", ".join(filter(None, (metric, setting))) for setting, metric in table.heads]
    lines = [
        "| " + " | ".join(map(_markdown, [table.corner, *heads])) + " |",
        "|---|" + "---:|" * len(heads),
        *("| " + " | ".join([_markdown(name), *map(_markdown_cell, cells)]) + " |" for name, cells in table.rows),
    ]
    return "\n".join([*([_markdown(head), ""] if head else []), *lines, "", caption(table)]) + "\n"


def to_latex(long: pd.DataFrame, rows: str | None = None, digits: int = 1, levels: Levels | None = None, head: str = "") -> str:
    """A tabular with the rules of booktabs (\\usepackage{booktabs}), and what it shows as comments on top."""
    table = grid(long, rows, digits, levels)
    lines = [
        *([f"% {head}"] if head else []),
        f"% {caption(table)}",
        rf"\begin{{tabular}}{{l{'r' * len(table.heads)}}}",
        r"\toprule",
    ]
    groups = [(setting, len(list(same))) for setting, same in groupby(setting for setting, _ in table.heads)]
    if any(setting for setting, _ in groups):
        starts = accumulate((width for _, width in groups), initial=2)
        lines.append(" & ".join(["", *(rf"\multicolumn{{{width}}}{{c}}{{{_latex(s)}}}" for s, width in groups)]) + r" \\")
        lines.append("".join(rf"\cmidrule(lr){{{a}-{a + width - 1}}}" for a, (_, width) in zip(starts, groups, strict=False)))
    lines.append(" & ".join(map(_latex, [table.corner, *(metric for _, metric in table.heads)])) + r" \\")
    lines.append(r"\midrule")
    lines += [" & ".join([_latex(name), *map(_latex_cell, cells)]) + r" \\" for name, cells in table.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def grid(long: pd.DataFrame, rows: str | None = None, digits: int = 1, levels: Levels | None = None) -> Grid:
    """What both kinds of table show. Raises ConfigError when `rows` is no factor."""
    by = [str(name) for name in long.columns[: list(long.columns).index("metric")]]
    down = rows if rows is not None else by[0] if by else None
    if down is not None and down not in by:
        raise ConfigError(f"rows: '{down}' is no factor of these runs.{did_you_mean(down, by)}")
    others = [name for name in by if name != down]
    place = {tuple(map(label, key)): i for key, (i,) in settings(long, [*others, "metric", *([down] if down else [])]).items()}
    order = {name: (levels or {}).get(name) or [v for (v,) in settings(long, [name])] for name in by}
    there = {key[: len(others)] for key in place}
    down_there = {key[-1] for key in place}
    shown = list(dict.fromkeys(long["metric"]))
    across = [s for s in (tuple(map(label, s)) for s in product(*(order[name] for name in others))) if s in there]
    names = [name for name in map(label, order[down]) if name in down_there] if down else ["all runs"]
    counts = [int(n) for n in long["n"] if n]
    usual = max(counts, key=lambda n: (counts.count(n), n), default=0)
    columns = []
    for setting, metric in product(across, shown):
        found = [place.get((*setting, metric, *([name] if down else []))) for name in names]
        columns.append(_cells(long, metric, found, usual, digits))
    said = {s: ", ".join(f"{n} = {v}" for n, v in zip(others, s, strict=True) if v != label(None)) for s in across}
    heads = [(said[setting], title(metric)) for setting, metric in product(across, shown)]
    return Grid(down or "", heads, [(name, [column[i] for column in columns]) for i, name in enumerate(names)], usual)


def title(metric: str) -> str:
    """The head of a metric: its common abbreviation or its name, and where its better values lie."""
    record = metrics.of(metric)
    base = metrics.METRICS.get(record.variant_of, record)
    words = base.short or metric.removesuffix(metrics.TOLD).replace("_", " ")
    told, unit = " (task known)" if record.variant_of else "", f" in {record.unit}" if record.scale != 1 else ""
    return f"{words}{told}{unit} {ARROWS[record.sign]}".rstrip()


def number(value: float, metric: str, digits: int) -> str:
    """A value as it is printed: in the metric's unit (bytes in MB), with a minus sign, no minus before a zero."""
    text = f"{value / metrics.of(metric).scale:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.removeprefix("-")


def caption(table: Grid) -> str:
    """What the cells are, in one line."""
    differ = any(cell.n is not None for _, cells in table.rows for cell in cells)
    words = [
        f"Mean ± standard deviation over {table.n} run{'s' if table.n != 1 else ''}{' unless said otherwise' if differ else ''}"
    ]
    words += ["best in bold"] if any(cell.best for _, cells in table.rows for cell in cells) else []
    short = [m for m in metrics.METRICS.values() if m.short]
    words += [f"{m.short}: {m.title.lower()}" for m in short if any(m.short in metric for _, metric in table.heads)]
    return "; ".join(words) + "."


def _published(frame: pd.DataFrame, path: bool) -> pd.DataFrame:
    return frame if path else frame.drop(columns="path")


def _cells(long: pd.DataFrame, metric: str, places: Sequence[int | None], usual: int, digits: int) -> list[Cell]:
    """One column."""
    cells = []
    for i in places:
        n = 0 if i is None else int(long["n"].iloc[i])
        if i is None or n == 0:
            cells.append(Cell())
            continue
        mean, std = (number(float(long[what].iloc[i]), metric, digits) for what in ("mean", "std"))
        cells.append(Cell(mean, std if n > 1 else None, n if n != usual else None))
    sign = metrics.of(metric).sign
    value = [-math.inf if cell.mean is None else sign * float(cell.mean.replace("−", "-")) for cell in cells]
    known = sum(cell.mean is not None for cell in cells)
    if not sign or known < 2:  # nothing to be better than
        return cells
    return [replace(cell, best=cell.mean is not None and v == max(value)) for cell, v in zip(cells, value, strict=True)]


def _markdown_cell(cell: Cell) -> str:
    if cell.mean is None:
        return "–"
    text = cell.mean + (f" ± {cell.std}" if cell.std is not None else "")
    return (f"**{text}**" if cell.best else text) + _count(cell)


def _latex_cell(cell: Cell) -> str:
    if cell.mean is None:
        return "--"
    text = (cell.mean + (rf" \pm {cell.std}" if cell.std is not None else "")).replace("−", "-")
    return (rf"$\mathbf{{{text}}}$" if cell.best else f"${text}$") + _count(cell)


def _count(cell: Cell) -> str:
    return "" if cell.n is None else f" (n={cell.n})"


def _markdown(text: str) -> str:
    """As plain text: nothing in it is a mark, a column or a tag."""
    escaped = re.sub(r"([\\|*`<\[\]])|(?<!\w)(_)|(_)(?!\w)", lambda m: f"\\{m.group()}", " ".join(text.split()))
    return escaped.replace("&", "&amp;")


def _latex(text: str) -> str:
    return "".join(LATEX.get(c, c) for c in " ".join(text.split()))
