"""Heads in closed form from sums over clients: against scikit-learn on all samples in one place, however they are split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from fedsim.core import config as configs
from fedsim.core import hardware
from fedsim.core.contracts import Calibrator, Seen
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate, Tensors
from fedsim.core.rng import torch_stream
from fedsim.core.sums import summed
from fedsim.exports.deployed import load_model
from fedsim.finished import OpenedRun
from fedsim.models.heads import linear, quadratic
from fedsim.simulation import prepare, run
from server import heads
from server.calibrators.qda import inverse
from tests.tiny import final_state, tiny

CLASSES, WIDTH, COUNT = 4, 5, 600
DIVIDES_BY_N = tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 8)  # before, its QDA did by n − 1
HEADS = {"qda": quadratic.Head()}
FAMILY: Mapping[str, dict[str, Any]] = {  # calibrator -> options, of which the oracle has the same
    "nearest_mean": {},
    "lda": {"shrinkage": 0.1},
    "ridge": {"penalties": [2.0]},
    "qda": {"shared": 0.0, "shrinkage": 0.0},
}


def data() -> tuple[Tensor, Tensor]:
    """Overlapping classes with covariances of their own (N, D), and labels, float64."""
    draw = torch_stream(0, "analytic")
    y = torch.arange(COUNT) % CLASSES
    mean, mix = (torch.randn(CLASSES, *s, WIDTH, dtype=torch.float64, generator=draw) for s in ((), (WIDTH,)))
    noise = torch.randn(COUNT, WIDTH, dtype=torch.float64, generator=draw)
    return 3 + mean[y] + torch.einsum("nd,nde->ne", noise, mix[y]), y


def split_over(clients: int, alpha: float | None) -> list[list[Tensor]]:
    """Places of the samples of two tasks by client: every class by a Dirichlet draw, or evenly."""
    draw, (_, y) = np.random.default_rng(0), data()
    tasks: list[list[Tensor]] = []
    for classes in ((0, 1), (2, 3)):
        owner = np.full(COUNT, -1)
        for c in classes:
            share = np.full(clients, 1 / clients) if alpha is None else draw.dirichlet(np.full(clients, alpha))
            at = draw.permutation(np.flatnonzero(y.numpy() == c))
            owner[at] = np.repeat(
                np.arange(clients), np.diff(np.round(np.concatenate([[0], share.cumsum()]) * len(at)).astype(int))
            )
        tasks.append([torch.from_numpy(np.flatnonzero(owner == k)) for k in range(clients)])
    return tasks


def solved(rule: Calibrator, head: Any, tasks: Sequence[Sequence[Tensor]]) -> Tensors:
    """The head after two tasks, from what clients of these samples send, in float64."""
    x, y = data()
    params = {n: t.double() for n, t in head.init(CLASSES, WIDTH, torch.Generator()).items()}
    state = rule.init()
    for task, clients in enumerate(tasks):
        classes = [(0, 1), (2, 3)][: task + 1]
        requests = rule.closing(state, classes).statistics  # type: ignore[union-attr]
        updates = []
        for k, at in enumerate(clients):
            seen, sent = Seen({}, x[at], y[at], CLASSES), dict[str, Tensor]()
            for r in requests:
                statistic = configs.build("statistics", {"name": r.name, **r.options})
                sent |= {f"{r.name}.{n}": t for n, t in statistic.synthetic(seen, params, r.match).items()}
            updates.append(ClientUpdate(k, len(at), {}, sent))
        state = rule.end_task(state, params, summed(map(rule.lift, updates)), classes, torch.Generator())
    return rule.deployed(state, params)


def oracle(name: str, test: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What scikit-learn makes of all samples: logits up to a constant per sample (N, C)."""
    x, y = (t.numpy() for t in data())
    if name == "ridge":
        return Ridge(alpha=2.0, fit_intercept=False, solver="svd").fit(x, np.eye(CLASSES)[y]).predict(test)
    if name == "nearest_mean":
        return -0.5 * ((test[:, None] - NearestCentroid().fit(x, y).centroids_) ** 2).sum(2)
    model = QuadraticDiscriminantAnalysis() if name == "qda" else LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1)
    return model.fit(x, y).decision_function(test)


@pytest.mark.parametrize("name", [n for n in FAMILY if n != "qda" or DIVIDES_BY_N])
def test_scikit_learns_whatever_the_split(name: str) -> None:
    """α = 0.05 and 0.5, iid, 1 and 100 clients: the head of all data in one place, to 1e-9."""
    rule, head = configs.build("calibrators", {"name": name, **FAMILY[name]}), HEADS.get(name, linear.Head())
    test = 3 + torch.randn(50, WIDTH, dtype=torch.float64, generator=torch_stream(0, "test"))
    want = oracle(name, test.numpy())
    heads = [solved(rule, head, split_over(*split)) for split in ((1, None), (10, None), (10, 0.5), (10, 0.05), (100, 0.5))]
    for params in heads:
        off = (head.logits(test, params).numpy() - want) / (1 + np.abs(want).max(1, keepdims=True))
        np.testing.assert_allclose(off if name == "ridge" else off - off[:, :1], 0, rtol=0, atol=1e-9)
        for n, t in params.items():
            torch.testing.assert_close(t, heads[0][n], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shrinkage", [0.0, 0.2])
def test_one_covariance_for_all_is_lda(shrinkage: float) -> None:
    test = torch.randn(50, WIDTH, dtype=torch.float64, generator=torch_stream(0, "test"))
    tasks = split_over(10, 0.5)
    qda = configs.build("calibrators", {"name": "qda", "shared": 1.0, "shrinkage": shrinkage})
    lda = configs.build("calibrators", {"name": "lda", "shrinkage": shrinkage})
    own = quadratic.Head().logits(test, solved(qda, quadratic.Head(), tasks)).log_softmax(1)
    common = linear.Head().logits(test, solved(lda, linear.Head(), tasks)).log_softmax(1)
    torch.testing.assert_close(own, common, rtol=0, atol=1e-9)


def test_singular_covariances_are_inverted_where_they_have_a_rank() -> None:
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch_stream(0, "few"))
    covariance = x.T @ x
    precision, log_det = inverse(covariance[None], regular=False)
    torch.testing.assert_close(x @ precision[0] @ x.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.isfinite(log_det).all()
    regular = covariance + torch.eye(6)
    for way in (True, False):
        precision, log_det = inverse(regular[None], regular=way)
        torch.testing.assert_close(precision[0], regular.inverse(), rtol=0, atol=1e-9)
        torch.testing.assert_close(log_det[0], torch.linalg.slogdet(regular).logabsdet, rtol=0, atol=1e-9)


FROZEN = ("adapter=none", "server.aggregator=frozen", "server.rounds=1", "server.consolidator=none")


def test_a_run_is_scikit_learns_and_its_bytes_are_those_of_covariances(tmp_path: Path) -> None:
    split = "partition={name: iid, clients: 2}"
    config = tiny(*FROZEN, "head=quadratic", "server.calibrator={name: qda, shrinkage: 0.3}", split, output=tmp_path)
    results = run(config)
    width, held, tasks = 16, 3, 2
    each = held + held * width + held * width * (width + 1) // 2
    assert results.costs["bytes"]["up"] == {"statistics": 4 * each * 2 * tasks}
    assert results.path is not None
    state = final_state(Path(results.path), config)
    assert state.calibrator["square"].shape == (6, width * (width + 1) // 2)
    parts = prepare(config)
    inputs = {n: torch.from_numpy(a) for n, a in parts.spec.train.inputs.items()}
    x, y = parts.model.features(inputs).double(), torch.from_numpy(parts.spec.train.labels)
    want = torch.stack([x[y == c].T @ x[y == c] for c in range(6)])
    rows, columns = torch.triu_indices(width, width)
    torch.testing.assert_close(state.calibrator["square"], want[:, rows, columns], rtol=1e-4, atol=1e-5)


def test_parts_that_do_not_suit() -> None:
    with pytest.raises(ConfigError, match=r"qda solves for a covariance of every class.*use head: quadratic"):
        prepare(tiny(*FROZEN, "server.calibrator=qda"))
    for option in ("shared", "shrinkage"):
        with pytest.raises(ConfigError, match=rf"{option} must be in \[0, 1\]"):
            configs.build("calibrators", {"name": "qda", option: 1.5})


@pytest.mark.parametrize("name", ["ridge", "lda", "qda"])
def test_sums_that_do_not_fit_are_refused_with_what_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine triangles of 8 bytes; with one byte less than that, one number fewer fits."""
    rule, copies = configs.build("calibrators", {"name": name}), 6 if name == "qda" else 1
    needed = 9 * 8 * copies * 16 * 17 // 2
    assert rule.room(16, 6) == needed
    more = ["head=quadratic"] if name == "qda" else []
    monkeypatch.setattr(hardware, "free_memory", lambda: needed)
    prepare(tiny(*FROZEN, f"server.calibrator={name}", *more))
    monkeypatch.setattr(hardware, "free_memory", lambda: needed - 1)
    with pytest.raises(ConfigError, match=rf"calibrator {name} keeps sums .* of the 16 numbers .* GB are free: 15 numbers fit"):
        prepare(tiny(*FROZEN, f"server.calibrator={name}", *more))


def test_solved_after_training(tmp_path: Path) -> None:
    """Any method, and then the head is solved: what is deployed has the solution on the features that were trained."""
    trained = ("server.aggregator=lorm", "server.consolidator=regmean", "server.calibrator={name: ridge, penalties: [1.0]}")
    config = tiny(*trained, "stream.tasks=1", output=tmp_path)
    results = run(config)
    assert results.path is not None
    state = final_state(Path(results.path), config)
    parts = prepare(config)
    rule = configs.build("consolidators", config.server.consolidator)
    module = rule.deployed(state.consolidator, state.params, finished=True)
    inputs = {n: torch.from_numpy(a) for n, a in parts.spec.train.inputs.items()}
    with torch.inference_mode(), parts.model.merged(module):
        x = parts.model.features(inputs).double().numpy()
    want = Ridge(alpha=1.0, fit_intercept=False, solver="svd").fit(x, np.eye(6)[parts.spec.train.labels]).coef_
    got = configs.build("calibrators", config.server.calibrator).deployed(state.calibrator, module)["head.weight"]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("head", "name"), [("linear", "lda"), ("cosine", "nearest_mean"), ("centres", "nearest_mean"), ("quadratic", "qda")]
)
def test_a_class_that_nobody_told_of_is_no_answer(head: str, name: str, tmp_path: Path) -> None:
    """With drawn passes nobody tells of class 0, whose row stays as it began. Oracle: the argmax over all other rows."""
    frozen = ("adapter=none", "server.aggregator=frozen", "server.consolidator=none", "server.rounds=1")
    drawn = ("server.participation=0.34", "server.pass_participation=drawn", "partition.alpha=0.1", "partition.min_samples=1")
    config = tiny(*frozen, *drawn, f"head={head}", f"server.calibrator={name}", "data.test_per_class=20", output=tmp_path)
    results = run(config)
    assert results.path is not None
    assert f"nobody has told calibrator {name} of 1 of 6 classes (server.pass_participation: drawn)" in results.notes[0]
    found, model = OpenedRun(results.path), load_model(results.path)
    spec, told = found.parts.spec, found.state.calibrator["count"].nonzero()[:, 0].tolist()
    assert told == model.rows == [1, 2, 3, 4, 5]
    assert model.tasks == (("class1", "class2"), ("class3", "class4", "class5"))
    assert 0 not in found.learned
    own = {n: t[told] for n, t in found.deployed.items() if n != "head.unknown"}
    for task, want in enumerate(results.accuracy[-1]):
        at = spec.test_of(task)
        inputs, labels = found.samples(spec.test).batch(at)
        logits = model.model.head.logits(model.model.features(inputs), own)
        guess = torch.tensor(told)[logits.argmax(dim=1)]
        assert want == pytest.approx(100 * float((guess == labels).float().mean()))
        assert model.predict(spec.test.inputs["pixel_values"][at]) == [f"class{c}" for c in guess.tolist()]
    assert next(c.predicted for c in results.classes if c.task == 1 and c.stage == "task_end") == 0


def test_rows_that_are_an_answer() -> None:
    """Rows that were trained or solved are; so are all where there is nothing else, or no calibrator."""
    first = {"head.weight": torch.ones(4, 2), "head.bias": torch.zeros(4)}
    moved = {"head.weight": first["head.weight"] + torch.tensor([[0.0], [1.0], [0.0], [1.0]]), "head.bias": torch.zeros(4)}
    assert heads.answering(first, moved, [0, 1])["head.unknown"].tolist() == [True, False, False, False]
    assert heads.answering(first, moved, [0, 1, 2])["head.unknown"].tolist() == [True, False, True, False]
    solved = {**moved, "head.bias": torch.tensor([-1.0, 0.0, 0.0, 0.0])}
    for began, deployed, seen in ((first, solved, [0, 1]), (first, first, [0, 1]), ({}, moved, [0, 1])):
        assert heads.answering(began, deployed, seen) is deployed


@pytest.mark.parametrize("name", ["nearest_mean", "teen", "lda", "qda", "ridge"])
def test_a_head_of_which_nobody_told_stays(name: str) -> None:
    """Everybody who was drawn for the pass holds other classes: counts of zero, and nothing to solve."""
    rule: Calibrator = configs.build("calibrators", {"name": name, **({"penalties": [1.0]} if name == "ridge" else {})})
    params = HEADS.get(name, linear.Head()).init(CLASSES, WIDTH, torch_stream(0, "head"))
    more = {"lda": {"gram": (15,)}, "qda": {"square": (2, 15)}, "ridge": {"gram": (15,), "squares": (1,)}}.get(name, {})
    sizes: Mapping[str, tuple[int, ...]] = {"count": (2,), "sum": (2, WIDTH), **more}
    total = {n: torch.zeros(size, dtype=torch.float64) for n, size in sizes.items()}
    state = rule.end_task(rule.init(), params, total, [(0, 1)], torch_stream(0, "draw"))
    deployed = rule.deployed(state, params)
    assert all(torch.equal(t, params[n]) for n, t in deployed.items())
