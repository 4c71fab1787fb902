"""Continual-learning metrics as pure functions of count matrices, in percent, float64.

Counts stay raw until here: a percentage that was rounded first moves the forgetting. All matrices are (T, T): row i is
the model after the end of task i, column j the test samples of task j; `total` 0 means that it was not tested.
Definitions of forgetting follow Chaudhry et al. 2018 ("Riemannian walk for incremental learning") with the last row in the
maximum, and fed-mammoth's diagonal form; backward transfer follows Lopez-Paz & Ranzato 2017 ("Gradient episodic memory").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

# T tasks; i task trained, j task tested
FloatArray = NDArray[np.float64]


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


OF_ACCURACY: dict[str, Callable[[FloatArray], float]] = {
    "final_average_accuracy": final_average_accuracy,
    "average_incremental_accuracy": average_incremental_accuracy,
    "forgetting": forgetting,
    "forgetting_diagonal": forgetting_diagonal,
    "backward_transfer": backward_transfer,
    "plasticity": plasticity,
}
NEED_TWO_TASKS = ("forgetting", "forgetting_diagonal", "backward_transfer")


def summary(correct_TT: ArrayLike, total_TT: ArrayLike, suffix: str = "") -> dict[str, float | None]:
    """Every metric by name, each name with `suffix`; None where it is undefined.

    Undefined: forgetting and backward transfer of a single task, and everything if some task was never tested when it
    should have been (an empty cell with j ≤ i, or no task at all).
    """
    a_TT, total = accuracy(correct_TT, total_TT), np.asarray(total_TT)
    tasks = len(a_TT)
    complete = tasks > 0 and bool((total[np.tril_indices(tasks)] > 0).all())
    values: dict[str, float | None] = {
        name: metric(a_TT) if complete and (tasks > 1 or name not in NEED_TWO_TASKS) else None
        for name, metric in OF_ACCURACY.items()
    }
    values["final_average_accuracy_micro"] = final_average_accuracy_micro(correct_TT, total_TT) if complete else None
    return {f"{name}{suffix}": value for name, value in values.items()}


def newest_share(predicted: Sequence[tuple[int, bool]]) -> float | None:
    """Percent of all predictions after the last task that fall on the classes which it brought; (count, is new) per class.

    With test sets of equal size 100/T is fair; more is the incremental bias that HGP (Mosconi et al. 2024) describes.
    """
    total = sum(count for count, _ in predicted)
    return 100.0 * sum(count for count, new in predicted if new) / total if total else None


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


def fairness(acc_K: FloatArray) -> dict[str, float | None]:
    """How evenly a model serves the clients that have an accuracy; percent but for Jain's index and the entropy.

    client_accuracy_mean, _std (all clients are there: ddof 0), _min; _worst_decile, _best_decile: mean of the ⌈K/10⌉ lowest,
    highest; client_jain: (Σ acc)² / (K Σ acc²), 1 when all are equal (Jain et al. 1984); client_entropy: of acc / Σ acc, in nats,
    ln K when all are equal.
    None without clients; the last two also where every accuracy is 0.
    """
    known = np.sort(acc_K[~np.isnan(acc_K)])
    names = ("mean", "std", "min", "worst_decile", "best_decile")
    if not len(known):
        return dict.fromkeys((*(f"client_accuracy_{n}" for n in names), "client_jain", "client_entropy"))
    tenth = math.ceil(len(known) / 10)
    values = (known.mean(), known.std(), known[0], known[:tenth].mean(), known[-tenth:].mean())
    share = known[known > 0] / known.sum() if known.sum() > 0 else None
    return {f"client_accuracy_{n}": float(v) for n, v in zip(names, values, strict=True)} | {
        "client_jain": None if share is None else float(known.sum() ** 2 / (len(known) * np.square(known).sum())),
        "client_entropy": None if share is None else float(-(share * np.log(share)).sum()),
    }
