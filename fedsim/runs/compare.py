"""Settings against each other: means over seeds with intervals, paired differences, gaps to a joint run.

Pure functions on the tidy frame of `fedsim.runs.collection`: one row per run. A *setting* is one combination of levels of the
factors `by`; its runs differ in the seed. A value that a run does not have (NaN) is left out and lowers n, which every
table shows.

    from fedsim.runs import compare
    from fedsim.runs.collection import collect
    collection = collect(["runs/heterogeneity"])
    frame, by = collection.frame(), list(collection.factors)
    compare.summary(frame, by, ["final_average_accuracy"])
    compare.paired(frame, by, {"method": "fedavg"}, ["final_average_accuracy"])

`fedsim.runs.tables` makes Markdown and LaTeX of a summary.

Which test, and why. Runs of two settings with the same split and the same seed share most of what makes runs differ, so their
differences d_i vary less than the runs do. With 3 to 10 seeds the paired t-test on d_i is the headline: sign-flip and Wilcoxon
tests, which assume less, cannot give a two-sided p below 2/2^n, that is 0.25 for 3 seeds and 0.0625 for 5, so they can never
reach 0.05 below 6 seeds, whatever the data. The price: the t-test assumes that the d_i are independent draws of a normal
distribution, which so few seeds cannot confirm. The exact sign-flip p stands beside it as a check that needs only symmetry.
Where several settings are compared with the baseline, Holm's correction (1979) keeps the chance of any false claim at the level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim.core import plugins
from fedsim.core.errors import ConfigError, did_you_mean
from fedsim.runs.collection import Collection
from fedsim.runs.known import Label
from fedsim.runs.metrics import GAP, HEADLINE, INTRANSIGENCE, MICRO, accuracy
from fedsim.runs.metrics import of as metric_of
from fedsim.runs.results import Results

if TYPE_CHECKING:
    import pandas as pd

FloatArray = NDArray[np.float64]
Setting = tuple[Label, ...]  # levels in the order of the factors

CONFIDENCE = 0.95  # of the intervals
MOST_FLIPS = 16  # pairs; 2^16 assignments are looked at
SUMMARY = ("metric", "n", "mean", "std", "low", "high")
PAIRED = (
    *("metric", "n", "unpaired", "difference", "std", "low", "high"),
    *("p", "p_holm", "p_sign_flip", "p_sign_flip_floor", "wins", "ties", "d_z"),
)


def summary(frame: pd.DataFrame, by: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """Mean over runs, their spread and the 95 % interval of the mean, per setting and metric.

    Columns: the factors `by`, metric, n (runs that have the metric), mean, std (ddof 1), low, high = mean ∓ t · std / √n with
    Student's t at n−1 degrees of freedom. std, low and high are NaN for one run, mean too for none.
    Rows: settings in the order of the frame, and in each the metrics as given.
    """
    plugins.require("scipy", "statistics over runs", "report")
    import pandas as pd

    rows = []
    for setting, places in settings(frame, by).items():
        for metric in metrics:
            values = _known(_column(frame, metric)[places])
            rows.append((*setting, metric, len(values), *_moments(values)))
    return pd.DataFrame(rows, columns=[*by, *SUMMARY])


def pivot(long: pd.DataFrame, rows: str, value: str = "mean") -> pd.DataFrame:
    """What `summary` or `paired` gives, as a matrix of one of its columns: levels of the factor `rows` down; the levels of the
    other factors and the metric across. Both in the order in which they come; NaN where there is no such setting."""
    import pandas as pd

    others = [name for name in long.columns[: list(long.columns).index("metric")] if name != rows]
    down, across = settings(long, [rows]), settings(long, [*others, "metric"])
    matrix = np.full((len(down), len(across)), np.nan)
    for i, places in enumerate(down.values()):
        for j, same in enumerate(across.values()):
            for place in set(places) & set(same):
                matrix[i, j] = long[value].iloc[place]
    columns = pd.MultiIndex.from_tuples(list(across), names=[*others, "metric"])
    return pd.DataFrame(matrix, index=pd.Index([setting[0] for setting in down], name=rows), columns=columns)


def paired(frame: pd.DataFrame, by: Sequence[str], baseline: Mapping[str, Label], metrics: Sequence[str]) -> pd.DataFrame:
    """Every setting against the baseline setting, run by run: d_i = metric(setting) − metric(baseline), same split, same seed.

    baseline: levels of some factors, e.g. {"method": "fedavg"}: a setting is compared with the setting of these levels that
    shares all its other factors (lorm at α = 0.1 with fedavg at α = 0.1); a key that one of the two does not have (None)
    does not tell them apart. Settings of the baseline itself have no row. A setting that could belong to several (joint training,
    to which no α applies, beside fedavg at two of them) is in no pair.

    Columns, after the factors of the setting:
    metric; n: pairs in which both runs have the metric; unpaired: runs of either setting that are in no pair;
    difference: mean of d; std (ddof 1); low, high: 95 % interval by Student's t, n−1 degrees of freedom;
    p: paired t-test, two-sided; p_holm: Holm's over all p of the metric in this table;
    p_sign_flip: exact, two-sided: share of the 2^n choices of signs for which |Σ ± d_i| is at least |Σ d_i|, NaN beyond 16 pairs;
    p_sign_flip_floor: 2/2^n, which it cannot go below;
    wins, ties: pairs in which the setting is better (see `fedsim.runs.metrics`), and equal; NaN where neither side is better;
    d_z: Cohen's, difference / std.
    Where all d_i are equal, up to rounding, nothing estimates their spread: p, p_holm and d_z are NaN. So they are for n < 2.

    Raises ConfigError for an unknown factor or level, a baseline that is ambiguous for every setting, a setting that holds a
    split and seed twice.
    """
    plugins.require("scipy", "statistics over runs", "report")
    import pandas as pd

    baseline = known_baseline(frame, by, baseline)
    found = settings(frame, by)
    rows = []
    for setting, reference in _references(by, baseline, found).items():
        places = found[setting]
        for metric in metrics:
            a, b, unpaired = _pairs(frame, by, metric, places, [] if reference is None else found[reference])
            rows.append((*setting, metric, len(a), unpaired, *_differences(a, b, metric_of(metric).sign)))
    table = pd.DataFrame(rows, columns=[*by, *(c for c in PAIRED if c != "p_holm")])
    adjusted = np.full(len(table), np.nan)
    for metric in metrics:
        of_metric = (table["metric"] == metric).to_numpy()
        adjusted[of_metric] = holm(_column(table, "p")[of_metric])
    return table.assign(p_holm=adjusted)[[*by, *PAIRED]]


def known_baseline(frame: pd.DataFrame, by: Sequence[str], baseline: Mapping[str, Label]) -> dict[str, Label]:
    """The baseline with its levels as the frame has them: "0.1" stands for 0.1. Raises ConfigError for what is not there."""
    if not baseline:
        raise ConfigError(
            f"the baseline names no factor: choose a level of {', '.join(by) or 'nothing, all runs are one setting'}"
        )
    out: dict[str, Label] = {}
    for name, wanted in baseline.items():
        if name not in by:
            raise ConfigError(f"baseline: '{name}' is no factor of these runs.{did_you_mean(name, by)}")
        levels = {label(level): level for (level,) in settings(frame, [name])}
        if label(wanted) not in levels:
            raise ConfigError(f"baseline: no run has {name}={label(wanted)}.{did_you_mean(label(wanted), levels)}")
        out[name] = levels[label(wanted)]
    return out


def unequal_seeds(frame: pd.DataFrame, by: Sequence[str]) -> dict[Setting, list[int]]:
    """Setting -> the seeds that it lacks and another setting has; empty when all settings have the same seeds."""
    seeds = frame["seed"].tolist()
    everywhere = sorted(set(seeds))
    have = {setting: {seeds[i] for i in places} for setting, places in settings(frame, by).items()}
    return {setting: [s for s in everywhere if s not in own] for setting, own in have.items() if len(own) < len(everywhere)}


def holm(p: FloatArray) -> FloatArray:
    """Holm's step-down p: max over j ≤ i of min(1, (m − j) p_(j)) for p_(0) ≤ p_(1) ≤ …, m of them. NaN stays."""
    out = np.full(len(p), np.nan)
    order = np.argsort(p, kind="stable")[: len(_known(p))]
    out[order] = np.maximum.accumulate(np.minimum(1.0, p[order] * np.arange(len(order), 0, -1)))
    return out


def sign_flip(d: FloatArray) -> float:
    """Exact two-sided p of H0 "d is symmetric around 0": share of all 2^n sign patterns s with |Σ s_i d_i| ≥ |Σ d_i|.

    NaN for no pairs and beyond `MOST_FLIPS`.
    """
    n = len(d)
    if not 1 <= n <= MOST_FLIPS:
        return math.nan
    signs = 1.0 - 2.0 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    sums = np.abs(signs @ d)
    return float(np.mean(sums >= sums[0] - 1e-9 * np.abs(d).sum()))  # a tie is a tie, however it was rounded


def gap_to_joint(collection: Collection, joint: Collection) -> pd.DataFrame:
    """The collection's frame with two more columns, in points, that hold every run against a joint run: one that learned all data
    at once. The joint run is the one of the same seed, else the mean over joint runs is taken.

    gap_to_joint: see `gap`
    intransigence: see there; NaN where it cannot be known
    Both are NaN where no joint run was tested on the same samples: the same `data` section, as many test samples of every class.
    A run that is known by its row has what its table says. Raises ConfigError when two joint runs would do for the same seed.
    """
    runs = {run.results.config.identity()[:16]: run.results for run in collection.runs}
    frame = collection.frame()
    gaps, missed = [], []
    told = {run.run: run.metrics for run in collection.known}
    for name in frame["run"].tolist():
        if name in told:
            gaps.append(_number(told[name].get(GAP)))
            missed.append(_number(told[name].get(INTRANSIGENCE)))
            continue
        run = runs[name]
        fit = _of_seed(run, [one.results for one in joint.runs if same_tests(run, one.results)])
        gaps.append(_mean([gap(run, one) for one in fit]))
        missed.append(_mean([intransigence(run, one) for one in fit]))
    return frame.assign(**{GAP: gaps, INTRANSIGENCE: missed})


def gap(run: Results, joint: Results) -> float:
    """joint_accuracy − final_average_accuracy in points, both over the run's tasks; where joint_accuracy is not known, the final
    accuracy over all test samples of the one less that of the other. NaN where the two were tested on other samples."""
    if not same_tests(run, joint):
        return math.nan
    over_tasks = joint_accuracy(run, joint) - _number(run.metrics[HEADLINE])
    over_samples = _number(joint.metrics[MICRO]) - _number(run.metrics[MICRO])
    return over_samples if math.isnan(over_tasks) else over_tasks


def intransigence(run: Results, joint: Results) -> float:
    """1/T Σ_j (a_joint[j] − a[j][j]) in points: how much less of a task was learned when it came than a joint run knows of it.

    a_joint[j]: the joint run's final accuracy on the test samples of the classes of task j, whatever its own tasks were.
    NaN unless the stream is class_incremental (else classes come back, or the task is told) and the classes, known by their
    names, are the same with as many test samples.
    """
    if run.config.stream.name != "class_incremental":
        return math.nan
    known_T = _by_task(run, joint)
    return math.nan if known_T is None else float(np.mean(known_T - np.diag(run.accuracy)))


def joint_accuracy(run: Results, joint: Results) -> float:
    """1/T Σ_j a_joint[j] in percent: the joint run's final accuracy, where every task of the run counts the same.

    Where tasks do not bring classes of their own (domains come one after the other), or classes are not told apart by their
    names, it is known only if all tasks have as many test samples. NaN where it is not known, and where the joint run was tested
    on other samples.
    """
    if not same_tests(run, joint):
        return math.nan
    known_T = _by_task(run, joint) if run.config.stream.name == "class_incremental" else None
    if known_T is not None:
        return float(np.mean(known_T))
    return _number(joint.metrics[MICRO]) if len(set(run.counts.total[-1].tolist())) == 1 else math.nan


def _by_task(run: Results, joint: Results) -> FloatArray | None:
    """(T,) the joint run's final accuracy on the test samples of the classes of every task of the run, in percent. None unless
    the classes, known by their names, are the same with as many test samples."""
    ours, theirs = final_counts(run), final_counts(joint)
    if not same_tests(run, joint) or len({c.name for c in ours}) < len(ours):
        return None
    of_name = {c.name: c for c in theirs}
    correct_T, total_T = np.zeros(len(run.accuracy)), np.zeros(len(run.accuracy))
    for c in ours:
        correct_T[c.task] += of_name[c.name].correct
        total_T[c.task] += c.total
    return accuracy(correct_T, total_T)


@dataclass(frozen=True)
class ClassCount:
    """Of one class after the last task; `task` is the one that brought it."""

    name: str
    task: int
    correct: int
    total: int


def final_counts(results: Results) -> list[ClassCount]:
    """Every class after the last task. A class that no client holds goes by its row of the head."""
    ends = [c for c in results.classes if c.stage == "task_end"]
    last = max((c.task for c in ends), default=-1)
    brought: dict[int, int] = {}
    for c in ends:
        brought[c.class_row] = min(c.task, brought.get(c.class_row, c.task))
    names = {h.class_row: h.class_name for h in results.holdings}
    return [
        ClassCount(names.get(c.class_row, f"row {c.class_row}"), brought[c.class_row], c.correct, c.total)
        for c in ends
        if c.task == last
    ]


def same_tests(run: Results, joint: Results) -> bool:
    """Whether both were tested on the same samples: the same `data` section, as many test samples of every class."""
    ours, theirs = (sorted((c.name, c.total) for c in final_counts(r)) for r in (run, joint))
    return run.config.data == joint.config.data and ours == theirs


def _of_seed(run: Results, joint: Sequence[Results]) -> list[Results]:
    """The joint run of the same seed, else all of them."""
    seeds = [one.config.seed for one in joint]
    twice = [seed for seed in seeds if seeds.count(seed) > 1]
    if twice:
        raise ConfigError(
            f"several joint runs of seed {twice[0]} could be the reference: name a folder with those of one setting"
        )
    return [one for one in joint if one.config.seed == run.config.seed] or list(joint)


def label(level: Label) -> str:
    """A level as text: 0.1, 3, lorm; whole floats without .0, a key that is not there as –."""
    if level is None:
        return "–"
    return str(int(level)) if isinstance(level, float) and level.is_integer() else str(level)


def describe(by: Sequence[str], setting: Setting) -> str:
    """method=lorm alpha=0.1, without the keys that are not there."""
    return " ".join(f"{name}={label(level)}" for name, level in zip(by, setting, strict=True) if level is not None)


def settings(frame: pd.DataFrame, by: Sequence[str]) -> dict[Setting, list[int]]:
    """Setting -> positions of its rows, in the order of the frame. A level that is not there is None."""
    columns = [frame[name].tolist() for name in by]
    found: dict[Setting, list[int]] = {}
    for i in range(len(frame)):
        found.setdefault(tuple(_level(column[i]) for column in columns), []).append(i)
    return found


def _level(value: Any) -> Label:
    """pandas turns None into NaN among numbers."""
    level: Label = None if isinstance(value, float) and math.isnan(value) else value
    return level


def _column(frame: pd.DataFrame, metric: str) -> FloatArray:
    values: FloatArray = frame[metric].to_numpy(dtype=np.float64)
    return values


def _known(values: FloatArray) -> FloatArray:
    return values[~np.isnan(values)]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _moments(values: FloatArray) -> tuple[float, float, float, float]:
    """mean, std, low, high"""
    from scipy import stats

    n = len(values)
    if n < 2:
        return (float(values[0]) if n else math.nan, math.nan, math.nan, math.nan)
    mean, std = float(values.mean()), float(values.std(ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std / math.sqrt(n)
    return mean, std, mean - half, mean + half


def _is(setting: Setting, by: Sequence[str], levels: Mapping[str, Label]) -> bool:
    return all(setting[by.index(name)] == level for name, level in levels.items())


def _references(
    by: Sequence[str], baseline: Mapping[str, Label], found: Mapping[Setting, Sequence[int]]
) -> dict[Setting, Setting | None]:
    """Of every other setting the baseline setting it is compared with; None without one or with several. Raises ConfigError where
    several is all there is."""
    near = {setting: _near(setting, by, baseline, found) for setting in found if not _is(setting, by, baseline)}
    doubtful = {setting: several for setting, several in near.items() if len(several) > 1}
    if doubtful and not any(len(one) == 1 for one in near.values()):
        setting, several = next(iter(doubtful.items()))
        differ = next(n for i, n in enumerate(by) if n not in baseline and len({s[i] for s in several}) > 1)
        raise ConfigError(f"baseline: {len(several)} settings could be that of {describe(by, setting)}: choose a {differ}, too")
    return {setting: some[0] if len(some) == 1 else None for setting, some in near.items()}


def _near(
    setting: Setting, by: Sequence[str], baseline: Mapping[str, Label], found: Mapping[Setting, Sequence[int]]
) -> list[Setting]:
    """The baseline setting with the same other factors; without one, those that differ in no key that both have."""
    exact = tuple(baseline.get(name, level) for name, level in zip(by, setting, strict=True))
    if exact in found:
        return [exact]
    others = [i for i, name in enumerate(by) if name not in baseline]
    return [s for s in found if _is(s, by, baseline) and all(s[i] == setting[i] or None in (s[i], setting[i]) for i in others)]


def _pairs(
    frame: pd.DataFrame, by: Sequence[str], metric: str, ours: Sequence[int], theirs: Sequence[int]
) -> tuple[FloatArray, FloatArray, int]:
    """The metric in both runs of every pair, and the number of runs that are in none."""
    a, b = (_of_split(frame, by, metric, places) for places in (ours, theirs))
    both = [key for key in a if key in b]
    unpaired = len(ours) + len(theirs) - 2 * len(both)
    return np.array([a[key] for key in both]), np.array([b[key] for key in both]), unpaired


def _of_split(frame: pd.DataFrame, by: Sequence[str], metric: str, places: Sequence[int]) -> dict[tuple[str, int], float]:
    """(split, seed) -> value, of the runs that have one."""
    out: dict[tuple[str, int], float] = {}
    splits, seeds, values = frame["partition_hash"].tolist(), frame["seed"].tolist(), _column(frame, metric)
    seen = set()
    for i in places:
        key = (str(splits[i]), int(seeds[i]))
        if key in seen:
            setting = next(s for s, rows in settings(frame, by).items() if i in rows)
            raise ConfigError(
                f"{describe(by, setting) or 'the one setting'} holds two runs of seed {key[1]} on the same split: "
                "compare by the key that tells them apart, too"
            )
        seen.add(key)
        if not math.isnan(values[i]):
            out[key] = float(values[i])
    return out


def _differences(a: FloatArray, b: FloatArray, better: int) -> tuple[float, ...]:
    """Everything of `PAIRED` from difference on, but p_holm, which needs the other comparisons."""
    from scipy import stats

    n = len(a)
    rounding = 1e-12 * float(np.abs([a, b]).max(initial=0))
    d = np.where(np.abs(a - b) > rounding, a - b, 0.0)
    mean, std, low, high = _moments(d)
    spread = n > 1 and std > rounding  # without one there is nothing that a test could rest on
    p = 2 * float(stats.t.sf(abs(mean) / (std / math.sqrt(n)), n - 1)) if spread else math.nan
    floor = 2.0 / 2**n if 1 <= n <= MOST_FLIPS else math.nan
    wins = float(np.sum(better * d > 0)) if better else math.nan
    return mean, std, low, high, p, sign_flip(d), floor, wins, float(np.sum(d == 0)), mean / std if spread else math.nan
