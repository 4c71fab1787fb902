"""Runs that do not lie here and are known by their row in a table, a CSV that `fedsim results --csv` wrote: those of another
machine, or published ones.

A row is known by `run`, the first 16 digits of the identity of its config; it has every number of the run, and no accuracy by
client or round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fedsim.core import plugins
from fedsim.core.errors import DataError, one_line
from fedsim.runs.metrics import HEADLINE

if TYPE_CHECKING:
    import pandas as pd

Label: TypeAlias = str | int | float | bool | None  # of a run on one axis
HASHES = ("run", "partition_hash")  # texts, even where all of their digits are decimal
MADE = ("version", "processor")  # texts too: what made a run, as far as it is known
NEEDED = (*HASHES, "seed", HEADLINE)
SUFFIX = ".csv"


@dataclass(frozen=True)
class Known:
    """A run by its row. cells: column -> value, None where the table has none; table: the file; axes: columns that tell the runs
    of the table apart and are no metrics; labels: on the axes of the sweep, empty without one."""

    cells: Mapping[str, Any]
    table: Path
    axes: Sequence[str] = ()
    labels: Mapping[str, Label] = field(default_factory=dict)

    @property
    def run(self) -> str:
        """The first 16 digits of its identity."""
        return str(self.cells["run"])

    @property
    def seed(self) -> int:
        return int(self.cells["seed"])

    @property
    def split(self) -> str:
        """The first 16 digits of the hash of its split."""
        return str(self.cells["partition_hash"])

    @cached_property
    def metrics(self) -> Mapping[str, float | None]:
        """Every number of the row by its column."""
        keys = {"seed", *MADE, *self.axes}
        return {c: value for c, value in self.cells.items() if c not in keys and not isinstance(value, str)}

    @property
    def made(self) -> Mapping[str, str]:
        """Which version of fedsim and which processor; empty where the table does not say."""
        return {name: str(self.cells.get(name) or "") for name in MADE}

    @property
    def named(self) -> Sequence[str]:
        """The axes that a sweep named: keys of a config have a dot in them."""
        return [name for name in self.axes if "." not in name]

    @property
    def levels(self) -> Mapping[str, Label]:
        """What the table says of the run's config: of those keys in which its runs differ."""
        return {name: self.cells[name] for name in self.axes}


def read(paths: Sequence[str | Path]) -> dict[str, Known]:
    """Every run of these tables, by `run`; one that is there twice counts once, as the first table has it.

    Raises DataError for a file that cannot be read, and for a table that `fedsim results` did not write.
    """
    found: dict[str, Known] = {}
    for path in map(Path, paths):
        frame = table(path)
        lacking = [column for column in NEEDED if column not in frame]
        if lacking:
            raise DataError(f"{path} has no column {', '.join(lacking)}: write it with fedsim results RUNS --csv {path.name}")
        axes = axes_of(frame)
        for record in frame.to_dict("records"):
            cells = {str(column): _cell(value) for column, value in record.items()}
            empty = [c for c in NEEDED if (cells[c] is None and c != HEADLINE) or (isinstance(cells[c], str) and c not in HASHES)]
            if empty:
                raise DataError(f"{path}: a row has no {', '.join(empty)}: write it with fedsim results RUNS --csv {path.name}")
            found.setdefault(str(cells["run"]), Known(cells, path, axes))
    return found


def axes_of(frame: pd.DataFrame) -> tuple[str, ...]:
    """Columns that tell the runs of a table apart and are no metrics: those between `run` and `seed`."""
    columns = [str(column) for column in frame.columns]
    return tuple(columns[columns.index("run") + 1 : columns.index("seed")]) if "run" in columns else ()


def table(path: Path) -> pd.DataFrame:
    """A CSV with the same numbers that were written, to the last bit. Raises DataError."""
    plugins.require("pandas", "a table of runs", "report")
    import pandas as pd

    before: Any = {"float_precision": "round_trip"}  # of which later versions warn: they read so by default
    exact = before if tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1) else {}
    try:
        frame: pd.DataFrame = pd.read_csv(path, dtype=dict.fromkeys((*HASHES, *MADE), str), low_memory=False, **exact)
    except pd.errors.EmptyDataError as e:
        raise DataError(f"{path} is empty: write the table again (fedsim results --csv)") from e
    except (OSError, ValueError) as e:  # pandas' own errors are ValueErrors
        raise DataError(f"{path} cannot be read: {one_line(e)}") from e
    return frame.copy()  # in one piece: columns are added to it


def _cell(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
