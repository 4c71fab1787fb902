"""ONE table of metrics: what a number of a run is called, how it is read, and how it is computed.

`METRICS` is read by results, comparisons, tables, the report, the trackers and the commands: a record that is added to it,
here or by a script, is computed and shown by all of them. Everything is float64, accuracies are percent.

Counts stay raw until here: a percentage that was rounded first moves the forgetting. All matrices are (T, T): row i is
the model after the end of task i, column j the test samples of task j; `total` 0 means that it was not tested.
Definitions of forgetting follow Chaudhry et al. 2018 ("Riemannian walk for incremental learning") with the last row in the
maximum, and fed-mammoth's diagonal form; backward transfer follows Lopez-Paz & Ranzato 2017 ("Gradient episodic memory").
"""

# T tasks; i task trained, j task tested; K clients, C classes, H holdings

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
CountArray = NDArray[np.int64]
Place = Literal["run", "results", "report", "page"]
Need = Literal["a task", "two tasks", "clients", "a joint run", "costs", "nothing"]
Value: TypeAlias = float | Mapping[str, float] | None

TOLD = "_task_incremental"  # ends the name of a metric that is computed with the task told at test time
HEADLINE = "final_average_accuracy"  # orders methods, stands in progress lines
MICRO = f"{HEADLINE}_micro"  # the same over all test samples: what a joint run, which has one task, can be held against
GAP, INTRANSIGENCE = "gap_to_joint", "intransigence"
EVERYWHERE: tuple[Place, ...] = ("run", "results", "report", "page")


def _no_matrix() -> CountArray:
    return np.zeros((0, 0), dtype=np.int64)


def _nobody() -> FloatArray:
    return np.zeros(0)


@dataclass(frozen=True, eq=False)
class Counts:
    """What the metrics of a run are computed from.

    correct, in_task, total: (T, T) counts at the tasks' ends; correct is the argmax over the classes seen, in_task the one inside
    the tested task's own classes. predicted: after the last task, per class (predictions that fall on it, whether that task
    brought it). clients: (K,) percent of the final model at every client, NaN where there is none. drifts: measure of
    `server.drift` -> group of tensors -> its values, one a round.
    """

    correct: CountArray = field(default_factory=_no_matrix)
    in_task: CountArray = field(default_factory=_no_matrix)
    total: CountArray = field(default_factory=_no_matrix)
    predicted: Sequence[tuple[int, bool]] = ()
    clients: FloatArray = field(default_factory=_nobody)
    drifts: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)

    @cached_property
    def accuracy(self) -> FloatArray:
        """(T, T) percent, NaN where nothing was tested."""
        return accuracy(self.correct, self.total)

    @cached_property
    def known_clients(self) -> FloatArray:
        """The clients' accuracies, from the lowest to the highest, of those that have one."""
        return np.sort(self.clients[~np.isnan(self.clients)])

    @cached_property
    def told(self) -> Counts:
        """The same with the task told at test time."""
        return replace(self, correct=self.in_task)

    def meet(self, need: Need) -> bool:
        """Whether a metric with this need is defined. Of tasks: that many were learned, and each was tested when it should."""
        tasks = len(self.total)
        tested = tasks > 0 and bool((self.total[np.tril_indices(tasks)] > 0).all())
        return {"a task": tested, "two tasks": tested and tasks > 1, "clients": len(self.known_clients) > 0}.get(need, True)


@dataclass(frozen=True)
class Metric:
    """One number of a run, and how it is called and read.

    name: its column and key. title: its head in charts and on pages. short: the field's abbreviation, which tables use.
    alias: another name that commands take. unit: "%", "MB" or none; scale: how much of the number one unit is.
    better: "higher", "lower", or "none" where it describes and is not judged. least, most: of what it can be; intervals are cut.
    needs: what must be there, else it is None. compute: its value from the counts, None where it is undefined, or part -> value,
    which become `<name>_<part>`; None: it comes from elsewhere (costs; a joint run, see `compare.gap_to_joint`).
    parts: whether columns `<name>_<part>` belong to it. shown: "run": in what `fedsim run` prints, and trackers compare runs by
    it; "results": in `fedsim results` unless others are asked for; "report": in the report's charts; "page": in its table.
    told: where its variant with the task told at test time is shown; None: there is no such variant. variant_of: the metric of
    which this is that variant.
    """

    name: str
    title: str
    compute: Callable[[Counts], Value] | None = None
    better: Literal["higher", "lower", "none"] = "none"
    needs: Need = "nothing"
    short: str = ""
    alias: str = ""
    unit: str = "%"
    scale: float = 1.0
    least: float = 0.0
    most: float = 100.0
    parts: bool = False
    shown: tuple[Place, ...] = ()
    told: tuple[Place, ...] | None = None
    variant_of: str = ""

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is, 0 where neither can be said."""
        return {"higher": 1, "lower": -1, "none": 0}[self.better]

    @property
    def axis(self) -> str:
        """The title with its unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def cut(self, low: float, high: float) -> tuple[float, float]:
        """An interval of means as it is shown: as far as the metric can go. Student's t knows of no end."""
        return max(low, self.least), min(high, self.most)

    def cut_difference(self, low: float, high: float) -> tuple[float, float]:
        """An interval of differences as it is shown: as far as two values can lie apart."""
        return max(low, self.least - self.most), min(high, self.most - self.least)

    def value(self, counts: Counts) -> Value:
        """Computed, None where it is undefined."""
        return self.compute(counts) if self.compute is not None and counts.meet(self.needs) else None


def accuracy(correct_TT: ArrayLike, total_TT: ArrayLike) -> FloatArray:
    """a[i][j] = 100 · correct / total in percent, NaN where nothing was tested."""
    correct, total = np.asarray(correct_TT, dtype=np.float64), np.asarray(total_TT, dtype=np.float64)
    percent: FloatArray = np.divide(100.0 * correct, total, out=np.full(correct.shape, np.nan), where=total > 0)
    return percent


def final_average_accuracy(a_TT: FloatArray) -> float:
    """1/T Σ_j a[T−1][j]: every task counts the same (macro)."""
    return float(a_TT[-1].mean())


def final_average_accuracy_micro(correct_TT: ArrayLike, total_TT: ArrayLike) -> float:
    """100 · Σ_j correct[T−1][j] / Σ_j total[T−1][j]: every test sample counts the same."""
    correct, total = np.asarray(correct_TT, dtype=np.float64), np.asarray(total_TT, dtype=np.float64)
    return float(100.0 * correct[-1].sum() / total[-1].sum())


def unequal(pairs: Iterable[tuple[float | None, float | None]]) -> bool:
    """Whether the final average accuracy over tasks and the one over all test samples differ, beyond rounding, in some of these
    pairs: then tasks have test sets of unequal sizes, and what a joint run's one task gives is another average."""
    return any(a is not None and b is not None and abs(a - b) > 1e-9 for a, b in pairs)


def learning_curve(a_TT: FloatArray) -> FloatArray:
    """A_i = 1/(i+1) Σ_{j≤i} a[i][j], shape (T,)."""
    return np.array([a_TT[i, : i + 1].mean() for i in range(len(a_TT))])


def average_incremental_accuracy(a_TT: FloatArray) -> float:
    """1/T Σ_i A_i: the mean of the learning curve."""
    return float(learning_curve(a_TT).mean())


def forgetting(a_TT: FloatArray) -> float:
    """1/(T−1) Σ_{j<T−1} (max_{j≤i≤T−1} a[i][j] − a[T−1][j]) ≥ 0; needs T ≥ 2."""
    drops = [a_TT[j:, j].max() - a_TT[-1, j] for j in range(len(a_TT) - 1)]
    return float(np.mean(drops))


def forgetting_diagonal(a_TT: FloatArray) -> float:
    """1/T Σ_j (a[j][j] − a[T−1][j]), the last task's 0 included, as fed-mammoth reports it; needs T ≥ 2."""
    return float((np.diag(a_TT) - a_TT[-1]).mean())


def backward_transfer(a_TT: FloatArray) -> float:
    """1/(T−1) Σ_{j<T−1} (a[T−1][j] − a[j][j]); negative where tasks were forgotten; needs T ≥ 2."""
    return float((a_TT[-1] - np.diag(a_TT))[:-1].mean())


def plasticity(a_TT: FloatArray) -> float:
    """1/T Σ_j a[j][j]: how well each task was learned when it came (learning accuracy)."""
    return float(np.diag(a_TT).mean())


def newest_share(predicted: Sequence[tuple[int, bool]]) -> float | None:
    """Percent of all predictions after the last task that fall on the classes which it brought; (count, is new) per class.

    With test sets of equal size 100/T is fair; more is the incremental bias that HGP (Mosconi et al. 2024) describes. None where
    that task brought no class, as a new domain does not.
    """
    total = sum(count for count, _ in predicted)
    brought = [count for count, new in predicted if new]
    return 100.0 * sum(brought) / total if total and brought else None


def product_error(counts: Counts) -> float | None:
    """100 · ‖(Σ p_k B_k)(Σ p_k A_k) − Σ p_k B_k A_k‖ / ‖Σ p_k B_k A_k‖, the mean over the rounds of a LoRA run in which both
    factors are trained: what averaging the factors loses, or would lose where the rule does something else (`server.drift`)."""
    of_rounds = counts.drifts.get("product_error", {}).get("adapter", ())
    return 100.0 * float(np.mean(of_rounds)) if len(of_rounds) else None


def client_accuracy(held_H3: ArrayLike, clients: int, correct_C: ArrayLike, total_C: ArrayLike) -> FloatArray:
    """acc_k = Σ_c h_kc · (correct_c / total_c) / Σ_c h_kc in percent, (K,): the expected accuracy on test samples that are
    distributed over classes as the client's own training samples h_k are. NaN for a client without a tested class.

    held_H3: rows of (client, class, samples), as many as there are.
    """
    client_H, class_H, samples_H = np.asarray(held_H3, dtype=np.int64).reshape(-1, 3).T
    acc_H = accuracy(correct_C, total_C)[class_H] if len(class_H) else np.zeros(0)
    tested_H = ~np.isnan(acc_H)
    weight_H = np.where(tested_H, samples_H, 0)
    right_K = np.bincount(client_H, weight_H * np.where(tested_H, acc_H, 0.0), minlength=clients)
    weight_K = np.bincount(client_H, weight_H, minlength=clients)
    mean_K: FloatArray = np.divide(right_K, weight_K, out=np.full(len(weight_K), np.nan), where=weight_K > 0)
    return mean_K


def worst_decile(sorted_K: FloatArray) -> float:
    """The mean of the ⌈K/10⌉ lowest accuracies."""
    return float(sorted_K[: math.ceil(len(sorted_K) / 10)].mean())


def best_decile(sorted_K: FloatArray) -> float:
    """The mean of the ⌈K/10⌉ highest accuracies."""
    return float(sorted_K[-math.ceil(len(sorted_K) / 10) :].mean())


def jain(acc_K: FloatArray) -> float | None:
    """(Σ acc)² / (K Σ acc²), 1 when all are equal (Jain et al. 1984); None where every accuracy is 0."""
    return float(acc_K.sum() ** 2 / (len(acc_K) * np.square(acc_K).sum())) if acc_K.sum() > 0 else None


def entropy(acc_K: FloatArray) -> float | None:
    """Of the shares acc / Σ acc, in nats: ln K when all are equal; None where every accuracy is 0."""
    if not acc_K.sum() > 0:
        return None
    share = acc_K[acc_K > 0] / acc_K.sum()
    return float(-(share * np.log(share)).sum())


# ---------------------------------------------------------------- the table


def _variant(metric: Metric) -> Metric:
    """The metric with the task told at test time."""
    compute, shown = metric.compute, metric.told
    assert compute is not None
    assert shown is not None
    return replace(
        metric,
        name=metric.name + TOLD,
        title=f"{metric.title}, task told",
        compute=lambda counts: compute(counts.told),
        short="",
        alias="",
        shown=shown,
        told=None,
        variant_of=metric.name,
    )


def _drift(measure: str, title: str) -> Metric:
    """A measure of `server.drift` by group of tensors: the mean over the rounds in which it is defined."""

    def means(counts: Counts) -> dict[str, float]:
        return {group: float(np.mean(values)) for group, values in counts.drifts.get(measure, {}).items()}

    return Metric(f"drift_{measure}", title, means, parts=True, unit="", least=-math.inf, most=math.inf)


_OF_TASKS = (
    Metric(
        HEADLINE, "Final average accuracy", lambda c: final_average_accuracy(c.accuracy), "higher", "a task",
        short="FAA", alias="faa", shown=EVERYWHERE, told=("report", "page"),
    ),
    Metric(
        "average_incremental_accuracy", "Average incremental accuracy", lambda c: average_incremental_accuracy(c.accuracy),
        "higher", "a task", short="AIA", alias="aia", shown=EVERYWHERE, told=(),
    ),
    Metric(
        "forgetting", "Forgetting", lambda c: forgetting(c.accuracy), "lower", "two tasks",
        least=-100.0, shown=EVERYWHERE, told=(),
    ),
    Metric(
        "forgetting_diagonal", "Forgetting, diagonal form", lambda c: forgetting_diagonal(c.accuracy), "lower", "two tasks",
        least=-100.0, told=(),
    ),
    Metric(
        "plasticity", "Plasticity", lambda c: plasticity(c.accuracy), "higher", "a task",
        shown=("report", "page"), told=(),
    ),
    Metric(
        "backward_transfer", "Backward transfer", lambda c: backward_transfer(c.accuracy), "higher", "two tasks",
        short="BWT", alias="bwt", least=-100.0, shown=("run", "report"), told=(),
    ),
    Metric(
        MICRO, "Final accuracy over all samples",
        lambda c: final_average_accuracy_micro(c.correct, c.total), "higher", "a task", told=(),
    ),
)  # fmt: skip
_OF_CLIENTS = (
    Metric(
        "client_accuracy_mean", "Mean accuracy over clients", lambda c: float(c.known_clients.mean()), "higher", "clients",
    ),
    Metric(
        "client_accuracy_std", "Standard deviation of accuracy over clients",  # all clients are there: ddof 0
        lambda c: float(c.known_clients.std()), "lower", "clients", shown=("report",),
    ),
    Metric(
        "client_accuracy_min", "Accuracy of the worst client", lambda c: float(c.known_clients[0]), "higher", "clients",
    ),
    Metric(
        "client_accuracy_worst_decile", "Accuracy of the worst tenth of clients", lambda c: worst_decile(c.known_clients),
        "higher", "clients", shown=("report",),
    ),
    Metric(
        "client_accuracy_best_decile", "Accuracy of the best tenth of clients", lambda c: best_decile(c.known_clients),
        "higher", "clients",
    ),
    Metric(
        "client_jain", "Jain's index of the clients' accuracies", lambda c: jain(c.known_clients), "higher", "clients",
        unit="", most=1.0,
    ),
    Metric(
        "client_entropy", "Entropy of the clients' accuracies", lambda c: entropy(c.known_clients), "higher", "clients",
        unit="nats", most=math.inf,
    ),
)  # fmt: skip
_OF_COSTS = (
    Metric("bytes", "Bytes up and down", None, "lower", "costs", unit="MB", scale=1e6, most=math.inf, parts=True),
    Metric("bytes_up", "Bytes up", None, "lower", "costs", unit="MB", scale=1e6, most=math.inf, parts=True),
    Metric("bytes_down", "Bytes down", None, "lower", "costs", unit="MB", scale=1e6, most=math.inf, parts=True),
    Metric("seconds", "Seconds", None, "lower", "costs", unit="", most=math.inf, parts=True),
    Metric("processor_seconds", "Processor seconds", None, "lower", "costs", unit="", most=math.inf),
    Metric("peak_memory", "Peak memory", None, "lower", "costs", unit="MB", scale=1e6, most=math.inf),
    Metric("skipped_clients", "Skipped clients", None, "lower", unit="", most=math.inf),
)

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "Accuracy", None, "higher"),  # of one test: a cell of the matrix, a mean over tasks at one moment
        *_OF_TASKS,
        *map(_variant, _OF_TASKS),
        Metric(
            "newest_share", "Predictions on the newest task's classes", lambda c: newest_share(c.predicted),
            shown=("report",),
        ),
        *_OF_CLIENTS,
        Metric(
            "product_error", "Product error of averaging LoRA's factors", product_error, most=math.inf, shown=("run", "report"),
        ),
        _drift("relative_norm", "Length of a client's change / length of the weights"),
        _drift("cosine", "Mean cosine between two clients' changes"),
        _drift("cosine_min", "Least cosine between two clients' changes"),
        _drift("cosine_to_mean", "Mean cosine of a client's change to the mean change"),
        _drift("diversity", "Gradient diversity"),
        _drift("effective_rank", "Effective rank of the clients' changes"),
        _drift("product_error", "Product error of averaging LoRA's factors, as a share"),
        Metric(GAP, "Gap to joint", None, "lower", "a joint run", alias="gap", least=-100.0, shown=("results",)),
        Metric(INTRANSIGENCE, "Intransigence", None, "lower", "a joint run", least=-100.0, shown=("results",)),
        Metric("learning_curve", "Mean accuracy on the tasks seen, after a task", None, "higher", "a task", parts=True),
        Metric("final_accuracy", "Accuracy on a task, after the last", None, "higher", "a task", parts=True),
        Metric("chance", "Accuracy by chance"),
        *_OF_COSTS,
    )
}  # fmt: skip


def computed(counts: Counts) -> dict[str, float | None]:
    """Every metric that is computed from counts, by name; None where it is undefined."""
    values: dict[str, float | None] = {}
    for metric in METRICS.values():
        if metric.compute is None:
            continue
        value = metric.value(counts)
        if isinstance(value, Mapping):
            values |= {f"{metric.name}_{part}": v for part, v in value.items()}
        elif not metric.parts:
            values[metric.name] = value
    return values


def of(column: str) -> Metric:
    """The record of a column of the tidy frame; one that describes and judges nothing where the table has none."""
    words = column.split("_")
    for n in range(len(words), 0, -1):
        found = METRICS.get("_".join(words[:n]))
        if found is not None and (n == len(words) or found.parts):
            return found
    return Metric(column, column.replace("_", " ").capitalize(), unit="", least=-math.inf, most=math.inf)


def shown(place: Place) -> list[Metric]:
    """The metrics that stand there, in the table's order."""
    return [metric for metric in METRICS.values() if place in metric.shown]


def aliases() -> dict[str, str]:
    """Alias -> name."""
    return {metric.alias: metric.name for metric in METRICS.values() if metric.alias}
