"""First-session adaptation and the heads that go with it: against scikit-learn, closed forms, loops, all data in one place."""

# C classes, D features

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from fedsim.core.config import build
from fedsim.core.contracts import Calibrator
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate, Tensors
from fedsim.core.rng import torch_stream
from fedsim.core.sums import summed
from fedsim.core.tensors import upper_triangle, with_prefix
from fedsim.simulation import prepare, run
from server import checkpoint
from tests.server.test_calibrators import features_of, recorded
from tests.tiny import final_state, kept, learned, same_bits, stopping, tiny

CLASSES, WIDTH, TASKS = 6, 7, ((4, 0, 2), (1, 3, 5))


def data(count: int = 240) -> tuple[Tensor, Tensor]:
    """Features (N, D) far from zero and labels, float64; the classes overlap, are of unequal size and spread alike."""
    generator = torch_stream(0, "lda")
    labels = torch.cat([torch.arange(CLASSES), (torch.rand(count - CLASSES, generator=generator).square() * CLASSES).long()])
    centres = torch.randn(CLASSES, WIDTH, dtype=torch.float64, generator=generator)
    mixed = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator)
    return 3.0 + centres[labels] + torch.randn(count, WIDTH, dtype=torch.float64, generator=generator) @ mixed, labels


def within(x: Tensor, y: Tensor) -> Tensor:
    """The upper triangle of the scatter within classes."""
    centred = [x[y == c] - x[y == c].mean(0) for c in y.unique()]
    return upper_triangle(sum((rows.T @ rows for rows in centred), torch.zeros(x.shape[1], x.shape[1]).double()))


def calibrated(rule: Calibrator, x: Tensor, y: Tensor, clients: int = 3, tasks: Sequence[Sequence[int]] = TASKS) -> Tensors:
    """The head after these tasks, in float64, with the samples spread over clients."""
    whose = torch.randint(clients, y.shape, generator=torch_stream(clients, "split"))
    state, params = (
        rule.init(),
        {"head.weight": torch.ones(CLASSES, x.shape[1]).double(), "head.bias": torch.ones(CLASSES).double()},
    )
    for t, classes in enumerate(tasks):
        lifts = []
        for k in range(clients):
            at = (whose == k) & torch.isin(y, torch.tensor(classes))
            means = [x[at & (y == c)].mean(0) for c in classes if bool((at & (y == c)).any())]
            sent = {
                "class_moments.count/head.weight": torch.tensor([float((at & (y == c)).sum()) for c in classes]).double(),
                "class_moments.mean/head.weight": torch.stack(means) if means else x[:0],
                "class_moments.within/head.weight": within(x[at], y[at]),
            }
            lifts.append(rule.lift(ClientUpdate(k, int(at.sum()), {}, sent)))
        state = rule.end_task(state, params, summed(lifts), tasks[: t + 1], torch.Generator())
    return rule.deployed(state, params)


def lda(**options: Any) -> Calibrator:
    rule: Calibrator = build("calibrators", {"name": "lda", **options})
    return rule


@pytest.mark.parametrize("shrinkage", [0.0, 0.01, 0.7, 1.0])
def test_lda_is_scikit_learns_whatever_the_split_and_the_order_of_tasks(shrinkage: float) -> None:
    x, y = data()
    want = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x.numpy(), y.numpy())
    for clients, tasks in ((1, TASKS), (5, TASKS), (40, TASKS[::-1]), (3, (tuple(range(CLASSES)),))):
        got = calibrated(lda(shrinkage=shrinkage), x, y, clients, tasks)
        np.testing.assert_allclose(got["head.weight"], want.coef_, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(got["head.bias"], want.intercept_, rtol=1e-9, atol=1e-9)
    uniform = calibrated(lda(shrinkage=shrinkage, priors="uniform"), x, y)
    np.testing.assert_allclose(uniform["head.weight"], want.coef_, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(uniform["head.bias"], want.intercept_ - np.log(want.priors_), rtol=1e-9, atol=1e-9)


def test_lda_of_two_classes_in_one_dimension_has_the_threshold_of_the_book() -> None:
    """x* = (μ₀ + μ₁)/2 + σ²/(μ₀ − μ₁) · log(π₁/π₀)."""
    x = torch.tensor([-1.0, 0.0, 1.0, 2.5, 3.5, 4.0, 5.0, 5.0]).double()[:, None]
    y = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    head = calibrated(lda(shrinkage=0.0), x, y, tasks=((0, 1),))
    (w0, w1), (b0, b1) = head["head.weight"][:2, 0], head["head.bias"][:2]
    first, second = x[:3, 0], x[3:, 0]
    variance = (first.var(correction=0) * 3 + second.var(correction=0) * 5) / 8
    shift = variance / (first.mean() - second.mean()) * math.log(5 / 3)
    torch.testing.assert_close((b1 - b0) / (w0 - w1), (first.mean() + second.mean()) / 2 + shift)


def test_lda_without_full_rank_is_the_solution_of_least_norm() -> None:
    """Fewer samples than features, no shrinkage: as scikit-learn's, by least squares; the rest of the head is left alone."""
    x, y = data(60)
    wide = torch.cat([x, x[:, :3] + x[:, 3:6]], dim=1)
    want = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.0).fit(wide.numpy(), y.numpy())
    got = calibrated(lda(shrinkage=0.0), wide, y)
    np.testing.assert_allclose(got["head.weight"], want.coef_, atol=1e-6)
    first = calibrated(lda(), x, y, tasks=TASKS[:1])
    assert bool((first["head.weight"][[1, 3, 5]] == 1).all()) and bool((first["head.bias"][[1, 3, 5]] == 1).all())


def by_hand(x: Tensor, y: Tensor, alpha: float, temperature: float) -> Tensor:
    """TEEN's prototypes one by one, of length 1."""
    unit = [x[y == c].mean(0) / x[y == c].mean(0).norm() for c in range(CLASSES)]
    out = list(unit)
    for c in TASKS[1]:
        shares = [math.exp(temperature * float(unit[c] @ unit[b])) for b in TASKS[0]]
        pull = sum((s / sum(shares) * unit[b] for s, b in zip(shares, TASKS[0], strict=True)), torch.zeros(WIDTH))
        out[c] = (1 - alpha) * unit[c] + alpha * pull / pull.norm()
        out[c] = out[c] / out[c].norm()
    return torch.stack(out)


def teen(**options: Any) -> Calibrator:
    rule: Calibrator = build("calibrators", {"name": "teen", **options})
    return rule


def test_teen_is_its_formula() -> None:
    x, y = data()
    for alpha, temperature in ((0.5, 16.0), (0.1, 2.0), (1.0, 16.0)):
        head = calibrated(teen(alpha=alpha, temperature=temperature), x, y)
        torch.testing.assert_close(head["head.weight"], by_hand(x, y, alpha, temperature))
        assert not head["head.bias"].any()
    base = list(TASKS[0])
    plain = calibrated(teen(alpha=0.0), x, y)
    cosine = calibrated(build("calibrators", {"name": "nearest_mean", "distance": "cosine"}), x, y)
    torch.testing.assert_close(plain["head.weight"], cosine["head.weight"])
    assert same_bits(plain["head.weight"][base], cosine["head.weight"][base])
    one = calibrated(teen(alpha=1.0), x, y, tasks=((4,), (0, 1, 2, 3, 5)))
    torch.testing.assert_close(one["head.weight"], one["head.weight"][[4]].expand(CLASSES, -1))


def test_simplecil_predicts_the_class_of_the_nearest_direction() -> None:
    x, y = data()
    means = torch.stack([x[y == c].mean(0) for c in range(CLASSES)])
    head = calibrated(build("calibrators", {"name": "nearest_mean", "distance": "cosine"}), x, y)
    want = F.cosine_similarity(x[:, None], means, dim=2).argmax(1)
    torch.testing.assert_close((x @ head["head.weight"].T + head["head.bias"]).argmax(1), want)
    assert not torch.equal(want, torch.cdist(x, means).argmin(1)), "here the two distances differ"


@pytest.mark.parametrize("options", [
    {"name": "lda", "shrinkage": 1.5}, {"name": "lda", "shrinkage": -0.1}, {"name": "lda", "priors": "even"},
    {"name": "teen", "alpha": 1.1}, {"name": "teen", "temperature": 0.0}, {"name": "nearest_mean", "distance": "far"},
])  # fmt: skip
def test_options_that_can_never_work(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=list(options)[1]):
        build("calibrators", options)


# ---------------------------------------------------------------- whole runs

FSA = ("server.consolidator=first_session", "server.rounds=2", "server.evaluate=task")
WIDE_HEAD = ("server.calibrator={name: ridge, penalties: [1.0]}", "head={name: random_features, size: 24}")
WAYS = {
    "lda": ("server.aggregator=fedavg", "server.calibrator={name: lda, shrinkage: 0.1}"),
    "ridge": ("server.aggregator=fedavg", *WIDE_HEAD),
    "nearest_mean, noise of the server": ("server.aggregator={name: fedatt, noise: 0.1}", "server.calibrator=nearest_mean"),
    "teen, a rule with statistics": ("server.aggregator=lorm", "server.calibrator=teen"),
    "moments of a round": ("server.aggregator=lorm", "server.calibrator={name: ccvr, when: round, covariance: diagonal}"),
    "learners with a server": ("server.aggregator=fairavg", "server.calibrator=lda", "client.optimizer=sgd",
                               "client.learners=[scaffold, lwf]"),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_after_the_first_task_nothing_is_trained_whatever_the_rule(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither noise of the server nor a rule that fits a head moves anything; what goes up in the second task is what the
    calibrator asks for, and what goes down is nothing."""
    config = tiny(*FSA, *WAYS[way], output=tmp_path)
    _, states, results = recorded(config, monkeypatch)
    first, last = (s.bytes for s in states)
    assert same_bits(with_prefix(states[1].params, "adapter."), with_prefix(states[0].params, "adapter."))
    assert not any(states[1].learners.values()), "control variates were reset at the task's start, and nothing was heard since"
    up = {kind: last["up"][kind] - first["up"][kind] for kind in last["up"]}
    down = {kind: last["down"][kind] - first["down"][kind] for kind in last["down"]}
    assert not up["adapter"] and not up["head"] and up["statistics"] > 0
    if "moments" in way:  # the head that a round repairs is sent again
        return
    assert not any(down.values()) and same_bits(states[1].params, states[0].params)
    sizes, width = prepare(config).manifest.histograms[1], 24 if way == "ridge" else 16
    told = [3 * 4 + int((held > 0).sum()) * width * 4 for held in sizes]
    triangle = width * (width + 1) // 2 * 4 if "lda" in str(WAYS[way]) or way == "ridge" else 0
    assert up["statistics"] == sum(told) + len(sizes) * triangle
    assert results.accuracy.shape == (2, 2)


def test_a_federated_lda_is_that_of_all_features_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(*FSA, *WAYS["lda"], output=tmp_path)
    shown, states, _ = recorded(config, monkeypatch)
    parts = [features_of(config, states[0].params, task) for task in (0, 1)]
    x = torch.cat([rows for part in parts for rows in part.values()])
    y = np.concatenate([np.full(len(rows), c) for part in parts for c, rows in part.items()])
    want = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1).fit(x.numpy(), y)
    np.testing.assert_allclose(shown[1]["head.weight"], want.coef_, rtol=1e-5, atol=1e-5 * np.abs(want.coef_).max())
    np.testing.assert_allclose(shown[1]["head.bias"], want.intercept_, rtol=1e-5, atol=1e-5 * np.abs(want.intercept_).max())


def test_the_head_may_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("server.aggregator=fedavg", "server.consolidator={name: first_session, train_head: true}", output=tmp_path)
    _, states, results = recorded(config, monkeypatch)
    assert same_bits(with_prefix(states[1].params, "adapter."), with_prefix(states[0].params, "adapter."))
    assert not torch.equal(states[1].params["head.weight"][3:], states[0].params["head.weight"][3:])
    assert results.costs["bytes"]["up"]["head"] == 2 * states[0].bytes["up"]["head"]


def test_a_run_that_was_stopped_while_clients_rest_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(*FSA, *WAYS["learners with a server"], output=tmp_path)
    whole = run(config)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", stopping(4))  # two rounds, the first task's end, a round of the second
        with pytest.raises(KeyboardInterrupt):
            run(config, output=tmp_path / "stopped")
    run(resume=tmp_path / "stopped")
    assert same_bits(learned(final_state(whole.path, config)), learned(final_state(tmp_path / "stopped", config)))
    assert same_bits(kept(whole.path), kept(tmp_path / "stopped"))


def test_who_makes_the_head_of_later_classes() -> None:
    with pytest.raises(ConfigError, match="freezes the head after the first task, and nobody makes one for later classes"):
        prepare(tiny("server.aggregator=fedavg", "server.consolidator=first_session"))
