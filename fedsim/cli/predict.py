"""fedsim predict: what a run's deployed model says of images or texts, as CSV."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.exports.deployed import DeployedModel


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `fedsim predict` takes."""
    command.add_argument("run", metavar="RUN", help="run directory of a finished run")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--images", metavar="FOLDER", help="all image files in a folder and below")
    what.add_argument("--text", metavar="FILE", help="a text on every line, UTF-8")
    command.add_argument("--top", type=int, default=5, metavar="K", help="how many classes to name (default: 5)")
    command.add_argument("--task", type=int, metavar="T", help="the task that they belong to: only its classes are named")
    command.add_argument(
        "--after-task", type=int, metavar="T", help="the model as it was after task T, of a run with server.keep=tasks"
    )
    command.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, … (default: a GPU if there is one)")
    command.add_argument("--output", metavar="FILE", help="write the CSV there, whole or not at all (default: standard output)")


def run(args: argparse.Namespace) -> int:
    """fedsim predict: a row per file or line, the likeliest class first."""
    from fedsim.exports.deployed import load_model
    from fedsim.exports.inputs import images_in, lines_of

    names, inputs = _images(images_in(args.images), args.images) if args.images else _texts(lines_of(args.text))
    model = load_model(args.run, args.after_task, args.device)
    rows = _rows(args, model, names, inputs)
    if args.output:
        from fedsim.core.files import write_atomic

        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows(rows)
        write_atomic(Path(args.output).absolute(), table.getvalue().encode(), "free space, or choose another --output")
    else:
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
    return 0


def _images(paths: Sequence[Path], folder: str) -> tuple[list[str], Sequence[Path]]:
    base = Path(folder).expanduser()
    return [str(p.relative_to(base)) for p in paths], paths


def _texts(lines: Sequence[tuple[int, str]]) -> tuple[list[str], Sequence[str]]:
    return [str(number) for number, _ in lines], [text for _, text in lines]


def _rows(args: argparse.Namespace, model: DeployedModel, names: Sequence[str], inputs: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The header, and a row per input, batch by batch."""
    size = model.config.runtime.eval_batch
    model.reader.require("image" if args.images else "text", args.images or args.text)
    classes = model.classes if args.task is None else [model.classes[c] for c in model.columns(args.task)]
    named = range(1, min(args.top, len(classes)) + 1)
    first = model.top(inputs[:size], args.top, args.task)  # before the header: what cannot be read is said alone
    yield ["file" if args.images else "line", *(f"{what}_{i}" for i in named for what in ("class", "probability"))]
    for start in range(0, len(inputs), size):
        found = first if start == 0 else model.top(inputs[start : start + size], args.top, args.task)
        for name, guesses in zip(names[start : start + size], found, strict=True):
            yield [name, *(cell for label, p in guesses for cell in (label, f"{p:.6f}"))]
