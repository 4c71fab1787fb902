"""What the commands share: configs and overrides as arguments; one line on stderr, plain lines, tables, bytes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MOST_LINES = 10


def configs_and_overrides(command: argparse.ArgumentParser, note: str = "") -> None:
    """What a command takes that works on one config: `configs` and `overrides` (`fedsim.cli.parse` tells them apart)."""
    what = f"YAML files, the later one winning, and keys such as partition.alpha=0.1{note}"
    command.add_argument("configs", nargs="*", metavar="CONFIG | KEY=VALUE", help=what)
    command.set_defaults(overrides=[])


def fail(message: str, code: int) -> int:
    """One line on stderr."""
    sys.stderr.write(f"fedsim: {' '.join(message.split())}\n")
    return code


def console() -> Console:
    """Standard output, as wide as the terminal."""
    from rich.console import Console

    return Console(highlight=False)


def line_printer(console: Console) -> Any:
    """Print text as it is: no markup, no wrapping by the console."""
    return lambda text: console.print(text, markup=False, soft_wrap=True)


def new_table(title: str) -> Table:
    """An empty table with a title."""
    from rich import box
    from rich.table import Table

    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )


def human_bytes(count: float) -> str:
    """1.2 MB: powers of 1000, as storage and networks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def counted(number: int, what: str) -> str:
    """1 run, 2 runs."""
    return f"{number} {what}{'s' if number != 1 else ''}"


def short(path: str | Path) -> str:
    """Relative to the working directory where it lies below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def capped(lines: Sequence[str], where: str = "") -> list[str]:
    """The first lines, indented, and how many more there are (and `where`)."""
    more = [f"  and {len(lines) - MOST_LINES} more{where}"] if len(lines) > MOST_LINES else []
    return [f"  {line}" for line in lines[:MOST_LINES]] + more
