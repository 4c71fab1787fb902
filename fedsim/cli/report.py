"""fedsim report: the runs of a folder as one HTML file with charts."""

from __future__ import annotations

import argparse
import os

FORMATS = ("svg", "png", "pdf")


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("paths", nargs="+", metavar="PATH", help="run directories, or folders of them")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--sweep", metavar="NAME", help="of several sweeps in the folder")
    which.add_argument("--all", action="store_true", help="every run of the folder, whatever its sweep")
    command.add_argument("--output", metavar="FILE", help="the page (default: report.html in PATH; of several, here)")
    command.add_argument("--figures", metavar="DIR", help="also write every chart as a file of its own into this folder")
    command.add_argument("--format", choices=FORMATS, default="svg", help="of these files (default: svg)")


def run(args: argparse.Namespace) -> int:
    """Write the page, and say what is in it and what is not."""
    from fedsim import report
    from fedsim.cli.printing import capped, console, counted, human_bytes, line_printer
    from fedsim.runs.collection import collect

    collection = collect(args.paths, sweep=args.sweep, everything=args.all)
    output = args.output or os.path.join(args.paths[0] if len(args.paths) == 1 else "", "report.html")
    written = report.write(collection, output, args.figures, args.format)
    print_line = line_printer(console())
    shown = f"{counted(written.charts, 'chart')} of {counted(written.runs, 'run')}"
    said = f"{os.path.relpath(written.path)}: {human_bytes(written.size)}, {shown}"
    files = f"; {counted(len(written.files), 'figure')} in {os.path.relpath(args.figures)}" if args.figures else ""
    print_line(said + files)
    absent = collection.absent
    if absent:
        print_line(f"{counted(len(absent), 'run')} not shown:")
    for line in capped([f"{one.what}: {one.reason}" for one in absent], " (the page lists them)"):
        print_line(line)
    if collection.others:
        print_line(f"{counted(collection.others, 'other finished run')} in the folder left out (--all takes every run)")
    return 0
