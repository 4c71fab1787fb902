"""fedsim run: a config to the end of the stream, then the outcome."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from fedsim.cli.printing import configs_and_overrides, console, fail, human_bytes, line_printer, new_table
from fedsim.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fedsim.core.config import SimConfig
    from fedsim.runs.results import FloatArray, Results


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `fedsim run` takes."""
    configs_and_overrides(command, "; with --resume they may be left out")
    command.add_argument("--output", metavar="DIR", help="run directory (default: runs/<name>-<hash of the config>)")
    command.add_argument("--resume", metavar="RUN_DIR", help="go on in this run directory, to the same bits as if never stopped")
    command.add_argument(
        "--dry-run", action="store_true", help="check config, data and model, say what it would be, train nothing"
    )
    command.add_argument("--quiet", action="store_true", help="print the outcome only")


def run(args: argparse.Namespace) -> int:
    """fedsim run: to the end of the stream, then the outcome."""
    paths = args.configs
    if not paths:
        if not args.resume:
            return show_presets(args.overrides)
        paths = [f"{args.resume}/config.yaml"] if args.overrides else []
    if args.resume and args.dry_run:
        raise ConfigError("--dry-run is for a run that is not begun: leave --resume out")
    if args.resume and args.output:
        raise ConfigError("--resume goes on in its own run directory: leave --output out")

    from fedsim.core import config as configs

    config = configs.load(paths, args.overrides) if paths else None
    if args.dry_run and config is not None:
        return dry_run(config)

    from fedsim import simulation
    from fedsim.watch.progress import ProgressDisplay

    display = ProgressDisplay(quiet=args.quiet)
    try:
        with display:
            results = simulation.run(config, output=args.output, resume=args.resume, progress=display)
    except KeyboardInterrupt:
        folder = args.resume or display.run_dir
        return fail(
            "stopped before anything was saved" if folder is None else f"stopped; go on with: fedsim run --resume {folder}", 130
        )
    show_results(results, console())
    return 0


def dry_run(config: SimConfig) -> int:
    """What is prepared before a run's first round, and what the run would be."""
    from fedsim import simulation

    parts = simulation.prepare(config)
    manifest, params, sizes = parts.manifest, parts.state.params, parts.manifest.sizes
    tested = sum(len(parts.spec.test_of(t)) for t in range(manifest.num_tasks))
    backbone = sum(p.numel() for p in parts.model.backbone.encoder.parameters())
    module, sent = sum(t.numel() for t in params.values()), sum(t.nbytes for t in params.values())
    seen = int(sizes.sum()) * config.server.rounds * config.client.epochs
    classes, trained_on = len(manifest.class_order), int(sizes.sum())
    lines = [
        f"{manifest.num_tasks} tasks of {classes} classes, {trained_on:,} samples to train on, {tested:,} to test",
        f"{manifest.num_clients} clients with {int(sizes.min()):,} to {int(sizes.max()):,} training samples of a task",
        f"backbone of {backbone:,} numbers; module and head of {module:,}, {human_bytes(sent)} to a client",
        f"{config.server.rounds} rounds x {config.client.epochs} epochs of a task: {seen:,} samples forward and backward in all",
        *(f"Note: {note}" for note in parts.notes),
        "Checked: one small batch went forward and backward. Nothing was trained, nothing was written.",
    ]
    print_line = line_printer(console())
    for line in lines:
        print_line(line)
    return 0


def show_presets(overrides: Sequence[str]) -> int:
    """What can be run by its name. Raises ConfigError if somebody wants something of a config that is not named."""
    from fedsim.core import presets

    if overrides:
        raise ConfigError(f"nothing to run: name a config before {overrides[0]}, e.g. fedsim run quickstart {overrides[0]}")
    screen = console()
    print_line = line_printer(screen)
    papers = (presets.REPRODUCTION, "As papers run them (weights and data are yours: docs/reproduction.md)")
    for part, what in ((presets.METHODS, "Methods"), (presets.STREAMS, "Streams"), papers):
        print_line(f"{what}\n")
        for name, line in presets.described(part).items():
            print_line(f"  {name + ' ':<24}{shorten(line, max(40, screen.width - 26), placeholder=' …')}")
        print_line("")
    print_line("fedsim run quickstart                     LoRM on 100 Omniglot characters, under a minute")
    print_line("fedsim run lorm partition.alpha=0.1       a method on that stream, any key changed")
    print_line("fedsim run fashion er                     any method on any stream; files of your own go as well as names")
    print_line("fedsim run --resume RUN_DIR               go on with a run that was stopped")
    return 0


def show_results(results: Results, console: Console) -> None:
    """What a researcher wants to know: accuracies, forgetting, bytes, seconds."""
    blocks = [*accuracy_tables(results.accuracy, console.width), metrics_table(results.metrics, results.config.stream.name)]
    if results.costs.get("client_rounds"):
        blocks.append(bytes_table(results.costs))
    for block in blocks:
        console.print()
        console.print(block)
    print_line = line_printer(console)
    print_line("")
    from fedsim.runs import bounds

    for line in known.lines if (known := bounds.find(results)) else ():
        print_line(line)
    seconds: Mapping[str, float] = results.costs.get("seconds", {})
    phases = ", ".join(f"{phase.replace('_', '-')} {value:.1f}" for phase, value in seconds.items())
    print_line(f"Seconds: {sum(seconds.values()):.1f} ({phases})")
    for note in results.notes:
        print_line(f"Note: {note}")
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
        table = new_table("Accuracy in % per task" + (f" (tasks {start} to {stop - 1})" if tasks > room else ""))
        table.add_column("after task", justify="right")
        for j in range(start, stop):
            table.add_column(str(j), justify="right", min_width=5)
        if start == 0:
            table.add_column("mean", justify="right", min_width=5, style="bold")
        for i in range(start, tasks):
            cells = ["" if np.isnan(a) else f"{a:.1f}" for a in accuracy_TT[i, start:stop]]
            table.add_row(str(i), *cells, *([f"{accuracy_TT[i, : i + 1].mean():.1f}"] if start == 0 else []))
        yield table


def metrics_table(values: Mapping[str, float | None], stream: str) -> Table:
    """The headline metrics, as the stream has it (e.g. class-incremental) and with the task known at test time."""
    from fedsim.runs import metrics

    table = new_table("Summary in %")
    table.add_column("")
    suffixes = [""] if stream == "task_incremental" else ["", metrics.TOLD]
    for name in [stream, "task_incremental"][: len(suffixes)]:
        table.add_column(name.replace("_", "-\n"), justify="right")
    for metric in metrics.shown("run"):
        cells = [values.get(metric.name + suffix) for suffix in suffixes]
        if metric.needs == "nothing" and cells == [None] * len(cells):
            continue  # it is of other runs
        label = metric.title.lower() if metric.unit == "%" else metric.axis.lower()
        table.add_row(label, *("–" if v is None else f"{v:.2f}" for v in cells))
    return table


def bytes_table(costs: Mapping[str, Any]) -> Table:
    """Traffic by kind of object: of the whole run, and of one client in one round."""
    down, up, turns = costs["bytes"]["down"], costs["bytes"]["up"], costs["client_rounds"]
    table = new_table("Bytes")
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
    if stored := costs.get("stored"):
        each, most = human_bytes(stored["mean"]), human_bytes(stored["max"])
        table.caption += f"\n{stored['clients']} clients store {each} on average, {most} at most"
    return table
