"""Ridge regression from sums over clients: against all data in one place, scikit-learn, and closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from clients.statistics.ridge_errors import held_out_errors, split
from fedsim.core.config import build
from fedsim.core.errors import AggregationError, ConfigError
from fedsim.core.messages import ClientUpdate, Tensors
from fedsim.core.rng import torch_stream
from fedsim.core.sums import BlockSum
from fedsim.core.tensors import upper_triangle
from fedsim.models.heads import linear, random_features
from fedsim.simulation import prepare, run
from server.calibrators.ridge import Calibrator, solved
from tests.tiny import final_state, tiny

CLASSES, WIDTH = 6, 7
GRID = [1e-2, 1.0, 1e2]


def data(count: int = 240) -> tuple[Tensor, Tensor]:
    """Inputs (N, M) whose classes overlap, and labels, float64."""
    generator = torch_stream(0, "ridge")
    labels = torch.arange(count) % CLASSES
    centres = torch.randn(CLASSES, WIDTH, dtype=torch.float64, generator=generator)
    return centres[labels] + 1.5 * torch.randn(count, WIDTH, dtype=torch.float64, generator=generator), labels


def update(client: int, x: Tensor, y: Tensor, classes: Sequence[int], penalties: Sequence[float]) -> ClientUpdate:
    """What a client sends, but in float64."""
    count = torch.tensor([float((y == c).sum()) for c in classes], dtype=torch.float64)
    statistics = {
        "class_moments.count/head.weight": count,
        "class_moments.mean/head.weight": torch.stack([x[y == c].mean(0) for c in classes if (y == c).any()]),
        "gram.full/head.weight": upper_triangle(x.T @ x),
        "ridge_errors.squares/head.weight": held_out_errors(x, y, CLASSES, penalties),
    }
    return ClientUpdate(client, len(x), {}, statistics)


def calibrated(rule: Calibrator, parts: Sequence[Sequence[Tensor]]) -> Tensors:
    """The head after two tasks of three classes each, whose samples (places) are split over clients as said."""
    x, y = data()
    state, params = rule.init(), {"head.weight": torch.zeros(CLASSES, WIDTH).double(), "head.bias": torch.ones(CLASSES).double()}
    for task, clients in enumerate(parts):
        classes = [(0, 1, 2), (3, 4, 5)][: task + 1]
        total = BlockSum()
        for k, at in enumerate(clients):
            total.add(k, 1, rule.lift(update(k, x[at], y[at], classes[-1], rule.penalties)))
        state = rule.end_task(state, params, total.result() or {}, classes, torch.Generator())
    return rule.deployed(state, params)


def split_over(clients: int, seed: int) -> list[list[Tensor]]:
    """Samples of two tasks over clients, in parts of very different size."""
    _, y = data()
    parts = []
    for classes in ((0, 1, 2), (3, 4, 5)):
        at = torch.isin(y, torch.tensor(classes)).nonzero()[:, 0]
        at = at[torch.randperm(len(at), generator=torch_stream(seed, "split"))]
        cuts = torch.randperm(len(at) - 1, generator=torch_stream(seed, "cuts"))[: clients - 1].sort().values + 1
        parts.append(list(torch.tensor_split(at, cuts)))
    return parts


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 1e4])
def test_federated_is_centralised_and_scikit_learns(penalty: float) -> None:
    """Whatever the split: the solution of all data in one place, to 1e-9."""
    x, y = data()
    onehot = torch.nn.functional.one_hot(y, CLASSES).double()
    want = torch.from_numpy(Ridge(alpha=penalty, fit_intercept=False, solver="svd").fit(x.numpy(), onehot.numpy()).coef_)
    for clients, seed in ((1, 0), (3, 1), (25, 2)):
        head = calibrated(Calibrator([penalty]), split_over(clients, seed))
        torch.testing.assert_close(head["head.weight"], want, rtol=0, atol=1e-9)
        assert not head["head.bias"].any()


def test_a_large_penalty_points_at_class_sums() -> None:
    x, y = data()
    sums = torch.nn.functional.one_hot(y, CLASSES).double().T @ x
    got = 1e12 * solved(sums, upper_triangle(x.T @ x), 1e12)
    torch.testing.assert_close(got, sums, rtol=0, atol=1e-5)


def test_an_orthogonal_projection_without_relu_is_ridge_on_the_features() -> None:
    x, y = data()
    onehot = torch.nn.functional.one_hot(y, CLASSES).double()
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=torch_stream(0, "turn"))).Q
    head = random_features.Head(size=WIDTH, activation="none")
    h = head.inputs(x, {"head.projection": turn})
    zero = torch.zeros(CLASSES, dtype=torch.float64)
    turned = {
        "head.weight": solved(onehot.T @ h, upper_triangle(h.T @ h), 3.0),
        "head.bias": zero,
        random_features.PROJECTION: turn,
    }
    plain = {"head.weight": solved(onehot.T @ x, upper_triangle(x.T @ x), 3.0), "head.bias": zero}
    torch.testing.assert_close(head.logits(x, turned), linear.Head().logits(x, plain), rtol=0, atol=1e-10)


def test_fewer_samples_than_inputs() -> None:
    """A singular Gram: the pseudo-inverse takes the place of a penalty that float32 cannot see."""
    x, y = data(5)
    onehot = torch.nn.functional.one_hot(y, CLASSES).double()
    got = solved(onehot.T @ x, upper_triangle((x.T @ x).float()).double(), 1e-12)
    torch.testing.assert_close(got @ x.T, onehot.T, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- the choice of a penalty


def by_scikit_learn(x: Tensor, y: Tensor, penalties: Sequence[float]) -> list[float]:
    fitted, held = split(x, y)
    onehot = torch.nn.functional.one_hot(y, CLASSES).double().numpy()
    found = []
    for penalty in penalties:
        model = Ridge(alpha=penalty, fit_intercept=False, solver="svd").fit(x[fitted].numpy(), onehot[fitted.numpy()])
        found.append(float(((model.predict(x[held].numpy()) - onehot[held.numpy()]) ** 2).sum()))
    return found


@pytest.mark.parametrize("count", [5, 30, 240])  # fewer samples than inputs, and more
def test_held_out_errors_are_scikit_learns(count: int) -> None:
    x, y = data(count)
    np.testing.assert_allclose(held_out_errors(x, y, CLASSES, GRID), by_scikit_learn(x, y, GRID), rtol=1e-9)


def test_who_is_held_out_does_not_depend_on_the_order_and_is_spread_over_classes() -> None:
    x, y = data()
    order = torch.randperm(len(x), generator=torch_stream(0, "order"))
    fitted, held = split(x, y)
    again = order[split(x[order], y[order])[1]]
    assert set(held.tolist()) == set(again.tolist())
    assert sorted([*fitted.tolist(), *held.tolist()]) == list(range(240))
    assert y[held].bincount().tolist() == [8] * 6


def test_the_penalty_has_the_smallest_error_over_clients_and_tasks() -> None:
    x, y = data()
    parts = split_over(4, 0)
    errors = np.sum([by_scikit_learn(x[at], y[at], GRID) for clients in parts for at in clients if len(at) >= 5], axis=0)
    chosen = calibrated(Calibrator(GRID), parts)
    want = calibrated(Calibrator([GRID[int(errors.argmin())]]), parts)
    torch.testing.assert_close(chosen["head.weight"], want["head.weight"], rtol=0, atol=0)
    others = [calibrated(Calibrator([p]), parts)["head.weight"] for k, p in enumerate(GRID) if k != errors.argmin()]
    assert not any(torch.allclose(chosen["head.weight"], other, rtol=1e-3) for other in others)


def test_nobody_who_could_hold_out_a_sample() -> None:
    rule = Calibrator(GRID)
    assert not rule.can_be_told(np.array([[2, 2], [1, 3]])).any()
    assert rule.can_be_told(np.array([[2, 3], [1, 0]])).all()
    assert Calibrator([1.0]).can_be_told(np.array([[2, 0], [1, 0]])).tolist() == [True, False]
    with pytest.raises(AggregationError, match="no client of the pass holds the five samples"):
        calibrated(rule, [[torch.tensor([k]) for k in range(3)]])


@pytest.mark.parametrize("kind", ["calibrators", "statistics"])
@pytest.mark.parametrize("penalties", [[], [0.0], [1.0, -1.0]])
def test_bad_options(kind: str, penalties: list[float]) -> None:
    with pytest.raises(ConfigError, match="penalties must be positive numbers, one at least"):
        build(kind, {"name": "ridge" if kind == "calibrators" else "ridge_errors", "penalties": penalties})


# ---------------------------------------------------------------- whole runs

RANPAC = (
    "adapter=none", "server.aggregator=frozen", "server.rounds=1", "server.consolidator=none", "server.calibrator=ridge",
    "head={name: random_features, size: 24}",
)  # fmt: skip


@pytest.mark.parametrize("stream", [(), ("stream.name=domain_incremental", "stream.tasks=null", "data.domains=2")])
def test_a_run_is_ridge_on_all_data_whatever_the_split(stream: Sequence[str], tmp_path: Path) -> None:
    heads: list[Any] = []
    for k, clients in enumerate(("partition.clients=1", "partition={name: iid, clients: 5}")):
        config = tiny(*RANPAC, "server.calibrator={name: ridge, penalties: [10]}", *stream, clients, output=tmp_path / str(k))
        results = run(config)
        assert results.path is not None
        state = final_state(Path(results.path), config)
        heads.append(Calibrator([10.0]).deployed(state.calibrator, state.params)["head.weight"])
        assert set(results.costs["bytes"]["up"]) == {"statistics"}
    parts = prepare(config)
    inputs = {n: torch.from_numpy(a) for n, a in parts.spec.train.inputs.items()}
    h = parts.model.head_inputs(parts.model.features(inputs), {}).double().numpy()
    model = Ridge(alpha=10, fit_intercept=False, solver="svd").fit(h, np.eye(6)[parts.spec.train.labels])
    for head in heads:
        np.testing.assert_allclose(head, model.coef_, rtol=1e-3, atol=1e-5)
    test = {n: torch.from_numpy(a) for n, a in parts.spec.test.inputs.items()}
    guess = model.predict(parts.model.head_inputs(parts.model.features(test), {}).double().numpy()).argmax(1)
    right = [100 * (guess == parts.spec.test.labels)[parts.spec.test_of(t)].mean() for t in range(2)]
    assert results.accuracy[1].tolist() == pytest.approx(right)


def test_parts_that_do_not_suit() -> None:
    with pytest.raises(ConfigError, match="calibrator ridge solves for the head's linear map, which head cosine has not"):
        prepare(tiny(*RANPAC, "head=cosine"))
    with pytest.raises(ConfigError, match=r"ridge makes the head's rows of what clients tell .* nobody holds enough samples"):
        prepare(tiny(*RANPAC, "partition={name: iid, clients: 18, min_samples: 1}"))
