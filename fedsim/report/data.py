"""What a report shows, as tidy frames: one function per chart, percent and bytes as in the runs.

A run has a *series* (what is compared: the method, with the other factors that tell runs apart) and a *split* (how heterogeneous
its clients are). The runs of one series on one split differ in the seed; means and 95 % intervals (Student t) are over them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.core.errors import ConfigError
from fedsim.runs import compare, metrics
from fedsim.runs.collection import Collection, Run, cost_figures, dirichlet_alpha
from fedsim.runs.known import Label
from fedsim.runs.metrics import HEADLINE, Metric
from fedsim.runs.results import DRIFT_MEASURES, Results

if TYPE_CHECKING:
    import pandas as pd

FEW = 3  # seeds: up to so many are shown one by one, their interval would be far wider than what is known of them
SEEDS = tuple(f"seed_{i}" for i in range(FEW))
SHOWN_CLIENTS = 50  # one by one; of more, the sizes are shown as a histogram
COSTS = ("bytes", "bytes_up", "bytes_down", "seconds")
METHOD_NAMES = ("method", "methods", "rule", "algorithm", "preset", "server.aggregator.name", "aggregator", "server.aggregator")
SPLIT_WORDS = ("alpha", "partition", "heterogen", "dirichlet", "split", "non_iid", "noniid", "skew")


@dataclass(frozen=True)
class Series:
    """What is compared. method: level of the factor that gives the colour; rest: of the other factors; rank: 0 is the best."""

    text: str
    method: str
    rest: str
    labels: Mapping[str, str]
    rank: int


@dataclass(frozen=True)
class Study:
    """The runs of a collection with what they are called."""

    collection: Collection
    runs: tuple[Run, ...]
    frame: pd.DataFrame  # one row per run, as the runs are ordered: series, split, seed, metrics, costs
    table: pd.DataFrame  # Collection.frame(), in the same order
    factors: tuple[str, ...]  # that tell series apart; the first is the method
    series: tuple[Series, ...]  # the best first
    splits: tuple[str, ...]  # the most heterogeneous first
    split_title: str
    title: str

    @classmethod
    def of(cls, collection: Collection) -> Study:
        """Name series and splits, and order them. Raises ConfigError where runs are known by their rows in a table only."""
        if collection.known:
            raise ConfigError(
                f"{len(collection.known)} runs are known by their rows in {collection.known[0].table} only: a report draws from "
                "run directories (fedsim ledger reads tables)"
            )
        table = collection.frame()
        by_identity = {run.results.config.identity()[:16]: run for run in collection.runs}
        runs = tuple(by_identity[identity] for identity in table["run"])
        levels = _levels(collection, runs)
        splits, split_factors = _splits(runs, levels)
        factors = _series_factors(levels, split_factors)
        labels = [{f: text(levels[f][i]) for f in factors} for i in range(len(runs))]
        texts = [_series_text(label, factors) or runs[0].results.config.name for label in labels]
        frame = table.drop(columns=[c for c in ("series", "split") if c in table]).assign(series=texts, split=splits)
        order = _best_first(frame, texts)
        by_text = dict(zip(texts, labels, strict=True))
        series = tuple(
            Series(t, by_text[t][factors[0]] if factors else t, _series_text(by_text[t], factors[1:]), by_text[t], rank)
            for rank, t in enumerate(order)
        )
        known = dict.fromkeys(s for _, s in sorted(zip(map(_split_key, runs), splits, strict=True), key=lambda pair: pair[0]))
        return cls(
            collection,
            runs,
            frame,
            table,
            factors,
            series,
            tuple(known),
            _split_title(runs),
            _title(collection),
        )

    def summary(self, metrics: Sequence[str], frame: pd.DataFrame | None = None, by: Sequence[str] = ()) -> pd.DataFrame:
        """series, split, `by`, metric, n, mean, std, low, high, and what is drawn: only what some run has.

        from, to: the 95 % interval, as far as the metric can go; of `FEW` seeds or less their range, NaN of one. Without `by`
        also seed_0, seed_1, …: these few seeds, else NaN.
        """
        import pandas as pd

        of, names = self.frame if frame is None else frame, ("from", "to", *(SEEDS if not by else ()))
        by = ["series", "split", *by]
        if of.empty:
            return pd.DataFrame(columns=[*by, *compare.SUMMARY, *names])
        metrics = [m for m in metrics if m in of]
        long = compare.summary(of, by, metrics)
        columns = {metric: of[metric].to_numpy(dtype=float) for metric in metrics}
        places = compare.settings(of, by).values()
        values = [[v for v in columns[metric][at] if not math.isnan(v)] for at in places for metric in metrics]
        about = long[["metric", "low", "high"]].itertuples(index=False)
        drawn = [_drawn(few, *record) for few, record in zip(values, about, strict=True)]
        long = long.assign(**{name: [row[i] for row in drawn] for i, name in enumerate(names)})
        return long[long["n"] > 0].reset_index(drop=True)

    @cached_property
    def settings(self) -> pd.DataFrame:
        """Every metric of the report of every series on every split."""
        return self.summary([m.name for m in metrics.shown("report")])

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """Those that some run has."""
        have = set(self.settings["metric"])
        return tuple(m for m in metrics.shown("report") if m.name in have)

    @cached_property
    def tasks(self) -> int:
        """Of the longest stream."""
        return max(len(run.results.accuracy) for run in self.runs)

    @cached_property
    def task_names(self) -> tuple[tuple[str, ...], ...]:
        """Of every run; empty where its manifest does not say."""
        known: dict[str, tuple[str, ...]] = {}
        for run in self.runs:
            known.setdefault(run.results.manifest_hash, _task_names(run.results.path))
        return tuple(known[run.results.manifest_hash] for run in self.runs)

    def task_name(self, run: int, task: int) -> str:
        names = self.task_names[run]
        return f"{task}: {names[task]}" if task < len(names) else str(task)

    @cached_property
    def common_tasks(self) -> tuple[str, ...]:
        """Name of each task where all runs agree on it, else its number."""
        at = [
            {self.task_name(i, t) for i, run in enumerate(self.runs) if t < len(run.results.accuracy)} for t in range(self.tasks)
        ]
        return tuple(names.pop() if len(names) == 1 else str(t) for t, names in enumerate(at))

    def _gather(self, rows_of: Callable[[Results], Iterable[Mapping[str, Any]]]) -> pd.DataFrame:
        """Rows of all runs, each with its series and split."""
        import pandas as pd

        gathered = [
            {"series": series, "split": split, **row}
            for run, series, split in zip(self.runs, self.frame["series"], self.frame["split"], strict=True)
            for row in rows_of(run.results)
        ]
        return pd.DataFrame(gathered)


# ---------------------------------------------------------------- charts that compare


def by_task(study: Study) -> pd.DataFrame:
    """Mean accuracy over the tasks seen (A_i of the learning curve), after each task: task, name, n, mean, std, low, high."""

    def rows(results: Results) -> Iterable[Mapping[str, Any]]:
        for i, row in enumerate(results.accuracy):
            yield {"task": i, "accuracy": float(np.mean(row[: i + 1]))}

    frame = study.summary(["accuracy"], study._gather(rows), ["task"])
    return frame.assign(name=[study.common_tasks[t] for t in frame["task"]])


def forgetting_by_task(study: Study) -> pd.DataFrame:
    """Forgetting after each task from the second on, 1/i Σ_{j<i} (max_{j≤l≤i} a[l][j] − a[i][j]): task, name, n, mean, …"""

    def rows(results: Results) -> Iterable[Mapping[str, Any]]:
        for i in range(1, len(results.accuracy)):
            yield {"task": i, "forgetting": metrics.forgetting(results.accuracy[: i + 1, : i + 1])}

    gathered = study._gather(rows)
    if gathered.empty:
        return gathered
    frame = study.summary(["forgetting"], gathered, ["task"])
    return frame.assign(name=[study.common_tasks[t] for t in frame["task"]])


def by_round(study: Study) -> pd.DataFrame:
    """Mean accuracy over the tasks seen, at every evaluation.

    `position` on the axis: task + (round + 1) / (rounds + 1), and task + 1 at a task's end.
    """

    def rows(results: Results) -> Iterable[Mapping[str, Any]]:
        tested: dict[tuple[int, int, str], list[float]] = {}
        for row in of_rounds(results):
            tested.setdefault((row["task"], row["round"], row["stage"]), []).append(row["accuracy"])
        for (task, round, stage), values in tested.items():
            yield _moment(results, task, round, stage) | {"accuracy": float(np.mean(values))}

    frame = study.summary(["accuracy"], study._gather(rows), ["task", "round", "stage", "position"])
    return frame.sort_values(["series", "split", "position"], kind="stable")


def drift(study: Study) -> pd.DataFrame:
    """Measures of `server.drift` at every round: group, measure, position, n, mean, std, low, high."""

    def rows(results: Results) -> Iterable[Mapping[str, Any]]:
        for row in results.drifts:
            values = {name: math.nan if (v := getattr(row, name)) is None else v for name in DRIFT_MEASURES}
            yield _moment(results, row.task, row.round, "round") | {"group": row.group} | values

    gathered = study._gather(rows)
    if gathered.empty:
        return gathered
    frame = study.summary([*DRIFT_MEASURES], gathered, ["group", "task", "round", "position"])
    return frame.rename(columns={"metric": "measure"})


def matrices(study: Study) -> pd.DataFrame:
    """The accuracy matrix, mean over seeds: after (task learned), tested, n, mean, std, low, high."""

    def rows(results: Results) -> Iterable[Mapping[str, Any]]:
        for i, j in zip(*np.tril_indices(len(results.accuracy)), strict=True):
            yield {"after": int(i), "tested": int(j), "accuracy": float(results.accuracy[i, j])}

    frame = study.summary(["accuracy"], study._gather(rows), ["after", "tested"])
    return frame.assign(
        after_name=[study.common_tasks[i] for i in frame["after"]], tested_name=[study.common_tasks[j] for j in frame["tested"]]
    )


def trade_off(study: Study) -> pd.DataFrame:
    """Plasticity (x) against forgetting (y) of every setting with two tasks or more: n, x, x_from, x_to, y, y_from, y_to."""
    return _against(study, "plasticity", "forgetting")


def cost_accuracy(study: Study) -> pd.DataFrame:
    """What a setting costs (x: MB or seconds, by `cost`) and the final average accuracy (y) that it buys, with intervals."""
    import pandas as pd

    frame = study.frame.copy()
    for direction in ("bytes_up", "bytes_down"):
        frame[direction] = frame[direction] / 1e6 if direction in frame else math.nan
    frame["bytes"] = frame["bytes_up"] + frame["bytes_down"]
    parts = [_against(study, cost, HEADLINE, frame).assign(cost=cost) for cost in COSTS]
    kept = [part for part in parts if len(part) and part["x"].max() > 0]
    return pd.concat(kept, ignore_index=True) if kept else pd.DataFrame()


def costs(study: Study) -> pd.DataFrame:
    """Where the bytes and seconds of a run go, mean over seeds: what ("bytes" in MB, "seconds"), direction, kind, amount,
    `place` of the kind in the bar, and `room` that the axis must have.
    """
    import pandas as pd

    figures = pd.DataFrame([cost_figures(run.results) for run in study.runs]).fillna(0.0)
    figures = figures.assign(series=study.frame["series"].to_numpy(), split=study.frame["split"].to_numpy())
    rows: list[dict[str, Any]] = []
    for (series, split), part in figures.groupby(["series", "split"], sort=False):
        for column in figures.columns:
            what, _, kind = column.partition("_")
            if what not in ("bytes", "seconds") or not kind or kind in ("up", "down") or not part[column].mean() > 0:
                continue
            direction, kind = kind.split("_", 1) if what == "bytes" else ("", kind)
            amount = float(part[column].mean()) / (1e6 if what == "bytes" else 1.0)
            row = {"series": series, "split": split, "what": what, "direction": direction}
            rows.append(row | {"kind": kind.replace("_", " "), "amount": amount, "n": len(part)})
    place = {kind: i for i, kind in enumerate(dict.fromkeys(row["kind"] for row in rows))}
    return (
        pd.DataFrame([row | {"place": place[row["kind"]]} for row in rows]).assign(room=_room(rows)) if rows else pd.DataFrame()
    )


def _room(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """How far the axis of the bars must reach, so that a number has its place at the end of the longest one."""
    totals, longest = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    for row in rows:
        totals[row["what"], row["split"], row["series"], row["direction"]] += row["amount"]
    for (what, split, *_), total in totals.items():
        longest[what, split] = max(longest[what, split], total)
    return [1.2 * longest[row["what"], row["split"]] for row in rows]


# ---------------------------------------------------------------- charts of one run


def of_rounds(results: Results) -> list[dict[str, Any]]:
    """One row per test of one run, in the order of time: task, round, stage, position, tested, accuracy (percent)."""
    frame = results.frame()
    columns = zip(*(frame[c].tolist() for c in ("task", "round", "stage", "tested", "accuracy")), strict=True)
    rows = [_moment(results, t, r, stage) | {"tested": j, "accuracy": a} for t, r, stage, j, a in columns if not math.isnan(a)]
    return sorted(rows, key=lambda row: (row["position"], row["tested"]))


def run_rounds(study: Study, run: int) -> pd.DataFrame:
    """Accuracy on every task seen, at every evaluation of one run: position, tested, name, accuracy."""
    import pandas as pd

    rows = of_rounds(study.runs[run].results)
    return pd.DataFrame([row | {"name": study.task_name(run, row["tested"])} for row in rows])


def run_matrices(study: Study, run: int) -> pd.DataFrame:
    """The accuracy matrix of one run, and the one with the task told at test time: judged, after, tested, names, mean."""
    import pandas as pd

    results = study.runs[run].results
    judged = {"task told at test time": results.accuracy_task_incremental}
    if results.config.stream.name != "task_incremental":
        judged = {"among all classes seen": results.accuracy} | judged
    rows = [
        {
            "judged": name,
            "after": int(i),
            "tested": int(j),
            "after_name": study.task_name(run, int(i)),
            "tested_name": study.task_name(run, int(j)),
            "mean": float(matrix[i, j]),
        }
        for name, matrix in judged.items()
        for i, j in zip(*np.tril_indices(len(matrix)), strict=True)
        if not math.isnan(matrix[i, j])
    ]
    return pd.DataFrame(rows)


def bubbles(study: Study, run: int) -> pd.DataFrame:
    """Who has what, of the first 50 clients: task, task_name, column (place of the class), class_name, client, samples."""
    import pandas as pd

    holdings = study.runs[run].results.holdings
    columns = {key: i for i, key in enumerate(sorted({(h.task, h.class_row) for h in holdings}))}
    rows = [
        {
            "task": h.task,
            "task_name": study.task_name(run, h.task),
            "column": columns[h.task, h.class_row],
            "class_name": h.class_name,
            "client": h.client,
            "samples": h.samples,
        }
        for h in holdings
        if h.client < SHOWN_CLIENTS
    ]
    return pd.DataFrame(rows)


def clients(study: Study, run: int) -> pd.DataFrame:
    """One row per client of one run: client, samples (of all tasks), classes, accuracy (of the final model; may be NaN)."""
    import pandas as pd

    results = study.runs[run].results
    samples, classes = Counter[int](), Counter[int]()
    for h in results.holdings:
        samples[h.client] += h.samples
        classes[h.client] += 1
    if not samples:
        return pd.DataFrame()
    ids = range(int(results.config.partition["clients"]))
    columns = {"client": list(ids), "samples": [samples[k] for k in ids], "classes": [classes[k] for k in ids]}
    return pd.DataFrame(columns | {"accuracy": results.client_accuracy})


# ---------------------------------------------------------------- names


def text(level: Label) -> str:
    """A level of a factor as it is shown."""
    if level is None:
        return "–"
    if isinstance(level, bool):
        return str(level).lower()
    return f"{level:g}" if isinstance(level, float) else str(level)


def split_text(results: Results) -> str:
    """ "0.1" for a Dirichlet α, "iid", else the name of the partition with its options."""
    alpha = dirichlet_alpha(results.config)
    if math.isinf(alpha):
        return "iid"
    if not math.isnan(alpha):
        return f"{alpha:g}"
    if results.config.manifest is not None:
        return Path(results.config.manifest).name
    options = {k: v for k, v in results.config.partition.items() if k not in ("name", "clients", "min_samples", "max_draws")}
    return " ".join([str(results.config.partition["name"]), *(f"{k}={text(v)}" for k, v in options.items())])


def _split_key(run: Run) -> tuple[int, float, str]:
    alpha = dirichlet_alpha(run.results.config)
    return (1, 0.0, split_text(run.results)) if math.isnan(alpha) else (0, alpha, "")


def _split_title(runs: Sequence[Run]) -> str:
    known = [not math.isnan(dirichlet_alpha(run.results.config)) for run in runs]
    return "Dirichlet α (smaller: more heterogeneous)" if all(known) else "Split of the data over clients"


def _levels(collection: Collection, runs: Sequence[Run]) -> dict[str, list[Label]]:
    """Factor -> level of every run. Without a sweep, names of configs stand for the keys that vary, if they decide them."""
    if collection.sweep is not None:
        levels = {name: [run.labels.get(name) for run in runs] for name in collection.factors}
    else:
        place = {id(run): i for i, run in enumerate(collection.runs)}
        order = [place[id(run)] for run in runs]
        levels = {name: [collection.varying[name][i] for i in order] for name in collection.factors}
        names: list[Label] = [run.results.config.name for run in runs]
        if len(set(names)) > 1 and all(_decides([names, list(map(_split_key, runs))], column) for column in levels.values()):
            levels = {"preset": names} | {k: v for k, v in levels.items() if not _decides([names], v)}
    return {name: column for name, column in levels.items() if len(set(map(repr, column))) > 1}


def _splits(runs: Sequence[Run], levels: Mapping[str, Sequence[Label]]) -> tuple[list[str], set[str]]:
    """The split of every run, and the factors that say nothing but how heterogeneous it is."""
    splits = [split_text(run.results) for run in runs]
    found: set[str] = set()
    for name, column in levels.items():
        if len(set(splits)) == 1 or not _decides([splits], column):
            continue
        alphas = [dirichlet_alpha(run.results.config) for run in runs]
        same_number = all(level == alpha for level, alpha in zip(column, alphas, strict=True) if math.isfinite(alpha))
        others = [c for other, c in levels.items() if other != name and other not in found]
        crossed = not _decides(others, splits)  # the others alone do not tell the splits apart
        named = any(word in name.lower() for word in SPLIT_WORDS)
        if named or same_number or (crossed and name.lower() not in METHOD_NAMES):
            found.add(name)
    return splits, found


def _series_factors(levels: Mapping[str, Sequence[Label]], split_factors: set[str]) -> tuple[str, ...]:
    """Factors that tell series apart, the method first; without those that follow from others."""
    left = {name: column for name, column in levels.items() if name not in split_factors}

    def importance(name: str) -> tuple[int, int]:
        known = METHOD_NAMES.index(name.lower()) if name.lower() in METHOD_NAMES else len(METHOD_NAMES)
        return known, -len(set(map(repr, left[name])))

    kept: list[str] = []
    for name in [*sorted(left, key=importance)[:1], *left]:
        if name not in kept and not (kept and _decides([left[k] for k in kept], left[name])):
            kept.append(name)
    return tuple(kept)


def _decides(causes: Sequence[Sequence[Any]], column: Sequence[Any]) -> bool:
    """Whether equal causes always come with equal values."""
    keys = list(zip(*causes, strict=True)) if causes else [()] * len(column)
    pairs = {(repr(key), repr(value)) for key, value in zip(keys, column, strict=True)}
    return len(pairs) == len({key for key, _ in pairs})


def _series_text(labels: Mapping[str, str], factors: Sequence[str]) -> str:
    """lorm, lr=0.01: the first factor by its level alone, the others with the last word of their name."""
    parts = []
    for factor in factors:
        if labels[factor] == "–":
            continue
        bare = factor.lower() in METHOD_NAMES
        parts.append(labels[factor] if bare else f"{_short(factor)}={labels[factor]}")
    return ", ".join(parts) or ", ".join(labels[f] for f in factors)


def _short(factor: str) -> str:
    *section, last = factor.split(".")
    return f"{section[-1]}.{last}" if last == "name" and section else last


def _best_first(frame: pd.DataFrame, texts: Sequence[str]) -> list[str]:
    """Series by the mean over splits of their mean accuracy; undefined ones come last."""
    order = dict.fromkeys(texts)
    score = frame.groupby(["series", "split"])[HEADLINE].mean().groupby("series").mean()
    return sorted(order, key=lambda t: -math.inf if math.isnan(score[t]) else score[t], reverse=True)


def _drawn(values: Sequence[float], metric: str, low: float, high: float) -> tuple[float, ...]:
    """from, to, seed_0, … of one setting."""
    if len(values) <= FEW:
        ends = (min(values), max(values)) if len(values) > 1 else (math.nan, math.nan)
        return (*ends, *values, *[math.nan] * (FEW - len(values)))
    return (*metrics.of(metric).cut(low, high), *[math.nan] * FEW)


def _title(collection: Collection) -> str:
    """The name of the study: of the sweep, of the config that all runs share, of the folder; else how many runs there are."""
    names = {run.results.config.name for run in collection.runs}
    if collection.sweep is not None:
        return collection.sweep.name
    return names.pop() if len(names) == 1 else collection.folder or f"{len(collection.runs)} runs"


def _task_names(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        return tuple(str(task["name"]) for task in json.loads((path / "manifest.json").read_text(encoding="utf-8"))["tasks"])
    except (OSError, ValueError, KeyError, TypeError):  # names are a comfort
        return ()


def _moment(results: Results, task: int, round: int, stage: str) -> dict[str, Any]:
    rounds = results.config.server.rounds
    position = task + 1.0 if stage == "task_end" else task + (round + 1) / (rounds + 1)
    return {"task": task, "round": round, "stage": stage, "position": position}


def _against(study: Study, x: str, y: str, frame: pd.DataFrame | None = None) -> pd.DataFrame:
    """Two metrics side by side, of the settings that have both."""
    import pandas as pd

    long = study.summary([x, y], frame)
    rows = []
    for (series, split), part in long.groupby(["series", "split"], sort=False):
        values = {record["metric"]: record for record in part.to_dict("records")}
        if x in values and y in values:
            row = {"series": series, "split": split, "n": values[y]["n"]}
            for axis, metric in (("x", x), ("y", y)):
                row |= {axis: values[metric]["mean"]}
                row |= {f"{axis}_{end}": values[metric][end] for end in ("from", "to")}
            rows.append(row)
    return pd.DataFrame(rows)
