"""The examples do what they say, and the engine does what their plain loops do."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from examples import breadcrumbs, fedavg_plain, median, private, replay, scaffold
from fedsim import laws, simulation
from fedsim.core import plugins
from fedsim.core.contracts import Member
from fedsim.simulation import run
from tests.tiny import final_state, kept, same_bits, tiny

PLAIN = ("client.optimizer=sgd", "client.lr=0.05", "client.epochs=2", "server.consolidator=none", "server.rounds=3")


def test_the_engine_is_the_plain_loop(tmp_path: Path) -> None:
    config = tiny(*PLAIN, "server.aggregator=fedavg", output=tmp_path)
    params, accuracy = fedavg_plain.fedavg(config)
    results = run(config)
    for name, tensor in final_state(results.path, config).params.items():
        torch.testing.assert_close(tensor, params[name], rtol=1e-4, atol=1e-6)
    for task in range(2):
        assert results.accuracy[task, : task + 1].tolist() == pytest.approx(accuracy[task, : task + 1].tolist())


def test_scaffold_is_its_pseudocode(tmp_path: Path) -> None:
    """The server's parameters, and its control variate."""
    config = tiny(*PLAIN, "server.aggregator=fairavg", "client.learners=[scaffold]", output=tmp_path)
    x, c = scaffold.scaffold(config)
    state = final_state(run(config).path, config)
    plain = final_state(
        run(tiny(*PLAIN, "server.aggregator=fairavg", output=tmp_path / "without")).path,
        tiny(*PLAIN, "server.aggregator=fairavg", output=tmp_path / "without"),
    )
    for name, tensor in state.params.items():
        torch.testing.assert_close(tensor, x[name], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(state.learners["scaffold"][f"control/{name}"].float(), c[name], rtol=1e-3, atol=1e-5)
    assert any(not torch.allclose(plain.params[n], x[n], rtol=1e-3, atol=1e-4) for n in x), "it makes a difference"


def test_the_plain_loop_runs_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """On a small stream of real characters, above chance on the second task."""
    fedavg_plain.main()
    assert "after task 1" in capsys.readouterr().out


def test_private_prints_what_privacy_costs(capsys: pytest.CaptureFixture[str]) -> None:
    """Three noise levels: chance is 25 %, ε = R / 2z² + 2 (R / 2z² · ln 10⁵)^½ with R = 4 rounds."""
    private.main()
    lines = capsys.readouterr().out.splitlines()
    found = [(float(line.split()[3]), float(line.split()[-1])) for line in lines]
    accuracies, epsilons = zip(*found, strict=True)
    assert accuracies[0] > accuracies[1] > accuracies[2] and accuracies[0] > 60
    rhos = [4 / 2 / z**2 for z in (1.0, 4.0)]
    assert epsilons == pytest.approx([math.inf, *(rho + 2 * math.sqrt(rho * math.log(1e5)) for rho in rhos)], abs=0.005)


def test_the_median_stands_what_fedavg_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    """Two of nine clients send five times the opposite: FedAvg falls, the median hardly moves."""
    median.main()
    lines = [line.replace(",", "").split() for line in capsys.readouterr().out.splitlines()]
    honest, attacked = ({line[0]: float(line[place]) for line in lines} for place in (2, -1))
    assert min(honest.values()) > 60
    assert attacked["fedavg"] < 45 < honest["median"] - 5 < attacked["median"]


def test_a_merging_rule_of_ones_own_keeps_neither_the_largest_nor_the_smallest(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand; and in a stream whose three tasks it merges."""
    rule, base = breadcrumbs.Merging(small=0.25, large=0.25, scale=0.5), {"x": torch.ones(4)}
    vectors = ([4.0, -3.0, 2.0, 1.0], [0.5, 6.0, 7.0, -8.0])
    members = [Member(str(k), {"x": 1 + torch.tensor(v)}) for k, v in enumerate(vectors)]
    assert rule.merge(members, base, torch.Generator())["x"].tolist() == [1.0, 2.5, 5.5, 1.0]
    breadcrumbs.main()
    rows = {line.split()[0]: float(line.split()[1]) for line in capsys.readouterr().out.splitlines()}
    assert list(rows) == ["mean", "task_arithmetic", "breadcrumbs"] and all(10 < value < 100 for value in rows.values())


@pytest.mark.parametrize(
    ("example", "kinds"), [(median, ["aggregators", "channels"]), (replay, ["learners"]), (breadcrumbs, ["merging"])]
)
def test_plugins_of_examples_keep_the_laws_of_their_kinds(example: ModuleType, kinds: list[str]) -> None:
    path = str(example.__file__)
    assert plugins.kinds_of(path) == kinds
    for kind in kinds:
        assert [(r.name, r.explanation) for r in laws.check_named(kind, path) if not r.ok] == []


def test_a_learner_of_ones_own_replays_what_it_says(tmp_path: Path) -> None:
    """The buffer is divided over the classes that the client has held, within its size; old samples join the batches."""
    config = tiny(
        *PLAIN, "server.aggregator=fedavg", f"client.learners=[{{name: {replay.__file__}, size: 7}}]", "partition.alpha=100",
        output=tmp_path,
    )  # fmt: skip
    results = run(config)
    parts = simulation.prepare(config)
    for client, memory in kept(results.path)["memory"].items():
        positions = memory["learner.replay/positions"].numpy()
        held = np.concatenate([parts.spec.shard(task, client) for task in range(2)])
        classes = len(set(parts.spec.train.labels[held].tolist()))
        _, counts = np.unique(parts.spec.train.labels[positions], return_counts=True)
        assert set(positions) <= set(held) and 0 < len(positions) <= 7 and counts.max() <= max(1, 7 // classes)
    without = final_state(run(tiny(*PLAIN, "server.aggregator=fedavg", output=tmp_path / "b")).path, tiny(
        *PLAIN, "server.aggregator=fedavg", output=tmp_path / "b"
    ))  # fmt: skip
    assert not same_bits(dict(without.params), dict(final_state(results.path, config).params))
