"""Experience replay against its parts: the loss by hand, what is remembered, and what cannot work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from clients.learners.er import Learner
from fedsim.core import config as configs
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate
from fedsim.simulation import prepare, run
from tests.clients.test_fused import Here, require_same, work
from tests.clients.works import step_of
from tests.tiny import kept, tiny


def test_the_loss_by_hand() -> None:
    """Own rows 0-2, another learner's row 3, replayed rows 4-5: the mean over rows 0, 1, 2, 4, 5 over classes seen."""
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([5, 6, 5, 7, 1, 2])
    known = {"logits": logits, "labels": labels, "classes": (5, 6), "seen": (1, 2, 5, 6)}
    step = step_of(**known, own=slice(0, 3), replayed=slice(4, 6))
    rows, seen = [0, 1, 2, 4, 5], [1, 2, 5, 6]
    want = F.cross_entropy(logits[rows][:, seen], torch.tensor([2, 3, 2, 0, 1]))
    torch.testing.assert_close(Learner().loss({}, step), want)
    empty = step_of(**known, own=slice(0, 3), replayed=slice(4, 4))
    plain = F.cross_entropy(logits[:3, 5:7], torch.tensor([0, 1, 0]))
    torch.testing.assert_close(Learner().loss({}, empty), plain)


def replaying(*overrides: str) -> Here:
    here = work(*overrides)
    here.learners["er"] = Learner(size=4, batch_size=3)
    return here


def test_an_empty_buffer_is_the_plain_cross_entropy() -> None:
    for got, want in zip(replaying().one_by_one(), work().one_by_one(), strict=True):
        assert isinstance(got, ClientUpdate) and isinstance(want, ClientUpdate)
        for name, tensor in want.params.items():
            torch.testing.assert_close(got.params[name], tensor)


def test_together_is_as_one_by_one_with_a_buffer() -> None:
    here = replaying()
    for k, job in enumerate(here.jobs):
        memory = {"positions": torch.from_numpy(here.shards[k][:3]), "offered": torch.tensor(3), "task": torch.tensor(0)}
        here.jobs[k] = replace(job, memory={f"learner.er/{n}": t for n, t in memory.items()})
    got = here.together()
    require_same(got, here.one_by_one())
    for update in got:
        assert isinstance(update, ClientUpdate)
        if update.num_samples:
            after = update.memory
            assert len(after["learner.er/positions"]) == 4
            assert int(after["learner.er/offered"]) == 3 + update.num_samples and int(after["learner.er/task"]) == 1


def test_samples_are_offered_once_a_task_and_online_in_every_round(tmp_path: Path) -> None:
    for online in (False, True):
        most = int(prepare(tiny()).manifest.sizes.sum(axis=0).max())
        config = tiny(
            f"client.learners=[{{name: er, size: {most}}}]", f"stream.online={str(online).lower()}", "server.rounds=2",
            "server.aggregator=fedavg", "server.consolidator=none", output=tmp_path / str(online),
        )  # fmt: skip
        results = run(config)
        held = prepare(config).manifest.sizes.sum(axis=0)
        for client, memory in kept(results.path)["memory"].items():
            positions = memory["learner.er/positions"].tolist()
            assert len(positions) == len(set(positions)) == held[client]
            assert int(memory["learner.er/offered"]) == held[client]
        stored = results.costs["stored"]
        assert stored["max"] == held.max() * (8 * 8 * 1 + 8) + 16, "samples of 64 bytes with their label, and two numbers"


@pytest.mark.parametrize(
    "options", [{"size": 0}, {"batch_size": 0}, {"size": 2.5}, {"total": 0}, {"total": 9, "size": 3}, {"buffer": "resevoir"}]
)
def test_options_that_can_never_work(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        configs.build("learners", {"name": "er", **options})


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("client.learners=[{name: er, total: 2}]", "learner er: total 2 leaves none of 3 clients a sample: use 3 or more"),
        (
            "client.learners=[{name: er, size: 73}]",
            r"learner er: no client can fill a buffer of 73, since none ever holds more than \d+ samples: set size to \d+ or",
        ),
        ("client.learners=[{name: er, total: 240}]", r"no client can fill a buffer of 80, .*: set total to \d+ or less"),
        (
            "stream.keep=false",
            r"learner er needs the buffer, which stream.keep: false forbids: choose another method, or allow it$",
        ),
    ],
)
def test_a_buffer_that_cannot_be(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        prepare(
            tiny(*{"client.learners": "client.learners=[{name: er, size: 4}]", override.partition("=")[0]: override}.values())
        )
    assert "\n" not in str(refused.value)


def test_a_total_is_shared_evenly() -> None:
    assert Learner(total=10).room(3) == 3 and Learner(size=7).room(3) == 7 and Learner().room(3) == Learner().size == 200


def test_two_buffers_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text("from clients.learners.er import Learner as Learner\n")
    with pytest.raises(ConfigError, match=r"both take the place of .*, which only one part of a run can have"):
        prepare(tiny(client={"learners": ["er", str(other)]}))
