"""Prototypes against the moments of all samples together, the loss by hand, and what travels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clients import local
from clients.learners.pip import Learner, moments
from fedsim.core import config as configs
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate
from fedsim.core.sums import summed
from fedsim.simulation import prepare, run
from tests.clients.test_fused import CLASSES, Here, doubled, require_same, work
from tests.clients.works import step_of
from tests.tiny import same_bits, tiny


def test_pooled_moments_are_those_of_all_samples_together() -> None:
    generator, learner = np.random.default_rng(0), Learner()
    features, labels = 3 + generator.normal(size=(60, 4)), generator.choice([1, 1, 3, 4], size=60)
    parts = np.split(np.arange(60), [11, 13, 37])
    labels[parts[1]] = [4, 1]  # a single sample each: told by nobody
    sent = [moments(torch.from_numpy(features[p]), torch.from_numpy(labels[p]), 6) for p in parts]
    assert not sent[1]["mean"].numel() and not sent[1]["count"].any()
    before = learner.opened(None, {}, 0)
    state = learner.heard(before, summed(learner.lift(s, 1) for s in sent), 4)
    told = learner.context(state)
    of = {c: np.concatenate([p[labels[p] == c] for p in parts if (labels[p] == c).sum() > 1]) for c in (1, 3, 4)}
    assert told["count"].tolist() == [0, len(of[1]), 0, len(of[3]), len(of[4]), 0]
    for row, c in enumerate((1, 3, 4)):
        np.testing.assert_allclose(told["mean"][row].numpy(), features[of[c]].mean(0), rtol=1e-6)
        np.testing.assert_allclose(told["variance"][row].numpy(), features[of[c]].var(0), rtol=1e-5)
    only = moments(torch.from_numpy(features[of[3]]) + 1, torch.full((len(of[3]),), 3), 6)
    later = learner.heard(state, learner.lift(only, 1), 4)
    assert torch.equal(later["mean"][1], state["mean"][1]), "nobody sent it in this round"
    np.testing.assert_allclose(later["mean"][3].numpy(), features[of[3]].mean(0) + 1, rtol=1e-6)
    assert learner.context(learner.opened(later, {}, 1)) == {}, "another task, other features"


KNOWN = {
    "count": torch.tensor([0.0, 5.0, 0.0, 7.0]),
    "mean": torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]]),
    "variance": torch.tensor([[4.0, 0.0, 1.0], [0.0, 9.0, 0.25]]),
}


def test_prototypes_lie_up_to_a_standard_deviation_above_the_mean() -> None:
    features, labels = Learner(augmented=400)._drawn(KNOWN, torch.Generator().manual_seed(0))
    assert labels.tolist() == [1] * 400 + [3] * 400
    for row, own in enumerate(features.view(2, 400, 3)):
        shares = (own - KNOWN["mean"][row]) / KNOWN["variance"][row].sqrt().clamp_min(1e-9)
        spread = KNOWN["variance"][row] > 0
        assert bool((shares[:, spread] >= 0).all() and (shares[:, spread] < 1).all()) and not shares[:, ~spread].any()
        torch.testing.assert_close(shares[:, spread].mean(), torch.tensor(0.5).double(), rtol=0, atol=0.05)


def test_the_loss_by_hand() -> None:
    """Own rows 0–1 and two prototypes for each class, the means where nothing varies; over the classes of the task."""
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    known = {**KNOWN, "variance": torch.zeros(2, 3)}
    learner = Learner(augmented=2)
    state = {"work": None, "waits": 5, "prototypes": learner._drawn(known, torch.Generator())}
    step = step_of(
        features=torch.zeros(3, 3), logits=logits, labels=torch.tensor([1, 3, 1]), own=slice(0, 2), classes=(1, 3),
        head=lambda features: features @ weight.T,
    )  # fmt: skip
    rows = torch.cat([logits[:2], KNOWN["mean"][[0, 0, 1, 1]] @ weight.T])[:, [1, 3]]
    torch.testing.assert_close(learner.loss(state, step), F.cross_entropy(rows, torch.tensor([0, 1, 0, 0, 1, 1])))


def injecting(*overrides: str) -> Here:
    here = work(*overrides)
    here.learners["pip"] = Learner(augmented=2)
    return here


def test_a_first_epoch_without_prototypes_is_the_plain_one() -> None:
    for got, want in zip(injecting("client.epochs=1").one_by_one(), work("client.epochs=1").one_by_one(), strict=True):
        assert isinstance(got, ClientUpdate) and isinstance(want, ClientUpdate)
        assert same_bits(got.params, want.params)


def test_then_a_client_makes_those_of_its_own_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """From its model as it is after the first epoch."""
    seen: list[dict[str, torch.Tensor]] = []
    real = Learner._drawn
    monkeypatch.setattr(Learner, "_drawn", lambda self, known, draw: seen.append(known) or real(self, known, draw))
    here, client = injecting("client.epochs=2"), 2
    longer, shorter = local.train(here.works()[client]), local.train(work("client.epochs=1").works()[client])
    assert isinstance(longer, ClientUpdate) and isinstance(shorter, ClientUpdate)
    one = here.works()[client]
    outputs = one.outputs(one.shard, {**one.params, **shorter.params})
    (known,) = seen
    for name, tensor in moments(outputs.features, one.labels(one.shard), here.model.num_classes).items():
        torch.testing.assert_close(known[name], tensor)


@pytest.mark.parametrize("told", [False, True], ids=["own prototypes", "the server's"])
def test_together_is_as_one_by_one(told: bool) -> None:
    here = doubled(injecting("client.epochs=2"))
    if told:
        zeros, width = torch.zeros(here.model.num_classes), here.model.backbone.width
        known = {
            "count": zeros.index_fill(0, torch.tensor(CLASSES), 3.0),
            "mean": torch.ones(3, width),
            "variance": torch.ones(3, width),
        }
        plan = replace(here.jobs[0].plan, context={"learner.pip": known})
        here = replace(here, jobs=[replace(j, plan=plan) for j in here.jobs])
    got = here.together()
    assert not here.told
    require_same(got, here.one_by_one(), 1e-6)


def test_what_travels(tmp_path: Path) -> None:
    """Up 4 (C + 2 H D) bytes a client and round, down as many for what the server knows, but not in a task's first round."""
    config = tiny("client.learners=[pip]", "server.aggregator=fedavg", "server.consolidator=none", output=tmp_path)
    results, manifest = run(config), prepare(config).manifest
    classes, width, rounds = 6, 16, config.server.rounds
    told_TKC = np.array(manifest.histograms) > 1
    trained = (manifest.sizes > 0).sum()
    assert results.costs["bytes"]["up"]["statistics"] == rounds * 4 * (trained * classes + 2 * told_TKC.sum() * width)
    known_T = told_TKC.any(axis=1).sum(axis=1)
    assert results.costs["bytes"]["down"]["context"] == (rounds - 1) * 3 * 4 * (2 * classes + 2 * known_T.sum() * width)
    assert "stored" not in results.costs


def test_options_that_can_never_work() -> None:
    with pytest.raises(ConfigError, match="augmented"):
        configs.build("learners", {"name": "pip", "augmented": 0})
