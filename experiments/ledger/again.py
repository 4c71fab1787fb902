"""Whether a table can be repeated: some of its runs, drawn at random, are made again and held against their rows.

    python -m experiments.ledger.again experiments/ledger/fashion.yaml experiments/ledger/fashion.csv [--runs 12] [--draw 0]

Every number but times and memory must be the same to the last digit. Processors of another kind may give other last bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsim.core import rng
from fedsim.runs.collection import collect
from fedsim.runs.known import Known
from fedsim.sweeps import making
from fedsim.sweeps.plan import expand, finished, told

MEASURED = ("seconds", "processor_seconds", "peak_memory")  # how columns begin that no run gives twice


def differing(row: Known, again: Mapping[Any, Any]) -> dict[str, tuple[float, Any]]:
    """The numbers of a row that came out otherwise: column -> (of the table, of the run)."""
    pairs = {c: (v, again.get(c)) for c, v in row.metrics.items() if v is not None and not c.startswith(MEASURED)}
    return {column: pair for column, pair in pairs.items() if pair[0] != pair[1]}


def main(words: Sequence[str] | None = None) -> int:
    """1 where a number differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="the YAML of which the table tells")
    parser.add_argument("table", type=Path, help="a CSV of fedsim results")
    parser.add_argument("--runs", type=int, default=12, help="how many are made again")
    parser.add_argument("--draw", type=int, default=0, help="another number draws others")
    parser.add_argument("--output", type=Path, default=Path("runs/ledger/again"))
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one per core)")
    args = parser.parse_args(words)
    plan = expand(args.sweep, output=args.output, **({} if args.jobs is None else {"jobs": args.jobs}))
    rows = told(plan, [args.table])
    there = [run for run in plan.runs if run.entry.identity in rows]
    places = rng.stream(args.draw, "again").permutation(len(there))[: args.runs]
    drawn = replace(plan, runs=tuple(there[place] for place in sorted(places.tolist())))
    done = finished(drawn)
    if missing := drawn.missing(done):
        making.make(drawn, done, missing, quiet=False)
    made = {str(record["run"]): record for record in collect([args.output]).frame().to_dict("records")}
    wrong = 0
    for run in drawn.runs:
        row = rows[run.entry.identity]
        if row.run not in made:
            wrong += 1
            print(f"{run.label}: could not be made again")
            continue
        found = differing(row, made[row.run])
        wrong += bool(found)
        if found and (then := row.made["processor"]) != (now := str(made[row.run]["processor"])):
            print(f"{run.label}: its row is of {then or 'a processor that the table does not name'}, this run of {now}")
        for column, (before, after) in found.items():
            print(f"{run.label}: {column} is {before!r} in the table and {after!r} now")
    print(
        f"{len(drawn.runs) - wrong} of {len(drawn.runs)} runs made again give their rows of {args.table.name}, to the last digit"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
