"""SLCA's alignment: its loss by autograd, its scale of old means, and the head that is deployed but not trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.core.rng import torch_stream
from fedsim.simulation import prepare, run
from server.calibrators._gaussians import Mixture, head_gradient
from server.calibrators.slca import Calibrator
from tests.tiny import final_state, same_bits, tiny

TASKS = ((0, 1), (2, 3), (4,))
WIDTH, SAMPLES = 4, 12


def reference_loss(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor, tasks: tuple[tuple[int, ...], ...]) -> Tensor:
    """As it is written down: logits over the mean of the tasks' norms, over 0.1."""
    logits = F.linear(x, weight, bias)
    norms = torch.stack([logits[:, list(classes)].norm(dim=1) for classes in tasks], dim=1)
    return F.cross_entropy(logits / norms.mean(1, keepdim=True) / 0.1, y)


def total_of(task: int, classes: tuple[int, ...]) -> dict[str, Tensor]:
    """What `lift` sums to for a task whose class c has features around 3c."""
    x_KND = torch.randn(len(classes), SAMPLES, WIDTH, dtype=torch.float64, generator=torch_stream(1, "data", task))
    x_KND = x_KND + 3 * torch.tensor(classes)[:, None, None]
    rows, columns = torch.triu_indices(WIDTH, WIDTH)
    square = torch.einsum("kni,knj->kij", x_KND, x_KND)[:, rows, columns]
    return {"count": torch.full((len(classes),), float(SAMPLES), dtype=torch.float64), "sum": x_KND.sum(1), "square": square}


def params_of(draw: int) -> Tensors:
    generator = torch_stream(2, "params", draw)
    shapes = {"adapter.layer.lora_A": (2, 3), "head.weight": (5, WIDTH), "head.bias": (5,)}
    return {n: torch.randn(s, dtype=torch.float64, generator=generator) for n, s in shapes.items()}


def aligned(rule: Calibrator, tasks: int = 3) -> tuple[Any, Tensors]:
    """After so many tasks; every task trained on to other tensors."""
    state, params = rule.init(), params_of(0)
    for t in range(tasks):
        params = params_of(t)
        state = rule.end_task(state, params, total_of(t, TASKS[t]), TASKS[: t + 1], torch_stream(3, "calibrate", t))
    return state, params


@pytest.mark.parametrize("tasks", [TASKS, (TASKS[0], (2, 3, 4)), ((0, 1, 2, 3, 4),)])
def test_its_gradient_is_that_of_the_loss(tasks: tuple[tuple[int, ...], ...]) -> None:
    params = params_of(1)
    weight, bias = (params[n].clone().requires_grad_() for n in ("head.weight", "head.bias"))
    x = torch.randn(7, WIDTH, dtype=torch.float64, generator=torch_stream(4, "x"))
    y = torch.tensor([0, 1, 2, 3, 4, 4, 0])
    want = torch.autograd.grad(reference_loss(weight, bias, x, y, tasks), (weight, bias))
    got = head_gradient(params["head.weight"], params["head.bias"], x, y, 0.1, [len(classes) for classes in tasks])
    for w, g in zip(want, got, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


def test_means_of_old_tasks_are_drawn_shorter_and_those_of_the_newest_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Calibrator(epochs=1)
    assert [rule.mean_scale(t, 2) for t in range(3)] == pytest.approx([0.9 + 0.1 * k / 3 for k in (1, 2, 3)])
    assert rule.mean_scale(2, 2) == 1.0
    drawn: list[Mixture] = []
    real = Mixture.draw
    monkeypatch.setattr(Mixture, "draw", lambda self, n, generator: (drawn.append(self), real(self, n, generator))[1])
    aligned(rule)
    means = torch.cat([total_of(t, classes)["sum"] / SAMPLES for t, classes in enumerate(TASKS)])
    scale = torch.tensor([0.9 + 0.1 / 3] * 2 + [0.9 + 0.2 / 3] * 2 + [1.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(drawn[-1].mean_MD, scale * means, rtol=1e-12, atol=0)


def test_alignment_is_sgd_on_that_loss_and_touches_the_head_alone() -> None:
    """Three epochs by torch.optim on the same draws."""
    rule = Calibrator(epochs=3, samples_per_class=10, batch_size=20, clip_norm=None, fade=0.0)
    state, params = aligned(rule)
    deployed = rule.deployed(state, params)
    assert torch.equal(deployed["adapter.layer.lora_A"], params["adapter.layer.lora_A"])
    weight, bias = (params[n].clone().requires_grad_() for n in ("head.weight", "head.bias"))
    optimizer = torch.optim.SGD([weight, bias], lr=0.01, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    known = [told for of_task in state["gaussians"].values() for told in of_task.values()]
    mixture, draw = Mixture.of(known, 1.0, torch.float64), torch_stream(3, "calibrate", 2)
    for _ in range(3):
        x, y = mixture.draw(50, draw)
        for rows in torch.arange(50).split(20):
            optimizer.zero_grad()
            reference_loss(weight, bias, x[rows], y[rows], TASKS).backward()
            optimizer.step()
        schedule.step()
    torch.testing.assert_close(deployed["head.weight"], weight.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(deployed["head.bias"], bias.detach(), rtol=1e-9, atol=1e-11)
    without = replace(rule, epochs=0)
    assert same_bits(without.deployed(aligned(without)[0], params), params)


def test_training_goes_on_from_the_head_as_it_was(tmp_path: Path) -> None:
    """Slow learner and alignment in a run: parameters end with the bits of the run without alignment, what is shown differs."""
    slow = ("server.aggregator=fedavg", "server.consolidator=none", 'client.groups=[{match: "adapter.*", lr: 1e-4}]')
    configs = [tiny(*slow, "server.rounds=1", f"server.calibrator={name}", output=tmp_path) for name in ("null", "slca")]
    results = [run(config) for config in configs]
    without, with_it = (final_state(Path(str(r.path)), config) for r, config in zip(results, configs, strict=True))
    assert same_bits(without.params, with_it.params)
    assert not np.array_equal(results[0].accuracy, results[1].accuracy, equal_nan=True)
    deployed = Calibrator().deployed(with_it.calibrator, with_it.params)
    assert {n for n, t in deployed.items() if not torch.equal(t, with_it.params[n])} == {"head.weight", "head.bias"}
    numbers, width = 0, with_it.params["head.weight"].shape[1]
    for held_KC in prepare(configs[1]).manifest.histograms:  # a client sends n, and of what it holds the mean, and the covariance
        numbers += held_KC.size + (held_KC > 0).sum() * width + (held_KC > 1).sum() * width * (width + 1) // 2
    up = [r.costs["bytes"]["up"].get("statistics", 0) for r in results]
    assert up == [0, 4 * numbers]
    assert results[0].costs["bytes"]["down"].keys() == results[1].costs["bytes"]["down"].keys()
    assert "stored" not in results[1].costs


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match=r"fade must be in \[0, 1\], got 1.5"):
        Calibrator(fade=1.5)
