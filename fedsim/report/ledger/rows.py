"""What a ledger counts: means over seeds, differences run by run, and what a stream can tell at all.

A *setting* is one method on one split of one stream; its runs differ in the seed.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from fedsim.report.ledger.methods import Method, known
from fedsim.report.ledger.study import ANY, METHOD, SPLIT, Stream, Study
from fedsim.runs import compare
from fedsim.runs.bounds import Bounds
from fedsim.runs.metrics import HEADLINE, MICRO, TOLD, unequal

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (  # of the table, as far as a stream has them
    HEADLINE,
    "average_incremental_accuracy",
    "forgetting",
    f"{HEADLINE}{TOLD}",
    "client_accuracy_min",
    "bytes_up",
    "bytes_down",
    "stored_mean",
    "seconds",
    "peak_memory",
)
CHANCE, JOINT = "chance", "joint"
PROCESSOR = "processor_seconds"


class Mean(NamedTuple):
    """Over the seeds of a setting, in the metric's own unit; low to high: the 95 % interval of the mean."""

    n: int
    mean: float
    std: float
    low: float
    high: float


class Difference(NamedTuple):
    """From a baseline, in points, mean over pairs of the same split and seed, with its 95 % interval and Holm's p."""

    n: int
    mean: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Setting:
    """A method on a split of a stream. means: column -> mean; differences: baseline -> difference; curve: mean over the tasks
    seen after each task; final: accuracy on each task after the last."""

    stream: str
    split: str
    method: str
    seeds: int
    means: Mapping[str, Mean]
    differences: Mapping[str, Difference]
    curve: Sequence[Mean]
    final: Sequence[Mean]


@dataclass(frozen=True)
class Ledger:
    """All that the page shows. splits: of every stream, the most heterogeneous first; bounds and agreement (see `agreement`): by
    stream and split."""

    study: Study
    methods: Sequence[Method]
    settings: Sequence[Setting]
    splits: Mapping[str, Sequence[str]]
    bounds: Mapping[tuple[str, str], Bounds]
    agreement: Mapping[tuple[str, str], float]
    columns: Sequence[str]
    runs: int

    @classmethod
    def of(cls, study: Study) -> Ledger:
        """Count. Raises ConfigError where a method ran twice with the same split and seed."""
        settings = [setting for stream in study.streams for setting in _settings(stream, study.baselines)]
        columns = [c for c in COLUMNS if any(setting.means[c].n for setting in settings)]
        names = sorted({setting.method for setting in settings})
        splits = {stream.name: _splits(stream) for stream in study.streams}
        places = [(stream, split) for stream in study.streams for split in splits[stream.name]]
        return cls(
            study,
            [known(name, study) for name in names],
            settings,
            splits,
            {(stream.name, split): _bounds(stream, split, study.bounds) for stream, split in places},
            {(stream.name, split): agreement(_of_split(stream, split)) for stream, split in places},
            columns,
            _distinct(study.streams),
        )

    def usual(self, stream: str) -> str:
        """The split on which most methods were run; the most heterogeneous of equals."""
        return max(self.splits[stream], key=lambda split: len(self.shown(stream, split)))

    def shown(self, stream: str, split: str) -> list[Setting]:
        """The settings of a split, and those to which no split applies; the best first."""
        found = [s for s in self.settings if s.stream == stream and s.split in (split, ANY)]
        return sorted(found, key=lambda s: -math.inf if math.isnan(m := s.means[HEADLINE].mean) else m, reverse=True)


def agreement(frame: pd.DataFrame) -> float:
    """How far two seeds put methods in the same order: Kendall's τ_b of final average accuracy over the methods that both seeds
    have, mean over all pairs of seeds; 1: the same order, 0: none. NaN where no two seeds have two methods that differ."""
    known = [tau for tau in agreements(frame) if not math.isnan(tau)]
    return sum(known) / len(known) if known else math.nan


def agreements(frame: pd.DataFrame) -> list[float]:
    """The same τ of every pair of seeds."""
    from scipy import stats

    scores = frame.pivot_table(index=METHOD, columns="seed", values=HEADLINE)
    found = []
    for one, other in itertools.combinations(scores.columns, 2):
        both = scores[[one, other]].dropna()
        if len(both) > 1:
            found.append(float(stats.kendalltau(both[one], both[other]).statistic))
    return found


def _distinct(streams: Sequence[Stream]) -> int:
    """How many runs there are: one that stands in several tables counts once."""
    known = {run for stream in streams if "run" in stream.frame for run in stream.frame["run"]}
    return len(known) + sum(len(stream.frame) for stream in streams if "run" not in stream.frame)


def processors(frame: pd.DataFrame) -> Counter[str]:
    """How many runs each made, "" where a run does not say."""
    return Counter(frame["processor"].fillna("").astype(str) if "processor" in frame else [""] * len(frame))


def _of_split(stream: Stream, split: str) -> pd.DataFrame:
    """With the runs to which no split applies."""
    return stream.frame[stream.frame[SPLIT].isin((split, ANY))]


def _splits(stream: Stream) -> list[str]:
    """By α; what is no number comes after."""

    def place(split: str) -> tuple[float, str]:
        try:
            return float(split), split
        except ValueError:
            return math.inf, split

    found = sorted(set(stream.frame[SPLIT]), key=place)
    return [split for split in found if split != ANY] or found


def _settings(stream: Stream, baselines: Sequence[str]) -> Iterator[Setting]:
    frame = stream.frame.assign(**{c: math.nan for c in COLUMNS if c not in stream.frame})
    if PROCESSOR in frame and bool((frame.groupby([METHOD, SPLIT])[PROCESSOR].count() > 0).all()):
        frame["seconds"] = frame[PROCESSOR]  # which other work on the machine does not change; of runs that counted them
    parts = {kind: _numbered(frame, kind) for kind in ("learning_curve_", "final_accuracy_")}
    by = [METHOD, SPLIT]
    summed = compare.summary(frame, by, [*COLUMNS, *(c for columns in parts.values() for c in columns)])
    means: dict[tuple[str, str], dict[str, Mean]] = {}
    for row in _records(summed):
        means.setdefault((row[METHOD], row[SPLIT]), {})[row["metric"]] = Mean(*(row[name] for name in Mean._fields))
    against = {baseline: _differences(frame, by, baseline) for baseline in baselines if (frame[METHOD] == baseline).any()}
    for (method, split), places in compare.settings(frame, by).items():
        found = means[str(method), str(split)]
        differences = {b: table[method, split] for b, table in against.items() if (method, split) in table}
        curve, final = ([found[c] for c in columns if found[c].n] for columns in parts.values())
        yield Setting(stream.name, str(split), str(method), len(places), found, differences, curve, final)


def _numbered(frame: pd.DataFrame, start: str) -> list[str]:
    """Columns of a kind that some run has, in the order of their numbers."""
    found = [c for c in frame.columns if str(c).startswith(start) and str(c).removeprefix(start).isdigit()]
    return sorted(map(str, found), key=lambda c: int(c.removeprefix(start)))


def _differences(frame: pd.DataFrame, by: Sequence[str], baseline: str) -> dict[tuple[Any, Any], Difference]:
    table = compare.paired(frame, by, {METHOD: baseline}, [HEADLINE])
    columns = ("n", "difference", "low", "high", "p_holm")
    return {(row[METHOD], row[SPLIT]): Difference(*(row[c] for c in columns)) for row in _records(table[table["n"] > 0])}


def _records(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for record in frame.to_dict("records"):
        yield {str(column): value for column, value in record.items()}


def _bounds(stream: Stream, split: str, methods: Mapping[str, str]) -> Bounds:
    """Of a joint run a table knows the accuracy over all test samples: where that is another average than over the tasks, the
    nearest class mean is held against it in the same."""
    frame = _of_split(stream, split)
    federated = frame[frame[METHOD] != methods.get(JOINT)]
    scores = {name: frame.loc[frame[METHOD] == method, HEADLINE].mean() for name, method in methods.items()}
    if JOINT in scores and MICRO in frame and unequal(zip(federated[HEADLINE], federated[MICRO], strict=True)):
        del scores[JOINT]
        micro = {name: frame.loc[frame[METHOD] == method, MICRO].mean() for name, method in methods.items()}
        scores |= {f"{name}_micro": micro[name] for name in ("ncm", JOINT) if name in micro}
    known = {name: float(score) for name, score in scores.items() if not math.isnan(score)}
    chance = federated[CHANCE].mean() if CHANCE in frame else math.nan
    return Bounds(float(chance), **known)
