"""The command line: parses and prints, nothing else. One module per command; everything heavy is imported where it is used, so
that --help is quick."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from fedsim.cli import completion
from fedsim.cli.printing import fail
from fedsim.core.errors import FedsimError, did_you_mean
from fedsim.core.home import __version__

# command -> what it does; the module of that name holds add_arguments(parser) and run(args)
COMMANDS = {
    "run": "run a config, or go on with a run that was stopped",
    "serve": "run a config with clients on machines of their own, which join",
    "join": "be a client of a server on this or another machine, with data of one's own",
    "sweep": "run a config over axes and seeds, in parallel; what is there already is not run again",
    "tune": "try a few configurations of every method, with a fixed budget, and write the best as presets",
    "bounds": "what the numbers of a stream lie between: chance, what needs no training, joint training",
    "results": "the runs of a folder as one table, with statistics over seeds",
    "report": "the runs of a folder as one HTML file with charts",
    "ledger": "many methods on streams as one HTML file: table, bounds, costs, recipes",
    "merge": "merge finished runs, or the tasks of one, by any merging rule",
    "predict": "what a finished run's model says of images or texts, as CSV",
    "export": "a finished run's model for Hugging Face PEFT or transformers",
    "unlearn": "remove clients from a finished run, without further rounds",
    "list": "show plug-ins with their options",
    "partition": "show who holds which samples of the stream",
    "check": "hold a plug-in against the laws of its kind",
    "new": "write the skeleton of a plug-in or a study, to start from",
    "doctor": "show what is installed, what this machine can do, and what is missing",
    "completion": "print the script by which bash, zsh or fish complete fedsim's words",
}

ABOUT = "Federated continual learning with parameter-efficient modules."
FIRST = """begin with
  fedsim run quickstart     federated continual learning on real data, under a minute
  fedsim run                all methods and streams, a line each
  fedsim COMMAND --help     what a command takes"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0; 1 when something failed on the way; 2 for bad input; 130 when it was stopped."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show is no reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = parse(argv)
    try:
        with _terminable():
            code: int = args.command(args)
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return fail("stopped", 130)
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as e:
        if args.debug:
            raise
        if isinstance(e, FedsimError):
            return fail(f"error: {e}", e.exit_code)
        return fail(f"error: {type(e).__name__}: {e} (this is not expected: run with --debug for the traceback)", 1)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, which batch systems send, stops a command as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments with `command`, the function that carries them out. Files and overrides may stand before or after options."""
    parser, commands = _parser()
    completion.answer(parser, commands)
    words = sys.argv[1:] if argv is None else argv
    if words and not words[0].startswith("-") and words[0] not in commands:
        parser.error(f"there is no command '{words[0]}'.{did_you_mean(words[0], commands)}")
    args, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if hasattr(args, "configs"):  # every word but an override is a file
        words = [*args.configs, *rest]
        args.configs = [word for word in words if not _is_override(word)]
        args.overrides = [word for word in words if _is_override(word)]
    elif rest:
        if not all(map(_is_override, rest)):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.overrides = [*args.overrides, *rest]
    return args


def _show_help(parser: argparse.ArgumentParser) -> int:
    """`fedsim` alone: what there is, and where to begin."""
    parser.print_help()
    return 0


def _is_override(word: str) -> bool:
    """key=value; a path may hold a = as well."""
    return "=" in word and not os.path.isfile(word)


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command, by its name."""
    return _parser()[1]


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=16)
    parser = argparse.ArgumentParser(prog="fedsim", description=ABOUT, epilog=FIRST, formatter_class=layout)
    parser.add_argument("--version", action="version", version=f"fedsim {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    parser.set_defaults(command=lambda _: _show_help(parser), debug=False)
    each = {}
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"fedsim.cli.{name}")
        each[name] = command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        module.add_arguments(command)
        command.set_defaults(command=module.run)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser, each
