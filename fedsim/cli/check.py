"""fedsim check: an aggregator against the laws of merging."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fedsim.cli.list import wrapped
from fedsim.cli.printing import console, line_printer

if TYPE_CHECKING:
    from server.laws import LawResult


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `fedsim check` takes."""
    command.add_argument("rule", metavar="FILE_OR_NAME", help="./my_rule.py, or the name of an aggregator")
    command.add_argument("overrides", nargs="*", metavar="OPTION=VALUE", help="for example ridge=0.1")


def run(args: argparse.Namespace) -> int:
    """fedsim check: every law with what became of it; exit code 1 if one is broken."""
    from fedsim.core import config as configs
    from server import laws

    options = configs.parse_overrides(args.overrides)
    section = configs.expand("aggregators", {"name": args.rule, **options}, "check")
    results = laws.check(configs.build("aggregators", section))
    out = console()
    print_line = line_printer(out)
    for result in results:
        for line in law_lines(result, out.width):
            print_line(line)
    broken = sum(not r.ok for r in results)
    exempt = sum(r.exempt is not None for r in results)
    kept = len(results) - broken - exempt
    print_line(f"{args.rule}: {kept} laws kept, {exempt} exempt, {broken} broken")
    return 1 if broken else 0


def law_lines(result: LawResult, width: int) -> list[str]:
    """One law: ok, broken or exempt, its statement, and why."""
    verdict = "exempt" if result.exempt is not None else "ok" if result.ok else "BROKEN"
    lines = wrapped(f"{verdict:<7} {result.name:<14}", result.statement, width)
    why = result.exempt if result.exempt is not None else result.explanation
    return lines + (wrapped(" " * 23 + "→ ", why, width) if why else [])
