"""fedsim merge: finished runs, or the tasks of one, as one model."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.cli.printing import console, line_printer, new_table

if TYPE_CHECKING:
    from fedsim.merging.measure import Measured, Percent
    from fedsim.merging.merge import Merged
    from fedsim.merging.sources import Sources

FILES = ("merged.safetensors", "merged.json")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `fedsim merge` takes."""
    command.add_argument("runs", nargs="+", metavar="RUN", help="run directories of finished runs; with --of tasks, of one")
    command.add_argument("--rule", required=True, help="one of `fedsim list merging`, or the path of a file of your own")
    command.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="OPTION=VALUE", help="options of the rule, e.g. density=0.3"
    )
    command.add_argument(
        "--of", choices=("runs", "tasks"), default="runs", help="merge the runs, or the tasks' modules of one run (default: runs)"
    )
    command.add_argument(
        "--head",
        choices=("mean", "rule"),
        default="mean",
        help="of runs: each class's row as the mean over runs that learned the class (default), or merged by the rule",
    )
    command.add_argument("--calibrator", metavar="NAME", help="solve the head anew on the merged features, e.g. lda")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of a rule that draws, such as dare (default: 0)")
    command.add_argument("--output", required=True, metavar="DIR", help="a new folder for the model and what it knows")


def run(args: argparse.Namespace) -> int:
    """fedsim merge: write the merged model, and what it knows beside what each of its sources knows."""
    from fedsim.core.config import expand, parse_overrides
    from fedsim.core.errors import ConfigError, RunDirError
    from fedsim.core.files import held
    from fedsim.merging.heads import solved
    from fedsim.merging.merge import merge
    from fedsim.merging.sources import of_runs, of_tasks

    rule = expand("merging", {**parse_overrides(args.set), "name": args.rule}, "--rule")
    out = Path(args.output).absolute()
    if out.exists():
        raise RunDirError(f"{out} exists already: choose another --output")
    if args.of == "tasks" and len(args.runs) != 1:
        raise ConfigError(f"--of tasks merges the tasks of one run, but {len(args.runs)} are named: merge them one by one")
    sources = of_tasks(args.runs[0]) if args.of == "tasks" else of_runs(args.runs)
    merged = merge(sources, rule, args.seed, args.head)
    if args.calibrator:
        merged = replace(merged, deployed=solved(sources, merged.deployed, args.calibrator), head=args.calibrator)
    rows = _measured(sources, merged)
    with held(out, "fedsim merge"):
        _write(out, sources, merged, rows)
    _show(sources, merged, rows, out)
    return 0


def _measured(sources: Sources, merged: Merged) -> list[Measured]:
    """What every source knows by itself, of what it learned, and what the merged model knows."""
    from fedsim.merging.measure import measure, measure_source

    rows = [measure_source(sources, source) for source in sources.members]
    return [*rows, measure(sources.run, "merged", merged.deployed, sources.classes)]


def _write(out: Path, sources: Sources, merged: Merged, rows: list[Measured]) -> None:
    from dataclasses import asdict

    from safetensors.torch import save

    from fedsim.core.files import write_atomic
    from fedsim.runs.environment import environment

    told: dict[str, Any] = {
        "of": "tasks" if sources.of_tasks else "runs",
        "runs": [
            {"path": str(run.dir.path), "config": run.config.name, "identity": run.dir.identity, "split": run.dir.manifest_hash}
            for run in sources.runs
        ],
        "rule": merged.rule,
        "head": "the run's" if sources.of_tasks and merged.head == "mean" else merged.head,
        "seed": merged.seed,
        "as_the_run_did": merged.own,
        "tasks": list(sources.run.parts.manifest.task_names),
        "rows": [{**asdict(row), "average": row.average, "average_told": row.average_told} for row in rows],
        "environment": environment(),
    }
    write_atomic(out / FILES[0], save({n: t.contiguous() for n, t in merged.deployed.items()}))
    write_atomic(out / FILES[1], (json.dumps(told, indent=2) + "\n").encode())


def _show(sources: Sources, merged: Merged, rows: list[Measured], out: Path) -> None:
    """Two tables, and what their columns and rows mean."""
    from fedsim.merging import measure
    from fedsim.merging.merge import remarks

    screen = console()
    print_line = line_printer(screen)
    of = "tasks" if sources.of_tasks else "runs"
    named = ", ".join(f"{k}={v}" for k, v in merged.rule.items() if k != "name")
    title = f"{len(sources.members)} {of} merged by {merged.rule['name']}{f' ({named})' if named else ''}"
    for what, values, average in (
        ("class-incremental", "class_incremental", "average"),
        ("task told", "task_told", "average_told"),
    ):
        table = new_table(f"{title}: % right, {what}")
        table.add_column("model")
        for task in sources.run.tasks:
            table.add_column(f"task {task}", justify="right")
        table.add_column("average", justify="right")
        for row in rows:
            table.add_row(row.name, *map(_percent, getattr(row, values)), _percent(getattr(row, average)))
        screen.print(table)
        print_line("")
    print_line("class-incremental: the argmax over all classes that the model learned; task told: over the tested task's own.")
    for line in (*remarks(sources, merged), *measure.remarks(sources, rows)):
        print_line(line)
    print_line(f"written to {out}")


def _percent(value: Percent) -> str:
    return "–" if value is None else f"{value:.1f}"
