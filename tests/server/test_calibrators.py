"""Calibrators: what clients told of becomes Gaussians, features are drawn from them, and only the head's rows are trained.

Shapes: N samples, K classes that are trained on, C head rows, D features.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clients import samples as stored
from fedsim.core.config import SimConfig, build
from fedsim.core.contracts import statistic
from fedsim.core.errors import AggregationError, ConfigError
from fedsim.core.messages import ClientUpdate, Reply, Tensors
from fedsim.core.rng import torch_stream
from fedsim.core.sums import BlockSum
from fedsim.core.tensors import from_upper_triangle, matching, upper_triangle
from fedsim.runs.results import Results
from fedsim.simulation import prepare, run
from server import heads, loop, planning
from server.calibrators._gaussians import GaussianCalibrator, Mixture, cholesky, head_gradient
from server.calibrators.ccvr import Calibrator as Ccvr
from server.calibrators.hgp import Calibrator as Hgp
from server.calibrators.nearest_mean import Calibrator as NearestMean
from server.gather import Round
from server.state import ServerState
from tests.tiny import final_state, same_bits, tiny

CLASSES, WIDTH = 8, 5
DRAWING = ("ccvr", "hgp")  # features, from Gaussians
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


def told(
    client_id: int,
    samples: Samples,
    covariance: str = "diagonal",
    dtype: torch.dtype = torch.float64,
    classes: Sequence[int] = range(CLASSES),
) -> ClientUpdate:
    """An update with the statistics of these samples, from numpy, in the wire's format. classes: that are asked for."""
    rows = {c: samples[c].numpy() for c in classes if len(samples.get(c, ()))}
    second = "variance" if covariance == "diagonal" else "covariance"
    count = torch.tensor([float(len(samples.get(c, ()))) for c in classes], dtype=dtype)
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


def asked_for(update: ClientUpdate, classes: Sequence[int]) -> ClientUpdate:
    """The update to a plan that asks for these classes alone."""
    count_C = statistic(update, "class_moments.count/head.weight")
    if len(count_C) == len(classes):
        return update
    found = {}
    for name, tensor in update.statistics.items():
        least = 1 if "covariance" in name else 0
        known = [c for c in range(CLASSES) if count_C[c] > least]
        held = tensor[[known.index(c) for c in classes if c in known]]
        found[name] = count_C[list(classes)] if "count" in name else held
    return replace(update, statistics=found)


def calibrated(
    rule: GaussianCalibrator,
    updates: Sequence[ClientUpdate],
    classes: Sequence[int],
    state: Any = None,
    params: Tensors | None = None,
    before: Sequence[Sequence[int]] = (),
) -> tuple[Any, Tensors]:
    """After a round of a task with these classes; `before`: the classes of the tasks before it."""
    generator = torch_stream(1, "calibrate")
    state = rule.init() if state is None else state
    if rule.additive:
        updates = [asked_for(update, classes) for update in updates]
    return rule.calibrate(state, params or make_params(), updates, (*before, tuple(classes)), generator)


def of_task(state: Any, task: int = 0) -> Any:
    """The Gaussians that a state holds of a task."""
    return state["gaussians"].get(task, {})


def changed_rows(before: Tensors, after: Tensors) -> set[int]:
    weight = (before["head.weight"] != after["head.weight"]).any(1)
    return set((weight | (before["head.bias"] != after["head.bias"])).nonzero().flatten().tolist())


# ---------------------------------------------------------------- every calibrator

PAIR = [draw_samples({0: 4, 1: 7, 3: 3}, 0), draw_samples({0: 9, 1: 2, 2: 1}, 1)]
EVERY = pytest.mark.parametrize(
    "rule",
    [rule(covariance=form, epochs=2) for rule in (partial(Ccvr, when="round"), Hgp) for form in ("diagonal", "full")],
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
    _, other = rule.calibrate(rule.init(), make_params(torch.float32), updates, [(0, 1, 2, 3)], torch_stream(2, "calibrate"))
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
    want, got = (calibrated(rule, later, (0, 2), s, params, [(1, 3)]) for s in (state, loaded))
    assert same_bits(got, want)


@EVERY
def test_without_epochs_it_is_the_merge_alone(rule: GaussianCalibrator) -> None:
    rule, params = replace(rule, epochs=0), make_params()
    state, out = calibrated(rule, [told(0, PAIR[0], rule.covariance)], (0, 1, 3), params=params)
    assert same_bits(out, params)
    assert sorted(of_task(state)) == [0, 1, 3]


@EVERY
def test_an_update_without_the_statistics(rule: GaussianCalibrator) -> None:
    with pytest.raises(AggregationError, match=r"client 4 sent no 'class_moments\.count/head\.weight'"):
        calibrated(rule, [ClientUpdate(4, 3, {})], (0, 1))


@EVERY
def test_nobody_holds_any_class(rule: GaussianCalibrator) -> None:
    state, out = calibrated(rule, [told(0, {}, rule.covariance)], (0, 1))
    assert not of_task(state)
    assert same_bits(out, make_params())


@pytest.mark.parametrize("name", DRAWING)
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
        ({"clip_norm": 0.0}, "clip_norm must be positive, or null, got 0"),
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
    with pytest.raises(ConfigError, match="gaussian mixture goes with when: round only"):
        Ccvr(gaussian="mixture")


# ---------------------------------------------------------------- what is remembered


def test_classes_of_old_tasks_stay_and_those_of_this_one_are_replaced() -> None:
    rule = Hgp()
    state, params = calibrated(rule, [told(0, PAIR[0]), told(1, PAIR[1])], (0, 1, 2, 3))
    first = of_task(state)
    assert {c: one["count"].tolist() for c, one in first.items()} == {0: [4, 9], 1: [7, 2], 3: [3]}
    for c in (0, 1):
        want = torch.stack([samples[c].var(0) for samples in PAIR])
        torch.testing.assert_close(first[c]["variance"], want, rtol=1e-12, atol=0)
    again, _ = calibrated(rule, [told(2, draw_samples({1: 3}, 2))], (0, 1, 2, 3), state, params)  # the next round
    assert of_task(again)[1]["count"].tolist() == [3]
    assert all(same_bits(of_task(again)[c], first[c]) for c in (0, 3))  # of which nobody told now
    later, after = calibrated(rule, [told(2, draw_samples({4: 6, 5: 1}, 2))], (4, 5), again, params, before=[(0, 1, 2, 3)])
    assert same_bits(of_task(later), of_task(again))
    assert sorted(of_task(later, 1)) == [4]
    assert changed_rows(params, after) == {0, 1, 3, 4}


@pytest.mark.parametrize(
    "rule",
    [Hgp(), *(Ccvr(when="round", classes=classes, covariance="diagonal") for classes in ("seen", "task"))],
    ids=["hgp", "seen", "task"],
)
def test_a_class_that_comes_again_keeps_its_gaussians_of_all_tasks(rule: GaussianCalibrator, monkeypatch: Any) -> None:
    """Domains: the same classes in both tasks, of which the first kept nothing when they were kept by class. What is drawn has
    the clients of both tasks, by their counts."""
    old, new = {0: draw_samples({0: 30, 1: 10}, 3)[0] + 50, 1: draw_samples({1: 10}, 3)[1] - 50}, draw_samples({0: 10, 1: 10}, 4)
    state, params = calibrated(rule, [told(0, old)], (0, 1))
    drawn: list[Mixture] = []
    real = Mixture.draw
    monkeypatch.setattr(Mixture, "draw", lambda self, n, generator: (drawn.append(self), real(self, n, generator))[1])
    state, after = calibrated(rule, [told(1, new)], (0, 1), state, params, before=[(0, 1)])
    assert [sorted(of_task(state, t)) for t in (0, 1)] == [[0, 1], [0, 1]]
    mixture = drawn[0]
    assert mixture.weight_M.tolist() == [0.75, 0.25, 0.5, 0.5]
    assert mixture.place_M.tolist() == [0, 0, 1, 1]
    want = torch.stack([x.mean(0) for x in (old[0], new[0], old[1], new[1])])
    torch.testing.assert_close(mixture.mean_MD, want, rtol=1e-12, atol=1e-12)
    assert changed_rows(params, after) == {0, 1}


def test_hgp_with_two_domains_knows_both() -> None:
    """One line tells the classes of both domains apart, and it is not the one that the second domain alone gives a new head."""
    rule = Hgp(lr=0.05, factor=1.0, epochs=40, samples_per_class=64, batch_size=32)
    middles = [{0: (2.0, 0.0), 1: (-2.0, 0.0)}, {0: (-2.0, 8.0), 1: (-6.0, 8.0)}]
    domains = [
        {
            c: torch.tensor([*xy, 0, 0, 0]) + 0.2 * torch.randn(30, WIDTH, dtype=torch.float64, generator=torch_stream(8, d, c))
            for c, xy in middle.items()
        }
        for d, middle in enumerate(middles)
    ]
    state, _ = calibrated(rule, [told(0, domains[0])], (0, 1))
    _, params = calibrated(rule, [told(0, domains[1])], (0, 1), state, before=[(0, 1)])
    for samples in domains:
        guess = torch.cat([F.linear(samples[c], params["head.weight"], params["head.bias"])[:, :2].argmax(1) for c in (0, 1)])
        assert guess.tolist() == [0] * 30 + [1] * 30


@pytest.mark.parametrize(("classes", "trained"), [("task", {4, 5}), ("seen", {0, 1, 3, 4, 5})])
def test_ccvr_trains_the_current_task_or_all(classes: str, trained: set[int]) -> None:
    rule = Ccvr(classes=classes, when="round", covariance="diagonal")
    assert ("old head rows rewritten" in rule.traits.gives) == (classes == "seen")
    state, params = calibrated(rule, [told(0, PAIR[0])], (0, 1, 2, 3))
    _, after = calibrated(rule, [told(1, draw_samples({4: 5, 5: 5}, 3))], (4, 5), state, params, before=[(0, 1, 2, 3)])
    assert changed_rows(params, after) == trained


def test_when_ccvr_works() -> None:
    once, always = Ccvr(), Ccvr(when="round")
    assert once.plan(once.init(), 2, True, [(0, 1)]) is None
    (request,) = once.closing(once.init(), [(0, 1), (2, 5)]).statistics  # type: ignore[union-attr]
    assert (request.name, request.match) == ("class_moments", ("head.weight",))
    assert request.options == {"form": "covariance", "classes": [2, 5]}
    assert always.closing(always.init(), [(0, 1)]) is None
    seen = [(0, 1), (2, 5)]
    assert always.plan({}, 0, False, seen) == always.plan({}, 2, True, seen)
    assert always.plan({}, 0, False, seen).statistics[0].options == {"form": "covariance", "classes": [2, 5]}  # type: ignore[union-attr]
    assert always.additive and not Hgp().additive and not Ccvr(gaussian="mixture", when="round").additive
    assert Hgp().plan({}, 0, False, seen).statistics[0].options == {"form": "full"}  # type: ignore[union-attr]
    assert "old head rows rewritten" in Hgp().traits.gives
    held_KC = np.array([[1, 2, 1, 0], [1, 0, 0, 0]])
    for rule in (Hgp(), Ccvr(gaussian="mixture", when="round")):
        assert rule.can_be_told(held_KC).tolist() == [False, True, False, False]
    assert Ccvr().can_be_told(held_KC).tolist() == [True, True, False, False]
    assert NearestMean().can_be_told(held_KC).tolist() == [True, True, True, False]


@settings(max_examples=40)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5),
    covariance=st.sampled_from(["diagonal", "full"]),
    when=st.sampled_from(["round", "task_end"]),
    seed=st.integers(0, 50),
)
def test_pooled_moments_are_those_of_the_concatenated_data(
    sizes: list[tuple[int, int]], covariance: str, when: str, seed: int
) -> None:
    """Clients with one sample and with none included; from updates after a round, and from sums at a task's end."""
    clients = [draw_samples({2: a, 5: b}, seed, i) for i, (a, b) in enumerate(sizes)]
    if when == "round":
        rule = Ccvr(covariance=covariance, epochs=0, when="round")
        state = of_task(calibrated(rule, [told(i, samples, covariance) for i, samples in enumerate(clients)], (2, 5))[0])
    else:
        rule, total = Ccvr(covariance=covariance, epochs=0), BlockSum()
        for i, samples in enumerate(clients):
            total.add(i, 1, rule.lift(told(i, samples, covariance, classes=(2, 5))))
        ended = rule.end_task(rule.init(), make_params(), total.result() or {}, [(0, 1), (2, 5)], torch_stream(1, "end"))
        assert not of_task(ended, 0)
        state = of_task(ended, 1)
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
    round = partial(Ccvr, when="round", covariance="diagonal", epochs=0)
    start = make_params(torch.float32)
    alone, mixture = (
        of_task(calibrated(round(gaussian=kind), update, (0, 1, 3), None, start)[0]) for kind in ("pooled", "mixture")
    )
    assert alone.keys() == mixture.keys() == {0, 1, 3}
    for c, gaussian in mixture.items():
        torch.testing.assert_close(alone[c], gaussian, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("aggregator", ["fedavg", "fedatt"])
def test_moments_of_a_round_are_summed_where_clients_run(
    aggregator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits from sums as from whole updates, of which nothing is left where both parts take sums; a rule that needs
    every update gets them, statistics and all, and the calibrator its sum."""
    ccvr = "server.calibrator={name: ccvr, when: round, covariance: diagonal}"
    config = tiny(f"server.aggregator={aggregator}", "server.consolidator=mean", ccvr, "partition={name: iid, clients: 12}")
    rounds, real = list[Round](), heads.calibrate

    def watched(sim: Any, state: Any, params: Tensors, round: Round) -> Any:
        rounds.append(round)
        return real(sim, state, params, round)

    monkeypatch.setattr(heads, "calibrate", watched)
    ended = []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(planning, "reply", lambda sim, state, repair, plan: Reply())
            monkeypatch.setattr(planning, "summing", lambda sim, repair, plan: ())
        results = run(config, output=tmp_path / str(whole))
        ended.append(final_state(tmp_path / str(whole), config))
        assert set(results.costs["bytes"]["up"]) == {"adapter", "head", "statistics"}
    assert same_bits(ended[0].params, ended[1].params) and same_bits(ended[0].calibrator, ended[1].calibrator)
    summed, kept = rounds[0], rounds[4]
    assert set(summed.totals) == ({"rule", "calibrator"} if aggregator == "fedavg" else {"calibrator"})
    assert any(u.statistics for u in summed.updates) == (aggregator == "fedatt")
    assert not kept.totals and all(u.statistics for u in kept.updates)
    classes, width = config.data["classes"] // 2, 16
    assert summed.totals["calibrator"]["square"].shape == (classes, width)


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
    mixture = Mixture.of([of_task(state)[1]], rule.inflation, torch.float64)
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


@settings(max_examples=30)
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
    _, base = calibrated(Hgp(lr=0.02, clip_norm=None), updates, (0, 1, 3), params=params)
    longer = {n: scale * t if n in HEAD else t for n, t in params.items()}
    _, out = calibrated(Hgp(lr=0.02 * scale**2, clip_norm=None), updates, (0, 1, 3), params=longer)
    for name in HEAD:
        torch.testing.assert_close(out[name], scale * base[name], rtol=1e-7, atol=1e-9 * scale)


def test_a_head_of_zeros_takes_steps_of_ordinary_length() -> None:
    zeros = {n: torch.zeros_like(t) if n in HEAD else t for n, t in make_params(torch.float32).items()}
    _, out = calibrated(Hgp(), [told(0, PAIR[0], dtype=torch.float32)], (0, 1, 3), params=zeros)
    longest = float(out["head.weight"].abs().max())
    assert 0.01 < longest < 10


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    head=st.sampled_from([0.0, 1e-38, 1e-20, 1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e6]),
    size=st.sampled_from([0.0, 1e-6, 1.0, 1e3, 1e6]),
    classes=st.integers(2, 3),
    normalise=st.booleans(),
)
def test_a_step_is_bounded_whatever_head_and_features(seed: int, head: float, size: float, classes: int, normalise: bool) -> None:
    """In float32. One epoch of B batches at a constant rate without momentum goes B · lr · clip_norm at most; without the bound,
    logits as short as 1e-3 go a thousand times as far."""
    samples = {c: size * x for c, x in draw_samples({0: 4, 1: 4, 2: 4}, seed).items() if c < classes}
    small = {n: head * t if n in HEAD else t for n, t in make_params(torch.float32).items()}
    rule = Hgp(epochs=1, samples_per_class=16, batch_size=8, momentum=0.0, schedule="constant", normalise=normalise, lr=1.0)
    _, out = calibrated(rule, [told(0, samples, dtype=torch.float32)], range(classes), params=small)
    moved = math.sqrt(sum(float((out[n].double() - small[n].double()).square().sum()) for n in HEAD))
    rounding = 1e-6 * (1 + sum(float(small[n].abs().max()) for n in HEAD)) * 40
    assert moved <= 2 * classes * 20.0 * (1 + 1e-5) + rounding


def test_short_logits_do_not_explode() -> None:
    """Two classes and logits of length 1e-3: the mean gradient would be thousands long; a usual head has not a bit moved."""
    samples, params = draw_samples({0: 8, 1: 8}, 9), make_params()
    short = {n: 1e-4 * t if n in HEAD else t for n, t in params.items()}

    def moved(start: Tensors, clip_norm: float | None) -> Tensors:
        _, out = calibrated(Hgp(clip_norm=clip_norm, epochs=1), [told(0, samples)], (0, 1), params=start)
        return out

    assert float(moved(short, None)["head.weight"].abs().max()) > 10 * float(moved(short, 20.0)["head.weight"].abs().max())
    assert same_bits(moved(params, None), moved(params, 20.0))


@pytest.mark.parametrize("options", [{}, {"normalise": False, "lr": 0.05}, {"schedule": "constant", "momentum": 0.5}])
def test_training_is_torchs_sgd_on_the_same_draws(options: dict[str, Any]) -> None:
    """torch.optim.SGD, its cosine schedule and autograd, in float64; 3 classes x 50 draws in batches of 64, 64 and 22."""
    rule = Hgp(samples_per_class=50, batch_size=64, epochs=3, **options)
    classes, before = (0, 1, 3), make_params()
    state, after = calibrated(rule, [told(0, PAIR[0]), told(1, PAIR[1])], classes, params=before)
    head = [before[n][list(classes)].clone().requires_grad_() for n in ("head.weight", "head.bias")]
    optimizer = torch.optim.SGD(head, lr=rule.lr, momentum=rule.momentum)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    mixture = Mixture.of([of_task(state)[c] for c in classes], 3.0, torch.float64)
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


@settings(max_examples=30)
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


@pytest.mark.parametrize("name", ["hgp", "ccvr, when: round"])
def test_a_run_differs_in_the_head_alone(name: str, tmp_path: Path) -> None:
    """One round of one task: the adapter has the bits of the run without a calibrator, the head has not; with one client and no
    epochs the whole run is the plain one."""
    small = (*FEDAVG, "stream.classes_per_task=3", "stream.tasks=1", "server.rounds=1")
    calibrator = f"server.calibrator={{name: {name}}}"
    plain, with_it = (tiny(*small, *more, output=tmp_path) for more in ((), (calibrator,)))
    states = [final_state(Path(run(config).path), config) for config in (plain, with_it)]
    differ = {n for n, t in states[0].params.items() if not torch.equal(t, states[1].params[n])}
    assert differ == HEAD
    rows = list(of_task(states[1].calibrator).values())
    assert len(rows) == 3
    assert sum(int(one["count"].sum()) for one in rows) <= 36

    alone = (*FEDAVG, "partition.clients=1")
    calm = (calibrator.replace("}", ", epochs: 0}"),)
    states = [
        final_state(Path(run(config).path), config) for config in (tiny(*alone, *more, output=tmp_path) for more in ((), calm))
    ]
    assert same_bits(states[1].params, states[0].params)
    assert sorted(of_task(states[1].calibrator, 1)) == [3, 4, 5]


def features_of(config: SimConfig, deployed: Tensors, task: int) -> dict[int, Tensor]:
    """Features of all training samples of a task, of whichever client, by class, float64: the plain way."""
    parts = prepare(config)
    positions = np.concatenate([parts.spec.shard(task, c) for c in range(parts.manifest.num_clients)])
    samples = stored.Samples(parts.spec.train, parts.model.device)
    with torch.inference_mode(), parts.model.merged(deployed):
        inputs, labels = samples.batch(np.sort(positions))
        x_ND = parts.model.features(inputs).double()
    return {int(c): x_ND[labels == c] for c in labels.unique()}


def recorded(config: SimConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensors], list[ServerState], Results]:
    """What is evaluated at every task's end, and the state that the run goes on from."""
    shown, states = list[Tensors](), list[ServerState]()
    real, measured = loop.end_task, loop.measure

    def end_task(sim: Any, state: Any) -> Any:
        after = yield from real(sim, state)
        states.append(after)
        return after

    def measure(sim: Any, state: Any, deployed: Tensors, stage: str) -> Any:
        if stage == "task_end":
            shown.append(deployed)
        return measured(sim, state, deployed, stage)

    monkeypatch.setattr(loop, "end_task", end_task)
    monkeypatch.setattr(loop, "measure", measure)
    return shown, states, run(config)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("consolidator", ["none", "mean", "regmean"])
def test_ccvr_sees_all_data_under_the_merged_model_and_puts_the_head_back(
    consolidator: str, covariance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one of three clients drawn a round: moments are those of the concatenated data under what is deployed; the adapter and
    the head that training goes on from have the bits of the run without it; rows are the same SGD on the same draws."""
    small = ("server.aggregator=fedavg", f"server.consolidator={consolidator}", "server.participation=0.34", "server.rounds=1")
    small = (*small, "client.epochs=6", "client.lr=0.1")  # so that it matters through which module one looks
    config = tiny(*small, f"server.calibrator={{name: ccvr, covariance: {covariance}}}", output=tmp_path)
    plain = tiny(*small, output=tmp_path)
    without = final_state(Path(run(plain).path), plain)
    shown, states, results = recorded(config, monkeypatch)
    assert same_bits(without.params, states[-1].params)
    second, rule = "variance" if covariance == "diagonal" else "covariance", build("calibrators", config.server.calibrator)
    for task, (deployed, state) in enumerate(zip(shown, states, strict=True)):
        data = features_of(config, deployed, task)
        assert sorted(of_task(state.calibrator, task)) == sorted(data)
        for c, known in of_task(state.calibrator, task).items():
            assert known["count"].tolist() == [len(data[c])] == [12]
            np.testing.assert_allclose(known["mean"][0], data[c].mean(0), rtol=1e-5, atol=1e-5)
            want = data[c].T.cov()
            got = known[second][0].double().diag() if second == "variance" else from_upper_triangle(known[second][0].double())
            np.testing.assert_allclose(got, want.diagonal().diag() if second == "variance" else want, rtol=1e-4, atol=1e-4)
        before = features_of(config, state.params, task)
        apart = max(float((before[c].mean(0) - data[c].mean(0)).abs().max()) for c in data)
        assert (apart > 1e-2) == (consolidator != "none" and task == 1)
        head = {n: torch.zeros_like(t) for n, t in state.params.items() if n in HEAD}
        classes = [(0, 1, 2), (3, 4, 5)][: task + 1]
        trained = {**deployed, **{n: state.params[n] for n in head}}
        rows, weight, bias = rule.repaired(state.calibrator, trained, classes, torch_stream(0, "calibrate", task, 1))
        assert rows == list(range(3 * task + 3))
        assert torch.equal(deployed["head.weight"][rows], weight) and torch.equal(deployed["head.bias"][rows], bias)
        assert not torch.equal(state.params["head.weight"][rows], weight)
    assert results.costs["client_rounds"] == (2 * 1 + 2 * 3) + (2 * 3 if consolidator == "regmean" else 0)


def test_rows_of_old_tasks_are_deployed_as_they_were_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With classes: task; training, weight decay among it, goes on from other rows."""
    options = ("server.calibrator={name: ccvr, classes: task}", "client.weight_decay=0.5")
    shown, states, _ = recorded(tiny(*FEDAVG, *options, output=tmp_path), monkeypatch)
    for name in HEAD:
        assert torch.equal(shown[0][name][:3], shown[1][name][:3])
        assert not torch.equal(states[0].params[name][:3], states[1].params[name][:3])
        assert not torch.equal(shown[1][name][3:], states[1].params[name][3:])


@pytest.mark.parametrize("calibrator", ["hgp", "{name: ccvr, when: round}"])
def test_moments_of_a_round_are_those_of_the_blend_that_is_deployed(calibrator: str, tmp_path: Path) -> None:
    """One client, so that its module is the merged one: its moments of the second task are those under the mean of both tasks'
    modules; with the consolidator none, those under the module itself."""
    for consolidator in ("none", "mean"):
        one = ("server.aggregator=fedavg", f"server.consolidator={consolidator}", "partition.clients=1", "server.rounds=1")
        config = tiny(*one, f"server.calibrator={calibrator}", output=tmp_path)
        state = final_state(Path(run(config).path), config)
        deployed = build("consolidators", config.server.consolidator).deployed(state.consolidator, state.params, finished=True)
        data = features_of(config, deployed, 1)
        for c, known in of_task(state.calibrator, 1).items():
            np.testing.assert_allclose(known["mean"][0], data[c].mean(0), rtol=1e-4, atol=1e-5)
            if "variance" in known:
                np.testing.assert_allclose(known["variance"][0], data[c].var(0), rtol=1e-3, atol=1e-5)


SPLITS = (
    ("partition.clients=1",),
    ("server.participation=0.34",),
    ("partition={name: iid, clients: 5}", "server.participation=0.2"),
)


@pytest.mark.parametrize("stream", [(), ("stream.name=domain_incremental", "stream.tasks=null", "data.domains=2")])
def test_nearest_mean_of_the_bare_backbone_depends_on_no_split(stream: Sequence[str], tmp_path: Path) -> None:
    """Nothing is trained, not a byte of training goes up, and the head is the nearest class mean of the concatenated data."""
    accuracies = []
    for split in SPLITS:
        reference = ("adapter=none", "server.aggregator=frozen", "server.rounds=1", "server.calibrator=nearest_mean")
        config = tiny("server.consolidator=none", *reference, *stream, *split, output=tmp_path)
        results = run(config)
        assert results.path is not None
        state = final_state(Path(results.path), config)
        assert not state.params["head.weight"].any() and not state.params["head.bias"].any()
        assert set(results.costs["bytes"]["up"]) == {"statistics"}
        data: dict[int, Tensor] = {}
        for task in (0, 1):
            for c, x in features_of(config, {}, task).items():
                data[c] = torch.cat([data.get(c, x[:0]), x])
        means_CD = torch.stack([data[c].mean(0) for c in range(6)])
        deployed = NearestMean().deployed(state.calibrator, state.params)
        np.testing.assert_allclose(deployed["head.weight"], means_CD, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(deployed["head.bias"], -means_CD.square().sum(1) / 2, rtol=1e-5, atol=1e-6)
        parts = prepare(config)
        samples, right = stored.Samples(parts.spec.test, parts.model.device), []
        for task in (0, 1):
            inputs, labels = samples.batch(parts.spec.test_of(task))
            with torch.inference_mode():
                distance = torch.cdist(parts.model.features(inputs).double(), means_CD)
            right.append(100 * float((distance.argmin(1) == labels).double().mean()))
        assert results.accuracy[1].tolist() == pytest.approx(right)
        accuracies.append(results.accuracy[1].tolist())
    assert accuracies[0] == accuracies[1] == accuracies[2]


@pytest.mark.parametrize("name", ["lorm", "regmean", "variance_weighted", "livar"])
def test_rules_that_fit_a_head_look_at_what_is_deployed(name: str) -> None:
    """Statistics of its inputs are asked for through the blend of tasks, in every round."""
    rule = build("aggregators", {"name": name})
    params = make_params()
    for round in range(2):
        asked = [r for r in rule.plan(rule.init(params), round).statistics if matching(["head.weight"], r.match)]
        assert asked and all(r.blended for r in asked)
