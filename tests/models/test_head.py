"""The masked head against closed forms."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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


# ---------------------------------------------------------------- one head per source


def sources(
    seed: int, count: int = 4, classes: int = 5, width: int = 3, prototypes: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """Features (b, S, D) and what is beside the heads of sources, each of which holds a class at least, float64."""
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    held = torch.randint(0, 3, (count, classes), generator=g)
    held[torch.arange(count), torch.randint(0, classes, (count,), generator=g)] += 1
    params = {"head.weight": draw(count, classes, width), "head.bias": draw(count, classes), "head.count": held.float()}
    if prototypes:
        params |= {"head.prototypes": draw(count, classes, width), "head.scale": draw(count).exp()}
    return draw(6, count, width), params


def by_hand(features: Tensor, params: dict[str, Tensor]) -> list[list[float]]:
    """The mixture's probabilities, number by number."""
    out = []
    for x in features:
        parts, weights = [], []
        for s, f in enumerate(x.tolist()):
            held = [c for c in range(params["head.count"].shape[1]) if params["head.count"][s, c] > 0]
            z = {c: sum(w * v for w, v in zip(params["head.weight"][s, c].tolist(), f, strict=True)) for c in held}
            e = {c: math.exp(z[c] + params["head.bias"][s, c].item()) for c in held}
            parts.append({c: e[c] / sum(e.values()) for c in held})
            weights.append(1.0)
            if "head.prototypes" in params:
                means = params["head.prototypes"][s].tolist()
                near = min(sum((v - m) ** 2 for v, m in zip(f, means[c], strict=True)) for c in held)
                weights[-1] = math.exp(-near / params["head.scale"][s].item())
        share = [w / sum(weights) for w in weights]
        out.append([sum(w * p.get(c, 0.0) for w, p in zip(share, parts, strict=True)) for c in range(features.shape[2] + 2)])
    return out


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), prototypes=st.booleans())
def test_mixture_is_a_weighted_mean_of_probabilities(seed: int, prototypes: bool) -> None:
    features, params = sources(seed, prototypes=prototypes)
    got = head.logits(features, params)
    torch.testing.assert_close(got.exp(), torch.tensor(by_hand(features, params), dtype=torch.float64), rtol=1e-9, atol=1e-12)
    unknown = params["head.count"].sum(0) == 0
    assert torch.equal(torch.isneginf(got), unknown.expand_as(got))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), s=st.integers(0, 3))
def test_one_source_alone_keeps_its_own_prediction(seed: int, s: int) -> None:
    features, params = sources(seed)
    alone = {n: t[[s]] for n, t in params.items()}
    own = features[:, s] @ params["head.weight"][s].T + params["head.bias"][s]
    held = (params["head.count"][s] > 0).nonzero()[:, 0].tolist()
    got = head.logits(features[:, [s]], alone)
    torch.testing.assert_close(got[:, held], own[:, held].log_softmax(1), rtol=0, atol=1e-12)
    assert torch.equal(head.predict(got, range(5)), head.predict(own, held))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(4)), left=st.integers(1, 4))
def test_sources_do_not_depend_on_the_others(seed: int, order: list[int], left: int) -> None:
    features, params = sources(seed)
    some = order[:left]
    fewer = {n: t[some] for n, t in params.items()}
    for part in (head.source_log_probabilities, head.source_weights):
        assert torch.equal(part(features[:, some], fewer), part(features, params)[:, some])
    permuted = head.logits(features[:, order], {n: t[order] for n, t in params.items()})
    torch.testing.assert_close(permuted, head.logits(features, params), rtol=1e-12, atol=1e-12)


def test_far_sources_and_sources_without_a_scale() -> None:
    """No overflow to NaN: the nearest decides however far all are; who has no scale counts where nobody else does."""
    params = {
        "head.weight": torch.zeros(2, 2, 1),
        "head.bias": torch.tensor([[3.0, 0.0], [0.0, 3.0]]),
        "head.count": torch.ones(2, 2),
        "head.prototypes": torch.tensor([[[0.0], [0.0]], [[1e4], [1e4]]]),
        "head.scale": torch.tensor([1e-20, 1e-20]),
    }
    features = torch.full((1, 2, 1), 9e3)
    assert head.predict(head.logits(features, params), [0, 1]).tolist() == [1]
    one_sample = {**params, "head.scale": torch.tensor([0.0, 1.0])}
    for x, want in ((5.0, 1), (0.0, 0)):
        assert head.predict(head.logits(torch.full((1, 2, 1), x), one_sample), [0, 1]).tolist() == [want]
    alone = {n: t[[0]] for n, t in one_sample.items()}
    torch.testing.assert_close(head.logits(features[:, :1], alone), params["head.bias"][:1].log_softmax(1))
