"""The path integral of a client's training against closed forms and against what another pair of eyes sees of the same steps."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clients import local
from clients.samples import Samples
from clients.statistics.path_integral import Statistic as PathIntegral
from clients.work import Work
from fedsim.core.contracts import ArraySplit
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientJob, ClientUpdate, RoundPlan, StatisticRequest, bytes_up
from fedsim.core.rng import torch_stream
from fedsim.models import model as models
from fedsim.simulation import run
from tests.tiny import final_state, tiny

FORMS = ("movement", "gradient")
FACTORS = ("*.lora_A", "*.lora_B")


def draw(*address: str | int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch_stream(11, "path", *address))


class Following:
    """The learner beside a training of our own."""

    def __init__(self, form: str, params: dict[str, Tensor]) -> None:
        self.learner, self.params = PathIntegral(form).learner(list(params)), params
        self.state = self.learner.begin(WORK, {}, {}, torch.Generator())

    def before_step(self) -> None:
        gradients = {n: t.grad for n, t in self.params.items() if t.grad is not None}
        assert self.learner.corrected(self.state, gradients, self.params) is gradients

    def after_step(self) -> None:
        self.learner.stepped(self.state, self.params)

    def result(self) -> dict[str, Tensor]:
        return dict(self.learner.end(self.state, WORK, self.params, torch.Generator()).statistics)


WORK: Any = None  # the learner asks nothing of it


# ---------------------------------------------------------------- closed forms


def descend(form: str, lr: float, steps: int, clip: float | None = None) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """Plain gradient descent on ½‖w − t‖² for two tensors and one that is left alone; the gradients that it saw."""
    params = {n: draw(n, shape=s).requires_grad_() for n, s in (("a", (3, 2)), ("b", (4,)))} | {"c": draw("c", shape=(2,))}
    target = {n: draw("target", n, shape=tuple(params[n].shape)) for n in "ab"}
    follower = Following(form, params)
    optimizer = torch.optim.SGD([params["a"], params["b"]], lr=lr)
    seen: dict[str, list[Tensor]] = defaultdict(list)
    for _ in range(steps):
        loss = sum((0.5 * (params[n] - target[n]).square().sum() for n in "ab"), torch.zeros(()))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for n in "ab":
            seen[n].append((params[n] - target[n]).detach().clone())
        follower.before_step()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([params["a"], params["b"]], clip)
        optimizer.step()
        follower.after_step()
    return follower.result(), seen


@settings(max_examples=20)
@given(lr=st.floats(1e-3, 0.9), steps=st.integers(1, 6))
def test_gradient_descent_has_a_closed_form(lr: float, steps: int) -> None:
    """w moves by −lr·g, so a step's movement is lr·‖g‖², and g is w − t."""
    moved, seen = descend("movement", lr, steps)
    pulled, _ = descend("gradient", lr, steps)
    for n in "ab":
        torch.testing.assert_close(
            moved[f"movement/{n}"].double(), sum(lr * g.square().sum() for g in seen[n]), rtol=1e-6, atol=0
        )
        torch.testing.assert_close(pulled[f"gradient/{n}"].double(), sum(g.sum().abs() for g in seen[n]), rtol=1e-6, atol=0)
    assert moved["movement/c"].item() == pulled["gradient/c"].item() == 0


def test_gradients_are_those_before_clipping() -> None:
    """Clipped to norm c, a step is −lr·c·g/‖all g‖: g · movement is lr·c·‖g‖²/‖all g‖ with g as it was before."""
    lr, clip = 0.5, 1e-3
    moved, seen = descend("movement", lr, 3, clip)
    for n in "ab":
        norms = [torch.cat([seen[m][k].flatten() for m in "ab"]).norm() for k in range(3)]
        want = sum(lr * clip * g.square().sum() / norm for g, norm in zip(seen[n], norms, strict=True))
        torch.testing.assert_close(moved[f"movement/{n}"].double(), want, rtol=1e-3, atol=0)  # torch adds 1e-6 to the norm
    pulled, seen = descend("gradient", lr, 3, clip)
    torch.testing.assert_close(pulled["gradient/b"].double(), sum(g.sum().abs() for g in seen["b"]), rtol=1e-6, atol=0)


def test_the_absolute_value_is_of_a_tensors_sum_step_by_step() -> None:
    """g = (1, −4), then (−2, 1), by hand: |−3| + |−1| = 4. Steps down of (0.5, 0.25), (1, 1): |0.5 − 1| + |−2 + 1| = 1.5."""
    for form, want in (("gradient", 4.0), ("movement", 1.5)):
        w = torch.tensor([1.0, 2.0], requires_grad=True)
        follower = Following(form, {"w": w})
        for gradient, step in (((1.0, -4.0), (0.5, 0.25)), ((-2.0, 1.0), (1.0, 1.0))):
            w.grad = torch.tensor(gradient)
            follower.before_step()
            with torch.no_grad():
                w -= torch.tensor(step)
            follower.after_step()
        assert follower.result() == {f"{form}/w": torch.tensor(want)}


def test_a_tensor_may_miss_a_step() -> None:
    """A tensor that the loss leaves out in a step has no gradient there, and counts 0 in it."""
    v, w = (torch.zeros(2, requires_grad=True) for _ in range(2))
    follower = Following("movement", {"v": v, "w": w})
    for moving in ([w], [v, w], []):
        v.grad = w.grad = None
        for t in moving:
            t.grad = torch.ones(2)
        follower.before_step()
        with torch.no_grad():
            for t in moving:
                t -= 1
        follower.after_step()
    assert {n: t.item() for n, t in follower.result().items()} == {"movement/v": 2.0, "movement/w": 4.0}


# ---------------------------------------------------------------- in a client's training


class Witness:
    """Sees the same steps from elsewhere: gradients where they are clipped, values where the optimizer steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = []  # of every step and tensor: g, before, after
        clip, step = torch.nn.utils.clip_grad_norm_, torch.optim.AdamW.step
        gradients: list[np.ndarray] = []

        def clipping(tensors: Any, *args: Any) -> Any:
            gradients[:] = [numbers(t.grad) for t in tensors]
            return clip(tensors, *args)

        def stepping(optimizer: Any, *args: Any) -> Any:
            tensors = optimizer.param_groups[0]["params"]
            before = [numbers(t) for t in tensors]
            out = step(optimizer, *args)
            self.steps.append(list(zip(gradients, before, [numbers(t) for t in tensors], strict=True)))
            return out

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipping)
        monkeypatch.setattr(torch.optim.AdamW, "step", stepping)


def numbers(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().double().numpy().copy()
    return array


def train(plan: RoundPlan, *overrides: str, samples: int = 20) -> ClientUpdate:
    config = tiny("client.epochs=2", "client.clip_norm=0.1", *overrides)
    model, generator = models.build(config, 6), torch.Generator().manual_seed(1)
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    data = Samples(ArraySplit({"pixel_values": images}, np.arange(24) % 3), model.device)
    head = {n: torch.randn(t.shape, generator=generator) * 0.2 for n, t in model.init_head().items()}
    params = model.init_adapter(generator) | head
    job = ClientJob(client_id=3, task=0, round=0, params=params, plan=plan)
    update = local.train(Work.of(model, data, np.arange(samples), (0, 1, 2), job, config))
    assert isinstance(update, ClientUpdate), update
    return update


@pytest.mark.parametrize("form", FORMS)
def test_training_is_followed_step_by_step(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    witness = Witness(monkeypatch)
    update = train(RoundPlan(statistics=(StatisticRequest("path_integral", FACTORS, {"form": form}),)))
    assert len(witness.steps) == 2 * 3
    names = list(update.params)
    factors = [n for n in names if n.startswith("adapter.")]
    assert list(update.statistics) == [f"path_integral.{form}/{n}" for n in factors]
    for n in factors:
        seen = [step[names.index(n)] for step in witness.steps]
        each = [(g * (before - after)).sum() if form == "movement" else g.sum() for g, before, after in seen]
        got = update.statistics[f"path_integral.{form}/{n}"]
        assert got.shape == ()
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(np.abs(each).sum(), rel=1e-5)
        assert got.item() > 0


def test_one_number_per_tensor_travels() -> None:
    update = train(RoundPlan(statistics=(StatisticRequest("path_integral", FACTORS),)))
    assert bytes_up(update)["statistics"] == 4 * sum(n.startswith("adapter.") for n in update.params)


def test_what_is_not_trained_counts_zero() -> None:
    """B alone is trained: A has no gradient. In the very first step B is 0, so A's gradient is 0 too, though A is trained."""
    asked = (StatisticRequest("path_integral", FACTORS),)
    frozen = train(RoundPlan(train=("*.lora_B", "head.*"), statistics=asked)).statistics
    first = train(RoundPlan(statistics=asked), "client.batch_size=64", "client.epochs=1").statistics
    for sent in (frozen, first):
        assert all((s == 0) == n.endswith("lora_A") for n, s in sent.items())
    idle = train(RoundPlan(statistics=asked), samples=0)
    assert idle.num_samples == 0
    assert len(idle.statistics) == len(first)
    assert not any(bool(s) for s in idle.statistics.values())


def test_it_changes_nothing_of_the_training() -> None:
    plain = train(RoundPlan())
    for form in FORMS:
        told = train(RoundPlan(statistics=(StatisticRequest("path_integral", FACTORS, {"form": form}),)))
        assert all(torch.equal(t, told.params[n]) for n, t in plain.params.items())


def test_clients_that_train_together_give_the_same_signals(tmp_path: Path) -> None:
    """Up to rounding: each of them is followed by itself."""
    livar = ("server.aggregator=livar", "server.consolidator=none", "server.rounds=1", "stream.tasks=1")
    states = []
    for fused in ("runtime.fused=false", "runtime.fused=true"):
        config = tiny(*livar, fused, output=tmp_path / fused.rpartition("=")[2])
        states.append(final_state(run(config).path, config))
    assert not states[1].notes
    for name, tensor in states[0].params.items():
        torch.testing.assert_close(states[1].params[name], tensor, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- errors


def test_bad_options_and_a_pass_over_samples() -> None:
    with pytest.raises(ConfigError, match=r"form 'movment' is unknown. Did you mean 'movement'\?"):
        PathIntegral("movment")
    with pytest.raises(ConfigError, match=r"path_integral follows the training: there is none to follow"):
        PathIntegral().collect(None, {}, [])  # type: ignore[arg-type]
