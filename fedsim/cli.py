"""The command line: parses and prints, nothing else. Everything heavy is imported where it is used, so that --help is quick."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import fedsim
from fedsim.core.errors import ConfigError, FedsimError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fedsim.results import FloatArray, Results
    from server.laws import LawResult

PICTURES = (".png", ".svg", ".pdf")
HEADLINES = {
    "final_average_accuracy": "final average accuracy",
    "average_incremental_accuracy": "average incremental accuracy",
    "forgetting": "forgetting",
    "backward_transfer": "backward transfer",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0; 1 when something failed on the way; 2 for bad input; 130 for Ctrl-C."""
    args = parse(argv)
    try:
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


def fail(message: str, code: int) -> int:
    """One line on stderr."""
    sys.stderr.write(f"fedsim: {' '.join(message.split())}\n")
    return code


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments with `command`, the function that carries them out. Overrides may stand before or after options."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fedsim", description="Federated continual learning with parameter-efficient modules.")
    parser.add_argument("--version", action="version", version=f"fedsim {fedsim.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = _add(commands, run, "run", "run a config, or go on with a run that was stopped")
    command.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file; with --resume it may be left out")
    _add_overrides(command, "partition.alpha=0.1")
    command.add_argument("--output", metavar="DIR", help="run directory (default: runs/<name>-<hash of the config>)")
    command.add_argument("--resume", metavar="RUN_DIR", help="go on in this run directory, to the same bits as if never stopped")
    command.add_argument("--quiet", action="store_true", help="print the outcome only")

    command = _add(commands, list_plugins, "list", "show plug-ins with their options")
    command.add_argument("kind", nargs="?", metavar="KIND", help="aggregators, adapters, partitions, … (default: all)")

    command = _add(commands, partition, "partition", "show who holds which samples of the stream")
    command.add_argument("config", metavar="CONFIG", help="a YAML file")
    _add_overrides(command, "partition.alpha=0.1")
    command.add_argument("--picture", metavar="FILE", help=f"draw it ({', '.join(PICTURES)})")
    command.add_argument("--save", metavar="FILE", help="write the manifest, to be used with manifest=FILE")

    command = _add(commands, check, "check", "hold an aggregator against the laws of merging")
    command.add_argument("rule", metavar="FILE_OR_NAME", help="./my_rule.py, or the name of an aggregator")
    _add_overrides(command, "ridge=0.1", "OPTION=VALUE")
    return parser


def _add(commands: Any, function: Any, name: str, summary: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    command.set_defaults(command=function)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def _add_overrides(command: argparse.ArgumentParser, example: str, metavar: str = "KEY=VALUE") -> None:
    command.add_argument("overrides", nargs="*", metavar=metavar, help=f"for example {example}")


# ---------------------------------------------------------------- fedsim run


def run(args: argparse.Namespace) -> int:
    """fedsim run: to the end of the stream, then the outcome."""
    from fedsim.core import config as configs
    from fedsim.progress import ProgressDisplay

    path, overrides = args.config, list(args.overrides)
    if path is not None and args.resume and "=" in path:
        path, overrides = None, [path, *overrides]
    if path is None:
        if not args.resume:
            raise ConfigError("nothing to run: give a config, e.g. fedsim run configs/quickstart.yaml, or --resume RUN_DIR")
        path = f"{args.resume}/config.yaml" if overrides else None
    if args.resume and args.output:
        raise ConfigError("--resume goes on in its own run directory: leave --output out")
    config = None if path is None else configs.load(path, overrides)

    from fedsim import simulation

    display = ProgressDisplay(quiet=args.quiet)
    try:
        with display:
            results = simulation.run(config, output=args.output, resume=args.resume, progress=display)
    except KeyboardInterrupt:
        folder = args.resume or display.run_dir
        return fail(
            "stopped before anything was saved" if folder is None else f"stopped; go on with: fedsim run --resume {folder}", 130
        )
    show_results(results, _console())
    return 0


def show_results(results: Results, console: Console) -> None:
    """What a researcher wants to know: accuracies, forgetting, bytes, seconds."""
    blocks = [*accuracy_tables(results.accuracy, console.width), metrics_table(results.metrics, results.config.stream.name)]
    if results.costs.get("client_rounds"):
        blocks.append(bytes_table(results.costs))
    for block in blocks:
        console.print()
        console.print(block)
    print_line = _line_printer(console)
    print_line("")
    seconds: Mapping[str, float] = results.costs.get("seconds", {})
    phases = ", ".join(f"{phase.replace('_', '-')} {value:.1f}" for phase, value in seconds.items())
    print_line(f"Seconds: {sum(seconds.values()):.1f} ({phases})")
    if results.failures:
        print_line(f"Skipped clients: {len(results.failures)} (see failures.json)")
    if results.path is not None:
        print_line(f"Run directory: {os.path.relpath(results.path)}")


def accuracy_tables(accuracy_TT: FloatArray, width: int) -> Iterator[Table]:
    """The accuracy matrix; when it is wider than the terminal, its columns in several tables, the means in the first."""
    import numpy as np

    tasks = len(accuracy_TT)
    room = max(1, (width - 18) // 8)  # columns beside "after task" and "mean"
    for start in range(0, tasks, room):
        stop = min(start + room, tasks)
        table = _table("Accuracy in % per task" + (f" (tasks {start} to {stop - 1})" if tasks > room else ""))
        table.add_column("after task", justify="right")
        for j in range(start, stop):
            table.add_column(str(j), justify="right", min_width=5)
        if start == 0:
            table.add_column("mean", justify="right", min_width=5, style="bold")
        for i in range(start, tasks):
            cells = ["" if np.isnan(a) else f"{a:.1f}" for a in accuracy_TT[i, start:stop]]
            table.add_row(str(i), *cells, *([f"{accuracy_TT[i, : i + 1].mean():.1f}"] if start == 0 else []))
        yield table


def metrics_table(metrics: Mapping[str, float | None], stream: str) -> Table:
    """The headline metrics, as the stream has it (e.g. class-incremental) and with the task known at test time."""
    table = _table("Summary in %")
    table.add_column("")
    suffixes = [""] if stream == "task_incremental" else ["", "_task_incremental"]
    for name in [stream, "task_incremental"][: len(suffixes)]:
        table.add_column(name.replace("_", "-\n"), justify="right")
    for key, label in HEADLINES.items():
        values = [metrics[f"{key}{suffix}"] for suffix in suffixes]
        table.add_row(label, *("–" if v is None else f"{v:.2f}" for v in values))
    return table


def bytes_table(costs: Mapping[str, Any]) -> Table:
    """Traffic by kind of object: of the whole run, and of one client in one round."""
    down, up, turns = costs["bytes"]["down"], costs["bytes"]["up"], costs["client_rounds"]
    table = _table("Bytes")
    table.add_column("")
    for name in ("down", "up", "down each", "up each"):
        table.add_column(name, justify="right")
    kinds = [kind for kind in dict.fromkeys([*down, *up]) if down.get(kind, 0) or up.get(kind, 0)]
    for kind in kinds:
        totals = [down.get(kind, 0), up.get(kind, 0)]
        table.add_row(kind, *map(human_bytes, [*totals, *(t / turns for t in totals)]))
    totals = [sum(down.values()), sum(up.values())]
    table.add_row("all", *map(human_bytes, [*totals, *(t / turns for t in totals)]), style="bold")
    table.caption = f"each: per client and round, of which there were {turns}"
    return table


def human_bytes(count: float) -> str:
    """1.2 MB: powers of 1000, as storage and networks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


# ---------------------------------------------------------------- fedsim list


def list_plugins(args: argparse.Namespace) -> int:
    """fedsim list: every plug-in of a kind, its summary and its options."""
    from fedsim.core import plugins

    if args.kind is not None and args.kind not in plugins.KINDS:
        raise ConfigError(f"unknown kind '{args.kind}'.{did_you_mean(args.kind, plugins.KINDS)}")
    kinds = list(plugins.KINDS) if args.kind is None else [args.kind]
    print_line = _line_printer(_console())
    for kind in kinds:
        print_line(f"{kind} ({_where(kind)})")
        for name in plugins.names(kind):
            for line in describe(kind, name, _console().width):
                print_line(line)
        print_line("")
    return 0


def describe(kind: str, name: str, width: int) -> Iterator[str]:
    """One plug-in in lines of at most `width`: name and summary, what it computes, options with type and default."""
    from dataclasses import MISSING, fields, is_dataclass

    from fedsim.core import plugins
    from fedsim.core.errors import PluginError

    try:
        found = plugins.load(kind, name)
    except PluginError as e:
        yield from _wrapped(f"  {name:<18}", f"not available: {e}", width)
        return
    texts = [_first_sentence(sys.modules[found.__module__].__doc__), _first_sentence(found.__doc__)]
    texts = [t for t in dict.fromkeys(texts) if t]
    yield from _wrapped(f"  {name:<18}", texts[0] if texts else "", width)
    for text in texts[1:]:
        yield from _wrapped(" " * 20, text, width)
    for f in fields(found) if is_dataclass(found) else ():
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        value = "must be given" if default is MISSING else f"default {json.dumps(default, ensure_ascii=False, default=repr)}"
        yield from _wrapped(" " * 22, f"{f.name}: {f.type if isinstance(f.type, str) else f.type.__name__}, {value}", width)


def _first_sentence(text: str | None) -> str:
    """The first paragraph on one line, cut after its first sentence."""
    paragraph = " ".join((text or "").strip().split("\n\n")[0].split())
    return re.split(r"(?<=\.)(?<! al\.) ", paragraph)[0]


def _where(kind: str) -> str:
    """The config key that names a plug-in of this kind."""
    from fedsim.core import config as configs

    keys = {k: key for key, k in configs.PLUGIN_KEYS.items()} | {
        k: f"server.{key}" for key, k in configs.SERVER_PLUGIN_KEYS.items()
    }
    return {"objectives": "client.objectives", "pools": "runtime.pool", "statistics": "asked for by rules"}.get(kind) or keys[
        kind
    ]


def _wrapped(start: str, text: str, width: int) -> list[str]:
    room = max(30, width - len(start))
    lines = textwrap.wrap(text, room, break_long_words=False) or [""]
    return [start + lines[0], *(" " * len(start) + line for line in lines[1:])]


# ---------------------------------------------------------------- fedsim partition, fedsim check


def partition(args: argparse.Namespace) -> int:
    """fedsim partition: the split as a table, a picture, a file."""
    if args.picture and not args.picture.endswith(PICTURES):
        raise ConfigError(f"--picture {args.picture}: the name must end in {', '.join(PICTURES)}")
    from fedsim import simulation
    from fedsim.core import config as configs
    from fedsim.data import show

    manifest, _ = simulation.prepare_data(configs.load(args.config, args.overrides))
    console = _console()
    console.print(show.table(manifest))
    print_line = _line_printer(console)
    print_line(f"manifest hash: {manifest.hash}")
    if args.picture:
        show.picture(manifest, args.picture)
        print_line(f"picture: {args.picture}")
    if args.save:
        manifest.save(args.save)
        print_line(f"manifest: {args.save} (manifest={args.save} repeats this split)")
    return 0


def check(args: argparse.Namespace) -> int:
    """fedsim check: every law with what became of it; exit code 1 if one is broken."""
    from fedsim.core import config as configs
    from server import laws

    options = configs.parse_overrides(args.overrides)
    section = configs.expand("aggregators", {"name": args.rule, **options}, "check")
    results = laws.check(configs.build("aggregators", section))
    console = _console()
    print_line = _line_printer(console)
    for result in results:
        for line in law_lines(result, console.width):
            print_line(line)
    broken = sum(not r.ok for r in results)
    exempt = sum(r.exempt is not None for r in results)
    kept = len(results) - broken - exempt
    print_line(f"{args.rule}: {kept} laws kept, {exempt} exempt, {broken} broken")
    return 1 if broken else 0


def law_lines(result: LawResult, width: int) -> list[str]:
    """One law: ok, broken or exempt, its statement, and why."""
    verdict = "exempt" if result.exempt is not None else "ok" if result.ok else "BROKEN"
    lines = _wrapped(f"{verdict:<7} {result.name:<14}", result.statement, width)
    why = result.exempt if result.exempt is not None else result.explanation
    return lines + (_wrapped(" " * 23 + "→ ", why, width) if why else [])


# ---------------------------------------------------------------- printing


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _line_printer(console: Console) -> Any:
    """Print text as it is: no markup, no wrapping by the console."""
    return lambda text: console.print(text, markup=False, soft_wrap=True)


def _table(title: str) -> Table:
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


if __name__ == "__main__":
    sys.path[0] = os.path.dirname(
        os.path.dirname(os.path.abspath(fedsim.__file__))
    )  # not the user's folder: it may hold a clients.py
    sys.exit(main())
