"""A manifest for the eye: a table for the terminal and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from fedsim.core import plugins
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
    plugins.require("matplotlib", "a picture", "report")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only this needs it
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = [len(classes) for classes in manifest.task_classes]
    width = min(18.0, max(4.0, 0.2 * sum(columns)))  # inches, of the panels
    height = min(11.0, max(2.0, 0.3 * manifest.num_clients))
    full_width, full_height = width + 1.0, height + 1.6
    cell = 72 * min(width / sum(columns), height / manifest.num_clients)  # points
    figure = Figure(figsize=(full_width, full_height), dpi=120)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, manifest.num_tasks, sharey=True, squeeze=False, width_ratios=columns)[0]
    largest = max(int(h.max()) for h in manifest.histograms)
    for t, axes in enumerate(panels):
        _bubbles(axes, manifest.histograms[t], largest, cell, t)
        axes.set_title(
            f"{_short(manifest.task_names[t], 8 * width * columns[t] / sum(columns))}\nα {_alpha(manifest.alpha[t])}", fontsize=8
        )
        _class_ticks(axes, manifest.task_classes[t], width / sum(columns))
    panels[0].set_ylabel("client", fontsize=9)
    panels[0].set_ylim(manifest.num_clients - 0.4, -0.6)
    panels[0].yaxis.set_major_locator(MaxNLocator(nbins=20, integer=True, steps=[1, 2, 5, 10]))
    figure.text(0.5, 0.15 / full_height, f"class (area ∝ training samples, largest bubble: {largest})", ha="center", fontsize=8)
    figure.text(0.5, 1 - 0.3 / full_height, _title(manifest), ha="center", fontsize=10)
    figure.subplots_adjust(
        left=0.7 / full_width, right=1 - 0.3 / full_width, top=1 - 0.9 / full_height, bottom=0.7 / full_height, wspace=0.06
    )
    try:
        figure.savefig(str(path))
    except OSError as e:
        raise StorageError(f"cannot write the picture {path}: {e.strerror or e}") from e


def _bubbles(axes: Axes, histogram_KC: IntArray, largest: int, cell: float, task: int) -> None:
    """One panel. Where cells are too small to see, bubbles are larger than they and shine through each other."""
    clients, classes = np.nonzero(histogram_KC)
    diameter = max(0.95 * cell, 7.0)
    area = diameter**2 * histogram_KC[clients, classes] / largest
    axes.scatter(
        classes, clients, s=area, color=f"C{task % 10}", alpha=1.0 if diameter < cell else 0.7, linewidths=0, clip_on=False
    )
    axes.set_xlim(-0.6, histogram_KC.shape[1] - 0.4)
    axes.tick_params(labelsize=7, length=2)
    axes.grid(color="0.92", linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _class_ticks(axes: Axes, classes: Sequence[int], column: float) -> None:
    """Rows of the head, as many as there is room for (0.3 inches each)."""
    step = next(n for e in range(9) for n in (10**e, 2 * 10**e, 5 * 10**e) if n * column >= 0.3)
    at = range(0, len(classes), step)
    axes.set_xticks(list(at), [str(classes[i]) for i in at])


def _title(manifest: Manifest) -> str:
    asked: Any = manifest.asked.get("partition", {})
    options = ", ".join(f"{k} {v}" for k, v in asked.items() if k in ("alpha", "classes_per_client"))
    name = f"{asked['name']} ({options} asked)" if options else str(asked.get("name", "partition"))
    return f"{name}, {manifest.num_clients} clients, {manifest.num_tasks} tasks, overall α {_alpha(manifest.overall_alpha)}"


def _same_classes(manifest: Manifest) -> bool:
    return len(set(manifest.task_classes)) == 1


def _short(name: str, room: float) -> str:
    limit = max(4, int(room))
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def _number(value: Any) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _alpha(value: float) -> str:
    return "–" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:.3g}"
