"""fedsim list: plug-ins with their options."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterator

from fedsim.cli.printing import console, line_printer
from fedsim.core.errors import ConfigError, did_you_mean


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `fedsim list` takes."""
    command.add_argument("kind", nargs="?", metavar="KIND", help="aggregators, adapters, partitions, … (default: all)")
    command.add_argument("--markdown", action="store_true", help="all methods as one page, and what goes with what (a minute)")


def run(args: argparse.Namespace) -> int:
    """fedsim list: every plug-in of a kind, its summary and its options."""
    from fedsim.core import plugins

    if args.markdown:
        from fedsim import matrix

        sys.stdout.write(matrix.page())
        return 0
    if args.kind is not None and args.kind not in plugins.KINDS:
        raise ConfigError(f"unknown kind '{args.kind}'.{did_you_mean(args.kind, plugins.KINDS)}")
    kinds = [*plugins.KINDS] if args.kind is None else [args.kind]
    print_line = line_printer(console())
    for kind in kinds:
        print_line(f"{kind} ({where(kind)})")
        for name in plugins.names(kind):
            for line in describe(kind, name, console().width):
                print_line(line)
        print_line("")
    return 0


def describe(kind: str, name: str, width: int) -> Iterator[str]:
    """One plug-in in lines of at most `width`: name and summary, what it computes, options with type, default and meaning."""
    from fedsim.core import options, plugins
    from fedsim.core.contracts import Part
    from fedsim.core.errors import PluginError

    try:
        found = plugins.load(kind, name)
    except PluginError as e:
        yield from wrapped(f"  {name + ' ':<18}", f"not available: {e}", width)
        return
    texts = [_first_sentence(sys.modules[found.__module__].__doc__), _first_sentence(found.__doc__)]
    texts = [t for t in dict.fromkeys(texts) if t]
    yield from wrapped(f"  {name + ' ':<18}", texts[0] if texts else "", width)
    for text in texts[1:]:
        yield from wrapped(" " * 20, text, width)
    for o in options.of(found):
        value = o.default if o.default == options.MUST else f"default {o.default}"
        meaning = f": {o.meaning}" if o.meaning else ""
        yield from wrapped(" " * 22, f"{o.name} ({o.type}, {value}){meaning}", width)
    for told in found.usual_traits().lines() if issubclass(found, Part) else ():
        yield from wrapped(" " * 22, told, width)


def _first_sentence(text: str | None) -> str:
    """The first paragraph on one line, cut after its first sentence."""
    paragraph = " ".join((text or "").strip().split("\n\n")[0].split())
    return re.split(r"(?<=\.)(?<! al\.) ", paragraph)[0]


def where(kind: str) -> str:
    """The config key that names a plug-in of this kind."""
    from fedsim.core import config as configs

    keys = {k: key for key, k in configs.PLUGIN_KEYS.items()} | {
        k: f"server.{key}" for key, k in configs.SERVER_PLUGIN_KEYS.items()
    }
    keys |= {
        "learners": "client.learners",
        "merging": "server.aggregator.rule, server.consolidator.rule",
        "pools": "runtime.pool",
        "statistics": "asked for by rules",
        "trackers": "trackers",
    }
    return keys[kind]


def wrapped(start: str, text: str, width: int) -> list[str]:
    room = max(30, width - len(start))
    lines = textwrap.wrap(text, room, break_long_words=False) or [""]
    return [start + lines[0], *(" " * len(start) + line for line in lines[1:])]
