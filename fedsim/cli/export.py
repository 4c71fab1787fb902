"""fedsim export: a run's deployed model for PEFT and transformers."""

from __future__ import annotations

import argparse

from fedsim.cli.printing import console, line_printer

FORMS = ("peft", "merged")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `fedsim export` takes."""
    command.add_argument("run", metavar="RUN", help="run directory of a finished run")
    command.add_argument(
        "--to",
        choices=FORMS,
        required=True,
        help="peft: a LoRA adapter with the head; merged: the backbone with merged weights, as transformers loads it",
    )
    command.add_argument("folder", metavar="DIR", help="a new folder")
    command.add_argument(
        "--after-task", type=int, metavar="T", help="the model as it was after task T, of a run with server.keep=tasks"
    )


def run(args: argparse.Namespace) -> int:
    """fedsim export: write the folder, and say how it is loaded."""
    from fedsim.exports.write import export

    made = export(args.run, args.to, args.folder, args.after_task)
    print_line = line_printer(console())
    print_line(f"written to {made.folder}; its README.md says what it is. It is loaded by")
    print_line("")
    for line in str(made.script).splitlines():
        print_line(f"    {line}" if line else "")
    print_line("")
    for note in made.notes:
        print_line(f"note: {note}")
    return 0
