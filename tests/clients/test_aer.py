"""AER and ABS: which epochs replay, what a client keeps where labels are wrong, and the same numbers together as one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from clients.learners import abs as asymmetric
from clients.learners import aer
from clients.learners._buffers import Buffer
from fedsim.core.contracts import Learner, Outputs
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate
from fedsim.core.rng import torch_stream
from fedsim.simulation import run
from tests.clients.test_fused import Here, require_same, work
from tests.clients.works import step_of
from tests.tiny import final_state, same_bits, tiny

NOBODY = torch.Generator()


def client(round: int, rounds: int, epochs: int, **others: Any) -> Any:
    """Five samples in batches of two: three steps an epoch."""
    settings = {"epochs": epochs, "batch_size": 2}
    config = SimpleNamespace(
        client=SimpleNamespace(**settings),
        server=SimpleNamespace(rounds=rounds),
        partition={"clients": 2},
        stream=SimpleNamespace(online=False),
    )
    return SimpleNamespace(config=config, round=round, shard=np.arange(5), **others)


@pytest.mark.parametrize("rule", [aer.Learner(size=4), asymmetric.Learner(size=4)])
@pytest.mark.parametrize(("rounds", "epochs"), [(1, 1), (2, 3), (3, 2), (4, 1)])
def test_every_second_epoch_replays_and_the_tasks_last_one_does(rule: aer.Learner, rounds: int, epochs: int) -> None:
    memory = Buffer(np.array([7, 8, 9]), {}, 3).memory()
    replayed = []
    for round in range(rounds):
        state = rule.begin(client(round, rounds, epochs), memory, {}, NOBODY)
        for _ in range(epochs):
            of_epoch = []
            for _ in range(3):
                of_epoch.append(len(rule.replay(state, np.arange(2), NOBODY)))
                rule.stepped(state, {})
            assert len(set(of_epoch)) == 1
            replayed.append(of_epoch[0])
    assert replayed[::-1] == [2 * (k % 2 == 0) for k in range(rounds * epochs)]
    never = replace(rule, forget=False)
    state = never.begin(client(0, rounds, epochs), memory, {}, NOBODY)
    assert len(never.replay(state, np.arange(2), NOBODY)) == 2


def test_the_loss_by_hand() -> None:
    """ER-ACE: replayed rows over classes seen, beside the cross-entropy of the others, which is the engine's."""
    logits, labels = torch.randn(5, 6, generator=torch_stream(0, "logits")), torch.tensor([4, 5, 4, 1, 2])
    known = {"logits": logits, "labels": labels, "classes": (4, 5), "seen": (1, 2, 4, 5), "own": slice(0, 3)}
    got = aer.Learner().loss({}, step_of(**known, replayed=slice(3, 5)))
    assert got is not None
    torch.testing.assert_close(got, F.cross_entropy(logits[3:][:, [1, 2, 4, 5]], torch.tensor([0, 1])))
    assert aer.Learner().loss({}, step_of(**known, replayed=slice(3, 3))) is None


def test_the_largest_keys_of_every_class_are_kept_and_weigh_as_they_should() -> None:
    """Of two samples the first is kept with chance w_1 / (w_1 + w_2); classes share the room evenly."""
    labels, keys = np.array([3, 3, 1, 1, 1]), np.array([0.6, 0.9, 0.1, 0.3, 0.2])
    assert asymmetric.chosen(labels, keys, 2).tolist() == [3, 1]
    assert asymmetric.chosen(labels, keys, 4).tolist() == [3, 4, 1, 0]
    draw, weights = torch_stream(1, "draw"), torch.tensor([0.6, 0.2])
    first = sum(int(asymmetric.sampling_keys(weights, draw).argmax() == 0) for _ in range(2000))
    assert stats.binomtest(first, 2000, 0.75).pvalue > 0.001


def seeing(right: np.ndarray, current: np.ndarray) -> Any:
    """A client whose model is sure of the labels of some samples, and of other classes for the rest. Classes 2 and 3 are new."""
    labels = torch.from_numpy(np.where(current, 2 + np.arange(len(right)) % 2, np.arange(len(right)) % 2))
    sure = torch.where(torch.from_numpy(right), labels, labels ^ 1)
    logits = 5.0 * F.one_hot(sure, 4)
    shard = np.flatnonzero(current)
    return SimpleNamespace(
        config=client(0, 1, 1).config, task=1, round=0, shard=shard, classes=(2, 3), seen=(0, 1, 2, 3),
        labels=lambda at: labels[torch.from_numpy(at)], outputs=lambda at, params: Outputs(logits[at], logits[at].float()),
    )  # fmt: skip


def test_new_samples_are_kept_for_being_likely_and_old_ones_for_being_unlikely() -> None:
    right, current = np.arange(80) % 4 < 2, np.arange(80) >= 40
    here = seeing(right, current)
    rule, old = asymmetric.Learner(size=24), Buffer(np.arange(40), {}, 60)
    buffer = rule.filled(old, here, {}, torch_stream(2, "abs"))
    labels = here.labels(buffer.positions).numpy()
    assert np.bincount(labels).tolist() == [6, 6, 6, 6]
    of_now = current[buffer.positions]
    assert right[buffer.positions][of_now].all()
    assert right[buffer.positions][~of_now].mean() < 0.1
    assert (buffer.offered, buffer.task) == (100, 1)
    again = rule.filled(
        buffer, here, {}, torch_stream(3, "abs")
    )  # the same task's next round: all of its samples are weighed anew
    assert again.offered == 100
    assert len(set(again.positions)) == 24
    assert set(again.positions[current[again.positions]]) == set(buffer.positions[of_now])


@pytest.mark.parametrize(("round", "judge"), [(0, 2.0), (1, 9.0)])
def test_the_model_that_judges(round: int, judge: float) -> None:
    """The one that the round began with; in a task's first round the client's own after the forgetting epoch, steps 0 to 2."""
    seen: list[float] = []
    rule = asymmetric.Learner(size=4)
    here = seeing(np.ones(5, dtype=bool), np.ones(5, dtype=bool))
    outputs = here.outputs
    here.outputs = lambda at, params: (seen.append(float(params["w"])), outputs(at, params))[1]
    here.config, here.round, here.params = client(0, 2, 2).config, round, {"w": torch.tensor(9.0)}
    state = rule.begin(here, {}, {}, NOBODY)
    for step in range(6):
        rule.replay(state, np.arange(2), NOBODY)
        rule.stepped(state, {"w": torch.tensor(float(step))})
    rule.end(state, here, {"w": torch.tensor(5.0)}, torch_stream(4, "abs"))
    assert set(seen) == {judge}


@pytest.mark.parametrize("rule", [aer.Learner(size=4), asymmetric.Learner(size=4)])
def test_together_is_as_one_by_one(rule: Learner) -> None:
    def replaying() -> Here:
        here = work("client.epochs=2")
        here.learners["x"] = rule
        for k, job in enumerate(here.jobs):
            memory = Buffer(here.shards[k][:3], {}, 3, task=0).memory()
            here.jobs[k] = replace(job, memory={f"learner.x/{n}": t for n, t in memory.items()})
        return here

    got = replaying().together()
    require_same(got, replaying().one_by_one())
    assert any(isinstance(u, ClientUpdate) and u.num_samples for u in got)


def test_the_first_round_is_fedavg_and_samples_are_stored(tmp_path: Path) -> None:
    one = (
        "server.aggregator=fedavg",
        "server.consolidator=none",
        "server.rounds=1",
        "stream.tasks=1",
        "stream.classes_per_task=3",
    )
    configs = [
        tiny(*one, f"client.learners=[{names}]", output=tmp_path)
        for names in ("", "{name: aer, size: 4}", "{name: abs, size: 4}")
    ]
    results = [run(config) for config in configs]
    plain, *others = (final_state(Path(str(r.path)), config).params for r, config in zip(results, configs, strict=True))
    assert all(same_bits(params, plain) for params in others)
    for r in results[1:]:
        assert r.costs["bytes"] == results[0].costs["bytes"]
        assert r.costs["stored"]["max"] == 4 * (8 * 8 + 8) + 16


def test_abs_chooses_by_itself() -> None:
    with pytest.raises(ConfigError, match="buffer herding does not go with abs, which chooses by itself"):
        asymmetric.Learner(buffer="herding")
