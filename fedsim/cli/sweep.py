"""fedsim sweep: from a sweep YAML to a folder of finished runs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedsim.cli.printing import console, counted, fail, human_bytes, line_printer, new_table, short

if TYPE_CHECKING:
    from fedsim.runs.known import Known
    from fedsim.runs.results import Results
    from fedsim.sweeps.job import Cost
    from fedsim.sweeps.plan import PlannedRun, SweepPlan


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `fedsim sweep` takes."""
    command.add_argument("sweep", metavar="SWEEP", help="a YAML file: base, and axes (list, grid, zip, seeds)")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every run, for example client.epochs=1")
    command.add_argument("--output", metavar="DIR", help="folder of the runs (default: output of the YAML, or runs/<its name>)")
    launch_arguments(command)
    command.add_argument(
        "--known",
        action="append",
        default=[],
        metavar="CSV",
        help="a table of fedsim results: its runs are not made again, and count as they stand there",
    )
    command.add_argument("--dry-run", action="store_true", help="list the runs; time, memory and bytes from one measured round")
    command.add_argument("--quiet", action="store_true", help="print the outcome only")


def launch_arguments(command: argparse.ArgumentParser) -> None:
    """Where and how runs go, in the place of what the YAML says."""
    command.add_argument("--jobs", type=_count, metavar="N", help="runs at a time (default: one per core)")
    command.add_argument("--retry", type=int, metavar="N", help="further attempts for a run that fails (default: 0)")
    command.add_argument("--address", help="of a Ray cluster to join, whose machines share the file system")


def launch_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of them that were given."""
    return {k: v for k in ("jobs", "retry", "address") if (v := getattr(args, k)) is not None}


def run(args: argparse.Namespace) -> int:
    """fedsim sweep: what is missing, then the table."""
    from fedsim.core import plugins
    from fedsim.sweeps.plan import expand, finished, keep_record, told, verify

    plan = expand(args.sweep, args.overrides, args.output, **launch_options(args))
    there, tabled = finished(plan), told(plan, args.known)
    done: dict[str, Results | Known] = {**tabled, **there}
    missing = plan.missing(done)
    print_line = line_printer(console())
    if not args.quiet:
        known = f", {len(done) - len(there)} known by a table" if tabled else ""
        print_line(f"{plan.record.name}: {len(plan.runs)} runs, {len(there)} finished already{known}, {len(missing)} to make")
        print_line(f"folder: {short(plan.folder)}")
        for note in plan.record.notes:
            print_line(f"{note}: left out there")
    verify(plan, missing)
    if args.dry_run:
        return _dry_run(plan, done, missing)
    for package in ("pandas", "scipy"):  # of the table at the end, which should not fail then
        plugins.require(package, "fedsim sweep", "report")
    kept = keep_record(plan)
    if kept.record.name != plan.record.name:
        print_line(f"another sweep of this name lies in the folder, so this one is called {kept.record.name}")
    plan = kept
    failed: dict[str, str] = {}
    if missing:
        failed = make(plan, done, missing, args.quiet)
    _show(plan, failed, args.known)
    return 1 if failed else 0


def make(plan: SweepPlan, done: Mapping[str, Results | Known], missing: Sequence[PlannedRun], quiet: bool) -> dict[str, str]:
    """Make the runs that are missing, and show how they go; by label, why those failed that did. Ends the program when it is
    stopped, with a line that says how to go on."""
    from fedsim.sweeps import making
    from fedsim.sweeps.plan import finished

    try:
        return making.make(plan, done, missing, quiet)
    except KeyboardInterrupt:
        there = len(finished(plan))
        fail(f"stopped, {there} of {len(plan.runs)} runs are finished; the same command goes on with the others", 130)
        raise SystemExit(130) from None


def _show(plan: SweepPlan, failed: dict[str, str], known: Sequence[str]) -> None:
    """The table over seeds, what failed, and where to go from here."""
    print_line = line_printer(console())
    for label, error in failed.items():
        print_line(f"failed: {label}: {error}")
    folder = short(plan.folder)
    if len(failed) == len(plan.runs):
        print_line(f"folder: {folder}")
    else:
        from fedsim.cli import results

        parser = argparse.ArgumentParser()
        results.add_arguments(parser)
        results.run(parser.parse_args([str(plan.folder), *known, "--sweep", plan.record.name]))
        print_line("")
        print_line(f"more: fedsim results {' '.join([folder, *known])}   fedsim report {folder}")


def _dry_run(plan: SweepPlan, done: Mapping[str, Results | Known], missing: Sequence[PlannedRun]) -> int:
    """The runs, and what the missing ones will take."""
    from fedsim.runs.known import Known
    from fedsim.sweeps import estimate, launch
    from fedsim.watch.progress import duration

    print_line = line_printer(console())
    measured: dict[str, estimate.Estimate] = {}
    jobs = 1
    if missing:
        kinds = estimate.samples(missing)
        print_line(f"measuring one round of {counted(len(kinds), 'kind')} of runs")

        def told(run: PlannedRun, cost: Cost) -> None:
            one = measured[estimate.kind(run)] = estimate.of_run(run, cost)
            print_line(f"[{len(measured)}/{len(kinds)}] {run.label}: {duration(one.seconds)}")

        jobs = launch.measure(plan.launch, kinds, told)
    rest = estimate.mean(list(measured.values())) if measured else None
    table = new_table("Runs")
    for name in plan.record.axes:
        table.add_column(name)
    for name in ("state", "time", "memory", "bytes"):
        table.add_column(name, justify="left" if name == "state" else "right")
    total = []
    for run in plan.runs:
        cells = ["–" if value is None else str(value) for value in run.entry.labels.values()]
        if run.entry.identity in done:
            table.add_row(*cells, "known" if isinstance(done[run.entry.identity], Known) else "finished", "", "", "")
            continue
        one = measured.get(estimate.kind(run), rest)
        assert one is not None
        total.append(one)
        state = "to go on with" if (plan.folder / run.entry.folder / "checkpoint.pt").exists() else "to make"
        figures = (duration(one.seconds), human_bytes(one.peak_bytes), human_bytes(one.traffic_bytes))
        table.add_row(*cells, state, *(text if one.measured else f"~{text}" for text in figures))
    console().print(table)
    if total:
        jobs = min(len(total), jobs)
        whole = estimate.of_sweep(total, jobs)
        print_line(
            f"about {duration(whole.seconds)} with {jobs} at a time, {human_bytes(whole.peak_bytes)} of memory, "
            f"{human_bytes(whole.traffic_bytes)} between clients and servers (from one measured round of each kind)"
        )
    return 0


def _count(text: str) -> Any:
    """A number, or the word auto."""
    if text != "auto" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"a number or auto, not {text!r}")
    return text if text == "auto" else int(text)
