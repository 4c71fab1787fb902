"""One self-contained HTML file from run directories: charts that answer to the mouse, the table, and how each run was made.

    from fedsim import report
    from fedsim.runs.collection import collect
    report.write(collect(["runs/heterogeneity"]), "report.html", figures="figures")

`data` says what is shown, `charts` how one chart looks, `figures` which charts a report holds, `page` makes the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedsim.core import plugins
from fedsim.core.errors import ConfigError, did_you_mean
from fedsim.core.files import held, storage_errors, write_atomic
from fedsim.runs.collection import Collection

if TYPE_CHECKING:
    from fedsim.report.data import Study
    from fedsim.report.figures import Figure

FORMATS = ("svg", "png", "pdf")


@dataclass(frozen=True)
class Written:
    """What was written: the page, its size in bytes, how many charts and runs it shows, and the figures as files."""

    path: Path
    size: int
    charts: int
    runs: int
    files: tuple[Path, ...] = ()


def write(collection: Collection, path: str | Path, figures: str | Path | None = None, format: str = "svg") -> Written:
    """Write the page to `path`, and with `figures` every chart into that folder as svg, png or pdf, in light colours.

    Raises StorageError, InUse while another process writes that page, and ConfigError for another format and for runs that are
    known by their rows in a table only.
    """
    if format not in FORMATS:
        raise ConfigError(f"no figures as '{format}'.{did_you_mean(format, FORMATS)}")
    for package in ("pandas", "scipy", "altair", "vl_convert"):
        plugins.require(package, "fedsim report", "report")
    from fedsim.report import page
    from fedsim.report.data import Study
    from fedsim.report.figures import figures as figures_of

    target = Path(path).absolute()
    study = Study.of(collection)
    with held(target, "fedsim report", file=True):
        drawn = figures_of(study)
        content = page.render(study, drawn).encode()
        write_atomic(target, content, "free space, then try again")
        files = () if figures is None else _write_figures(study, drawn, Path(figures).absolute(), format)
        return Written(target, len(content), len(drawn), len(study.runs), files)


def _write_figures(study: Study, drawn: list[Figure], folder: Path, format: str) -> tuple[Path, ...]:
    from fedsim.report.figures import convert, drawings

    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    written = []
    for drawing in drawings(study, drawn):
        path = folder / f"{drawing.name}.{format}"
        write_atomic(path, convert(drawing, format), "free space, then try again")
        written.append(path)
    return tuple(written)
