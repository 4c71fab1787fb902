"""fedsim ledger: many methods as one page that sorts and filters, with the bounds of each stream and every method's recipe."""

from __future__ import annotations

import argparse
import os


def add_arguments(command: argparse.ArgumentParser) -> None:
    what = "folders of runs or CSVs of `fedsim results`, each a stream; or a YAML that names them and says more"
    command.add_argument("paths", nargs="+", metavar="PATH", help=what)
    command.add_argument("--sweep", metavar="NAME", help="of several sweeps in a folder")
    command.add_argument("--output", metavar="FILE", help="the page (default: what the YAML says, or ledger.html in PATH)")


def run(args: argparse.Namespace) -> int:
    """Write the page, and say what is in it."""
    from fedsim.cli.printing import capped, console, counted, human_bytes, line_printer
    from fedsim.report import ledger

    study = ledger.read(args.paths, args.sweep)
    written = ledger.write(study, args.output)
    print_line = line_printer(console())
    shown = f"{counted(written.methods, 'method')}, {counted(written.runs, 'run')}"
    print_line(f"{os.path.relpath(written.path)}: {human_bytes(written.size)}, {shown}")
    for line in capped([f"{s.name}: {line}" for s in study.streams for line in s.absent], " (the page lists them)"):
        print_line(f"not shown: {line}")
    return 0
