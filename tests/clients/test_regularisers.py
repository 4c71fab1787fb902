"""Learners that hold clients together, or to what was learned before, against closed forms: FedRS, MOON."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.learners import fedrs, moon
from fedsim.core import config as configs
from fedsim.core.contracts import Outputs
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate
from fedsim.simulation import prepare, run
from tests.clients.test_fused import Here, doubled, require_same, work
from tests.clients.works import step_of
from tests.tiny import final_state, kept, same_bits, tiny

NEED_A_PAST = "lwf, feature_distillation, moon, ewc, si"
GOES_ON = ("server.aggregator=fedavg", "server.consolidator=none")


def updates(here: Here, together: bool = False) -> list[ClientUpdate]:
    found = here.together() if together else here.one_by_one()
    assert all(isinstance(u, ClientUpdate) for u in found)
    return [u for u in found if isinstance(u, ClientUpdate)]


@pytest.mark.parametrize("together", [False, True])
def test_nothing_is_added_before_there_is_a_past(together: bool) -> None:
    """No teacher, no model of one's own, no importance, no anchor: not a bit moves."""
    ours, theirs = (updates(work(f"client.learners=[{items}]"), together) for items in (NEED_A_PAST, ""))
    assert all(same_bits(a.params, b.params) for a, b in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------- FedRS


@pytest.mark.parametrize("alpha", [0.3, 0.0, 1.0, None])
def test_fedrs_by_hand(alpha: float | None) -> None:
    """Classes 2, 4, 5 of the task, of which the client holds 2 and 5; row 2 of the batch is another learner's."""
    z = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    step = step_of(logits=z, labels=torch.tensor([5, 2, 0]), classes=(2, 4, 5), own=slice(0, 2))
    value = fedrs.Learner(alpha=alpha).loss({"held": [2, 5]}, step)
    want, slope = 0.0, torch.zeros_like(z)
    for row, label in enumerate([5, 2]):
        scaled = {c: z[row, c].item() * (1.0 if c != 4 else alpha or 0.0) for c in (2, 4, 5) if c != 4 or alpha is not None}
        total = sum(math.exp(v) for v in scaled.values())
        want -= (scaled[label] - math.log(total)) / 2
        for c, v in scaled.items():
            slope[row, c] = (math.exp(v) / total - (c == label)) * (1.0 if c != 4 else alpha or 0.0) / 2
    assert value.item() == pytest.approx(want, rel=1e-12)
    (gradient,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(gradient, slope)
    if not alpha:
        assert not gradient[:, 4].any(), "the row of an absent class is not pushed away"


def test_fedrs_is_the_cross_entropy_at_alpha_1_and_for_who_holds_all_classes() -> None:
    here, bare = work(), updates(work())
    one, scaled = (updates(replace(here, learners={"fedrs": fedrs.Learner(alpha=alpha)})) for alpha in (1.0, 0.1))
    classes = [len(set(here.samples.batch(shard)[1].tolist())) for shard in here.shards]
    assert {2, 3} <= set(classes), "the test says nothing unless some hold all three and some do not"
    for held, a, b, plain in zip(classes, one, scaled, bare, strict=True):
        assert same_bits(a.params, plain.params)
        assert same_bits(b.params, plain.params) == (held in (0, 3))


# ---------------------------------------------------------------- MOON


def contrast(ours: torch.Tensor, near: torch.Tensor, far: torch.Tensor, **options: float) -> torch.Tensor | None:
    models = {"round": near, "last": far}
    step = step_of(
        features=ours,
        labels=torch.zeros(len(ours)),
        own=slice(0, 3),
        model=lambda p: Outputs(models[p["which"]], models[p["which"]]),
    )
    return moon.Learner(**options).loss({"round": {"which": "round"}, "last": {"which": "last"}}, step)


def test_moon_by_hand_and_at_its_fixed_points() -> None:
    draw = torch.Generator().manual_seed(0)
    ours, near, far = (torch.randn(4, 6, dtype=torch.float64, generator=draw) for _ in range(3))
    want = 0.0
    for f, g, p in zip(ours[:3], near[:3], far[:3], strict=True):
        good, bad = (math.exp(float(f @ other / (f.norm() * other.norm())) / 0.3) for other in (g, p))
        want -= 2.0 * math.log(good / (good + bad)) / 3
    value = contrast(ours, near, far, mu=2.0, temperature=0.3)
    assert value is not None and value.item() == pytest.approx(want, rel=1e-12)
    ours.requires_grad_()
    alike = contrast(ours, near, 3 * near)
    assert alike is not None and alike.item() == pytest.approx(math.log(2), rel=1e-12)
    (gradient,) = torch.autograd.grad(alike, ours)
    assert float(gradient.abs().max()) < 1e-15


def test_moon_forgets_its_model_with_the_task_and_is_fedavg_without_weight() -> None:
    here, bare = work(), updates(work())
    memory = {f"learner.moon/model/{n}": -t for n, t in here.jobs[0].params.items() if n.startswith("adapter.")}
    for task, mu in ((0, 1.0), (1, 0.0)):
        jobs = [replace(j, memory={**memory, "learner.moon/task": torch.tensor(task)}) for j in here.jobs]
        ours = updates(replace(here, jobs=jobs, learners={"moon": moon.Learner(mu=mu)}))
        assert all(same_bits(a.params, b.params) for a, b in zip(ours, bare, strict=True))


def test_moon_together_is_as_one_by_one_and_looks_at_its_own_last_model() -> None:
    here = doubled(work("client.learners=[moon]"))
    bare = doubled(work())
    for k, job in enumerate(here.jobs):
        last = {f"learner.moon/model/{n}": (k - 1.5) * t for n, t in job.params.items() if n.startswith("adapter.")}
        here.jobs[k] = replace(job, memory={**last, "learner.moon/task": torch.tensor(1)})
    got, plain = here.together(), bare.one_by_one()
    require_same(got, here.one_by_one())
    for ours, theirs in zip(got, plain, strict=True):
        assert isinstance(ours, ClientUpdate) and isinstance(theirs, ClientUpdate)
        if ours.num_samples:
            assert not same_bits(ours.params, theirs.params)
            own = {f"learner.moon/model/{n}": t for n, t in ours.params.items() if not n.startswith("head.")}
            assert same_bits({n: t for n, t in (ours.memory or {}).items() if n != "learner.moon/task"}, own)


def test_what_moon_stores(tmp_path: Path) -> None:
    """A device keeps the module that it sends, and the task's number; nothing more travels."""
    config, bare = (tiny(*GOES_ON, f"client.learners=[{item}]", output=tmp_path) for item in ("moon", ""))
    results, plain = run(config), run(bare)
    module = sum(t.nbytes for n, t in final_state(results.path, config).params.items() if n.startswith("adapter."))
    assert results.costs["stored"] == {"clients": 3, "mean": module + 8, "max": module + 8}
    assert results.costs["bytes"] == plain.costs["bytes"]
    assert all(int(m["learner.moon/task"]) == 1 for m in kept(results.path)["memory"].values())
    (note,) = prepare(tiny(*GOES_ON, "client.learners=[moon]", "server.rounds=1")).notes
    assert note.startswith("learner moon: with one round per task")


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options",
    [
        {"name": "fedrs", "alpha": 1.5}, {"name": "fedrs", "alpha": -0.1}, {"name": "moon", "mu": -1.0},
        {"name": "moon", "temperature": 0.0},
    ],
)  # fmt: skip
def test_options_that_can_never_work(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=list(options)[1]):
        configs.build("learners", options)


def test_two_in_the_place_of_the_cross_entropy_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"learner fedrs and learner square both take the place of the cross-entropy"):
        prepare(tiny(*GOES_ON, "client.learners=[fedrs, square]"))
