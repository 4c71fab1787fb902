"""Loss terms against their closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clients.learners import square
from fedsim.core import config as configs
from fedsim.core.errors import ConfigError
from fedsim.simulation import run
from tests.clients.test_fused import require_same, require_trained, work
from tests.clients.works import step_of
from tests.tiny import final_state, tiny


def loss(of: square.Learner, logits: Tensor, labels: Sequence[int], classes: Sequence[int]) -> Tensor:
    return of.loss({}, step_of(logits=logits, labels=torch.tensor(labels), classes=classes))


def test_square_of_a_worked_example() -> None:
    """κ = 5, classes 1 and 3, labels 3 and 1: ((1−0)² + (4−5)² + (−2−5)² + (3−0)²) / 4 = (1 + 1 + 49 + 9) / 4."""
    logits = torch.tensor([[9.0, 1.0, 9.0, 4.0], [9.0, -2.0, 9.0, 3.0]], dtype=torch.float64)
    told = logits, [3, 1], (1, 3)
    assert float(loss(square.Learner(kappa=5.0), *told)) == 15.0
    everything = (1 + 1 + 49 + 9 + 4 * 81) / 8
    assert float(loss(square.Learner(kappa=5.0, classes="all"), *told)) == everything


@settings(max_examples=30)
@given(
    kappa=st.floats(0.5, 30),
    classes=st.lists(st.integers(0, 6), min_size=1, max_size=7, unique=True),
    seed=st.integers(0, 999),
    everything=st.booleans(),
)
def test_square_is_the_sum_over_entries_and_its_gradient_is_the_residual(
    kappa: float, classes: list[int], seed: int, everything: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(4, 7, dtype=torch.float64, generator=generator).mul_(5).requires_grad_()
    labels = [classes[i] for i in torch.randint(0, len(classes), (4,), generator=generator).tolist()]
    rows = list(range(7)) if everything else classes
    residual = torch.zeros(4, 7, dtype=torch.float64)
    for i, label in enumerate(labels):
        for c in rows:
            residual[i, c] = z.detach()[i, c] - (kappa if c == label else 0.0)
    value = loss(square.Learner(kappa=kappa, classes="all" if everything else "task"), z, labels, classes)
    (gradient,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(value.detach(), residual.square().sum() / (4 * len(rows)))
    torch.testing.assert_close(gradient, 2 * residual / (4 * len(rows)))


def test_square_refuses_a_label_of_another_task() -> None:
    with pytest.raises((RuntimeError, IndexError)):
        loss(square.Learner(), torch.zeros(1, 4), [0], (1, 3))


@pytest.mark.parametrize("options", [{"kappa": 0.0}, {"kappa": float("inf")}, {"kappa": float("nan")}, {"classes": "old"}])
def test_options_that_can_never_work(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        configs.build("learners", {"name": "square", **options})


@pytest.mark.parametrize("classes", ["task", "all"])
def test_square_of_clients_together_is_as_one_by_one(classes: str) -> None:
    here = work(f"client.learners=[{{name: square, kappa: 5.0, classes: {classes}}}]")
    got = here.together()
    require_same(got, here.one_by_one())
    require_trained(got, here.jobs)


def test_square_alone_is_the_loss_of_a_run(tmp_path: Path) -> None:
    """Nothing of the cross-entropy is left: on a head of zeros and a single step with SGD, its rows go to the closed form."""
    config = tiny(
        "adapter=none", "stream.tasks=1", "partition.clients=1", "server.rounds=1", "server.aggregator=fedavg",
        "server.consolidator=none", "client.optimizer=sgd", "client.lr=0.5", "client.batch_size=1000",
        "client.learners=[{name: square, kappa: 4.0}]", output=tmp_path,
    )  # fmt: skip
    bias = final_state(run(config).path, config).params["head.bias"]
    # ∂/∂b_c = 2 (0 − κ n_c / n) / S with n_c / n = 1 / 6 and S = 6
    torch.testing.assert_close(bias, torch.full((6,), 0.5 * 2 * 4.0 / 36))
