"""The masked head against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.core.errors import ModelError
from fedsim.models import head


@settings(deadline=None, max_examples=30)
@given(classes=st.lists(st.integers(0, 6), min_size=1, unique=True), seed=st.integers(0, 99))
def test_cross_entropy_is_over_the_chosen_classes_alone(classes: list[int], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 7, dtype=torch.float64, generator=g, requires_grad=True)
    labels = torch.tensor(classes)[torch.randint(len(classes), (5,), generator=g)]
    loss = head.masked_cross_entropy(logits, labels, classes)
    z = logits.detach().tolist()
    want = sum(math.log(sum(math.exp(z[i][c]) for c in classes)) - z[i][y] for i, y in enumerate(labels.tolist())) / 5
    assert loss.item() == pytest.approx(want, abs=1e-12)
    loss.backward()  # type: ignore[no-untyped-call]
    others = [c for c in range(7) if c not in classes]
    assert logits.grad is not None
    assert not logits.grad[:, others].any()


@pytest.mark.parametrize("classes", [range(100, 103), [100, 102, 101]])
@pytest.mark.parametrize("label", [0, 99, 103])
def test_label_outside_of_the_task_is_no_silent_zero(classes: list[int], label: int) -> None:
    with pytest.raises(IndexError):
        head.masked_cross_entropy(torch.zeros(1, 200), torch.tensor([label]), classes)


def test_no_classes() -> None:
    with pytest.raises(ModelError, match="no classes"):
        head.masked_cross_entropy(torch.zeros(1, 3), torch.tensor([0]), [])


def test_prediction_is_among_the_classes() -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0, 0.0], [9.0, 3.0, 2.0, 8.0]])
    assert head.predict(logits, [1, 2]).tolist() == [2, 1]
    assert head.predict(logits, [3, 1]).tolist() == [1, 3]
    assert head.predict(logits, range(4)).tolist() == [0, 0]


def test_logits_and_zero_start() -> None:
    params = head.init(4, 3)
    assert not any(t.any() for t in params.values())
    params = {"head.weight": torch.arange(12.0).view(4, 3), "head.bias": torch.ones(4)}
    h = torch.tensor([[1.0, 0.0, 2.0]])
    assert head.logits(h, params).tolist() == [[5.0, 14.0, 23.0, 32.0]]
