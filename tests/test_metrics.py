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

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server import metrics

SIZES = np.array([100, 100, 200])
ORACLE = np.array([[90, 0, 0], [80, 70, 0], [60, 75, 50]])
TOTAL = np.tril(np.ones((3, 3), dtype=int)) * SIZES
CORRECT = ORACLE * TOTAL // 100


def test_oracle_matrix() -> None:
    got = metrics.summary(CORRECT, TOTAL)
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
    got = metrics.summary([[45]], [[60]])
    assert got["final_average_accuracy"] == got["final_average_accuracy_micro"] == got["plasticity"] == 75.0
    assert got["forgetting"] is got["forgetting_diagonal"] is got["backward_transfer"] is None


@pytest.mark.parametrize("total", [np.zeros((0, 0)), [[10, 0], [0, 10]]])
def test_undefined_when_a_task_was_not_tested(total: object) -> None:
    assert set(metrics.summary(np.zeros_like(total), total).values()) == {None}


def test_suffix_is_on_every_name() -> None:
    assert set(metrics.summary(CORRECT, TOTAL, "_told")) == {f"{name}_told" for name in metrics.summary(CORRECT, TOTAL)}


@st.composite
def count_matrices(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    tasks = draw(st.integers(2, 5))
    sizes = draw(st.lists(st.integers(1, 40), min_size=tasks, max_size=tasks))
    correct = np.array([[draw(st.integers(0, sizes[j])) if j <= i else 0 for j in range(tasks)] for i in range(tasks)])
    return correct, np.tril(np.ones((tasks, tasks), dtype=int)) * np.array(sizes)


@settings(deadline=None, max_examples=60)
@given(count_matrices())
def test_relations(counts: tuple[np.ndarray, np.ndarray]) -> None:
    """max-drop ≥ 0 and ≥ −BWT; BWT = −T/(T−1) · diagonal; macro = micro where all tasks have the same size."""
    correct, total = counts
    tasks = len(correct)
    m = metrics.summary(correct, total)
    assert m["forgetting"] >= 0
    assert m["forgetting"] >= -m["backward_transfer"] - 1e-9
    assert m["backward_transfer"] == pytest.approx(-tasks / (tasks - 1) * m["forgetting_diagonal"], abs=1e-9)
    even = metrics.summary(np.minimum(correct, 1), np.sign(total))
    assert even["final_average_accuracy"] == pytest.approx(even["final_average_accuracy_micro"], abs=1e-9)
