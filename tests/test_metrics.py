"""Metrics against closed forms.

The oracle matrix a = [[90], [80, 70], [60, 75, 50]]:
  final average accuracy       (60 + 75 + 50) / 3                                  = 61.67
  average incremental          (90 + (80 + 70) / 2 + 61.67) / 3                    = 75.56
  forgetting (max-drop)        ((90 − 60) + (75 − 75)) / 2                         = 15.0
  forgetting (diagonal)        ((90 − 60) + (70 − 75) + 0) / 3                     = 8.33
  backward transfer            ((60 − 90) + (75 − 70)) / 2                         = −12.5
  plasticity                   (90 + 70 + 50) / 3                                  = 70
  micro, n = (100, 100, 200)   (60 + 75 + 100) / 400                               = 58.75
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from scipy import stats

from fedsim.runs import metrics
from fedsim.runs.metrics import Counts, computed

SIZES = np.array([100, 100, 200])
ORACLE = np.array([[90, 0, 0], [80, 70, 0], [60, 75, 50]])
TOTAL = np.tril(np.ones((3, 3), dtype=int)) * SIZES
CORRECT = ORACLE * TOTAL // 100
OF_TASKS = [m.name for m in metrics.METRICS.values() if m.told is not None]


def of_tasks(correct: ArrayLike, total: ArrayLike) -> dict[str, float | None]:
    """What is computed from the matrix alone."""
    found = computed(Counts(np.asarray(correct), np.asarray(correct), np.asarray(total)))
    return {name: value for name, value in found.items() if name in OF_TASKS}


def of_clients(acc_K: np.ndarray) -> dict[str, float | None]:
    return {name: value for name, value in computed(Counts(clients=acc_K)).items() if name.startswith("client_")}


def test_oracle_matrix() -> None:
    got = of_tasks(CORRECT, TOTAL)
    assert got == pytest.approx(
        {
            "final_average_accuracy": 185 / 3,
            "final_average_accuracy_micro": 58.75,
            "average_incremental_accuracy": (90 + 75 + 185 / 3) / 3,
            "forgetting": 15.0,
            "forgetting_diagonal": 25 / 3,
            "backward_transfer": -12.5,
            "plasticity": 70.0,
        },
        abs=1e-12,
    )


def test_accuracy_is_percent_and_nan_where_nothing_was_tested() -> None:
    a_TT = metrics.accuracy(CORRECT, TOTAL)
    assert a_TT.dtype == np.float64
    np.testing.assert_array_equal(a_TT, np.where(TOTAL > 0, ORACLE, np.nan))


def test_learning_curve() -> None:
    np.testing.assert_allclose(metrics.learning_curve(metrics.accuracy(CORRECT, TOTAL)), [90, 75, 185 / 3])


def test_one_task_has_no_forgetting() -> None:
    got = of_tasks([[45]], [[60]])
    assert got["final_average_accuracy"] == got["final_average_accuracy_micro"] == got["plasticity"] == 75.0
    assert got["forgetting"] is got["forgetting_diagonal"] is got["backward_transfer"] is None


@pytest.mark.parametrize("total", [np.zeros((0, 0)), [[10, 0], [0, 10]]])
def test_undefined_when_a_task_was_not_tested(total: object) -> None:
    assert set(of_tasks(np.zeros_like(total), total).values()) == {None}


def test_every_metric_of_tasks_has_a_variant_with_the_task_told() -> None:
    """Of the counts inside the task's own classes, whatever the others are."""
    found = computed(Counts(np.zeros_like(CORRECT), CORRECT, TOTAL))
    told = of_tasks(CORRECT, TOTAL)
    assert {name: found[name + metrics.TOLD] for name in told} == told
    assert found["final_average_accuracy"] == 0


@st.composite
def count_matrices(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    tasks = draw(st.integers(2, 5))
    sizes = draw(st.lists(st.integers(1, 40), min_size=tasks, max_size=tasks))
    correct = np.array([[draw(st.integers(0, sizes[j])) if j <= i else 0 for j in range(tasks)] for i in range(tasks)])
    return correct, np.tril(np.ones((tasks, tasks), dtype=int)) * np.array(sizes)


@settings(max_examples=60)
@given(count_matrices())
def test_relations(counts: tuple[np.ndarray, np.ndarray]) -> None:
    """max-drop ≥ 0 and ≥ −BWT; BWT = −T/(T−1) · diagonal; macro = micro where all tasks have the same size."""
    correct, total = counts
    tasks = len(correct)
    m = of_tasks(correct, total)
    assert m["forgetting"] >= 0
    assert m["forgetting"] >= -m["backward_transfer"] - 1e-9
    assert m["backward_transfer"] == pytest.approx(-tasks / (tasks - 1) * m["forgetting_diagonal"], abs=1e-9)
    even = of_tasks(np.minimum(correct, 1), np.sign(total))
    assert even["final_average_accuracy"] == pytest.approx(even["final_average_accuracy_micro"], abs=1e-9)


# ---------------------------------------------------------------- the newest classes' share


def test_newest_share_by_hand() -> None:
    """After the last task 30 of 120 predictions fall on its classes: 25 %, whatever the rest is split into."""
    assert metrics.newest_share([(50, False), (40, False), (20, True), (10, True)]) == 25.0
    assert metrics.newest_share([(0, False), (7, True)]) == 100.0
    assert metrics.newest_share([(7, False), (0, True)]) == 0.0
    assert metrics.newest_share([]) is metrics.newest_share([(0, True)]) is None
    assert metrics.newest_share([(7, False), (3, False)]) is None, "the last task brought no class"


# ---------------------------------------------------------------- accuracy at the clients


def test_client_accuracy_by_hand() -> None:
    """Class accuracies 50, 100, 20 %, class 3 was not tested. Client 0 holds 3 and 1 of classes 0 and 1: (3·50 + 1·100) / 4.
    Client 1 holds class 2, in two tasks, and 9 of class 3, which count for nothing. Clients 2 and 3: nothing, nothing tested."""
    held = [(0, 0, 3), (0, 1, 1), (1, 2, 4), (1, 3, 9), (1, 2, 1), (3, 3, 5)]
    got = metrics.client_accuracy(held, 4, [5, 4, 2, 0], [10, 4, 10, 0])
    np.testing.assert_array_equal(got, [62.5, 20.0, np.nan, np.nan])


def test_without_holdings_no_client_has_an_accuracy() -> None:
    np.testing.assert_array_equal(metrics.client_accuracy([], 2, [], []), [np.nan, np.nan])
    np.testing.assert_array_equal(metrics.client_accuracy([], 2, [1], [2]), [np.nan, np.nan])


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 10_000))
def test_client_accuracy_is_the_expected_accuracy(clients: int, classes: int, seed: int) -> None:
    """Dense, in one line; and clients weighted by what they hold give the accuracy on the pooled classes."""
    rng = np.random.default_rng(seed)
    held_KC = rng.integers(0, 4, (clients, classes))
    total_C = rng.integers(1, 30, classes)
    correct_C = rng.integers(0, total_C + 1)
    rows = [(k, c, held_KC[k, c]) for k, c in np.argwhere(held_KC)]
    got = metrics.client_accuracy(rows, clients, correct_C, total_C)
    holds = held_KC.sum(axis=1) > 0
    expected = (held_KC @ (100 * correct_C / total_C))[holds] / held_KC.sum(axis=1)[holds]
    np.testing.assert_allclose(got[holds], expected)
    assert np.isnan(got[~holds]).all()
    if holds.any():
        pooled = held_KC.sum(axis=0) @ (100 * correct_C / total_C) / held_KC.sum()
        assert np.average(got[holds], weights=held_KC.sum(axis=1)[holds]) == pytest.approx(pooled)


def test_even_accuracies_are_fair() -> None:
    got = of_clients(np.full(10, 60.0))
    assert got == pytest.approx(
        {
            "client_accuracy_mean": 60, "client_accuracy_std": 0, "client_accuracy_min": 60,
            "client_accuracy_worst_decile": 60, "client_accuracy_best_decile": 60, "client_jain": 1, "client_entropy": np.log(10),
        },
        abs=1e-12,
    )  # fmt: skip


def test_fairness_by_hand() -> None:
    """10, 30, 50 and a client without accuracy: mean 30, std √(800/3), Jain 90² / (3 · 3500), shares 1/9, 3/9, 5/9."""
    got = of_clients(np.array([30.0, np.nan, 50.0, 10.0]))
    assert got["client_accuracy_std"] == pytest.approx(np.sqrt(800 / 3))
    assert (got["client_accuracy_mean"], got["client_accuracy_min"]) == (30, 10)
    assert (got["client_accuracy_worst_decile"], got["client_accuracy_best_decile"]) == (10, 50)
    assert got["client_jain"] == pytest.approx(8100 / 10500)
    assert got["client_entropy"] == pytest.approx(stats.entropy([1, 3, 5]))


@pytest.mark.parametrize(("clients", "tenth"), [(1, 1), (10, 1), (11, 2), (20, 2), (21, 3)])
def test_a_decile_is_rounded_up(clients: int, tenth: int) -> None:
    got = of_clients(np.arange(1.0, clients + 1)[::-1])
    assert got["client_accuracy_worst_decile"] == np.arange(1, tenth + 1).mean()
    assert got["client_accuracy_best_decile"] == np.arange(clients - tenth + 1, clients + 1).mean()


@settings(max_examples=60)
@given(st.lists(st.integers(0, 997).map(lambda right: 100 * right / 997), min_size=1, max_size=30))
def test_fairness_of_any_accuracies(values: list[float]) -> None:
    """min ≤ worst decile ≤ mean ≤ best decile; 1/K ≤ Jain ≤ 1; entropy as scipy has it; std is the population's."""
    got = of_clients(np.array(values))
    order = [got[f"client_accuracy_{n}"] for n in ("min", "worst_decile", "mean", "best_decile")]
    assert all(a <= b + 1e-9 for a, b in pairwise(order))  # type: ignore[operator]
    assert got["client_accuracy_std"] == pytest.approx(np.std(values), abs=1e-9)
    if max(values) == 0:
        return
    assert 1 / len(values) - 1e-9 <= got["client_jain"] <= 1 + 1e-9  # type: ignore[operator]
    assert got["client_entropy"] == pytest.approx(stats.entropy(values), abs=1e-9)


def test_fairness_of_nobody_and_of_zeros() -> None:
    assert set(of_clients(np.array([np.nan])).values()) == {None}
    zeros = of_clients(np.zeros(3))
    assert (zeros["client_accuracy_mean"], zeros["client_jain"], zeros["client_entropy"]) == (0, None, None)
