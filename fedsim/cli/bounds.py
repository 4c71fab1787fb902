"""fedsim bounds: what the numbers of a stream lie between."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fedsim.cli.printing import configs_and_overrides, console, fail, line_printer, new_table
from fedsim.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from fedsim.core.config import SimConfig
    from fedsim.runs.bounds import Bounds
    from fedsim.runs.results import Results


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `fedsim bounds` takes."""
    configs_and_overrides(command)
    command.add_argument("--output", metavar="DIR", help="folder of the runs (default: runtime.output, where runs find them)")
    command.add_argument("--untrained", action="store_true", help="only those that train nothing; no joint training")
    command.add_argument("--quiet", action="store_true", help="print the outcome only")


def run(args: argparse.Namespace) -> int:
    """fedsim bounds: make the runs that are not there, and say what they found."""
    if not args.configs:
        raise ConfigError("nothing to bound: name a stream, e.g. fedsim bounds fashion")
    from fedsim.core import config as configs
    from fedsim.runs import bounds

    config = configs.load(args.configs, args.overrides)
    folder = Path(args.output or config.runtime.output).absolute()
    names = [name for name in bounds.REFERENCES if not (args.untrained and name == "joint")]
    made: list[Results] = []
    for name in names:
        try:
            made.append(_made(bounds.reference(config, name), folder, args.quiet))
        except KeyboardInterrupt:
            return fail("stopped; what is finished is kept: go on with the same command", 130)
    found = bounds.find(made[0])
    assert found is not None
    screen = console()
    screen.print(_table(config, found))
    for line in found.lines[1:]:
        line_printer(screen)(line)
    return 0


def _made(wanted: SimConfig, folder: Path, quiet: bool) -> Results:
    """The run of this config in the folder, made or gone on with where it is not finished."""
    from fedsim import simulation
    from fedsim.runs import bounds
    from fedsim.watch.progress import ProgressDisplay

    identity = wanted.identity()
    if (done := bounds.beside(folder, identity)) is not None:
        return done
    with ProgressDisplay(quiet=quiet) as display:
        return simulation.once(wanted, folder / identity[:16], display)


def _table(config: SimConfig, found: Bounds) -> Table:
    table = new_table(f"What {config.name} lies between, in %")
    table.add_column("")
    table.add_column("final average\naccuracy", justify="right")
    for text, value in found.rows.items():
        table.add_row(text, f"{value:.2f}")
    if found.headroom is not None:
        over = found.over and f", {found.over}"
        table.add_row(f"headroom{over}: the last less nearest class mean", f"{found.headroom:.2f}")
    return table
