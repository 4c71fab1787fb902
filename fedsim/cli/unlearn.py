"""fedsim unlearn: remove clients from a finished run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.cli.printing import console, line_printer, new_table

if TYPE_CHECKING:
    from fedsim.unlearning.finished import FinishedRun
    from fedsim.unlearning.measure import Measured
    from fedsim.unlearning.remove import Removed

FIRST_ORDER = (
    "The adapter is not linear in its tensors, so that subtracting a client's vector is a first-order heuristic: what it removes "
    "depends on α, and it may remove from others. With tangents (adapter tangent) vectors add up."
)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `fedsim unlearn` takes."""
    command.add_argument("run", metavar="RUN", help="run directory of a finished run")
    command.add_argument("--client", type=int, action="append", required=True, metavar="ID", help="whom to remove (repeatable)")
    command.add_argument(
        "--task", type=int, action="append", metavar="T", help="of which task only (default: of all; repeatable)"
    )
    command.add_argument("--how", choices=("drop", "sums", "recompose", "subtract"), help="default: the first that is possible")
    command.add_argument("--alpha", type=float, nargs="+", metavar="A", help="coefficients to try (default: share of samples)")
    command.add_argument("--renormalise", action="store_true", help="divide by what is left: exact if the model is their mean")
    command.add_argument("--verify", action="store_true", help="retrain without the clients from the same seed, and compare")
    command.add_argument("--output", metavar="DIR", help="default: RUN/unlearned/<clients and tasks>")


def run(args: argparse.Namespace) -> int:
    """fedsim unlearn: write the model without the clients, and what it knows, beside what it knew before."""
    from fedsim.core.errors import ConfigError
    from fedsim.core.files import held
    from fedsim.unlearning.finished import FinishedRun
    from fedsim.unlearning.measure import require_retrainable
    from fedsim.unlearning.remove import remove

    if args.renormalise and args.alpha:
        raise ConfigError("--renormalise and --alpha exclude each other: renormalising goes with the shares of samples")
    if args.verify and args.task:
        raise ConfigError("--verify retrains without the clients in every task: leave out --task")
    found = FinishedRun(args.run)
    clients = sorted(set(args.client))
    if args.verify:
        require_retrainable(found, clients)
    alphas: list[float | None] = args.alpha or [None]
    ways = [remove(found, clients, args.task, args.how, alpha, args.renormalise) for alpha in alphas]
    out = Path(args.output or found.dir.path / "unlearned" / _folder(clients, args.task)).absolute()
    with held(out, "fedsim unlearn"):
        rows = _measured(args, found, clients, ways, out)
        _write(out, found, clients, args.task, ways, rows)
    _show(found, clients, args.task, ways, rows, out)
    return 0


def _measured(args: argparse.Namespace, found: FinishedRun, clients: list[int], ways: list[Removed], out: Path) -> list[Measured]:
    """What every model knows: before, without the clients, and retrained without them if that is asked for."""
    from fedsim.unlearning.measure import measure, retrained

    rows = [measure(found, "before", found.deployed, clients, args.task)]
    rows += [measure(found, removed.name, removed.deployed, clients, args.task) for removed in ways]
    if args.verify:
        again = retrained(found, clients, out / "retrained")
        rows.append(measure(found, "retrained without", again, clients))
    return rows


def _folder(clients: list[int], tasks: list[int] | None) -> str:
    of_tasks = f"-task-{'-'.join(map(str, sorted(set(tasks))))}" if tasks else ""
    return f"client-{'-'.join(map(str, clients))}{of_tasks}"


def _write(
    out: Path, found: FinishedRun, clients: list[int], tasks: list[int] | None, ways: list[Removed], rows: list[Measured]
) -> None:
    """The deployed tensors of the first way, and the table."""
    from dataclasses import asdict

    from safetensors.torch import save

    from fedsim.core.files import write_atomic

    write_atomic(out / "deployed.safetensors", save({n: t.contiguous() for n, t in ways[0].deployed.items()}))
    told: dict[str, Any] = {
        "run": str(found.dir.path),
        "clients": clients,
        "tasks": tasks,
        "how": ways[0].way,
        "alpha": [w.alpha for w in ways],
        "renormalised": ways[0].renormalised,
        "affine": found.affine,
        "rows": [asdict(r) for r in rows],
    }
    write_atomic(out / "unlearned.json", json.dumps(told, indent=2).encode())


def _show(
    found: FinishedRun, clients: list[int], tasks: list[int] | None, ways: list[Removed], rows: list[Measured], out: Path
) -> None:
    """The table, and what its columns and the way of removal mean."""
    screen = console()
    of_tasks = f" of task {', '.join(map(str, sorted(set(tasks))))}" if tasks else ""
    table = new_table(f"{found.dir.path.name} without client {', '.join(map(str, clients))}{of_tasks}")
    table.add_column("model")
    for column in ("forgotten", "retained", "test", "membership AUC"):
        table.add_column(column, justify="right")
    for row in rows:
        numbers = [f"{value:.1f}" for value in (row.forgotten, row.retained, row.test)]
        table.add_row(row.name, *numbers, f"{row.membership_auc:.3f}")
    screen.print(table)
    print_line = line_printer(screen)
    print_line(
        "forgotten, retained: percent right on the training samples that were removed, and on all others; test: final average"
    )
    print_line(
        "accuracy; membership AUC: how well the loss tells the removed samples from test samples of their classes (0.5: not)"
    )
    if orphans := found.orphans(clients, tasks):
        some = f"{', '.join(orphans[:5])}{', …' if len(orphans) > 5 else ''}"
        print_line(f"Nobody is left who held samples of {len(orphans)} {'class' if len(orphans) == 1 else 'classes'} ({some}).")
    if ways[0].way == "sums":
        print_line("Exact: the clients sent their sums once more, which were subtracted, and the head was solved again.")
    if ways[0].way == "drop" and found.not_exact:
        print_line(f"Left out, but not exact: {found.not_exact}.")
    if ways[0].way == "subtract":
        print_line(f"Subtracted: {found.not_exact or 'as it was asked for; --how recompose would be exact'}.")
        if not found.affine:
            print_line(FIRST_ORDER)
    print_line(f"written to {out}")
