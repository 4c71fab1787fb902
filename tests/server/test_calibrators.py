"""Calibrators: what clients told of becomes Gaussians, features are drawn from them, and only the head's rows are trained.

Shapes: N samples, K classes that are trained on, C head rows, D features.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim.core import plugins
from fedsim.core.config import build
from fedsim.core.errors import AggregationError, ConfigError
from fedsim.core.messages import ClientUpdate, Tensors
from fedsim.core.rng import torch_stream
from fedsim.core.tensors import from_upper_triangle, upper_triangle
from fedsim.simulation import run
from server.calibrators._gaussians import GaussianCalibrator, Mixture, cholesky, head_gradient
from server.calibrators.ccvr import Calibrator as Ccvr
from server.calibrators.hgp import Calibrator as Hgp
from tests.tiny import final_state, same_bits, tiny

CLASSES, WIDTH = 8, 5
NAMES = plugins.names("calibrators")
HEAD = {"head.weight", "head.bias"}
Samples = Mapping[int, Tensor]  # class -> (N, D), float64


def draw_samples(sizes: Mapping[int, int], *address: int) -> dict[int, Tensor]:
    """Features of one client: classes around different means, with correlated features."""
    generator = torch_stream(1, "samples", *address)
    mix_DD = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator)
    return {
        c: 3 * torch.sin(torch.arange(WIDTH) + 2.0 * c) + torch.randn(n, WIDTH, dtype=torch.float64, generator=generator) @ mix_DD
        for c, n in sizes.items()
    }


def told(client_id: int, samples: Samples, covariance: str = "diagonal", dtype: torch.dtype = torch.float64) -> ClientUpdate:
    """An update with the statistics of these samples, from numpy, in the wire's format."""
    rows = {c: x.numpy() for c, x in sorted(samples.items()) if len(x)}
    second = "variance" if covariance == "diagonal" else "covariance"
    count = torch.zeros(CLASSES, dtype=dtype)
    for c, x in rows.items():
        count[c] = len(x)
    if covariance == "diagonal":
        spread = [x.var(0, ddof=1) if len(x) > 1 else np.zeros(WIDTH) for x in rows.values()]
    else:
        spread = [upper_triangle(torch.from_numpy(np.cov(x, rowvar=False))).numpy() for x in rows.values() if len(x) > 1]
    width = WIDTH if covariance == "diagonal" else WIDTH * (WIDTH + 1) // 2
    statistics = {
        "count": count,
        "mean": torch.tensor(np.array([x.mean(0) for x in rows.values()]).reshape(-1, WIDTH), dtype=dtype),
        second: torch.tensor(np.array(spread).reshape(-1, width), dtype=dtype),
    }
    named = {f"class_moments.{form}/head.weight": t for form, t in statistics.items()}
    return ClientUpdate(client_id, sum(len(x) for x in rows.values()), {}, named)


def make_params(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shapes = {"adapter.block.0.lora_A": (2, 4), "adapter.block.0.lora_B": (4, 2)}
    shapes |= {"head.weight": (CLASSES, WIDTH)}
    out = {n: torch.randn(s, dtype=dtype, generator=torch_stream(1, n)) for n, s in shapes.items()}
    return out | {"head.bias": torch.randn(CLASSES, dtype=dtype, generator=torch_stream(1, "head.bias"))}


def calibrated(
    rule: GaussianCalibrator,
    updates: Sequence[ClientUpdate],
    classes: Sequence[int],
    state: Any = None,
    params: Tensors | None = None,
    seen: Sequence[int] | None = None,
) -> tuple[Any, Tensors]:
    generator = torch_stream(1, "calibrate")
    return rule.calibrate(
        rule.init() if state is None else state, params or make_params(), updates, classes, seen or classes, generator
    )


def changed_rows(before: Tensors, after: Tensors) -> set[int]:
    weight = (before["head.weight"] != after["head.weight"]).any(1)
    return set((weight | (before["head.bias"] != after["head.bias"])).nonzero().flatten().tolist())


# ---------------------------------------------------------------- every calibrator

PAIR = [draw_samples({0: 4, 1: 7, 3: 3}, 0), draw_samples({0: 9, 1: 2, 2: 1}, 1)]
EVERY = pytest.mark.parametrize(
    "rule",
    [build("calibrators", {"name": name, "covariance": form, "epochs": 2}) for name in NAMES for form in ("diagonal", "full")],
    ids=lambda rule: f"{type(rule).__module__.rpartition('.')[2]}-{rule.covariance}",
)


@EVERY
def test_only_rows_of_the_head_change(rule: GaussianCalibrator) -> None:
    """And of these only those of classes with two samples: nobody holds 4, and one sample of class 2 makes no Gaussian."""
    updates, before = [told(i, samples, rule.covariance) for i, samples in enumerate(PAIR)], make_params()
    given = copy.deepcopy((before, updates))
    _, after = calibrated(rule, updates, (0, 1, 2, 3, 4), params=before)
    assert list(after) == list(before)
    assert all(after[n].dtype == t.dtype and after[n].shape == t.shape for n, t in before.items())
    assert {n for n, t in before.items() if not torch.equal(after[n], t)} == HEAD
    assert changed_rows(before, after) == {0, 1, 3}
    assert same_bits(before, given[0])
    assert all(same_bits(a.statistics, b.statistics) for a, b in zip(updates, given[1], strict=True))


@EVERY
def test_the_same_generator_gives_the_same_bits(rule: GaussianCalibrator) -> None:
    updates = [told(i, samples, rule.covariance, torch.float32) for i, samples in enumerate(PAIR)]
    first, second = (calibrated(rule, updates, (0, 1, 2, 3), params=make_params(torch.float32)) for _ in range(2))
    assert same_bits(first, second)
    _, other = rule.calibrate({}, make_params(torch.float32), updates, (0, 1, 2, 3), (0, 1, 2, 3), torch_stream(2, "calibrate"))
    assert not torch.equal(other["head.weight"], first[1]["head.weight"])


@EVERY
def test_the_state_goes_through_a_file(rule: GaussianCalibrator) -> None:
    state, params = calibrated(rule, [told(0, PAIR[0], rule.covariance)], (0, 1, 3))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert same_bits(loaded, state)
    later = [told(1, PAIR[1], rule.covariance)]
    want, got = (calibrated(rule, later, (0, 2), s, params, (0, 1, 2, 3)) for s in (state, loaded))
    assert same_bits(got, want)


@EVERY
def test_without_epochs_it_is_the_merge_alone(rule: GaussianCalibrator) -> None:
    rule = build("calibrators", {"name": type(rule).__module__.rpartition(".")[2], "covariance": rule.covariance, "epochs": 0})
    params = make_params()
    state, out = calibrated(rule, [told(0, PAIR[0], rule.covariance)], (0, 1, 3), params=params)
    assert same_bits(out, params)
    assert sorted(state) == [0, 1, 3]


@EVERY
def test_an_update_without_the_statistics(rule: GaussianCalibrator) -> None:
    with pytest.raises(AggregationError, match=r"client 4 sent no 'class_moments\.count/head\.weight'"):
        calibrated(rule, [ClientUpdate(4, 3, {})], (0, 1))


@EVERY
def test_nobody_holds_any_class(rule: GaussianCalibrator) -> None:
    state, out = calibrated(rule, [told(0, {}, rule.covariance)], (0, 1))
    assert state == {}
    assert same_bits(out, make_params())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"covariance": "ful"}, r"covariance 'ful' is unknown\. Did you mean 'full'\?"),
        ({"schedule": "linear"}, "Choose from: cosine, constant"),
        ({"samples_per_class": 0}, "samples_per_class must be at least 1, got 0"),
        ({"epochs": -1}, "epochs must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0"),
        ({"lr": math.nan}, "lr must be a finite number, got nan"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("calibrators", {"name": name, **options})


def test_bad_options_of_one() -> None:
    with pytest.raises(ConfigError, match="factor must not be negative, got -1"):
        Hgp(factor=-1.0)
    with pytest.raises(ConfigError, match=r"gaussian 'pool' is unknown\. Did you mean 'pooled'\?"):
        Ccvr(gaussian="pool")
    with pytest.raises(ConfigError, match="Choose from: task, seen"):
        Ccvr(classes="all")
    with pytest.raises(ConfigError, match="Choose from: round, task_end"):
        Ccvr(when="end")


# ---------------------------------------------------------------- what is remembered


def test_classes_of_old_tasks_stay_and_those_of_this_one_are_replaced() -> None:
    rule = Hgp()
    first, params = calibrated(rule, [told(0, PAIR[0]), told(1, PAIR[1])], (0, 1, 2, 3))
    assert {c: one["count"].tolist() for c, one in first.items()} == {0: [4, 9], 1: [7, 2], 3: [3]}
    for c in (0, 1):
        want = torch.stack([samples[c].var(0) for samples in PAIR])
        torch.testing.assert_close(first[c]["variance"], want, rtol=1e-12, atol=0)
    later = [told(2, draw_samples({1: 3, 4: 6}, 2))]
    second, after = calibrated(rule, later, (1, 3, 4), first, params, seen=(0, 1, 2, 3, 4))
    assert sorted(second) == [0, 1, 3, 4]
    assert second[1]["count"].tolist() == [3]
    for c in (0, 3):  # 0 is of an old task, 3 of this one too, but nobody of this round told of it
        assert same_bits(second[c], first[c])
    assert changed_rows(params, after) == {0, 1, 3, 4}


@pytest.mark.parametrize(("classes", "trained"), [("task", {4, 5}), ("seen", {0, 1, 3, 4, 5})])
def test_ccvr_trains_the_current_task_or_all(classes: str, trained: set[int]) -> None:
    rule = Ccvr(classes=classes)
    assert rule.rewrites_old_rows == (classes == "seen")
    state, params = calibrated(rule, [told(0, PAIR[0])], (0, 1, 2, 3))
    _, after = calibrated(rule, [told(1, draw_samples({4: 5, 5: 5}, 3))], (4, 5), state, params, seen=range(6))
    assert changed_rows(params, after) == trained


def test_when_ccvr_works() -> None:
    once, always = Ccvr(), Ccvr(when="round", covariance="full")
    assert once.plan({}, 0, last=False) is None
    (request,) = once.plan({}, 2, last=True).statistics  # type: ignore[union-attr]
    assert (request.name, request.match, request.options) == ("class_moments", ("head.weight",), {"form": "full"})
    assert always.plan({}, 0, last=False) == always.plan({}, 2, last=True)
    assert always.plan({}, 0, last=False).statistics[0].options == {"form": "covariance"}  # type: ignore[union-attr]
    assert Hgp().plan({}, 0, last=False) is not None
    assert Hgp().rewrites_old_rows
    held_KC = np.array([[1, 2, 1, 0], [1, 0, 0, 0]])
    for rule in (Hgp(), Ccvr(gaussian="mixture")):
        assert rule.can_be_told(held_KC).tolist() == [False, True, False, False]
    assert Ccvr().can_be_told(held_KC).tolist() == [True, True, False, False]


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5),
    covariance=st.sampled_from(["diagonal", "full"]),
    seed=st.integers(0, 50),
)
def test_pooled_moments_are_those_of_the_concatenated_data(sizes: list[tuple[int, int]], covariance: str, seed: int) -> None:
    """Clients with one sample and with none included."""
    clients = [draw_samples({2: a, 5: b}, seed, i) for i, (a, b) in enumerate(sizes)]
    rule = Ccvr(covariance=covariance, epochs=0)
    state, _ = calibrated(rule, [told(i, samples, covariance) for i, samples in enumerate(clients)], (2, 5))
    for c in (2, 5):
        data_ND = torch.cat([samples[c] for samples in clients]).numpy()
        if len(data_ND) < 2:
            assert c not in state
            continue
        assert state[c]["count"].tolist() == [len(data_ND)]
        np.testing.assert_allclose(state[c]["mean"][0], data_ND.mean(0), rtol=1e-9, atol=1e-9)
        want = np.cov(data_ND, rowvar=False)
        if covariance == "diagonal":
            np.testing.assert_allclose(state[c]["variance"][0], want.diagonal(), rtol=1e-9, atol=1e-9)
        else:
            np.testing.assert_allclose(from_upper_triangle(state[c]["covariance"][0]), want, rtol=1e-9, atol=1e-9)


def test_one_client_pools_to_itself() -> None:
    update = [told(0, PAIR[0], dtype=torch.float32)]
    alone, _ = calibrated(Ccvr(epochs=0), update, (0, 1, 3))
    mixture, _ = calibrated(Ccvr(gaussian="mixture", epochs=0), update, (0, 1, 3))
    assert same_bits(alone, mixture)


# ---------------------------------------------------------------- drawing


def known(counts: Sequence[Sequence[float]], second: str, spread: float) -> list[dict[str, Tensor]]:
    """A class per list, a component per count; every component has a mean of its own."""
    out, number = [], 0
    for per_class in counts:
        means = torch.arange(number, number + len(per_class), dtype=torch.float64)[:, None] * torch.ones(WIDTH)
        number += len(per_class)
        one = torch.full((WIDTH,), spread) if second == "variance" else upper_triangle(spread * torch.eye(WIDTH))
        out.append({"count": torch.tensor(per_class), "mean": means, second: one.double().expand(len(per_class), -1)})
    return out


@pytest.mark.parametrize("second", ["variance", "covariance"])
def test_without_variance_every_draw_is_a_mean(second: str) -> None:
    """And so it tells its component: classes are uniform, components as their counts (χ² with 5 standard deviations)."""
    counts = [[2.0, 6.0, 12.0], [50.0], [3.0, 3.0], [1.0, 9.0]]
    mixture = Mixture.of(known(counts, second, 0.0), 3.0, torch.float64)
    x_ND, place_N = mixture.draw(40_000, torch_stream(3, "draw"))
    component_N = x_ND[:, 0].long()
    assert torch.equal(x_ND, component_N[:, None].double().expand(-1, WIDTH))
    assert torch.equal(place_N, torch.tensor([0, 0, 0, 1, 2, 2, 3, 3])[component_N])

    def chi2(drawn: Tensor, share: Tensor) -> float:
        want = share / share.sum() * drawn.sum()
        return float(((drawn - want).square() / want).sum())

    assert chi2(place_N.bincount(minlength=4).double(), torch.ones(4).double()) < 3 + 5 * 6**0.5
    drawn = component_N.bincount(minlength=8).double()
    for part, per_class in zip(drawn.split([len(c) for c in counts]), counts, strict=True):
        freedom = len(per_class) - 1
        assert chi2(part, torch.tensor(per_class).double()) <= freedom + 5 * (2 * freedom) ** 0.5
    order = (place_N[1:] == place_N[:-1]).double().mean()
    assert float(order) == pytest.approx(0.25, abs=0.02)  # shuffled: neighbours are of the same class by chance alone


@pytest.mark.parametrize(("covariance", "factor"), [("diagonal", None), ("full", None), ("diagonal", 0.5), ("full", 2.0)])
def test_draws_have_the_moments_that_were_told(covariance: str, factor: float | None) -> None:
    rule = Hgp(covariance=covariance, factor=factor, epochs=0)
    f = factor or (3.0 if covariance == "diagonal" else 1.0)
    samples = draw_samples({1: 40}, 7)
    state, _ = calibrated(rule, [told(0, samples, covariance)], (1,))
    mixture = Mixture.of([state[1]], rule.inflation, torch.float64)
    x_ND, _ = mixture.draw(200_000, torch_stream(3, "moments"))
    want = samples[1].T.cov()
    if covariance == "diagonal":
        want = want.diagonal().diag()
    scale = (f * want.diagonal()).sqrt()
    assert float(((x_ND.mean(0) - samples[1].mean(0)) / scale).abs().max()) < 0.012
    assert float(((x_ND.T.cov() - f * want) / (scale * scale[:, None])).abs().max()) < 0.02


def test_cholesky_of_a_regular_covariance_is_exact() -> None:
    covariance = draw_samples({0: 50}, 8)[0].T.cov()
    factor = cholesky(upper_triangle(covariance))
    torch.testing.assert_close(factor @ factor.T, covariance, rtol=1e-12, atol=1e-12)
    assert torch.equal(factor, factor.tril())


@pytest.mark.parametrize("samples", [2, 3, 20, 40])
def test_cholesky_of_few_samples(samples: int) -> None:
    """Rank 1, 2, 19 and 39 of 40, rounded to float32 as on the wire: off by a small ridge on the diagonal and nothing else."""
    x = torch.randn(samples, 40, dtype=torch.float64, generator=torch_stream(4, samples))
    covariance = x.T.cov()
    factor = cholesky(upper_triangle(covariance.float()))
    off = factor @ factor.T - covariance
    mean_variance = float(covariance.diagonal().mean())
    assert float((off - off.diagonal().diag()).abs().max()) < 1e-6 * float(covariance.abs().max())
    assert float(off.diagonal().abs().max()) < 1e-4 * mean_variance


def test_cholesky_of_what_is_no_covariance() -> None:
    assert not cholesky(torch.zeros(6)).any()
    with pytest.raises(AggregationError, match="large negative eigenvalues"):
        cholesky(upper_triangle(torch.diag(torch.tensor([5.0, -3.0, 1.0]))))


# ---------------------------------------------------------------- the loss and its steps


def loss(weight_KD: Tensor, bias_K: Tensor, x_bD: Tensor, place_b: Tensor, temperature: float | None) -> Tensor:
    """As the sheets write it."""
    z_bK = F.linear(x_bD, weight_KD, bias_K)
    if temperature is not None:
        z_bK = z_bK / z_bK.norm(dim=1, keepdim=True) / temperature
    return F.cross_entropy(z_bK, place_b)


def batch(seed: int, classes: int = 4, size: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch_stream(5, "batch", seed)
    weight, bias, x = (torch.randn(s, dtype=torch.float64, generator=draw) for s in ((classes, WIDTH), (classes,), (size, WIDTH)))
    return weight, bias, x, torch.randint(0, classes, (size,), generator=draw)


@pytest.mark.parametrize("temperature", [0.1, 1.0, None])
@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_autograds(temperature: float | None, seed: int) -> None:
    weight, bias, x, place = batch(seed)
    leaves = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    want = torch.autograd.grad(loss(*leaves, x, place, temperature), leaves)
    for got, expected in zip(head_gradient(weight, bias, x, place, temperature), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
def test_the_normalised_loss_does_not_see_the_heads_scale(seed: int, scale: float) -> None:
    """Its gradient is orthogonal to the head, and 1/c as long for a head c times as long."""
    weight, bias, x, place = batch(seed)
    got_w, got_b = head_gradient(weight, bias, x, place, 0.1)
    assert abs(float((got_w * weight).sum() + (got_b * bias).sum())) < 1e-9 * float(1 + got_w.norm() * weight.norm())
    for got, base in zip(head_gradient(scale * weight, scale * bias, x, place, 0.1), (got_w, got_b), strict=True):
        torch.testing.assert_close(scale * got, base, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("scale", [0.01, 7.0])
def test_a_longer_head_with_a_longer_step_is_calibrated_alike(scale: float) -> None:
    """W ← W − lr g becomes cW ← cW − (c² lr)(g / c)."""
    updates, params = [told(0, PAIR[0]), told(1, PAIR[1])], make_params()
    _, base = calibrated(Hgp(lr=0.02), updates, (0, 1, 3), params=params)
    longer = {n: scale * t if n in HEAD else t for n, t in params.items()}
    _, out = calibrated(Hgp(lr=0.02 * scale**2), updates, (0, 1, 3), params=longer)
    for name in HEAD:
        torch.testing.assert_close(out[name], scale * base[name], rtol=1e-7, atol=1e-9 * scale)


def test_a_head_of_zeros_takes_steps_of_ordinary_length() -> None:
    zeros = {n: torch.zeros_like(t) if n in HEAD else t for n, t in make_params(torch.float32).items()}
    _, out = calibrated(Hgp(), [told(0, PAIR[0], dtype=torch.float32)], (0, 1, 3), params=zeros)
    longest = float(out["head.weight"].abs().max())
    assert 0.01 < longest < 10


@pytest.mark.parametrize("options", [{}, {"normalise": False, "lr": 0.05}, {"schedule": "constant", "momentum": 0.5}])
def test_training_is_torchs_sgd_on_the_same_draws(options: dict[str, Any]) -> None:
    """torch.optim.SGD, its cosine schedule and autograd, in float64; 3 classes x 50 draws in batches of 64, 64 and 22."""
    rule = Hgp(samples_per_class=50, batch_size=64, epochs=3, **options)
    classes, before = (0, 1, 3), make_params()
    state, after = calibrated(rule, [told(0, PAIR[0]), told(1, PAIR[1])], classes, params=before)
    head = [before[n][list(classes)].clone().requires_grad_() for n in ("head.weight", "head.bias")]
    optimizer = torch.optim.SGD(head, lr=rule.lr, momentum=rule.momentum)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    mixture = Mixture.of([state[c] for c in classes], 3.0, torch.float64)
    generator = torch_stream(1, "calibrate")
    for _ in range(3):
        x, place = mixture.draw(150, generator)
        for rows in torch.arange(150).split(64):
            optimizer.zero_grad()
            loss(head[0], head[1], x[rows], place[rows], 0.1 if rule.normalise else None).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if rule.schedule == "cosine":
            cosine.step()
    for name, want in zip(("head.weight", "head.bias"), head, strict=True):
        torch.testing.assert_close(after[name][list(classes)], want.detach(), rtol=1e-9, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(
    held=st.dictionaries(st.integers(0, CLASSES - 1), st.integers(0, 4), max_size=CLASSES),
    others=st.dictionaries(st.integers(0, CLASSES - 1), st.integers(0, 4), max_size=CLASSES),
    classes=st.sets(st.integers(0, CLASSES - 1), min_size=1),
    covariance=st.sampled_from(["diagonal", "full"]),
)
def test_rows_of_other_classes_are_left_alone(
    held: dict[int, int], others: dict[int, int], classes: set[int], covariance: str
) -> None:
    """Rows of classes that are not the task's, and of those that nobody holds two samples of, keep their bits; the logits of the
    latter are not in the loss either: whatever stands in those rows, the others come out the same."""
    rule = Hgp(covariance=covariance, samples_per_class=8, epochs=1)
    updates = [told(i, draw_samples(sizes, i), covariance) for i, sizes in enumerate((held, others))]
    params, rows = make_params(), sorted(classes)
    _, after = calibrated(rule, updates, rows, params=params)
    told_of = {c for c in rows if max(held.get(c, 0), others.get(c, 0)) >= 2}
    assert changed_rows(params, after) == (told_of if len(told_of) > 1 else set())  # a single class has nothing to be told from
    rest = [c for c in range(CLASSES) if c not in told_of]
    moved = {n: t.clone() for n, t in params.items()}
    for name in HEAD:
        moved[name][rest] += 100.0
    _, again = calibrated(rule, updates, rows, params=moved)
    for name in HEAD:
        assert torch.equal(again[name][sorted(told_of)], after[name][sorted(told_of)])


def test_it_takes_away_a_bias_to_recent_classes() -> None:
    """Five well separated classes, of which the head favours the last two by a bias: it finds the first three again."""
    samples = {c: 6 * torch.eye(CLASSES, WIDTH + 3, dtype=torch.float64)[c, :WIDTH] for c in range(WIDTH)}
    samples = {c: x + 0.3 * torch.randn(30, WIDTH, dtype=torch.float64, generator=torch_stream(6, c)) for c, x in samples.items()}
    params = make_params() | {"head.weight": torch.eye(CLASSES, WIDTH).double(), "head.bias": torch.zeros(CLASSES).double()}
    params["head.bias"][3:] = 10.0

    def accuracy(head: Tensors) -> float:
        x, y = torch.cat(list(samples.values())), torch.arange(WIDTH).repeat_interleave(30)
        logits = F.linear(x, head["head.weight"], head["head.bias"])[:, :WIDTH]
        return float((logits.argmax(1) == y).double().mean())

    _, after = calibrated(Hgp(lr=0.1), [told(0, samples)], range(WIDTH), params=params)
    assert accuracy(params) == pytest.approx(0.4)
    assert accuracy(after) == 1.0


# ---------------------------------------------------------------- in a run

FEDAVG = ("server.aggregator=fedavg", "server.consolidator=none")


@pytest.mark.parametrize("name", NAMES)
def test_a_run_differs_in_the_head_alone(name: str, tmp_path: Path) -> None:
    """One round of one task: the adapter has the bits of the run without a calibrator, the head has not; with one client and no
    epochs the whole run is the plain one."""
    small = (*FEDAVG, "stream.classes_per_task=3", "stream.tasks=1", "server.rounds=1")
    plain, with_it = (tiny(*small, *more, output=tmp_path) for more in ((), (f"server.calibrator.name={name}",)))
    states = [final_state(Path(run(config).path), config) for config in (plain, with_it)]
    differ = {n for n, t in states[0].params.items() if not torch.equal(t, states[1].params[n])}
    assert differ == HEAD
    rows = list(states[1].calibrator.values())
    assert len(rows) == 3
    assert sum(int(one["count"].sum()) for one in rows) <= 36

    alone = (*FEDAVG, "partition.clients=1")
    calm = (f"server.calibrator.name={name}", "server.calibrator.epochs=0")
    states = [
        final_state(Path(run(config).path), config) for config in (tiny(*alone, *more, output=tmp_path) for more in ((), calm))
    ]
    assert same_bits(states[1].params, states[0].params)
    assert len(states[1].calibrator) == 6
