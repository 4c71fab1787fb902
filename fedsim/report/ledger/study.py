"""What a ledger is made from: runs, or the tables that `fedsim results --csv` makes of them, and what a person says of them.

    fedsim ledger runs/my_sweep               # one stream; several folders, or CSVs, are several
    fedsim ledger ledger.yaml                 # the same with words of one's own:

    title: The ledger
    lead: What this is, in a sentence.
    results: {fashion: fashion.csv, intents: ../runs/intents}    # stream: a CSV, or a folder of runs
    streams: {fashion: "Fashion-MNIST, 5 tasks x 2 classes"}     # a line each
    bounds: {ncm: my_ncm}                                        # where the bounds of a stream go by other names than the presets
    baselines: [fedavg, ranpac]                                  # with which all are compared, run by run
    recipes: best/{stream}/{method}.yaml                         # configs that were run, where they are not the presets
    families: {replay: [mine]}                                   # beside those of fedsim's own presets
    remarks: {er: Twenty samples a client.}
    published: published.csv                                     # figures of papers: stream, method, beta, figure, source, tag
    output: index.html

Only `results` is needed; paths are relative to the YAML.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.core import config as configs
from fedsim.core.config import SimConfig, text
from fedsim.core.errors import ConfigError, DataError, did_you_mean, one_line
from fedsim.report.data import METHOD_NAMES
from fedsim.report.data import Study as Named
from fedsim.runs import known
from fedsim.runs.bounds import REFERENCES
from fedsim.runs.collection import collect
from fedsim.runs.collection import dirichlet_alpha as alpha_of
from fedsim.runs.compare import label
from fedsim.runs.metrics import HEADLINE

if TYPE_CHECKING:
    import pandas as pd

ANY = "any split"  # of a run to which the split does not apply: one client that holds everything
ALIKE = "the split of all runs"  # of a table that does not name it, as no key of it differs
METHOD, SPLIT = "method", "split"  # columns of a stream's frame
ALPHAS = ("dirichlet_alpha", "partition.alpha", "alpha")  # columns that say how heterogeneous a run's clients are
NEEDED = ("seed", "partition_hash", HEADLINE)
BASELINES = ("fedavg", "ranpac")
PARTITION = "partition."  # begins the columns that say how data were split
HOW_MANY = ("clients", "min_samples", "max_draws")  # keys of a partition that do not say how unlike clients are
PUBLISHED = ("stream", "method", "beta", "figure", "source", "tag")  # columns of figures that papers give


@dataclass(frozen=True)
class Options:
    """The YAML of a ledger."""

    results: dict[str, str] = field(default_factory=dict)
    title: str = "Ledger"
    lead: str = ""
    streams: dict[str, str] = field(default_factory=dict)
    bounds: dict[str, str] = field(default_factory=dict)
    baselines: list[str] = field(default_factory=lambda: [*BASELINES])
    recipes: str = ""
    families: dict[str, list[str]] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    published: str = ""
    output: str = "ledger.html"

    def __post_init__(self) -> None:
        if not self.results:
            raise ConfigError("results names no table: give {stream: a CSV of fedsim results, or a folder of runs}")
        for name in self.bounds:
            if name not in REFERENCES:
                raise ConfigError(f"unknown key 'bounds.{name}'.{did_you_mean(name, REFERENCES)}")
        for name in self.streams:
            if name not in self.results:
                raise ConfigError(f"streams.{name} is in no results.{did_you_mean(name, self.results)}")


@dataclass(frozen=True)
class Stream:
    """Runs of many methods on one stream. frame: one row per run, with columns `method` and `split` beside those of
    `Collection.frame`; configs: of a method, where the runs themselves were at hand; absent: runs that are not shown, and why."""

    name: str
    frame: pd.DataFrame
    note: str = ""
    configs: Mapping[str, SimConfig] = field(default_factory=dict)
    absent: Sequence[str] = ()


@dataclass(frozen=True)
class Study:
    """Streams and what is said of them. families: method -> family; recipes: pattern of a config's path with {stream} and
    {method}, empty for none; published: rows of `PUBLISHED`, as text; output: where the page goes by default."""

    title: str
    streams: Sequence[Stream]
    lead: str = ""
    bounds: Mapping[str, str] = field(default_factory=dict)
    baselines: Sequence[str] = BASELINES
    recipes: str = ""
    families: Mapping[str, str] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)
    published: Sequence[Mapping[str, str]] = ()
    output: Path = Path("ledger.html")


def read(paths: Sequence[str | Path], sweep: str | None = None) -> Study:
    """A ledger from a YAML, or from CSVs and folders of runs, each a stream named as it is. sweep: the one that says which
    runs count, where a folder holds several. Raises the errors of bad input."""
    found = [Path(path) for path in paths]
    if len(found) == 1 and found[0].suffix in (".yaml", ".yml"):
        return _of_yaml(found[0])
    names = [path.resolve().stem if path.suffix == ".csv" else path.resolve().name for path in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two streams would be called '{name}': name them in a YAML, as `results: {{stream: path}}`")
    output = found[0] / "ledger.html" if len(found) == 1 and found[0].is_dir() else Path("ledger.html")
    options = Options({name: str(path) for name, path in zip(names, found, strict=True)}, title=" and ".join(names))
    return replace(_study(options, Path(), sweep), output=output)


def families(more: Mapping[str, Sequence[str]] | None = None) -> dict[str, str]:
    """Method -> family, of fedsim's own presets; `more` (family -> methods) wins."""
    own = text.plain(_yaml(files("fedsim.report.ledger") / "families.yaml"), "families")
    return {method: family for table in (own, more or {}) for family, methods in table.items() for method in methods}


def _yaml(path: Any) -> dict[str, Any]:
    return text.read(Path(str(path)))


def _of_yaml(path: Path) -> Study:
    content = text.resolved(text.read(path), str(path))
    try:
        options: Options = configs.typed(Options, content, "")
        return _study(options, path.parent)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e


def _study(options: Options, folder: Path, sweep: str | None = None) -> Study:
    streams = [_stream(name, folder / path, options.streams.get(name, ""), sweep) for name, path in options.results.items()]
    present = {method for stream in streams for method in stream.frame[METHOD]}
    bounds = {**{name: name for name in REFERENCES if name in present}, **options.bounds}
    for key, wanted in (*((f"bounds.{b}", m) for b, m in bounds.items()), *(("baselines", m) for m in options.baselines)):
        if wanted not in present and (key != "baselines" or wanted not in BASELINES):
            raise ConfigError(f"{key}: no run is of the method '{wanted}'.{did_you_mean(wanted, present)}")
    return Study(
        options.title,
        streams,
        options.lead,
        bounds,
        [method for method in options.baselines if method in present],
        str(folder / options.recipes) if options.recipes else "",
        families(options.families),
        options.remarks,
        _published(folder / options.published) if options.published else (),
        folder / options.output,
    )


def _published(path: Path) -> list[dict[str, str]]:
    """Figures that papers give. Raises DataError for one without a source: nobody could look it up."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{path} cannot be read: {one_line(e)}") from e
    for number, row in enumerate(rows, 2):
        lacking = [name for name in PUBLISHED if name not in row or (name != "beta" and not (row[name] or "").strip())]
        if lacking:
            raise DataError(f"{path}, line {number}: {', '.join(lacking)} is empty: a published figure needs all but beta")
    return rows


def _stream(name: str, path: Path, note: str, sweep: str | None) -> Stream:
    return _of_table(name, path, note) if path.suffix == ".csv" else _of_runs(name, path, note, sweep)


def _of_table(name: str, path: Path, note: str) -> Stream:
    frame = known.table(path)
    names, alphas = ([column for column in words if column in frame] for words in (METHOD_NAMES, ALPHAS))
    lacking = [*([] if names else [METHOD]), *(c for c in NEEDED if c not in frame), *([] if alphas else ALPHAS[:1])]
    if lacking:
        raise DataError(f"{path} has no column {', '.join(lacking)}: write it with fedsim results RUNS --csv {path.name}")
    axes = known.axes_of(frame)
    keys = [column.removeprefix(PARTITION) for column in axes if column.startswith(PARTITION)]
    partitions = [dict(zip(keys, row, strict=True)) for row in frame[[PARTITION + key for key in keys]].to_numpy().tolist()]
    splits = [_split(alpha, partition) for alpha, partition in zip(frame[alphas[0]].tolist(), partitions, strict=True)]
    if "" in splits:
        if any(splits):
            one = frame[names[0]].iloc[splits.index("")]
            raise DataError(f"{path}: no column {PARTITION}* tells how the data of a run without an α, of {one}, were split")
        splits = [ALIKE] * len(splits)
    frame[METHOD] = frame[names[0]].astype(str)
    frame[SPLIT] = splits
    _require_settings(frame, [axis for axis in axes if axis != "manifest"], path)
    return Stream(name, frame, note)


def _split(alpha: float, partition: Mapping[str, Any]) -> str:
    """What a run's split is called, from its α and the keys of its partition that are known; empty where none is."""
    if not math.isnan(alpha):
        return "iid" if math.isinf(alpha) else f"{alpha:g}"
    if partition.get("name") == "joint" or partition.get("clients") == 1:
        return ANY
    there = {key: value for key, value in partition.items() if not (isinstance(value, float) and math.isnan(value))}
    options = [f"{key}={label(value)}" for key, value in there.items() if key not in ("name", *HOW_MANY)]
    return " ".join([*([str(there["name"])] if "name" in there else []), *options])


def _require_settings(frame: pd.DataFrame, axes: Sequence[str], path: Path) -> None:
    """The runs of a method on a split differ in the seed alone: raises ConfigError where an axis tells them apart as well, or a
    seed is there twice. A cell that is empty tells nothing apart."""
    for (method, split), runs in frame.groupby([METHOD, SPLIT], sort=False):
        where = f"{path}: {method} on the split {split}"
        differ = [axis for axis in axes if runs[axis].nunique() > 1]
        if differ:
            levels = ", ".join(map(label, dict.fromkeys(runs[differ[0]].dropna())))
            raise ConfigError(f"{where} has runs of several settings, with {differ[0]} {levels}: leave one of them in the table")
        for _, alike in runs.groupby("seed"):
            if len(alike) > 1:
                seed = alike["seed"].tolist()[0]
                told = f" ({', '.join(map(str, alike['run']))})" if "run" in alike else ""
                raise ConfigError(f"{where} holds {len(alike)} runs of seed {label(seed)}{told}: leave one of them in the table")


def _of_runs(name: str, path: Path, note: str, sweep: str | None) -> Stream:
    """Methods and splits are named as in the report."""
    collection = collect([path], sweep)
    named = Named.of(collection)
    applies = [_split(alpha_of(config), config.partition) != ANY for config in (run.results.config for run in named.runs)]
    splits = [split if one else ANY for one, split in zip(applies, named.frame["split"], strict=True)]
    methods = named.frame["series"].tolist()
    own = {method: run.results.config for method, run in zip(methods, named.runs, strict=True)}
    frame = named.frame.assign(**{METHOD: methods, SPLIT: splits})
    _require_settings(frame, [], path)
    return Stream(name, frame, note, own, [f"{a.what}: {a.reason}" for a in collection.absent])
