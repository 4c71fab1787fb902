"""Rows of a dataclass of numbers and words as CSV, and back."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

PARSE: Mapping[str, Callable[[str], Any]] = {"int": int, "str": str, "float | None": lambda cell: float(cell) if cell else None}


def to_csv(header: Sequence[Any], records: Iterable[Sequence[Any]]) -> str:
    return csv_bytes(header, records).decode()


def csv_bytes(header: Sequence[Any], records: Iterable[Sequence[Any]]) -> bytes:
    """One byte per character while it grows: a million clients' lines are long."""
    grown = io.BytesIO()
    text = io.TextIOWrapper(grown, encoding="utf-8", newline="", write_through=False)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(records)
    text.flush()
    return grown.getvalue()


def table(kind: type[Any], rows: Sequence[Any]) -> str:
    return to_csv([f.name for f in dataclasses.fields(kind)], [dataclasses.astuple(row) for row in rows])


def from_csv(kind: type[Any], text: str) -> tuple[Any, ...]:
    """Rows of a dataclass of numbers and words; further columns, which are derived, are left out. An empty cell is None."""
    records = csv.reader(io.StringIO(text))
    place = {name: i for i, name in enumerate(next(records, ()))}
    rows = list(filter(None, records))
    if not rows:
        return ()
    columns = [map(PARSE[str(f.type)], map(itemgetter(place[f.name]), rows)) for f in dataclasses.fields(kind)]
    return tuple(map(kind, *columns))
