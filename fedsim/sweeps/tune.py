"""Tuning with a fixed budget: a few configurations of every method, on seeds that no table uses; the best of each is a preset.

    base: fashion                                # as in a sweep, and `set` too
    list: {method: {er: {extends: er}, ewc: {extends: ewc}, ncm: {extends: ncm}}}     # one axis: each variant is tuned by itself
    tune:
      keys: {client.lr: [1.0e-3, 3.0e-3]}        # values that are tried for every variant
      own:                                       # further keys of one variant; null: it has nothing to tune
        ewc: {client.learners: [[{name: ewc, lam: 1}], [{name: ewc, lam: 100}]]}
        ncm: null
      budget: 8                                  # configurations of a variant, at most: if there are more, the one of all first
                                                 # values, and others drawn evenly
      seeds: [10, 11]                            # one after the other; after each, `keep` of the configurations go on
      keep: 0.5
      metric: final_average_accuracy
      into: configs/ledger/fashion               # where the winners are written, <variant>.yaml each

Successive halving (Jamieson & Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter optimization") with
seeds as the resource: every variant has the same budget, whatever its accuracy. A configuration's score is the mean of the metric
over the seeds that it was played on; of equal scores the one that stands first wins. One that is left alone is not played again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from fedsim.core import config as configs
from fedsim.core import presets, rng
from fedsim.core.config import text
from fedsim.core.errors import ConfigError, DataError, did_you_mean
from fedsim.core.files import storage_errors, write_atomic
from fedsim.runs import known
from fedsim.runs.collection import Entry, SweepRecord
from fedsim.runs.known import Label
from fedsim.runs.metrics import HEADLINE, METRICS
from fedsim.runs.results import Results
from fedsim.sweeps import plan
from fedsim.sweeps.plan import Launch, PlannedRun, SweepPlan

SETTING, AS_IT_IS = "setting", "as it is"
Make = Callable[[SweepPlan, Mapping[str, Results], Sequence[PlannedRun]], object]


@dataclass(frozen=True)
class TuneOptions:
    """The section `tune`."""

    keys: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    budget: int = 8
    seeds: list[int] = field(default_factory=lambda: [10, 11])
    keep: float = 0.5
    metric: str = HEADLINE
    into: str = "tuned"

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ConfigError(f"budget must be at least 1, got {self.budget}")
        if not 0 < self.keep <= 1:
            raise ConfigError(f"keep must be in (0, 1], got {self.keep}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds must be a list of different seeds, got {self.seeds}")
        judged = [name for name, metric in METRICS.items() if metric.better != "none" and metric.compute and not metric.parts]
        if self.metric not in judged:  # costs, differences to another run and curves are no number of a run's own metrics
            raise ConfigError(
                f"metric '{self.metric}' is none that is judged as one number of a run (metrics.json): take one such as "
                f"{HEADLINE}.{did_you_mean(self.metric, judged)}"
            )

    def numbers(self, size: int) -> list[int]:
        """How many of so many configurations are left on each seed; one that is left alone is not played."""
        found = [size]
        for _ in self.seeds[1:]:
            found.append(max(1, math.ceil(self.keep * found[-1])))
        return found

    def runs(self, size: int) -> int:
        """How many runs so many configurations take."""
        return sum(number for number in self.numbers(size) if number > 1)


@dataclass(frozen=True)
class Candidate:
    """A configuration of a variant: the keys that it sets, and its run for every seed."""

    variant: str
    changes: Mapping[str, Any]
    runs: Mapping[int, PlannedRun]

    @property
    def setting(self) -> str:
        """As a label: "client.lr=0.003"."""
        return " ".join(f"{key}={plan.label(value)}" for key, value in self.changes.items()) or AS_IT_IS


@dataclass(frozen=True)
class Winner:
    """The best configuration of a variant. score: its mean over `seeds`; tried: configurations; None: nothing was to be tuned."""

    candidate: Candidate
    score: float | None
    seeds: Sequence[int]
    tried: int


@dataclass(frozen=True)
class Tuning:
    """What is going to be tried. axis: what variants are called; extends: of every variant, with all else that it changes."""

    name: str
    axis: str
    candidates: tuple[Candidate, ...]
    variants: Mapping[str, Mapping[str, Any]]
    base: Sequence[str]
    options: TuneOptions
    launch: Launch
    folder: Path
    path: Path

    def of(self, variant: str) -> list[Candidate]:
        """Its configurations, in order."""
        return [one for one in self.candidates if one.variant == variant]

    def left(self, variant: str, number: int, scores: Mapping[str, float]) -> list[Candidate]:
        """Which of its configurations are left for the seed of this place, in their order: all, and then the best of those that
        were, the share `keep`, one at least.

        scores: the metric of runs by identity; a run that is not in it failed, and its configuration is out.
        """
        found = self.of(variant)
        sizes = self.options.numbers(len(found))
        for count in range(1, number + 1):
            if len(found) > 1:  # else it was not played
                best = self.ranked(found, self.options.seeds[:count], scores)[: sizes[count]]
                found = [one for one in found if one in best]
        return found

    def rung(self, number: int, scores: Mapping[str, float]) -> list[Candidate]:
        """Who is played on the seed of this place: those that are `left`, of variants that have more than one left."""
        every = (self.left(variant, number, scores) for variant in self.variants)
        return [one for left in every if len(left) > 1 for one in left]

    def ranked(self, candidates: Sequence[Candidate], seeds: Sequence[int], scores: Mapping[str, float]) -> list[Candidate]:
        """Those that did not fail on these seeds, the best first; of equal ones the one that stands first."""
        sign = 1.0 if METRICS[self.options.metric].better == "lower" else -1.0
        means = {id(one): self.score(one, seeds, scores) for one in candidates}
        there = [(mean, one) for one in candidates if (mean := means[id(one)]) is not None]
        return [one for _, one in sorted(there, key=lambda pair: sign * pair[0])]

    def score(self, one: Candidate, seeds: Sequence[int], scores: Mapping[str, float]) -> float | None:
        """The mean of the metric; None where a run is missing."""
        values = [scores.get(one.runs[seed].entry.identity) for seed in seeds]
        return None if any(v is None or math.isnan(v) for v in values) else fmean(v for v in values if v is not None)

    def winners(self, scores: Mapping[str, float]) -> dict[str, Winner]:
        """By variant, once all rungs were played; a variant of which every configuration failed is left out."""
        found, seeds = {}, self.options.seeds
        for variant in self.variants:
            tried = len(self.of(variant))
            played = [seed for number, seed in enumerate(seeds) if len(self.left(variant, number, scores)) > 1]
            last = self.left(variant, len(seeds) - 1, scores)
            if tried == 1:
                found[variant] = Winner(last[0], None, (), 1)
            elif best := self.ranked(last, played, scores):
                found[variant] = Winner(best[0], self.score(best[0], played, scores), played, tried)
        return found

    def as_sweep(self, rungs: Sequence[Sequence[Candidate]]) -> SweepPlan:
        """The runs of these rungs as a sweep with the axes variant, setting and seed."""
        runs, seeds = [], self.options.seeds
        for seed, candidates in zip(seeds, rungs, strict=False):
            for one in candidates:
                labels: dict[str, Label] = {self.axis: one.variant, SETTING: one.setting, "seed": seed}
                run = one.runs[seed]
                runs.append(PlannedRun(Entry(run.entry.identity, labels), replace(run.config, name=one.variant)))
        axes: dict[str, Sequence[Label]] = {
            self.axis: list(self.variants),
            SETTING: list(dict.fromkeys(one.setting for one in self.candidates)),
            "seed": list(seeds[: len(rungs)]),
        }
        record = SweepRecord(self.name, axes, tuple(run.entry for run in runs), self.path.read_text(encoding="utf-8"))
        return SweepPlan(record, tuple(runs), self.launch, self.folder)


def read(path: str | Path, overrides: Sequence[str] = (), output: str | Path | None = None, **launch: Any) -> Tuning:
    """Read a tuning and check every config of it. Raises ConfigError or PluginError, with the place of what is wrong."""
    path, sweep = plan.read(path, more=("tune",))
    options: TuneOptions = configs.typed(TuneOptions, sweep.pop("tune", None) or {}, "tune")
    for key in ("grid", "zip", "seeds"):
        if key in sweep:
            raise ConfigError(f"{path.name}: '{key}' has no place in a tuning: what is tried stands under tune.keys and tune.own")
    axes = sweep.get("list") or {}
    if not isinstance(axes, Mapping) or len(axes) != 1 or not isinstance(next(iter(axes.values())), Mapping):
        raise ConfigError(f"{path.name}: a tuning has one axis of variants, as list: {{method: {{er: {{extends: er}}}}}}")
    axis, variants = next(iter(axes.items()))
    for name in options.own:
        if name not in variants:
            raise ConfigError(f"tune.own names '{name}', which is no variant.{did_you_mean(name, variants)}")
    candidates: list[Candidate] = []
    first: SweepPlan | None = None
    all_fits = []
    for name, changes in variants.items():
        one = {**sweep, "list": {axis: {name: changes}}, "seeds": list(options.seeds)}
        grid = _values(name, options)
        found, fits = plan.laid_out({**one, "grid": grid} if grid else one, path, overrides, output, **launch)
        all_fits += fits
        first = first or found
        candidates += _candidates(str(name), grid, found, options)
    assert first is not None, "an empty axis is refused by then"
    plan.require_used(all_fits)
    base = sweep["base"]
    if isinstance(base, Mapping):
        raise ConfigError(f"{path.name}: the base of a tuning must be a preset or files, so that winners can extend them")
    words = [base] if isinstance(base, str) else base
    plain = {str(name): changes or {} for name, changes in variants.items()}
    return Tuning(first.record.name, axis, tuple(candidates), plain, words, options, first.launch, first.folder, path)


def _values(variant: str, options: TuneOptions) -> dict[str, Any]:
    """Key -> values that are tried for a variant; none where it has nothing to tune."""
    own = options.own.get(variant, {})
    if own is None:
        return {}
    if not isinstance(own, Mapping):
        raise ConfigError(f"tune.own.{variant} must map keys to lists of values, or be null, got {own!r}")
    return {**options.keys, **own}


def _candidates(variant: str, grid: Mapping[str, Any], found: SweepPlan, options: TuneOptions) -> list[Candidate]:
    """The configurations of one variant, as many as the budget allows."""
    by_setting: dict[str, tuple[dict[str, Any], dict[int, PlannedRun]]] = {}
    values = {key: {plan.label(value): value for value in grid[key]} for key in grid}
    for run in found.runs:
        changes = {key: values[key][label] for key in grid if (label := run.entry.labels[key]) is not None}
        changes, runs = by_setting.setdefault(repr(changes), (changes, {}))
        runs[int(str(run.entry.labels["seed"]))] = run
    all_of_it = [Candidate(variant, changes, runs) for changes, runs in by_setting.values()]
    if len(all_of_it) <= options.budget:
        return all_of_it
    drawn = rng.stream(0, "tune", variant).choice(len(all_of_it) - 1, options.budget - 1, replace=False) + 1
    return [all_of_it[place] for place in (0, *sorted(drawn.tolist()))]


def played(tuning: Tuning, make: Make, known: Mapping[str, float] | None = None) -> dict[str, float]:
    """Rung after rung, what is missing of it; the metric by identity of every run that has it. make: makes the missing runs of a
    plan, and may fail at some of them. known: scores of runs that are not made again, see `told`."""
    rungs: list[list[Candidate]] = []
    scores = dict(known or {})
    for number in range(len(tuning.options.seeds)):
        rungs.append(tuning.rung(number, scores))
        sweep = tuning.as_sweep(rungs)
        done = plan.finished(sweep)
        here = tuple(run for run in sweep.runs if run.entry.identity in done or run.entry.identity not in scores)
        if missing := replace(sweep, runs=here).missing(done):
            plan.verify(sweep, missing)
            sweep = plan.keep_record(sweep)
            make(replace(sweep, runs=here), done, missing)
            done = plan.finished(sweep)
        scores |= scores_of(done, tuning.options.metric)
    return scores


def told(tuning: Tuning, tables: Sequence[str | Path]) -> dict[str, float]:
    """The metric by identity of the tuning's runs that have a row in these tables, of `fedsim tune --csv` or `fedsim results
    --csv`: so a tuning goes on where its run directories are not. Raises DataError."""
    metric, found = tuning.options.metric, dict[str, float]()
    entries = [run.entry for one in tuning.candidates for run in one.runs.values()]
    for path in map(Path, tables):
        frame = known.table(path)
        if lacking := [column for column in ("run", metric) if column not in frame]:
            raise DataError(f"{path} has no column {', '.join(lacking)}: write it with fedsim tune or fedsim results, and --csv")
        row = {str(run): float(value) for run, value in zip(frame["run"], frame[metric], strict=True) if not math.isnan(value)}
        here = {entry.identity: row[entry.folder] for entry in entries if entry.folder in row}
        if not here:
            raise DataError(f"none of the tuning's runs is in {path}: a run is known by its whole config (column run)")
        found = here | found
    return found


def scores_of(results: Mapping[str, Results], metric: str) -> dict[str, float]:
    """The metric by identity, of runs that have it."""
    found = {identity: one.metrics.get(metric) for identity, one in results.items()}
    return {identity: float(value) for identity, value in found.items() if value is not None}


def write(tuning: Tuning, winners: Mapping[str, Winner]) -> list[Path]:
    """A YAML for every winner: what the variant extends, and the keys that won. Raises StorageError."""
    folder, written = Path(tuning.options.into), []
    for variant, winner in winners.items():
        changes = {k: v for k, v in tuning.variants[variant].items() if k != "extends"}
        files = tuning.variants[variant].get("extends") or []
        words = [*tuning.base, *([files] if isinstance(files, str) else files)]
        body = configs.merge(configs.nested(changes), configs.nested(winner.candidate.changes))
        extends = [_reference(word, tuning.path.parent, folder.absolute()) for word in words]
        path = folder / f"{variant}.yaml"
        with storage_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, f"# {_told(tuning, winner)}\n{text.write({'extends': extends, **body})}".encode())
        written.append(path)
    return written


def _told(tuning: Tuning, winner: Winner) -> str:
    if winner.score is None:
        return "As it is: nothing was to be tuned."
    metric = METRICS[tuning.options.metric]
    seeds = f"seed{'s' if len(winner.seeds) > 1 else ''} {', '.join(map(str, winner.seeds))}"
    return f"The best of {winner.tried} configurations on {seeds} of {tuning.path.name}: {metric.name} {winner.score:.2f}."


def _reference(word: str, beside: Path, folder: Path) -> str:
    """How a file in this folder names what a tuning beside that one names: a preset by its name, a file by its relative path."""
    (found,) = presets.located([word], beside, whole=False)
    return word if found.is_relative_to(presets.folder()) and not (beside / word).is_file() else os.path.relpath(found, folder)


def table(tuning: Tuning, scores: Mapping[str, float]) -> list[dict[str, Any]]:
    """One row for every run that was played: by what it is known, variant, setting, seed, and the metric."""
    rows = []
    for number, seed in enumerate(tuning.options.seeds):
        for one in tuning.rung(number, scores):
            entry = one.runs[seed].entry
            labels = {tuning.axis: one.variant, SETTING: one.setting, "seed": seed}
            rows.append({"run": entry.folder, **labels, tuning.options.metric: scores.get(entry.identity)})
    return rows
