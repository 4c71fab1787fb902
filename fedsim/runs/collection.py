"""Many runs as data: find them in a folder, label them as the sweep that made them does, one tidy frame.

A folder of runs, as `fedsim sweep` and `fedsim run` fill it:

    <any name>/          run directories; a sweep names them by the first 16 digits of the config's identity
    sweeps/<name>.json   what a sweep consists of: axes, and the labels of every run
    failures/<id>.json   why a run of a sweep failed, until it succeeds

Beside folders there may be tables of runs that lie elsewhere (`fedsim.runs.known`).

What is damaged, unfinished or failed is listed with its reason and never averaged in silently; a run that lies there twice
counts once.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.core import content, plugins
from fedsim.core.config import SimConfig
from fedsim.core.errors import FedsimError, RunDirError, did_you_mean, one_line
from fedsim.core.files import storage_errors, write_atomic
from fedsim.core.home import __version__
from fedsim.data.manifest import estimate_alpha
from fedsim.runs import display, known, metrics
from fedsim.runs.environment import noted, processor_of, version_of
from fedsim.runs.known import MADE, Known, Label
from fedsim.runs.results import Results

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "fedsim-sweep-1"
TEXTS = ("run", "partition_hash", *MADE, "path")  # columns of the frame that are no numbers
NAMED = (*TEXTS, "seed", "dirichlet_alpha")  # columns that no axis of a sweep can be called
STARTED = ("status.json", "config.yaml")  # one of them is in every folder that a run began


class Unfinished(RunDirError):
    """A run that has not come to its end; nothing is wrong with it."""


@dataclass(frozen=True)
class Entry:
    """One run of a sweep: its identity (sha256 of the resolved config) and its label on every axis, the seed among them."""

    identity: str
    labels: Mapping[str, Label]

    @property
    def folder(self) -> str:
        """Name of its run directory in the sweep's folder."""
        return self.identity[:16]


@dataclass(frozen=True)
class SweepRecord:
    """What a sweep consists of. `axes`: name -> labels in the order of the YAML; "seed" is the last one, None stands for runs to
    which the axis does not apply."""

    name: str
    axes: Mapping[str, Sequence[Label]]
    runs: Sequence[Entry]
    text: str = ""  # of the YAML
    notes: Sequence[str] = ()  # keys that do not apply to some of the runs

    def save(self, folder: Path) -> Path:
        """Write it into a folder of runs. Raises StorageError."""
        path = self.file(folder)
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n").encode())
        return path

    def file(self, folder: Path) -> Path:
        """Where it lies in a folder of runs."""
        return folder / "sweeps" / f"{self.name}.json"

    @classmethod
    def load(cls, path: Path) -> SweepRecord:
        """Read it back. Raises RunDirError."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError(f"not of format {FORMAT}")
            entries, notes = content.pop("runs"), content.pop("notes", ())
            return cls(**content, runs=tuple(Entry(**entry) for entry in entries), notes=tuple(notes))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise RunDirError(
                f"{path} is damaged ({type(e).__name__}: {e}): start the sweep again, finished runs are kept"
            ) from e


@dataclass(frozen=True)
class Run:
    """A finished run with its labels on the axes of the sweep; empty without a sweep."""

    results: Results
    labels: Mapping[str, Label] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return self.results.config.seed

    @property
    def split(self) -> str:
        """The first 16 digits of the hash of its split."""
        return self.results.manifest_hash[:16]

    @property
    def metrics(self) -> Mapping[str, float | None]:
        return self.results.metrics

    @cached_property
    def levels(self) -> Mapping[str, Label]:
        """Every key of its config that decides the numbers."""
        return flatten(self.results.config)


@dataclass(frozen=True)
class Absent:
    """A run that is not in the data, and why, in one line."""

    what: str
    reason: str


@dataclass(frozen=True)
class Collection:
    """Runs that belong together. `others`: finished runs of the folder that are not of the chosen sweep; `folder`: its name where
    all are of one, else empty; `known`: runs that are not at hand, by their rows in tables."""

    runs: tuple[Run, ...]
    absent: tuple[Absent, ...] = ()
    sweep: SweepRecord | None = None
    others: int = 0
    folder: str = ""
    known: tuple[Known, ...] = ()

    @cached_property
    def members(self) -> tuple[Run | Known, ...]:
        """All runs, those at hand first."""
        return (*self.runs, *self.known)

    def __repr__(self) -> str:
        of = self.sweep.name if self.sweep else self.folder
        lost = f", {len(self.absent)} absent" if self.absent else ""
        return f"<Collection {f'{of!r}, ' if of else ''}{len(self.members)} run{'s' if len(self.members) != 1 else ''}{lost}>"

    def __str__(self) -> str:
        """A table with one row per run, and what is absent."""
        return display.as_text(repr(self), [self._table()], self._remarks())

    def _repr_html_(self) -> str:
        return display.as_html(repr(self), [self._table()], self._remarks())

    def _table(self) -> display.Table:
        """One row per run: what tells it apart, its seed, and the metrics of `fedsim results`; the first of many."""
        names = [m for m in metrics.shown("results") if any(run.metrics.get(m.name) is not None for run in self.members)]
        rows = []
        for i, run in enumerate(self.members[: display.MOST_ROWS]):
            values = [run.metrics.get(m.name) for m in names]
            texts = ["–" if level is None else str(level) for level in self._setting(i).values()]
            rows.append((*texts, str(run.seed), *("–" if v is None else f"{v:.2f}" for v in values)))
        more = f" (the first {len(rows)} of {len(self.members)})" if len(self.members) > len(rows) else ""
        return display.Table(f"Runs{more}", (*self.factors, "seed", *(m.title for m in names)), rows)

    def _remarks(self) -> list[str]:
        absent = [f"absent: {one.what}: {one.reason}" for one in self.absent[: display.MOST_ROWS]]
        return [*absent, *([self.unlike_text] if self.unlike_text else [])]

    @cached_property
    def unlike(self) -> tuple[str, ...]:
        """Keys in which the runs' data, streams and partitions differ; "split" where runs that share all of these and the seed
        were split otherwise. Numbers of such runs stand beside each other, but are not of the same thing."""
        sections = ("data", "stream", "partition", "manifest")
        keys = [key for key in self.varying if key.split(".")[0] in sections]
        same: dict[tuple[Label, ...], set[str]] = {}
        for i, run in enumerate(self.members):
            same.setdefault((run.seed, *(_text(self.varying[key][i]) for key in keys)), set()).add(run.split)
        return (*keys, *(["split"] if any(len(splits) > 1 for splits in same.values()) else []))

    @property
    def unlike_text(self) -> str:
        """What a table of these runs says in its head; empty where all are of the same data and split."""
        more = f" and {len(self.unlike) - 6} more" if len(self.unlike) > 6 else ""
        differ = f"Rows differ in their data or split: {', '.join(self.unlike[:6])}{more}." if self.unlike else ""
        return " ".join(filter(None, (differ, self._joint_text)))

    @property
    def _joint_text(self) -> str:
        """Joint runs have one task; beside them are runs whose tasks have test sets of other sizes than each other."""
        joint = self.varying.get("stream.joint", [])
        others = [run.metrics for run, alone in zip(self.members, joint, strict=False) if not alone]
        if not metrics.unequal([(m.get(metrics.HEADLINE), m.get(metrics.MICRO)) for m in others]):
            return ""
        return (
            "Joint runs have one task: their accuracies are over all test samples, those of the others over tasks; "
            f"{metrics.MICRO} is over all test samples for both."
        )

    @cached_property
    def varying(self) -> Mapping[str, list[Label]]:
        """Dotted config keys whose values differ between the runs, each with one value per run; `seed` comes last.

        Lists are given as JSON; a key that a run does not have is None. Where a run lies and how it was spread over workers
        (`name`, `runtime.*` but what may move bits) is left out. Of a run that is known by its row, the keys that its table has;
        the others are taken for those of the other runs.
        """
        flat = [run.levels for run in self.members]
        keys = dict.fromkeys(key for one in flat for key in one)
        values = {key: [one.get(key) for one in flat] for key in keys}
        silent = [isinstance(run, Known) for run in self.members]  # on a key that its table has not
        found = {
            key: v
            for key, v in values.items()
            if key != "seed" and len({_text(x) for x, one, s in zip(v, flat, silent, strict=True) if key in one or not s}) > 1
        }
        return found | {"seed": [run.seed for run in self.members]}

    @cached_property
    def factors(self) -> Mapping[str, tuple[Label, ...]]:
        """What tells settings apart, without the seed, each with its levels in order: the axes of the sweep; else the keys that
        vary, plug-ins' names first, less those that follow from the ones before (as a rule's options follow from its name). The
        axes of a sweep of which there is a table only come before these."""
        if self.sweep is not None:
            used = {name: {run.labels.get(name) for run in self.members} for name in self.sweep.axes}
            return {name: tuple(v for v in axis if v in used[name]) for name, axis in self.sweep.axes.items() if name != "seed"}
        factors: dict[str, tuple[Label, ...]] = {}
        settings = [""] * len(self.members)
        named = {name for run in self.known for name in run.named}
        for key in sorted(self.varying, key=lambda key: (key not in named, not key.endswith((".name", ".source")))):
            finer = [f"{setting} {_text(value)}" for setting, value in zip(settings, self.varying[key], strict=True)]
            if key != "seed" and len(set(finer)) > len(set(settings)):
                factors[key], settings = _in_order(self.varying[key]), finer
        return factors

    def frame(self) -> pd.DataFrame:
        """One row per run: `run` (16 digits of its identity), the factors, the other keys that vary, seed, `partition_hash` (16
        digits), `version` (of fedsim) and `processor` (whose last bits the numbers have), `dirichlet_alpha` (as asked for;
        inf for iid, NaN for others), the split in figures, every metric (percent; NaN where undefined), accuracies by task
        and chance, bytes by direction and kind, seconds by phase, client rounds, skipped clients, path."""
        plugins.require("pandas", "a frame of runs", "report")
        import pandas as pd

        varying = {k: v for k, v in self.varying.items() if k not in self.factors}
        rows = []
        for i, run in enumerate(self.members):
            level = self._setting(i)
            keys = level | {key: values[i] for key, values in varying.items()}
            row = _row_of_known(run, keys) if isinstance(run, Known) else _row(run.results, keys)
            rows.append(row | level)
        rows.sort(key=lambda row: (*(levels.index(row[name]) for name, levels in self.factors.items()), row["seed"]))
        frame = pd.DataFrame(rows)
        numeric = [c for c in frame.columns if c not in {*self.factors, *varying, *TEXTS}]
        frame[numeric] = frame[numeric].astype(float)
        return frame

    def _setting(self, i: int) -> dict[str, Label]:
        """The level of a member on every factor."""
        return {name: self.members[i].labels.get(name) if self.sweep else self.varying[name][i] for name in self.factors}


def collect(paths: str | Path | Sequence[str | Path], sweep: str | None = None, everything: bool = False) -> Collection:
    """The runs in these folders (or in one: run directories, or folders of them), and those of tables (`fedsim results --csv`).

    When a folder holds the record of one sweep, that sweep says which runs count, in which order, under which labels;
    `sweep` chooses among several, `everything` takes every run and no record. Of a run that lies there nothing is taken from a
    table. Raises RunDirError when there is nothing, and for a table beside runs that are of no sweep; DataError for a table that
    cannot be read.
    """
    places = [Path(p).absolute() for p in ([paths] if isinstance(paths, str | Path) else paths)]
    tables = [path for path in places if path.suffix == known.SUFFIX]
    folders = [path for path in places if path not in tables]
    name = places[0].stem if len(places) == 1 and tables else folders[0].name if len(folders) == 1 else ""
    rows = known.read(tables)
    found: dict[str, Results] = {}
    absent: list[Absent] = []
    for path in _candidates(folders):
        try:
            results, identity = verified(path)
        except Unfinished as e:
            absent.append(Absent(path.name, str(e)))
            continue
        except RunDirError as e:
            absent.append(Absent(path.name, f"damaged, left out: {e} (delete the folder and run it again)"))
            continue
        if identity in found:
            absent.append(Absent(path.name, f"the same run as {found[identity].path}: counted once"))
        else:
            found[identity] = results
    record = None if everything else _record(folders, sweep)
    if record is None:
        if rows and folders:
            raise RunDirError(
                f"{tables[0]} beside {folders[0]}: only the record of their sweep says which runs are of which setting: give the "
                "folder that holds it (sweeps/*.json; --sweep NAME chooses among several), or the table alone"
            )
        if not found and not rows:
            more = [f"and {len(absent) - 3} more"] if absent[3:] else []
            reasons = "; ".join([*(f"{a.what}: {a.reason}" for a in absent[:3]), *more])
            raise RunDirError(
                f"no finished run in {', '.join(map(str, folders))}" + (f" ({reasons})" if reasons else _hint(folders))
            )
        return Collection(tuple(Run(r) for r in found.values()), tuple(absent), folder=name, known=tuple(rows.values()))
    runs = [Run(found[e.identity], e.labels) for e in record.runs if e.identity in found]
    lacking = [e for e in record.runs if e.identity not in found]
    told = [replace(rows[e.folder], labels=e.labels) for e in lacking if e.folder in rows]
    missing = [e for e in lacking if e.folder not in rows]
    if not runs and not told:
        why = _why_missing(folders, missing[0], absent) if missing else "it names none"
        raise RunDirError(f"sweep {record.name}: none of its {len(record.runs)} runs is finished; the first: {why}")
    named = {e.folder for e in lacking}  # said once, by their labels
    left_out = [
        *(Absent(label_text(e.labels), _why_missing(folders, e, absent)) for e in missing),
        *(a for a in absent if a.what not in named),
    ]
    ours = {e.folder for e in record.runs}
    others = len({identity[:16] for identity in found}.union(rows) - ours)
    return Collection(tuple(runs), tuple(left_out), record, others, name, tuple(told))


def verified(path: Path) -> tuple[Results, str]:
    """A finished run that can be believed, with the identity with which it began. Raises RunDirError for any other.

    Its counts give the metrics that were written at its end, its config and plug-ins are those that it began with (as this
    version of fedsim reads them), and it holds its costs.
    """
    try:
        results = Results.load(path)
        if not results.finished:
            raise Unfinished(f"unfinished: go on with fedsim run --resume {path}, or start its sweep again")
        if not results.costs:
            raise RunDirError("it holds no costs")
        cost_figures(results)
        status = json.loads((path / "status.json").read_text(encoding="utf-8"))
        if status["fedsim"] != __version__:  # which may have read the same config otherwise
            return results, results.config.identity()
        split = results.config.manifest  # its content is part of the identity
        if (split is None or Path(split).is_file()) and status["identity"] not in results.config.known_as():
            raise RunDirError("its config.yaml or plugins/ were changed since it ran")
        return results, str(status["identity"])
    except RunDirError:
        raise
    except (FedsimError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
        raise RunDirError(one_line(e)) from e


def sweeps(paths: Sequence[str | Path]) -> list[str]:
    """Names of the sweeps whose records lie in these folders."""
    return list(dict.fromkeys(path.stem for path in _records([Path(p) for p in paths])))


def flatten(config: SimConfig) -> dict[str, Label]:
    """Dotted key -> value of everything that decides the numbers; lists as JSON.

    A user's own plug-in file goes by its name and the first 8 digits of its content's hash. Rules by group have one name,
    "adapter.*: lorm, head.*: fedavg", and their options by number.
    """
    plain = config.to_dict()
    plain |= {key: content.known_by(plain[key]) for key in ("data", "model")}
    plain["runtime"] = {key: _file_name(value) for key, value in config.runtime.moves_bits().items()}
    for key in ("name", "trackers"):
        plain.pop(key, None)
    rules = plain["server"]["aggregator"]
    if isinstance(rules, list):
        names = ", ".join(f"{rule.pop('match')}: {_file_name(rule.pop('name'))}" for rule in rules)
        plain["server"]["aggregator"] = {"name": names} | {str(i): rule for i, rule in enumerate(rules) if rule}
    return {key: _file_name(v) if key.endswith((".name", ".source")) else v for key, v in _flat(plain, "")}


def dirichlet_alpha(config: SimConfig) -> float:
    """Dirichlet α of the labels that was asked for; inf for an iid split, NaN for others and for a split from a file."""
    if config.manifest is not None:
        return math.nan
    alphas = {"iid": math.inf, "dirichlet": config.partition.get("alpha", math.nan)}
    return float(alphas.get(config.partition["name"], math.nan))


def split_figures(results: Results) -> dict[str, float]:
    """Of the split that a run trained on: α by maximum likelihood, least and most samples and mean classes of a client."""
    samples, classes = Counter[int](), Counter[int]()
    for h in results.holdings:
        samples[h.client] += h.samples
        classes[h.client] += 1
    if not samples:
        return dict.fromkeys(("alpha_measured", "client_samples_min", "client_samples_max", "client_classes_mean"), math.nan)
    clients = int(results.config.partition["clients"])
    seen = {key: i for i, key in enumerate(dict.fromkeys((h.task, h.class_row) for h in results.holdings))}
    held_CK = np.zeros((len(seen), clients), dtype=np.int64)
    for h in results.holdings:
        held_CK[seen[h.task, h.class_row], h.client] = h.samples
    return {
        "alpha_measured": estimate_alpha(held_CK),
        "client_samples_min": min(samples[k] for k in range(clients)),
        "client_samples_max": max(samples.values()),
        "client_classes_mean": sum(classes.values()) / clients,
    }


def task_figures(results: Results) -> dict[str, float]:
    """learning_curve_<i>: mean accuracy over the tasks seen after task i; final_accuracy_<j>: on task j after the last task;
    chance: the final average accuracy of guesses among the classes to choose from. In percent; NaN where it cannot be known."""
    matrix = results.accuracy
    curve = {f"learning_curve_{i}": float(a) for i, a in enumerate(metrics.learning_curve(matrix))}
    final = {f"final_accuracy_{j}": float(a) for j, a in enumerate(matrix[-1])} if len(matrix) else {}
    return {"chance": chance(results)} | curve | final


def chance(results: Results) -> float:
    """Percent that guessing gets right: 100 over the classes that are told apart, or over those of a task that is told; NaN
    where the run does not know its classes."""
    held = {(h.task, h.class_row) for h in results.holdings}
    if not held:
        return math.nan
    if results.config.stream.name != "task_incremental":
        return 100.0 / len({row for _, row in held})
    return float(np.mean([100.0 / size for size in Counter(task for task, _ in held).values()]))


def cost_figures(results: Results) -> dict[str, float]:
    """bytes_up, bytes_down and each by kind, seconds and each by phase, client_rounds, stored_clients, stored_mean and
    stored_max (bytes) where clients remember anything, and where one process did it all processor_seconds and
    peak_memory (bytes). Raises KeyError where there are no costs."""
    figures: dict[str, float] = {}
    for direction, kinds in results.costs["bytes"].items():
        figures[f"bytes_{direction}"] = sum(kinds.values())
        figures |= {f"bytes_{direction}_{kind}": count for kind, count in kinds.items()}
    seconds = results.costs["seconds"]
    figures["seconds"] = sum(seconds.values())
    figures |= {f"seconds_{phase}": value for phase, value in seconds.items()}
    figures |= {f"stored_{name}": value for name, value in results.costs.get("stored", {}).items()}
    figures |= {name: results.costs[name] for name in ("processor_seconds", "peak_memory") if name in results.costs}
    return figures | {"client_rounds": results.costs["client_rounds"]}


def _row(results: Results, keys: Mapping[str, Label]) -> dict[str, Any]:
    """What the frame says of a run; keys: of its config, in which runs differ."""
    told = noted(results.path)
    made = dict(zip(MADE, (version_of(told), processor_of(told)), strict=True))
    row: dict[str, Any] = {"run": results.config.identity()[:16], **keys}
    row |= {"partition_hash": results.manifest_hash[:16], **made, "dirichlet_alpha": dirichlet_alpha(results.config)}
    row |= split_figures(results) | results.metrics | task_figures(results) | cost_figures(results)
    return row | {"skipped_clients": len(results.failures), "path": str(results.path)}


def _row_of_known(run: Known, keys: Mapping[str, Label]) -> dict[str, Any]:
    return {"run": run.run, **keys, "partition_hash": run.split, **run.made, **run.metrics, "path": str(run.table)}


def label_text(labels: Mapping[str, Label]) -> str:
    """method=lorm alpha=0.1 seed=0; – where an axis does not apply"""
    return " ".join(f"{name}={'–' if value is None else value}" for name, value in labels.items())


def failure_file(folder: Path, entry: Entry) -> Path:
    """Where the reason is kept why a run of a sweep failed: {"labels", "error", "attempts", "traceback"}."""
    return folder / "failures" / f"{entry.folder}.json"


def _candidates(folders: Sequence[Path]) -> list[Path]:
    """Run directories, damaged ones too: the folders themselves, or what lies in them. Once each."""
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise RunDirError(f"no folder {folder}")
        if (folder / "status.json").is_file():
            found.append(folder)
        else:
            found += sorted(child for child in folder.iterdir() if any((child / f).is_file() for f in STARTED))
    return list({path.resolve(): path for path in found}.values())


def _hint(folders: Sequence[Path]) -> str:
    near = sorted({status.parent.parent for folder in folders for status in folder.glob("*/*/status.json")})
    return f": did you mean {near[0]}?" if near else ""


def _record(folders: Sequence[Path], wanted: str | None) -> SweepRecord | None:
    """The record of this name, or the only one."""
    files = _records(folders)
    names = {path.stem for path in files}
    if wanted is not None and wanted not in names:
        raise RunDirError(f"no sweep '{wanted}' in {', '.join(map(str, folders))}.{did_you_mean(wanted, names)}")
    if wanted is None and len(names) != 1:
        return None
    chosen = [SweepRecord.load(path) for path in files if wanted in (None, path.stem)]
    if any(record.runs != chosen[0].runs for record in chosen):
        raise RunDirError(f"the folders hold different sweeps of the name {chosen[0].name}: take one folder at a time")
    return chosen[0]


def _records(folders: Sequence[Path]) -> list[Path]:
    return [path for folder in folders for path in sorted((folder / "sweeps").glob("*.json"))]


def _why_missing(folders: Sequence[Path], entry: Entry, absent: Sequence[Absent]) -> str:
    for folder in folders:
        path = failure_file(folder, entry)
        if path.is_file():
            try:
                note = json.loads(path.read_text(encoding="utf-8"))
                return f"failed: {note['error']}"
            except (OSError, ValueError, KeyError):
                return f"failed ({path} is damaged)"
    return next((a.reason for a in absent if a.what == entry.folder), "not run yet: start the sweep again")


def _file_name(plugin: Any) -> Any:
    """Every run directory holds a copy of its own: the path would tell runs of one rule apart."""
    if not isinstance(plugin, str) or not plugins.is_path(plugin):
        return plugin
    return f"{Path(plugin).name} {plugins.fingerprint(plugin)[:8]}"


def _text(value: Label) -> str:
    """The same for the same value: a whole number that came out of a table's column of floats is one of a config."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(float(value))
    return repr(value)


def _in_order(values: Sequence[Label]) -> tuple[Label, ...]:
    """Levels once each: numbers by size, else by their text (runs come in the order of a hash); None last."""
    levels = set(values) - {None}
    numbers = all(isinstance(v, int | float) for v in levels)
    in_order = sorted(levels, key=lambda v: float(v or 0) if numbers else str(v))
    return (*in_order, *([None] if None in values else []))


def _flat(value: Mapping[str, Any], path: str) -> list[tuple[str, Label]]:
    found: list[tuple[str, Label]] = []
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            found += _flat(item, f"{path}{key}.")
        else:
            found.append((f"{path}{key}", json.dumps(item) if isinstance(item, list | Mapping) else item))
    return found
