"""Learners that the last task's model teaches, against closed forms; what a teacher costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.learners import _teacher, feature_distillation, lwf
from fedsim.core import config as configs
from fedsim.core import contracts
from fedsim.core.contracts import Outputs
from fedsim.core.errors import ConfigError
from fedsim.simulation import prepare, run
from tests.clients.works import step_of
from tests.tiny import final_state, same_bits, tiny

GOES_ON = ("server.aggregator=fedavg", "server.consolidator=none")
NEW, SEEN = (5, 6), (1, 2, 4, 5, 6)


def logits(seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def taught(learner: contracts.Learner, z: Tensor, t: Tensor | None, **known: Any) -> Tensor | None:
    """The learner's term, of logits or features z beside those of a teacher; the last row is another learner's."""
    asked = {"labels": torch.tensor([5, 6, 5, 1]), "classes": NEW, "seen": SEEN, "own": slice(0, 3)} | known
    step = step_of(features=z, logits=z, model=lambda params: Outputs(params["t"], params["t"]), **asked)
    return learner.loss({"teacher": None if t is None else {"t": t}}, step)


def soft(row: Tensor, classes: tuple[int, ...], temperature: float) -> list[float]:
    powers = [math.exp(float(row[c]) / temperature) for c in classes]
    return [p / sum(powers) for p in powers]


@pytest.mark.parametrize(("options", "classes"), [({}, (1, 2, 4)), ({"classes": "task", "temperature": 5.0, "alpha": 3.0}, NEW)])
def test_lwf_by_hand_with_its_gradient(options: dict[str, Any], classes: tuple[int, ...]) -> None:
    learner, z, t = lwf.Learner(**options), logits(0).requires_grad_(), logits(1)
    value = taught(learner, z, t)
    assert value is not None
    heat, want, slope = learner.temperature, 0.0, torch.zeros_like(t)
    for row in range(3):
        ours, theirs = (soft(x[row], classes, heat) for x in (z.detach(), t))
        want -= learner.alpha * sum(q * math.log(p) for p, q in zip(ours, theirs, strict=True)) / 3
        slope[row, list(classes)] = learner.alpha * (torch.tensor(ours) - torch.tensor(theirs)).double() / (3 * heat)
    assert value.item() == pytest.approx(want, rel=1e-12)
    (gradient,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(gradient, slope, atol=1e-7, rtol=1e-6)


def test_hot_distillation_matches_centred_logits() -> None:
    """T → ∞: the gradient is (z − t, each less its mean over the classes) / (S T² b)."""
    z, t, heat = logits(0).requires_grad_(), logits(1), 1e4
    (gradient,) = torch.autograd.grad(_teacher.distillation(z, t, SEEN, heat), z)
    apart = (z - t).detach()[:, SEEN]
    torch.testing.assert_close(gradient[:, SEEN] * 5 * heat**2 * 4, apart - apart.mean(dim=1, keepdim=True), rtol=1e-2, atol=1e-2)


FEATURES = (feature_distillation.Learner(normalised=False, alpha=0.3), feature_distillation.Learner())


@pytest.mark.parametrize("learner", FEATURES)
def test_feature_distillation_by_hand(learner: feature_distillation.Learner) -> None:
    """0.3 times the mean squared distance; of unit vectors, 2 (1 − cos)."""
    f, t, want = logits(0), logits(1), 0.0
    for ours, theirs in zip(f[:3], t[:3], strict=True):
        cosine = float(ours @ theirs / (ours.norm() * theirs.norm()))
        want += 2 * (1 - cosine) / 3 if learner.normalised else 0.3 * float((ours - theirs) @ (ours - theirs)) / 3
    value = taught(learner, f, t)
    assert value is not None and value.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("learner", [lwf.Learner(), lwf.Learner(classes="task"), *FEATURES])
def test_who_equals_the_teacher_learns_nothing_of_it(learner: contracts.Learner) -> None:
    z = logits(0).requires_grad_()
    value = taught(learner, z, z.detach())
    assert value is not None
    (gradient,) = torch.autograd.grad(value, z)
    assert float(gradient.abs().max()) < 1e-15


@pytest.mark.parametrize("there", [True, False])
def test_sigmoids_by_hand(there: bool) -> None:
    """Classes 1, 2, 4 are old and 5, 6 new, labels 5, 6, 5: a mean over 3 x 5 binary cross-entropies."""
    z, t, labels = logits(0), logits(1), [5, 6, 5]
    want = 0.0
    for row, label in enumerate(labels):
        for c in SEEN:
            target = float(torch.sigmoid(t[row, c])) if there and c not in NEW else float(c == label)
            p = float(torch.sigmoid(z[row, c]))
            want -= (target * math.log(p) + (1 - target) * math.log(1 - p)) / 15
    learner = lwf.Learner(form="sigmoids")
    value = taught(learner, z, t if there else None)
    assert value is not None and value.item() == pytest.approx(want, rel=1e-12)
    assert contracts.CROSS_ENTROPY in learner.traits.takes


def test_old_classes_are_those_before_the_task_or_all() -> None:
    assert _teacher.old_classes(NEW, SEEN) == [1, 2, 4]
    assert _teacher.old_classes((0, 1), (0, 1)) == [0, 1]


def test_weight_zero_is_fedavg_and_sends_no_teacher(tmp_path: Path) -> None:
    nulls = "{name: lwf, alpha: 0}, {name: feature_distillation, alpha: 0}"
    null, bare = (tiny(*GOES_ON, f"client.learners=[{items}]", output=tmp_path) for items in (nulls, ""))
    ours, theirs = run(null), run(bare)
    assert same_bits(final_state(ours.path, null).params, final_state(theirs.path, bare).params)
    assert ours.costs["bytes"] == theirs.costs["bytes"]


def test_a_teacher_comes_down_once_a_task(tmp_path: Path) -> None:
    """A module that goes on is the first round's parameters. Where modules are fresh, each of 3 clients is sent the teacher's, of
    as many bytes, once; the head is still the parameters'. A client that sat out the first round is sent it all."""
    down = {}
    for name, overrides in {
        "goes on": GOES_ON, "fresh": ("server.aggregator=fedavg", "server.consolidator=mean"),
        "drawn": (*GOES_ON, "server.participation=0.34"),
    }.items():  # fmt: skip
        results = run(tiny(*overrides, "client.learners=[lwf]", output=tmp_path / name))
        down[name] = results.costs["bytes"]["down"]
        assert "stored" not in results.costs
    each = down["goes on"]["adapter"] // 12  # 2 tasks x 2 rounds x 3 clients
    assert down["goes on"]["context"] == 0
    assert down["fresh"]["context"] == 3 * each
    assert down["drawn"]["context"] == each + down["goes on"]["head"] // 12


@pytest.mark.parametrize("learner", ["lwf", "{name: lwf, form: sigmoids}", "feature_distillation"])
@pytest.mark.parametrize(
    "stream", [["stream.tasks=1"], ["stream.joint=true"], ["stream.tasks=null", "stream.classes_per_task=6"]]
)
def test_a_stream_of_one_task_has_no_teacher(learner: str, stream: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^learner \w+ is taught by .* use several tasks$"):
        prepare(tiny(*GOES_ON, f"client.learners=[{learner}]", *stream))


@pytest.mark.parametrize(
    "options", [{"name": "lwf", "alpha": -1}, {"name": "lwf", "temperature": 0}, {"name": "lwf", "form": "hard"},
                {"name": "lwf", "classes": "new"}, {"name": "feature_distillation", "alpha": -1}],
)  # fmt: skip
def test_options_that_can_never_work(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=list(options)[1]):
        configs.build("learners", options)


def test_sigmoids_leave_nothing_to_labels_where_all_classes_are_old() -> None:
    with pytest.raises(ConfigError, match=r"learner lwf with sigmoids .* use form: softmax"):
        prepare(tiny(*GOES_ON, "client.learners=[{name: lwf, form: sigmoids}]", "stream.name=domain_incremental",
                     "stream.tasks=null", "data.domains=2"))  # fmt: skip
