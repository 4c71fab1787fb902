"""A manifest for the eye: a table for the terminal and a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from fedsim.core.contracts import IntArray
from fedsim.core.errors import StorageError
from fedsim.data.manifest import Manifest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_ROWS = 50  # clients listed one by one in the table


def table(manifest: Manifest) -> Table:
    """Training samples per client and task with the number of classes held ("31 / 7c"), the smallest, mean and largest shard, and
    the α that came out per task beside the one asked for. Beyond 50 clients only the first 50 are listed."""
    sizes_TK = manifest.sizes
    held_TK = np.stack([np.count_nonzero(h, axis=1) for h in manifest.histograms])
    classes_K = sum((np.count_nonzero(h, axis=1) for h in manifest.histograms), np.zeros(manifest.num_clients, dtype=np.int64))
    if _same_classes(manifest):  # domains: the same classes in every task
        classes_K = np.count_nonzero(sum(manifest.histograms), axis=1)
    out = Table(title=_title(manifest), caption="samples / classes held; α: maximum likelihood over the classes of the task")
    out.add_column("client", justify="right")
    for name, test in zip(manifest.task_names, np.diff(manifest.test_offsets), strict=True):
        out.add_column(f"{name}\n({test} test)", justify="right")
    out.add_column("all", justify="right")
    out.add_column("classes", justify="right")
    for k in range(min(manifest.num_clients, MAX_ROWS)):
        cells = [f"{n} / {c}c" for n, c in zip(sizes_TK[:, k], held_TK[:, k], strict=True)]
        out.add_row(str(k), *cells, str(sizes_TK[:, k].sum()), str(classes_K[k]))
    if manifest.num_clients > MAX_ROWS:
        out.add_row("…", *["…"] * (manifest.num_tasks + 2))
    out.add_section()
    total_K = sizes_TK.sum(axis=0)
    for name, of in (("min", np.min), ("mean", np.mean), ("max", np.max)):
        out.add_row(name, *[_number(of(s)) for s in sizes_TK], _number(of(total_K)), _number(of(classes_K)))
    out.add_section()
    out.add_row("α", *[_alpha(a) for a in manifest.alpha], _alpha(manifest.overall_alpha), "")
    return out


def picture(manifest: Manifest, path: str | Path) -> None:
    """Clients (rows) × classes (columns) as bubbles with an area in proportion to the samples; tasks stand side by side.

    The format follows the suffix (.png, .svg, .pdf). Needs matplotlib. Raises StorageError when the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only this needs it
    from matplotlib.figure import Figure

    columns = [len(classes) for classes in manifest.task_classes]
    clients = manifest.num_clients
    row, column = max(0.055, min(0.3, 30 / clients)), max(0.055, min(0.2, 24 / sum(columns)))  # inches
    inner_width, inner_height = max(4.0, column * sum(columns)), max(2.0, row * clients)
    figure = Figure(figsize=(inner_width + 1.6, inner_height + 1.5), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, manifest.num_tasks, sharey=True, squeeze=False, width_ratios=columns, gridspec_kw={"wspace": 0.04})[
        0
    ]
    largest = max(int(h.max()) for h in manifest.histograms)
    cell = 72 * min(inner_height / clients, inner_width / sum(columns))  # points
    for t, axis in enumerate(axes):
        _bubbles(axis, manifest.histograms[t], largest, cell, t)
        sized = f"{_wrapped(manifest.task_names[t])}\nα {_alpha(manifest.alpha[t])}"
        axis.set_title(sized, fontsize=8)
        _class_ticks(axis, manifest, t, column)
    axes[0].set_ylabel("client")
    axes[0].set_ylim(clients - 0.5, -0.5)
    figure.supxlabel(f"class (area ∝ training samples, largest bubble: {largest})", fontsize=8)
    figure.suptitle(_title(manifest), fontsize=10)
    figure.subplots_adjust(
        left=0.7 / (inner_width + 1.6),
        right=1 - 0.2 / (inner_width + 1.6),
        top=1 - 0.85 / (inner_height + 1.5),
        bottom=0.65 / (inner_height + 1.5),
    )
    try:
        figure.savefig(str(path))
    except OSError as e:
        raise StorageError(f"cannot write the picture {path}: {e.strerror or e}") from e


def _bubbles(axis: Axes, histogram_KC: IntArray, largest: int, cell: float, task: int) -> None:
    clients, classes = np.nonzero(histogram_KC)
    area = (0.95 * cell) ** 2 * histogram_KC[clients, classes] / largest
    axis.scatter(classes, clients, s=area, color=f"C{task % 10}", linewidths=0, clip_on=False)
    axis.set_xlim(-0.6, histogram_KC.shape[1] - 0.4)
    axis.tick_params(labelsize=7, length=2)
    axis.grid(color="0.92", linewidth=0.5)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _class_ticks(axis: Axes, manifest: Manifest, task: int, column: float) -> None:
    """Rows of the head under the first class of a task and at even steps, as many as there is room for."""
    classes = manifest.task_classes[task]
    step = max(1, math.ceil(0.3 / column))
    at = range(0, len(classes), step)
    axis.set_xticks(list(at), [str(classes[i]) for i in at])


def _title(manifest: Manifest) -> str:
    asked: Any = manifest.asked.get("partition", {})
    options = ", ".join(f"{k} {v}" for k, v in asked.items() if k in ("alpha", "classes_per_client"))
    name = f"{asked['name']} ({options} asked)" if options else str(asked.get("name", "partition"))
    return f"{name}, {manifest.num_clients} clients, {manifest.num_tasks} tasks, overall α {_alpha(manifest.overall_alpha)}"


def _same_classes(manifest: Manifest) -> bool:
    return len(set(manifest.task_classes)) == 1


def _wrapped(name: str, width: int = 16) -> str:
    return name if len(name) <= width else f"{name[: width - 1]}…"


def _number(value: Any) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _alpha(value: float) -> str:
    return "–" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:.3g}"
