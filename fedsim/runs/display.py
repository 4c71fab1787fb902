"""How results show themselves: as text, and as HTML in a notebook. Neither needs a library; charts are the report's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Protocol

import numpy as np

from fedsim.core.config import SimConfig
from fedsim.runs import metrics

MOST_ROWS, MOST_TASKS = 30, 20  # of a table of runs, of an accuracy matrix
STYLE = "border-collapse:collapse;margin:.4em 1.2em .6em 0;display:inline-table;vertical-align:top"
CELL = "padding:.15em .6em;text-align:right;border-bottom:1px solid rgba(128,128,128,.3)"


@dataclass(frozen=True)
class Table:
    """A title, heads of columns, and cells; a number between 0 and 1 in `shade` darkens a cell."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    shade: Sequence[Sequence[float | None]] = ()

    def text(self) -> str:
        """In columns of their widest cell, numbers to the right."""
        lines = [self.heads, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.heads))]
        cells = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
                 for line in lines]  # fmt: skip
        return "\n".join([self.title, *(f"  {line}".rstrip() for line in cells)])

    def html(self) -> str:
        """A table with its style inside, readable on light and dark pages."""
        heads = "".join(f"<th style='{CELL}'>{escape(head)}</th>" for head in self.heads)
        rows = "".join(f"<tr>{''.join(self._cell(i, j) for j in range(len(self.heads)))}</tr>" for i in range(len(self.rows)))
        title = f"<caption style='text-align:left;font-weight:bold'>{escape(self.title)}</caption>"
        return f"<table style='{STYLE}'>{title}<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"

    def _cell(self, i: int, j: int) -> str:
        shade = self.shade[i][j] if self.shade else None
        colour = "" if shade is None else f";background:rgba(48,136,160,{0.75 * shade:.2f})"
        return f"<td style='{CELL}{colour}'>{escape(self.rows[i][j])}</td>"


class OfARun(Protocol):
    """What is needed of `Results`."""

    @property
    def config(self) -> SimConfig: ...
    @property
    def accuracy(self) -> metrics.FloatArray: ...
    @property
    def metrics(self) -> Mapping[str, float | None]: ...
    @property
    def finished(self) -> bool: ...
    @property
    def path(self) -> Path | None: ...


def as_text(headline: str, tables: Sequence[Table], remarks: Sequence[str]) -> str:
    """A headline, tables and lines below each other."""
    return "\n".join([headline, *(table.text() for table in tables), *remarks])


def as_html(headline: str, tables: Sequence[Table], remarks: Sequence[str], chart: str = "") -> str:
    """The same as one element. chart: an element, or empty."""
    told = "".join(f"<div>{escape(line)}</div>" for line in remarks)
    return f"<div><div><code>{escape(headline)}</code></div>{''.join(table.html() for table in tables)}{chart}{told}</div>"


def headline(results: OfARun) -> str:
    """One line: which run, how far, how good, and where it lies."""
    config, tasks = results.config, len(results.accuracy)
    value = results.metrics.get(metrics.HEADLINE)
    parts = [
        f"'{config.name}' seed {config.seed}",
        f"{tasks} task{'s' if tasks != 1 else ''} learned{'' if results.finished else ', unfinished'}",
        *([] if value is None else [f"final average accuracy {value:.2f} %"]),
        *([] if results.path is None else [str(results.path)]),
    ]
    return f"<Results {', '.join(parts)}>"


def tables(results: OfARun) -> list[Table]:
    """The headline metrics, and the accuracy matrix."""
    shown = [(m, results.metrics.get(m.name)) for m in metrics.shown("run")]
    rows = [(m.title.lower(), f"{value:.2f} {m.unit}".rstrip()) for m, value in shown if value is not None]
    found = [Table("Summary", ("", results.config.stream.name.replace("_", " ")), rows)] if rows else []
    accuracy_TT = results.accuracy[:MOST_TASKS, :MOST_TASKS]
    if not len(accuracy_TT):
        return found
    more = f", the first {MOST_TASKS} of {len(results.accuracy)} tasks" if len(results.accuracy) > MOST_TASKS else ""
    cells = [["" if np.isnan(a) else f"{a:.1f}" for a in row] for row in accuracy_TT]
    shade = [[None if np.isnan(a) else float(a) / 100 for a in row] for row in accuracy_TT]
    means = [f"{np.nanmean(row):.1f}" for row in accuracy_TT]
    matrix = Table(
        f"Accuracy in % on every task, after each task{more}",
        ("after task", *map(str, range(len(accuracy_TT))), "mean"),
        [(str(i), *row, mean) for i, (row, mean) in enumerate(zip(cells, means, strict=True))],
        [(None, *row, None) for row in shade],
    )
    return [*found, matrix]
