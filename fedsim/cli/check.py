"""fedsim check: a plug-in of any kind against the laws of its kind."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fedsim.cli.list import wrapped
from fedsim.cli.printing import console, line_printer
from fedsim.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedsim.laws import LawResult


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `fedsim check` takes."""
    command.add_argument("plugin", metavar="FILE_OR_NAME", help="./my_rule.py, or the name of a plug-in")
    command.add_argument("overrides", nargs="*", metavar="OPTION=VALUE", help="for example ridge=0.1 (default: its examples)")
    command.add_argument("--kind", help="aggregators, adapters, … where a name or a file has several (default: all of them)")


def run(args: argparse.Namespace) -> int:
    """fedsim check: for every class, all laws with what became of them; exit code 1 if one is broken."""
    from fedsim import laws
    from fedsim.core import config as configs

    kinds = _kinds(args.plugin, args.kind)
    options = configs.parse_overrides(args.overrides) or None
    if options and len(kinds) > 1:
        raise ConfigError(
            f"{args.plugin} is several plug-ins ({', '.join(kinds)}): say by --kind which of them has these options"
        )
    out, broken = console(), 0
    print_line = line_printer(out)
    for kind in kinds:
        if len(kinds) > 1:
            print_line(kind)
        results = laws.check_named(kind, args.plugin, options)
        for result in results:
            for line in law_lines(result, out.width):
                print_line(line)
        for line in laws.strangers(kind, args.plugin):
            print_line(f"note    {line}")
        print_line(f"{args.plugin}: {_counts(results)}")
        broken += sum(not r.ok for r in results)
    return 1 if broken else 0


def _kinds(name: str, wanted: str | None) -> list[str]:
    """The kinds that a name or a file has a plug-in of, or the one that is wanted."""
    from fedsim.core import plugins

    if wanted is None:
        return list(plugins.kinds_of(name))
    if wanted not in plugins.KINDS:
        raise ConfigError(f"unknown kind '{wanted}'.{did_you_mean(wanted, plugins.KINDS)}")
    return [wanted]


def _counts(results: Sequence[LawResult]) -> str:
    broken = sum(not r.ok for r in results)
    exempt = sum(r.exempt is not None for r in results)
    return f"{len(results) - broken - exempt} laws kept, {exempt} exempt, {broken} broken"


def law_lines(result: LawResult, width: int) -> list[str]:
    """One law: ok, broken or exempt, its statement, and why."""
    verdict = "exempt" if result.exempt is not None else "ok" if result.ok else "BROKEN"
    lines = wrapped(f"{verdict:<7} {result.name:<14}", result.statement, width)
    why = result.exempt if result.exempt is not None else result.explanation
    return lines + (wrapped(" " * 23 + "→ ", why, width) if why else [])
