"""Generators that the server trains without data, and what clients do with their images: parts by hand, losses that fall, and
bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clients.learners import _generator, mfcl, target
from clients.learners._generator import ImageGenerator
from fedsim.core import config as configs
from fedsim.core.contracts import Outputs
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate
from fedsim.simulation import prepare, run
from tests.clients.test_fused import work
from tests.clients.works import step_of
from tests.models.zoo import BERT
from tests.tiny import final_state, same_bits, tiny

CPU = torch.device("cpu")
GOES_ON = ("server.aggregator=fedavg", "server.consolidator=none")
NEW, SEEN, OLD = (5, 6), (1, 2, 4, 5, 6), [1, 2, 4]
SMALL = "images: 5, batch: 3, steps: 2, warmup: 0, student_steps: 1, latent: 4, width: 2"
METHODS = {
    "target": f"{{name: target, {SMALL}}}",
    "mfcl": "{name: mfcl, steps: 2, batch: 4, latent: 3, width: 2}",
    "mfcl, samples": "{name: mfcl, steps: 2, batch: 4, latent: 3, width: 2, sends: samples, images: 5}",
}


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- the generator


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((28, 28), [(7, 7), (14, 14), (28, 28)]), ((32, 20, 3), [(8, 5), (16, 10), (32, 20)]), ((8, 8), [(4, 4), (8, 8)]),
        ((3, 3, 1), [(2, 2), (3, 3)]), ((225, 100, 3), [(8, 4), (15, 7), (29, 13), (57, 25), (113, 50), (225, 100)]),
    ],
)  # fmt: skip
def test_images_are_of_the_shape_and_between_0_and_1(shape: tuple[int, ...], sizes: list[tuple[int, int]]) -> None:
    generator = ImageGenerator(5, 3, shape)
    assert generator.sizes == sizes
    tensors = generator.init(draw(), CPU)
    for training in (True, False):
        images = generator.images(tensors, 50 * generator.latents(3, draw(), CPU), training)
        assert images.shape == (3, *shape) and bool(((images >= 0) & (images <= 1)).all())
        assert float(images.std()) > 0.01


def test_an_image_does_not_depend_on_the_others_once_moments_are_kept() -> None:
    generator = ImageGenerator(4, 3, (8, 8, 3))
    tensors, z = generator.init(draw(), CPU), generator.latents(6, draw(1), CPU)
    before = {n: t.clone() for n, t in tensors.items()}
    training = generator.images(tensors, z, training=True)
    moved = {n for n, t in tensors.items() if not torch.equal(t, before[n])}
    assert moved == {n for n in tensors if "running" in n}, "in training they follow the batch's"
    together, alone = generator.images(tensors, z), torch.cat([generator.images(tensors, one[None]) for one in z])
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(training, together)


def test_smoothing_is_a_gaussian_filter() -> None:
    images = torch.rand(2, 9, 7, 3, generator=draw(), dtype=torch.float64)
    bell = np.exp(-(np.arange(-2, 3) ** 2) / 2.0)
    kernel = np.outer(bell, bell) / bell.sum() ** 2
    for some in (images, images[..., 0]):
        flat = kernel.reshape(1, 5, 5, *[1] * (some.ndim - 3))
        want = scipy.ndimage.correlate(some.numpy(), flat, mode="mirror")
        torch.testing.assert_close(_generator.smoothed(some), torch.from_numpy(want))


def test_gaps_of_batch_norms_by_hand() -> None:
    x = torch.randn(5, 3, 4, 4, generator=draw())
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    first: Any = net[0]
    first.running_mean, first.running_var = torch.tensor([0.5, 0.0, -1.0]), torch.tensor([1.0, 2.0, 3.0])
    with _generator.moments_watched(net) as gaps:
        net(x)
    columns = x.transpose(0, 1).flatten(1)
    want = (columns.mean(1) - first.running_mean).norm() + (columns.var(1, correction=0) - first.running_var).norm()
    assert len(gaps) == 1
    torch.testing.assert_close(gaps[0], want)
    with _generator.moments_watched(nn.Linear(2, 2)) as gaps:
        assert not gaps


# ---------------------------------------------------------------- what the server asks of images


def server_of(outputs: Callable[..., Tensor], encoder: nn.Module | None = None) -> Any:
    """A server whose model gives these logits, by the tensors that it is handed."""
    backbone = SimpleNamespace(encoder=encoder or nn.Identity())
    return SimpleNamespace(seen=OLD, backbone=backbone, outputs=lambda x, params=None: Outputs(x, outputs(x, params)))


def logits(seed: int, rows: int = 4) -> Tensor:
    return 2 * torch.randn(rows, 8, dtype=torch.float64, generator=draw(seed))


def test_the_loss_of_targets_images_by_hand() -> None:
    t, s, labels = logits(0), logits(1), torch.tensor([4, 1, 2, 2])
    s[:2] = t[:2] * 0.5  # of which teacher and student agree
    server = server_of(lambda x, params: t if params is None else s)
    learner = target.Learner(oh=0.7, adv=2.0)
    want = agreed = 0.0
    for row, label in enumerate(labels.tolist()):
        p, q = (torch.softmax(z[row, OLD], 0) for z in (t, s))
        want -= 0.7 * math.log(p[OLD.index(label)]) / 4
        if int(p.argmax()) == int(q.argmax()):
            agreed -= 2.0 * float((p * (p / q).log()).sum()) / 4
    assert agreed < 0
    images = torch.rand(4, 2, 2)
    assert float(learner.image_loss(server, images, labels, None)) == pytest.approx(want)
    assert float(learner.image_loss(server, images, labels, {"any": torch.zeros(1)})) == pytest.approx(want + agreed)


def test_the_loss_of_mfcls_images_by_hand() -> None:
    t, images = logits(0), torch.rand(4, 6, 6, dtype=torch.float64, generator=draw())
    learner = mfcl.Learner(content=3.0, temperature=2.0, balance=5.0, smooth=7.0)
    p = torch.softmax(t[:, OLD], 1)
    content = -torch.log_softmax(t[:, OLD] / 2, 1).amax(1).mean()
    balance = 1 + (p.mean(0) * p.mean(0).log()).sum() / math.log(3)
    rough = (images - _generator.smoothed(images)).square().mean()
    got = learner.image_loss(server_of(lambda x, _: t), images)
    torch.testing.assert_close(got, 3 * content + 5 * balance + 7 * rough)
    even = torch.full((4, 8), 0.5, dtype=torch.float64)
    alone = mfcl.Learner(content=0.0, smooth=0.0).image_loss(server_of(lambda x, _: even), images)
    assert float(alone) == pytest.approx(0.0, abs=1e-12), "all classes alike: the most entropy"


def linear_server() -> Any:
    """A server whose model is a linear map of an image's pixels, with a student of the same kind that knows nothing yet."""
    map_8P = torch.randn(8, 64, generator=draw(3))

    def outputs(pixels: Tensor, params: Any = None) -> Outputs:
        features = 2 * pixels.flatten(1) - 1
        return Outputs(features, features @ (map_8P if params is None else params["w"]).T)

    return SimpleNamespace(
        seen=OLD, device=CPU, draw=draw(), image_shape=(8, 8), backbone=SimpleNamespace(encoder=nn.Identity()), config=tiny(),
        fresh={"w": torch.zeros(8, 64)}, outputs=outputs,
    )  # fmt: skip


def test_mfcls_generator_learns() -> None:
    """After more steps the same latent vectors give images of much less loss: of sure classes, all of them."""
    lows = []
    for steps in (1, 60):
        server, learner = linear_server(), mfcl.Learner(steps=steps, batch=16, latent=8, width=4, lr=1e-2)
        state = learner.made(None, server)
        generator, tensors = ImageGenerator(8, 4, (8, 8)), {n.removeprefix(mfcl.TENSORS): t for n, t in state.items()}
        images = generator.images(tensors, generator.latents(64, draw(9), CPU))
        lows.append(float(learner.image_loss(server, images)))
        assert steps == 1 or set(server.outputs(images).logits[:, OLD].argmax(1).tolist()) == {0, 1, 2}
    assert lows[1] < 0.2 * lows[0]


def test_targets_images_come_to_be_of_the_classes_that_are_asked_for_and_its_student_learns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, students, found = list[Tensor](), list[Any](), list[float]()
    real = target.Learner.image_loss

    def noting(self: Any, server: Any, images: Tensor, labels_b: Tensor, student: Any) -> Tensor:
        asked.append(labels_b)
        students.append(student)
        return real(self, server, images, labels_b, student)

    monkeypatch.setattr(target.Learner, "image_loss", noting)
    for steps in (1, 30):
        asked.clear(), students.clear()
        server = linear_server()
        learner = target.Learner(images=40, batch=16, steps=steps, warmup=1, student_steps=9, latent=8, width=4, lr=1e-2)
        images = learner.made(None, server)["images"]
        assert images.dtype == torch.uint8 and images.shape == (40, 8, 8)
        assert [s is None for s in students] == [True] * steps + [False] * 2 * steps
        labels = torch.cat(asked[::steps])[:40]
        places = torch.tensor([OLD.index(c) for c in labels.tolist()])
        found.append(float(F.cross_entropy(server.outputs(images / 255).logits[:, OLD], places)))
    assert found[1] < 0.2 * found[0]
    ours, theirs = (server.outputs(images / 255, params).logits[:, OLD].detach() for params in (students[-1], None))
    assert float((ours.argmax(1) == theirs.argmax(1)).float().mean()) > 0.7


# ---------------------------------------------------------------- what clients do with them


def known(z: Tensor, t: Tensor) -> dict[str, Any]:
    """A step with own rows 0-1, another learner's row 2 and synthetic rows 3-5; logits double features, the teacher's are t."""
    return {
        "features": z, "logits": 2 * z, "labels": torch.tensor([5, 6, 1, -1, -1, -1]), "classes": NEW, "seen": SEEN,
        "own": slice(0, 2), "synthetic": slice(3, 6), "model": lambda params: Outputs(t / 2, t),
        "head": lambda features, params=None: (2 if params is None else 3) * features,
    }  # fmt: skip


def test_targets_term_by_hand_and_least_for_a_student_that_is_the_teacher() -> None:
    t, z = logits(0, 6), logits(1, 6).requires_grad_()
    state = {"images": torch.zeros(1), "teacher": {}}
    got = target.Learner(distillation=3.0).loss(state, step_of(**known(z, t)))
    p, q = (torch.softmax(x[3:, OLD] / 2, 1) for x in (t, 2 * z))
    assert got is not None
    torch.testing.assert_close(got, -3 * (p * q.log()).sum(1).mean())
    same = (t / 2).clone().requires_grad_()
    least = target.Learner(distillation=3.0).loss(state, step_of(**known(same, t)))
    assert least is not None and least < got
    (gradient,) = torch.autograd.grad(least, same)
    assert float(gradient.abs().max()) < 1e-12


def test_mfcls_terms_by_hand_and_which_tensors_learn_from_them() -> None:
    t, z = logits(0, 6), logits(1, 6).requires_grad_()
    rows, told = [0, 1, 3, 4, 5], [5, 6, *(OLD[int(row[OLD].argmax())] for row in t[3:])]
    labels = torch.tensor([SEEN.index(c) for c in told])
    finetuned = F.cross_entropy(2 * z[rows][:, list(SEEN)], labels)
    apart = (3 * z[rows][:, OLD] - t[rows][:, OLD]).square().mean()
    state = {"teacher": {"t": t}}
    got = mfcl.Learner(head=2.0, features=0.5).loss(state, step_of(**known(z, t)))
    assert got is not None
    torch.testing.assert_close(got, 2 * finetuned + 0.5 * apart)
    ours, theirs = (torch.autograd.grad(value, z)[0] for value in (got, 0.5 * apart))
    torch.testing.assert_close(ours, theirs), "the cross-entropy of the head does not reach the features"


@pytest.mark.parametrize("method", METHODS)
def test_without_images_it_is_fedavg(method: str) -> None:
    """As in a first task: the bits of no learner, one by one and together."""
    with_it, without = work(f"client.learners=[{METHODS[method]}]"), work()
    for ours, theirs in zip(with_it.one_by_one() + with_it.together(), without.one_by_one() + without.together(), strict=True):
        assert isinstance(ours, ClientUpdate) and isinstance(theirs, ClientUpdate)
        assert same_bits(ours.params, theirs.params)


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("method", METHODS)
def test_a_run_makes_images_and_sends_them_once_a_task(method: str, tmp_path: Path) -> None:
    """3 clients, and two tasks that are followed by another: as many bytes as closed forms say, and none up."""
    config = tiny(*GOES_ON, f"client.learners=[{METHODS[method]}]", "stream.tasks=3", output=tmp_path)
    results = run(config)
    state = final_state(results.path, config)  # type: ignore[arg-type]
    (kept,) = state.learners.values()
    one = 5 * 8 * 8
    if method == "mfcl":  # linear 3 -> 4 channels of 4 × 4; conv 4 -> 2, 2 -> 1; norms of 4 and 2 channels with two moments
        one = 4 * ((3 + 1) * 64 + (4 * 9 + 1) * 2 + (2 * 9 + 1) + 4 * (4 + 2))
        assert kept.pop("shape").tolist() == [8, 8]
    else:
        images = kept["images" if method == "target" else "samples"]
        assert images.dtype == torch.uint8 and images.shape == (5, 8, 8)
    assert sum(t.nbytes for t in kept.values()) == one
    shape = 2 * 8 if method == "mfcl" else 0  # which stays the same
    assert results.costs["bytes"]["down"]["context"] == 3 * (2 * one + shape)
    assert "stored" not in results.costs and results.costs["seconds"]["server"] > 0
    trained = sum(t.nbytes for t in state.params.values())
    assert sum(results.costs["bytes"]["up"].values()) == 3 * 2 * 3 * trained, "in 3 tasks of 2 rounds, and nothing else"


@pytest.mark.parametrize("learner", ["{name: target, distillation: 0}", "{name: mfcl, head: 0, features: 0}"])
def test_weights_of_zero_are_fedavg_and_make_nothing(learner: str, tmp_path: Path) -> None:
    null, bare = (tiny(*GOES_ON, f"client.learners=[{item}]", output=tmp_path) for item in (learner, ""))
    ours, theirs = run(null), run(bare)
    assert same_bits(final_state(ours.path, null).params, final_state(theirs.path, bare).params)  # type: ignore[arg-type]
    assert ours.costs["bytes"] == theirs.costs["bytes"]


@pytest.mark.parametrize("learner", ["target", "mfcl"])
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stream.tasks=1"], r"there is one task \(stream.tasks: 1, .*use several tasks"),
        (["stream.tasks=null", "stream.classes_per_task=6"], "there is one task .*use several tasks"),
        (["data.kind=tokens"], "trains a generator of images, but data.source synthetic has texts"),
    ],
)
def test_what_cannot_work_is_said_before_training(learner: str, overrides: list[str], said: str) -> None:
    model = {"backbone": "random", "config": BERT} if "data.kind=tokens" in overrides else {}
    with pytest.raises(ConfigError, match=f"^learner {learner} .*{said}"):
        prepare(tiny(*GOES_ON, f"client.learners=[{learner}]", *overrides, **({"model": model} if model else {})))


def test_mfcl_needs_one_head() -> None:
    server = {"aggregator": "collect", "consolidator": "compose", "rounds": 1}
    with pytest.raises(ConfigError, match=r"^learner mfcl asks the head .* aggregator collect keeps a head per client"):
        prepare(tiny("client.learners=[mfcl]", server=server, adapter={"name": "apt", "memory": 1}, head="mixture"))


@pytest.mark.parametrize(
    "options",
    [
        {"distillation": -1.0}, {"images": 0}, {"batch_size": 0}, {"lr_z": 0.0}, {"student_steps": -1},
        {"name": "mfcl", "sends": "z"}, {"name": "mfcl", "steps": 0}, {"name": "mfcl", "batch_size": 0},
        {"name": "mfcl", "features": -0.1},
        {"name": "mfcl", "temperature": 0.0},
    ],
)  # fmt: skip
def test_options_that_can_never_work(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=list(options)[-1]):
        configs.build("learners", {"name": "target", **options})
