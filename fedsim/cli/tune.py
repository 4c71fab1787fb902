"""fedsim tune: from a tuning YAML to a preset of every method's best configuration."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedsim.cli.printing import capped, console, counted, line_printer, new_table, short
from fedsim.cli.sweep import launch_arguments, launch_options, make

if TYPE_CHECKING:
    from fedsim.sweeps.tune import Tuning, Winner


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `fedsim tune` takes."""
    command.add_argument("tuning", metavar="TUNING", help="a YAML file: base, one list axis, and the section tune")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every run, for example client.epochs=1")
    command.add_argument("--output", metavar="DIR", help="folder of the runs (default: output of the YAML, or runs/<its name>)")
    launch_arguments(command)
    command.add_argument("--csv", metavar="FILE", help="all that was tried, one row for every run")
    command.add_argument(
        "--known",
        action="append",
        default=[],
        metavar="CSV",
        help="a table of fedsim tune --csv (or of fedsim results --csv): its runs are not made again",
    )
    command.add_argument("--dry-run", action="store_true", help="say what would be tried, and how many runs that takes")
    command.add_argument("--quiet", action="store_true", help="print the outcome only")


def run(args: argparse.Namespace) -> int:
    """fedsim tune: rung after rung, what is missing of it; then the winners."""
    from fedsim.sweeps import tune

    tuning = tune.read(args.tuning, args.overrides, args.output, **launch_options(args))
    known = tune.told(tuning, args.known)
    print_line = line_printer(console())
    if not args.quiet or args.dry_run:
        for line in _told(tuning, len(known)):
            print_line(line)
    if args.dry_run:
        return 0
    scores = tune.played(tuning, lambda plan, done, missing: make(plan, done, missing, args.quiet), known)
    winners = tuning.winners(scores)
    files = tune.write(tuning, winners)
    if args.csv:
        _write_csv(args.csv, tune.table(tuning, scores))
    _show(tuning, winners)
    print_line(f"{counted(len(files), 'winner')} written to {tuning.options.into}")
    lost = [name for name in tuning.variants if name not in winners]
    for line in capped([f"{name}: every configuration failed (see {short(tuning.folder)}/failures)" for name in lost]):
        print_line(line)
    return 1 if lost else 0


def _told(tuning: Tuning, known: int) -> list[str]:
    """How much is tried. known: runs of which a table tells."""
    options, sizes = tuning.options, [len(tuning.of(variant)) for variant in tuning.variants]
    runs = sum(map(options.runs, sizes))
    seeds = ", ".join(map(str, options.seeds))
    on = f"seeds {seeds}: after each of them {options.keep:.0%} go on" if len(options.seeds) > 1 else f"seed {seeds}"
    return [
        f"{tuning.name}: {counted(len(sizes), 'variant')} of {min(sizes)} to {max(sizes)} configurations, by {options.metric}",
        f"{counted(runs, 'run')} at most, on {on}" + (f"; {known} known by a table" if known else ""),
        f"folder: {short(tuning.folder)}",
    ]


def _show(tuning: Tuning, winners: Mapping[str, Winner]) -> None:
    table = new_table(f"Best of every {tuning.axis}, by {tuning.options.metric}")
    for name in (tuning.axis, "score", "of", "setting"):
        table.add_column(name, justify="right" if name in ("score", "of") else "left")
    for variant, winner in winners.items():
        score = "–" if winner.score is None else f"{winner.score:.2f}"
        table.add_row(variant, score, str(winner.tried), winner.candidate.setting)
    console().print(table)


def _write_csv(path: str, rows: Sequence[Mapping[str, object]]) -> None:
    from fedsim.core import plugins

    plugins.require("pandas", "fedsim tune --csv", "report")
    import pandas as pd

    from fedsim.core.files import write_atomic

    write_atomic(Path(path).absolute(), pd.DataFrame(rows).to_csv(index=False).encode())
