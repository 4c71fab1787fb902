"""What a run measures beside the accuracy matrix: counts by class that agree with those by task, with the predictions
themselves, and with those of a run that was stopped and gone on in. (That pools agree is in test_simulation.)"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix

from clients.worker import Worker, class_counts
from fedsim import simulation
from fedsim.cli.run import metrics_table
from fedsim.core.config import SimConfig
from fedsim.runs.results import Results
from fedsim.simulation import run
from server import checkpoint
from tests.tiny import final_state, stopping, tiny

METHODS: dict[str, dict[str, Any]] = {
    "lorm": {},
    "fedavg": {"server": {"aggregator": "fedavg", "consolidator": "none"}},  # a task's end deploys what was just measured
    "fedavg, at tasks' ends only": {"server": {"aggregator": "fedavg", "consolidator": "none", "evaluate": "task"}},
    "domains": {"stream": {"name": "domain_incremental", "tasks": 2}, "data": {"domains": 2}},
}
TABLES = ("classes.csv", "drift.csv", "partition.csv", "rounds.csv")


def task_classes(results: Results) -> list[list[int]]:
    assert results.path is not None
    return [task["classes"] for task in json.loads((results.path / "manifest.json").read_text())["tasks"]]


@pytest.mark.parametrize("method", METHODS)
def test_counts_by_class_sum_to_counts_by_task(method: str, tmp_path: Path) -> None:
    results = run(tiny("client.epochs=3", output=tmp_path, **METHODS[method]))
    classes_of = task_classes(results)
    for task in range(len(classes_of)):
        rows = {r.tested: r for r in results.rows if (r.task, r.stage) == (task, "task_end")}
        by_class = {c.class_row: c for c in results.classes if c.task == task}
        assert set(by_class) == {c for seen in classes_of[: task + 1] for c in seen}
        assert {(c.stage, c.round) for c in by_class.values()} == {("task_end", 2)}
        tested = sum(r.total for r in rows.values())
        assert sum(c.predicted for c in by_class.values()) == sum(c.total for c in by_class.values()) == tested
        assert sum(c.correct for c in by_class.values()) == sum(r.correct for r in rows.values())
        assert all(c.correct <= min(c.predicted, c.total) for c in by_class.values())
        if method != "domains":  # there, every task tests every class
            for j, row in rows.items():
                assert (sum(by_class[c].correct for c in classes_of[j]), sum(by_class[c].total for c in classes_of[j])) == (
                    row.correct,
                    row.total,
                )
    assert len({c.predicted for c in results.classes}) > 1  # the counts tell classes apart


def test_counts_by_class_are_those_of_the_predictions(tmp_path: Path) -> None:
    """The final parameters, deployed by hand: one forward over all test samples, counted by scikit-learn."""
    config = tiny("client.epochs=3", output=tmp_path, **METHODS["fedavg"])
    results = run(config)
    parts = simulation.prepare(config)
    params = final_state(Path(str(results.path)), config).params
    positions = np.concatenate([parts.spec.test_of(t) for t in range(2)])
    labels = parts.spec.test.labels[positions]
    worker = Worker(parts.spec)
    inputs, _ = worker.test_samples.batch(positions)
    with torch.no_grad(), worker.model.merged(params):
        guess = worker.model.logits(worker.model.features(inputs), params).argmax(dim=1).numpy()
    matrix = confusion_matrix(labels, guess, labels=range(6))
    final = {c.class_row: c for c in results.classes if c.task == 1}
    assert [final[c].correct for c in range(6)] == matrix.diagonal().tolist()
    assert [final[c].predicted for c in range(6)] == matrix.sum(axis=0).tolist()
    assert [final[c].total for c in range(6)] == matrix.sum(axis=1).tolist()
    newest = matrix[:, task_classes(results)[1]].sum()
    assert results.metrics["newest_share"] == pytest.approx(100 * newest / matrix.sum())


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=30))
def test_class_counts_are_the_confusion_matrix(pairs: list[tuple[int, int]]) -> None:
    guess, labels = (np.array([p[i] for p in pairs], dtype=np.int64) for i in (0, 1))
    matrix = confusion_matrix(labels, guess, labels=range(7)) if pairs else np.zeros((7, 7), dtype=int)
    there = np.flatnonzero(matrix.sum(axis=0) + matrix.sum(axis=1))
    assert class_counts(guess, labels) == tuple((c, matrix[c, c], matrix[:, c].sum(), matrix[c].sum()) for c in there.tolist())


def test_holdings_are_the_split_of_the_manifest(tmp_path: Path) -> None:
    results = run(tiny("server.rounds=1", output=tmp_path))
    tasks = json.loads((Path(str(results.path)) / "manifest.json").read_text())["tasks"]
    for t, task in enumerate(tasks):
        held = Counter({(h.client, h.class_row): h.samples for h in results.holdings if h.task == t})
        expected = {(k, c): n for k, row in enumerate(task["histogram"]) for c, n in zip(task["classes"], row, strict=True) if n}
        assert held == expected
    assert sum(h.samples for h in results.holdings) == 6 * 12
    assert not np.isnan(results.client_accuracy).any()


def test_drift_is_measured_in_every_round_on_what_was_trained(tmp_path: Path) -> None:
    results = run(tiny(output=tmp_path, **METHODS["fedavg"]))
    assert [(d.task, d.round, d.group) for d in results.drifts] == [
        (t, r, group) for t in range(2) for r in range(2) for group in ("adapter", "head")
    ]
    assert {d.clients for d in results.drifts} == {3}
    head = [d for d in results.drifts if d.group == "head"]
    assert head[0].relative_norm is None  # it starts at zero
    assert head[1].relative_norm is not None
    assert all(d.product_error is not None for d in results.drifts if d.group == "adapter")
    by_turns = run(tiny(output=tmp_path))  # LoRM trains A and B in turn
    assert {d.product_error for d in by_turns.drifts} == {None}
    errors = [d.product_error for d in results.drifts if d.product_error is not None]
    assert results.metrics["product_error"] == pytest.approx(100 * np.mean(errors)) and by_turns.metrics["product_error"] is None
    for found, is_there in ((results, True), (by_turns, False)):
        table = metrics_table(found.metrics, "class_incremental")
        assert ("product error of averaging lora's factors" in list(table.columns[0].cells)) == is_there
    assert {"drift_cosine_adapter", "drift_cosine_head"} <= set(by_turns.metrics)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[SimConfig, Path]:
    config = tiny(output=tmp_path_factory.mktemp("whole"))
    return config, Path(str(run(config).path))


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_tables_are_the_same_after_a_resume(
    stop_after: int, whole: tuple[SimConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first round, the last round of a task, a task's end."""
    config, path = whole
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", stopping(stop_after))
        with pytest.raises(KeyboardInterrupt):
            run(config, output=tmp_path / "stopped")
    resumed = run(resume=tmp_path / "stopped")
    for name in TABLES:
        assert (tmp_path / "stopped" / name).read_bytes() == (path / name).read_bytes(), name
    assert resumed.metrics == Results.load(path).metrics
