"""A sweep YAML becomes a list of checked configs, before anything runs.

    base: omniglot                        # a preset or file, a list of them (the later one wins), or a mapping of config keys
    set: {client.epochs: 1}               # for every run
    list:                                 # axes of named variants; a variant may change several keys
      method:                             # or presets alone: method: [fedavg, lorm]; or files: method: best/*.yaml
        fedavg: {}
        lorm: {extends: lorm}
        fair: {server.aggregator: fairavg}
    grid: {partition.alpha: [0.1, 0.5]}   # axes of values of one key each
    zip: {client.lr: [1e-3, 1e-2], client.epochs: [4, 1]}      # keys that go together, value by value
    seeds: [0, 1, 2]                      # or a number: 3 is [0, 1, 2]
    launch: {jobs: 2}                     # where and how: `Launch`; moves no number
    output: runs/my_sweep                 # default: runs/<name of the YAML>

Every combination is a run. The layers of a config, the later one winning: base, what variants extend, set, what variants change,
zip, grid, seed, overrides of the command line. An option that the plug-in of a variant does not have (`adapter.rank` of prompts)
is left out there, which the plan's notes say; runs that become equal thereby are one, without a label on that axis.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path
from typing import Any

from fedsim.core import config as configs
from fedsim.core import plugins, presets
from fedsim.core.config import SimConfig
from fedsim.core.errors import ConfigError, DataError, FedsimError, RunDirError, did_you_mean
from fedsim.runs import known
from fedsim.runs.collection import NAMED, Entry, SweepRecord, label_text, verified
from fedsim.runs.directory import RunDir
from fedsim.runs.known import Known, Label
from fedsim.runs.results import Results
from fedsim.sweeps.fit import Fitted, fit, notes

KEYS = ("base", "set", "list", "grid", "zip", "seeds", "launch", "output")


@dataclass(frozen=True)
class Launch:
    """Where and how the runs of a sweep go; none of it moves a number.

    jobs: runs at a time, "auto": as many as the cores (and GPUs) of the machine or cluster allow.
    pool: of each run. serial: one run per core, which wastes nothing | ray: each run's clients on Ray workers of their own
        (`runtime.workers`), one run at a time unless `jobs` says more | flower.
    gpus: GPUs per run, may be a fraction; "auto": 1 where the device is a GPU, else 0.
    memory_gb: what Ray reserves per run; null: nothing. address: of a Ray cluster to join, whose machines share the file system.
    retry: further attempts for a run that fails for a reason that may pass.
    """

    jobs: Any = "auto"
    pool: str = "serial"
    gpus: Any = "auto"
    memory_gb: float | None = None
    address: str | None = None
    retry: int = 0

    def __post_init__(self) -> None:
        if self.pool == "ray" and self.gpus != "auto":
            raise ConfigError("gpus is for runs in one process: with pool ray, set runtime.gpus_per_worker")
        counted = isinstance(self.jobs, int) and not isinstance(self.jobs, bool) and self.jobs >= 1
        if self.jobs != "auto" and not counted:
            raise ConfigError(f"jobs must be 'auto' or at least 1, got {self.jobs!r}")
        amount = isinstance(self.gpus, int | float) and not isinstance(self.gpus, bool) and self.gpus >= 0
        if self.gpus != "auto" and not amount:
            raise ConfigError(f"gpus must be 'auto' or a number that is not negative, got {self.gpus!r}")
        if self.memory_gb is not None and not self.memory_gb > 0:
            raise ConfigError(f"memory_gb must be positive, got {self.memory_gb!r}")
        if self.retry < 0:
            raise ConfigError(f"retry must not be negative, got {self.retry!r}")


@dataclass(frozen=True)
class PlannedRun:
    """One run: its labels and identity, and its resolved config."""

    entry: Entry
    config: SimConfig

    @property
    def label(self) -> str:
        """method=lorm partition.alpha=0.1 seed=0"""
        return label_text(self.entry.labels)


@dataclass(frozen=True)
class SweepPlan:
    """All runs of a sweep, every config checked; `record` is what its folder keeps of it."""

    record: SweepRecord
    runs: tuple[PlannedRun, ...]
    launch: Launch
    folder: Path

    def missing(self, done: Container[str]) -> list[PlannedRun]:
        """The runs that are still to be made. done: identities, those of `finished(plan)` and perhaps of `told(plan, tables)`."""
        return [run for run in self.runs if run.entry.identity not in done]


@dataclass(frozen=True)
class Level:
    """One place on an axis: its labels, files whose layers it starts from, keys that it changes."""

    labels: Mapping[str, Label]
    extends: Sequence[str] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    by_key: bool = True  # the labels are the values of `changes`

    def steps(self) -> list[Level]:
        """Key by key where each has a label of its own, else itself."""
        if not self.by_key:
            return [self]
        return [Level({key: self.labels[key]}, (), {key: value}) for key, value in self.changes.items()]


def expand(
    path: str | Path,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    **launch: Any,
) -> SweepPlan:
    """Read a sweep and check every config of it. `overrides` hold for every run; `launch` replaces options of that section.

    Raises ConfigError or PluginError (with the labels of the run that is wrong).
    """
    path, sweep = read(path)
    return planned(sweep, path, overrides, output, **launch)


def read(path: str | Path, more: Sequence[str] = ()) -> tuple[Path, dict[str, Any]]:
    """A sweep as its YAML holds it. more: keys that it may have beside those of a sweep. Raises ConfigError."""
    path = Path(path).absolute()
    if not path.is_file():
        raise ConfigError(f"no sweep file {path}")
    sweep = configs.read_yaml(path)
    require_keys(sweep, path.name, more)
    return path, sweep


def require_keys(sweep: Mapping[str, Any], name: str, more: Sequence[str] = ()) -> None:
    """Raise ConfigError for a key that a sweep does not have, and for a sweep without a base. name: how errors call it."""
    known = (*KEYS, *more)
    for key in sweep:
        if key not in known:
            raise ConfigError(f"unknown key '{key}' in {name}.{did_you_mean(key, known)} A config goes under 'base'.")
    if "base" not in sweep:
        raise ConfigError(
            f"{name} names no base: a sweep needs one, e.g. base: fashion or base: ../configs/lorm.yaml (fedsim run takes a "
            "config)"
        )


def planned(
    sweep: Mapping[str, Any],
    path: Path,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    text: str | None = None,
    **launch: Any,
) -> SweepPlan:
    """The plan of a sweep that was read from this file: see `expand`. text: what the record keeps where there is no file."""
    plan, fits = laid_out(sweep, path, overrides, output, text, **launch)
    require_used(fits)
    return plan


def laid_out(
    sweep: Mapping[str, Any],
    path: Path,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    text: str | None = None,
    **launch: Any,
) -> tuple[SweepPlan, list[tuple[Mapping[str, Label], Fitted]]]:
    """See `planned`: the plan, and by labels what applies to each run; whether every key applies to some is left to be asked."""
    base: Sequence[Mapping[str, Any]] = _base_layers(sweep["base"], path.parent)
    common = configs.nested(_mapping(sweep.get("set") or {}, "set"))
    last = configs.parse_overrides(overrides)
    told = {**_mapping(sweep.get("launch") or {}, "launch"), **launch}
    how: Launch = configs.typed(Launch, told, "launch")
    axes = [*_named(sweep.get("list") or {}, path.parent), *_zipped(sweep.get("zip") or {}), *_grid(sweep.get("grid") or {})]
    _require_distinct_axes([name for axis in axes for name in axis[0].labels])
    seeds = _seeds(sweep.get("seeds"), [*base, common, last])
    named = dict.fromkeys(f for axis in axes for level in axis for f in level.extends)
    files = {f: configs.read_layers(presets.located([f], path.parent, whole=False)[0]) for f in named}
    if isinstance(sweep["base"], list) and len(sweep["base"]) > 1:
        changes = (configs.nested(level.changes) for axis in axes for level in axis)
        base = configs.on_a_stream(base, (common, *changes, *(layer for layers in files.values() for layer in layers)))
    runs: list[PlannedRun] = []
    fits: list[tuple[Mapping[str, Label], Fitted]] = []
    for seed, levels in itertools.product(seeds, itertools.product(*axes)):  # every setting has a first result soon
        labels = {name: value for level in levels for name, value in level.labels.items()} | {"seed": seed}
        steps = [step for level in levels for step in level.steps()]
        extended = [[layer for file in step.extends for layer in files[file]] for step in steps]
        fitted = fit(base, extended, [common, *(configs.nested(step.changes) for step in steps), {"seed": seed}, last])
        fits.append((labels, fitted))
        config = _config(_on_pool(fitted, how, "pool" in told, labels), labels)
        flags = zip(steps, fitted.gone_files, fitted.gone[1:], strict=False)  # the first change is `set`
        gone = [step for step, *nothing_left in flags if all(nothing_left) and (step.extends or step.changes)]
        values = {key: value for step in steps if step.by_key and step not in gone for key, value in step.changes.items()}
        _require_as_labelled(config, labels, values | {"seed": seed})
        labels = labels | {name: None for step in gone for name in step.labels}
        name = "-".join(str(v) for v in labels.values() if v is not None).replace("/", "_").replace("\\", "_")
        run = PlannedRun(Entry(config.identity(), labels), replace(config, name=name))
        if not gone or all(run.entry != other.entry for other in runs):
            runs.append(run)
    _require_distinct(runs)
    order = {name: [level.labels[name] for level in axis] for axis in axes for name in axis[0].labels} | {"seed": list(seeds)}
    for name in order:
        if None not in order[name] and any(run.entry.labels[name] is None for run in runs):
            order[name].append(None)
    record = SweepRecord(
        path.stem if path.stem != "sweep" else path.parent.name,
        order,
        tuple(run.entry for run in runs),
        path.read_text(encoding="utf-8") if text is None else text,
        notes(fits),
    )
    where = output or configs.resolved({"output": sweep.get("output")}, path.name)["output"] or f"runs/{record.name}"
    if not isinstance(where, str | Path):
        raise ConfigError(f"output must be the name of a folder, got {where!r}")
    folder = Path(where).absolute()
    return SweepPlan(record, tuple(runs), how, folder), fits


def _config(layers: Sequence[Mapping[str, Any]], labels: Mapping[str, Label]) -> SimConfig:
    try:
        return configs.compose(layers)
    except FedsimError as e:
        raise type(e)(f"{label_text(labels)}: {e}") from e


def _on_pool(fitted: Fitted, launch: Launch, chosen: bool, labels: Mapping[str, Label]) -> Sequence[Mapping[str, Any]]:
    """The layers with the pool of `launch`, which decides among ours only: they give the same bits, a user's own may not.

    chosen: launch names a pool. Raises ConfigError for two pools of one run.
    """
    pools = [pool for layer in fitted.layers if isinstance(pool := _pool(layer), str)]
    if pools and plugins.is_own("pools", pools[-1]):
        if chosen:
            raise ConfigError(
                f"{label_text(labels)}: runtime.pool is {pools[-1]}, which launch.pool cannot replace: leave that out"
            )
        return fitted.layers
    asked = [pool for layer in fitted.changes if (pool := _pool(layer)) not in (None, launch.pool)]
    if asked:
        raise ConfigError(
            f"{label_text(labels)}: runtime.pool cannot be {asked[-1]}: in a sweep launch.pool decides among the pools that give "
            "the same bits (serial: one run per core; ray: one run at a time)"
        )
    return [*fitted.layers, {"runtime": {"pool": launch.pool}}]


def _pool(layer: Mapping[str, Any]) -> Any:
    runtime = layer.get("runtime")
    return runtime.get("pool") if isinstance(runtime, Mapping) else None


def require_used(fits: Sequence[tuple[Mapping[str, Label], Fitted]]) -> None:
    """A key that applies to no run is misspelt, or meant for other plug-ins. Raises ConfigError."""
    used = {key for _, fitted in fits for key in fitted.offered - fitted.dropped}
    for labels, fitted in fits:
        for key in sorted(fitted.dropped - used):
            _config(fitted.as_given, labels)
            raise ConfigError(f"{label_text(labels)}: {key} applies to none of the runs: leave it out")


def _require_as_labelled(config: SimConfig, labels: Mapping[str, Label], values: Mapping[str, Any]) -> None:
    """A later axis or an override may have set a key again, and then the label would lie."""
    plain = config.to_dict()
    for key, value in values.items():
        found: Any = plain
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if not _holds(found, value):
            raise ConfigError(
                f"{label_text(labels)}: {key} is {found!r} in the end, not {value!r}: another axis or an override sets it again"
            )


def _holds(found: Any, value: Any) -> bool:
    """Whether a resolved value is what was asked for: a section holds its plug-in's name, numbers may be written as words."""
    if isinstance(value, Mapping):
        return isinstance(found, Mapping) and all(_holds(found.get(k), v) for k, v in value.items())
    if isinstance(value, str):
        name = found.get("name", found.get("source")) if isinstance(found, Mapping) else found
        return "${" in value or str(name) == value or _number(value) == name
    if isinstance(value, list) and isinstance(found, list):
        return len(found) == len(value) and all(map(_holds, found, value))
    return bool(found == value)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _require_distinct_axes(names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        if name == "seed":
            raise ConfigError("the seed's axis is called seeds")
        if name in NAMED:
            raise ConfigError(f"axis '{name}': the table of results has a column of that name already, call it otherwise")
        if name in names[:i]:
            raise ConfigError(f"axis '{name}' is there twice")


def _require_distinct(runs: Sequence[PlannedRun]) -> None:
    first: dict[str, PlannedRun] = {}
    for run in runs:
        other = first.setdefault(run.entry.identity, run)
        if other is not run:
            raise ConfigError(f"'{other.label}' and '{run.label}' resolve to the same run: leave one out, or let them differ")


def _base_layers(base: Any, folder: Path) -> list[dict[str, Any]]:
    files = [base] if isinstance(base, str) else base
    if isinstance(files, list) and files and all(isinstance(file, str) for file in files):
        return [layer for file in presets.located(files, folder) for layer in configs.read_layers(file)]
    if "extends" in _mapping(base, "base"):
        raise ConfigError("base: a mapping cannot extend a file: name the file itself as the base, and put changes under 'set'")
    return [configs.nested(base)]


def _named(axes: Any, folder: Path) -> list[list[Level]]:
    """list: {axis: {variant: changes}}; the names of presets; or a pattern of files, each a variant of its name."""
    found = []
    for axis, variants in _mapping(axes, "list").items():
        if isinstance(variants, str):
            found_files = sorted(glob(variants, root_dir=folder))
            if not found_files:
                raise ConfigError(f"list.{axis}: no file is called {variants} in {folder} (presets go in a list: [{variants}])")
            variants = {Path(file).stem: {"extends": file} for file in found_files}
        if isinstance(variants, list) and all(isinstance(name, str) for name in variants):
            if twice := [name for i, name in enumerate(variants) if name in variants[:i]]:
                raise ConfigError(f"list.{axis} names '{twice[0]}' twice: leave one out")
            variants = {name: {"extends": name} for name in variants}
        levels = []
        for name, changes in _nonempty(variants, f"list.{axis}", "variants", Mapping).items():
            where = f"list.{axis}.{name}"
            if not isinstance(name, str | int | float) or isinstance(name, bool):
                raise ConfigError(f"{where}: a variant is named by a word or a number: put {name!r} in quotes")
            changes = _mapping({} if changes is None else changes, where)
            files = changes.get("extends") or []
            files = [files] if isinstance(files, str) else files
            if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
                raise ConfigError(f"{where}.extends must name a config file, got {files!r}")
            rest = {k: v for k, v in changes.items() if k != "extends"}
            if "seed" in rest:
                raise ConfigError(f"{where}: a variant cannot set the seed, use seeds")
            levels.append(Level({axis: name}, files, rest, by_key=False))
        found.append(levels)
    return found


def _grid(axes: Any) -> list[list[Level]]:
    """grid: {key: [values]}"""
    found = []
    for key, values in _mapping(axes, "grid").items():
        values = _nonempty(values, f"grid.{key}", "values", list)
        found.append([Level({key: label(v)}, (), {key: v}) for v in values])
    return found


def _zipped(axes: Any) -> list[list[Level]]:
    """zip: {key: [values], key: [values]}, all of one length"""
    columns = {k: _nonempty(v, f"zip.{k}", "values", list) for k, v in _mapping(axes, "zip").items()}
    if not columns:
        return []
    lengths = {k: len(v) for k, v in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(
            f"zip: keys that go together need equally many values, got {', '.join(f'{k}: {n}' for k, n in lengths.items())}"
        )
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [[Level({k: label(v) for k, v in row.items()}, (), row) for row in rows]]


def _seeds(seeds: Any, layers: Sequence[Mapping[str, Any]]) -> list[int]:
    """As listed, counted from 0, or the base's own."""
    if seeds is None:
        seeds = [next((layer["seed"] for layer in reversed(layers) if "seed" in layer), 0)]
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        if seeds < 1:
            raise ConfigError(f"seeds must be a list, or a number of at least 1, got {seeds}")
        return list(range(seeds))
    for seed in _nonempty(seeds, "seeds", "seeds", list):
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ConfigError(f"seeds must be whole numbers, got {seed!r}")
    return list(seeds)


def _nonempty(value: Any, where: str, what: str, kind: type[Any]) -> Any:
    if not isinstance(value, kind):
        raise ConfigError(f"{where} must be a {'list of ' if kind is list else 'mapping of '}{what}, got {value!r}")
    if not value:
        raise ConfigError(f"{where} is empty: give it {what}, or leave the axis out")
    return value


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a mapping, got {value!r}")
    return value


def label(value: Any) -> Label:
    """How a value stands on an axis: lists and mappings as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def verify(plan: SweepPlan, missing: Sequence[PlannedRun]) -> None:
    """Find what only data and model can tell: split the data for every run that is missing, build every setting's model and rules
    once, and see whether the finished runs were made with the data, and the backbone's weights, that lie there now.

    Raises the errors of `fedsim.core.errors`, with the labels of the run that is wrong.
    """
    from fedsim import simulation

    settings, splits, hashes = set[str](), set[str](), dict[str, tuple[str, str]]()
    for run in missing:
        plain = run.config.to_dict()
        seed = plain.pop("seed")
        del plain["name"]
        setting = json.dumps(plain, sort_keys=True)
        split = json.dumps([seed, *(plain[k] for k in ("data", "stream", "partition", "manifest", "model"))], sort_keys=True)
        try:
            if setting not in settings:
                parts = simulation.prepare(run.config)
                hashes[_data(run.config)] = parts.manifest.data, parts.model.backbone.digest
            elif split not in splits:
                simulation.prepare_data(run.config)
        except FedsimError as e:
            raise type(e)(f"{run.label}: {e}") from e
        settings.add(setting)
        splits.add(split)
    of_missing = {run.entry.identity for run in missing}
    for run in plan.runs:
        now = hashes.get(_data(run.config))
        manifest = plan.folder / run.entry.folder / "manifest.json"
        if now is None or run.entry.identity in of_missing or not manifest.is_file():
            continue
        data, backbone = now
        if json.loads(manifest.read_text(encoding="utf-8"))["data"]["sha256"] != data:
            raise DataError(
                f"{run.label} was made with other data than lie there now: choose another --output, or delete {manifest.parent}"
            )
        RunDir.read(manifest.parent).require_backbone(backbone)


def _data(config: SimConfig) -> str:
    """All of a config that decides which samples there are, and what they hold: domains, held-out ones, a model's tokens."""
    plain, stream = config.to_dict(), config.stream
    return json.dumps([plain["data"], stream.name, stream.validation, plain["model"]], sort_keys=True)


def finished(plan: SweepPlan) -> dict[str, Results]:
    """By identity, the runs of a sweep that need not be made: they lie in the folder, finished and whole."""
    there: dict[str, Results] = {}
    for run in plan.runs:
        path = plan.folder / run.entry.folder
        if (path / "status.json").is_file():
            with suppress(RunDirError):
                results, identity = verified(path)
                if identity == run.entry.identity:
                    there[identity] = results
    return there


def told(plan: SweepPlan, tables: Sequence[str | Path]) -> dict[str, Known]:
    """By identity, the runs of a sweep that lie elsewhere and have a row in one of these tables (`fedsim results --csv`).

    Raises DataError for a table that cannot be read, and for one that has none of the sweep's runs.
    """
    found: dict[str, Known] = {}
    for path in tables:
        rows = known.read([path])
        here = {run.entry.identity: rows[run.entry.folder] for run in plan.runs if run.entry.folder in rows}
        if not here:
            raise DataError(
                f"none of the {len(plan.runs)} runs of this sweep is in {path}: a run is known by its whole config (column run)"
            )
        found = here | found
    return found


def keep_record(plan: SweepPlan) -> SweepPlan:
    """Save what the sweep consists of; the plan with the record as it was saved.

    Where another sweep of its name has no run in common with it (the same file with an override, say), this one gets a name of
    its own, and the other keeps its table. Raises StorageError.
    """
    record = plan.record
    ours = sorted(entry.identity for entry in record.runs)
    try:
        theirs = {entry.identity for entry in SweepRecord.load(record.file(plan.folder)).runs}
    except RunDirError:  # there is none, or it is damaged: written anew
        theirs = set(ours)
    if not theirs & set(ours):
        record = replace(record, name=f"{record.name}-{hashlib.sha256(''.join(ours).encode()).hexdigest()[:6]}")
    record.save(plan.folder)
    return replace(plan, record=record)
