"""Whether a table can be repeated: some of its runs, drawn at random, are made again and held against their rows.

    python -m experiments.ledger.again experiments/ledger/fashion.yaml experiments/ledger/fashion.csv [--runs 12] [--draw 0]

The split and every number but times and memory must be the same to the last digit. Processors of another kind may give other last
bits. Runs are made in a new folder: one that lies there already was not made again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fedsim.core import rng
from fedsim.core.errors import ConfigError, FedsimError
from fedsim.runs.collection import collect
from fedsim.runs.known import Known
from fedsim.sweeps import making
from fedsim.sweeps.plan import expand, finished, told

MEASURED = ("seconds", "processor_seconds", "peak_memory")  # how columns begin that no run gives twice


def differing(row: Known, again: Mapping[Any, Any]) -> dict[str, tuple[Any, Any]]:
    """What of a row came out otherwise, split and numbers: column -> (of the table, of the run). A cell that is empty says
    nothing."""
    told = {"partition_hash": row.split} | {c: v for c, v in row.metrics.items() if not c.startswith(MEASURED)}
    pairs = {column: (value, again.get(column)) for column, value in told.items() if value is not None}
    return {column: pair for column, pair in pairs.items() if pair[0] != pair[1]}


def main(words: Sequence[str] | None = None) -> int:
    """1 where a number differs or a run could not be made, 2 where nothing can be said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="the YAML of which the table tells")
    parser.add_argument("table", type=Path, help="a CSV of fedsim results")
    parser.add_argument("--runs", type=int, default=12, help="how many are made again")
    parser.add_argument("--draw", type=int, default=0, help="another number draws others")
    parser.add_argument("--output", type=Path, help="an empty folder (default: a new one in runs/ledger/again)")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one per core)")
    args = parser.parse_args(words)
    try:
        return _held_against(args)
    except FedsimError as e:
        print(f"again: {e}", file=sys.stderr)
        return 2


def _held_against(args: argparse.Namespace) -> int:
    folder = args.output or Path("runs/ledger/again") / f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S%f}"
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty, and what lies there would not be made again: name a new folder with --output")
    plan = expand(args.sweep, output=folder, **({} if args.jobs is None else {"jobs": args.jobs}))
    rows = told(plan, [args.table])
    there = [run for run in plan.runs if run.entry.identity in rows]
    places = rng.stream(args.draw, "again").permutation(len(there))[: args.runs]
    drawn = replace(plan, runs=tuple(there[place] for place in sorted(places.tolist())))
    making.make(drawn, {}, drawn.runs, quiet=False)
    records = collect([folder]).frame().to_dict("records") if finished(drawn) else []
    made = {str(record["run"]): record for record in records}
    wrong = 0
    for run in drawn.runs:
        row = rows[run.entry.identity]
        if row.run not in made:
            print(f"{run.label}: could not be made again")
            continue
        found = differing(row, made[row.run])
        wrong += bool(found)
        if found and (then := row.made["processor"]) != (now := str(made[row.run]["processor"])):
            print(f"{run.label}: its row is of {then or 'a processor that the table does not name'}, this run of {now}")
        for column, (before, after) in found.items():
            print(f"{run.label}: {column} is {before!r} in the table and {after!r} now")
    lost = len(drawn.runs) - len(made)
    right = f"{len(made) - wrong} of {len(made)} runs made again give their rows of {args.table.name}, to the last digit"
    print(right + (f"; {lost} could not be made" if lost else ""))
    return 1 if wrong or lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
