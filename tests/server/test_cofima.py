"""CoMA and CoFiMA: weights at their ends, equal Fisher information, numbers that nothing is known of, and a run by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsim.core.config import build
from fedsim.core.contracts import Consolidator
from fedsim.core.errors import AggregationError, ConfigError
from fedsim.core.messages import Tensors
from fedsim.core.rng import torch_stream
from fedsim.simulation import run
from server.consolidators.cofima import Consolidator as CoFiMA
from server.consolidators.coma import Consolidator as CoMA
from tests.tiny import final_state, same_bits, tiny

NAME = "adapter.layer.lora_B"
KEY = f"fisher.empirical/{NAME}"
SAMPLES = 10.0


def model(task: int) -> Tensors:
    generator = torch_stream(1, "cofima", task)
    return {n: torch.randn(s, generator=generator) for n, s in ((NAME, (3, 4)), ("head.weight", (5, 3)))}


def fisher(task: int) -> Tensor:
    return torch.rand(3, 4, dtype=torch.float64, generator=torch_stream(2, "fisher", task))


def after(rule: Consolidator, *fishers: Tensor) -> tuple[Any, Tensors]:
    """State and parameters after two tasks."""
    state: Any = rule.init()
    for task, of_task in enumerate(fishers):
        params = {**rule.start_task(state, model(0), {}, {}).params, **model(task)}
        total = {KEY: SAMPLES * of_task, "num_samples": torch.tensor(SAMPLES, dtype=torch.float64)}
        state = rule.end_task(state, params, total, torch.Generator())
    return state, params


def merged(rule: Consolidator, *fishers: Tensor) -> Tensor:
    state, params = after(rule, *fishers)
    deployed = rule.deployed(state, params, finished=True)
    assert torch.equal(deployed["head.weight"], model(1)["head.weight"])
    started = rule.start_task(state, params, {}, {}).params
    assert torch.equal(started[NAME], deployed[NAME])  # training goes on from what is deployed
    assert rule.deployed(state, params, finished=False) is params
    return deployed[NAME]


@pytest.mark.parametrize("rule", [CoMA, CoFiMA])
def test_weights_at_their_ends_give_the_bits_of_one_model(rule: Any) -> None:
    old, new = model(0)[NAME], model(1)[NAME]
    assert torch.equal(merged(rule(weight=1.0), fisher(0), fisher(1)), new)
    assert torch.equal(merged(rule(weight=0.0), fisher(0), fisher(1)), old)


def test_the_formulas() -> None:
    old, new = (model(t)[NAME].double() for t in (0, 1))
    f0, f1 = fisher(0), fisher(1)
    torch.testing.assert_close(merged(CoMA(), f0, f1).double(), 0.6 * old + 0.4 * new, rtol=1e-6, atol=1e-7)
    want = (0.6 * f0 * old + 0.4 * f1 * new) / (0.6 * f0 + 0.4 * f1)
    torch.testing.assert_close(merged(CoFiMA(clip=None), f0, f1).double(), want, rtol=1e-5, atol=1e-6)
    clipped = (0.6 * f0.clamp_max(0.3) * old + 0.4 * f1.clamp_max(0.3) * new) / (
        0.6 * f0.clamp_max(0.3) + 0.4 * f1.clamp_max(0.3)
    )
    torch.testing.assert_close(merged(CoFiMA(clip=0.3), f0, f1).double(), clipped, rtol=1e-5, atol=1e-6)


def test_equal_information_and_none_at_all_are_coma() -> None:
    want = merged(CoMA(), fisher(0), fisher(0))
    torch.testing.assert_close(merged(CoFiMA(clip=None), fisher(0), fisher(0)), want, rtol=1e-6, atol=1e-7)
    assert torch.equal(merged(CoFiMA(), fisher(0), fisher(1)), merged(CoFiMA(), fisher(1), fisher(1)))  # all of it is clipped
    nothing = torch.zeros(3, 4, dtype=torch.float64)
    assert torch.equal(merged(CoFiMA(clip=None), nothing, nothing), want)
    assert torch.equal(merged(CoFiMA(clip=None), nothing, fisher(1)), model(1)[NAME])
    assert torch.equal(merged(CoFiMA(clip=None), fisher(0), nothing), model(0)[NAME])


@given(weight=st.floats(0, 1), scale=st.floats(1e-30, 1e30))
def test_the_result_lies_between_the_two(weight: float, scale: float) -> None:
    got = merged(CoFiMA(weight=weight, clip=None), scale * fisher(0), scale * fisher(1))
    ends = torch.stack([model(0)[NAME], model(1)[NAME]])
    slack = 1e-6
    assert bool((got >= ends.amin(0) - slack).all() and (got <= ends.amax(0) + slack).all())


SMALL = ("server.aggregator=fedavg", "server.rounds=1", "server.evaluate=task")


def test_in_a_run_lambda_1_is_fedavg_and_the_information_is_that_of_all_samples(tmp_path: Path) -> None:
    """Up travels the model's own size once more per client and task; nothing is stored."""
    rules = ("none", "{name: coma, weight: 1.0}", "{name: cofima, weight: 1.0}")
    configs = [tiny(*SMALL, f"server.consolidator={rule}", output=tmp_path) for rule in rules]
    results = [run(config) for config in configs]
    states = [final_state(Path(str(r.path)), config) for r, config in zip(results, configs, strict=True)]
    for r, s in zip(results[1:], states[1:], strict=True):
        assert np.array_equal(r.accuracy, results[0].accuracy, equal_nan=True)
        assert same_bits(s.params, states[0].params)
    module = [t for n, t in states[2].params.items() if n.startswith("adapter.")]
    up = [r.costs["bytes"]["up"].get("statistics", 0) for r in results]
    assert up[:2] == [0, 0]
    assert up[2] == 2 * 3 * sum(4 * t.numel() for t in module)  # tasks × clients
    assert all(bool((f >= 0).all()) for f in states[2].consolidator["fisher"].values())
    assert any(bool(f.any()) for f in states[2].consolidator["fisher"].values())


def test_a_run_without_a_module_has_nothing_to_average(tmp_path: Path) -> None:
    results = run(tiny(*SMALL, "adapter=none", "server.consolidator=cofima", output=tmp_path))
    assert results.costs["bytes"]["up"].get("statistics", 0) == 0


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"weight must be in \[0, 1\], got 1.1"):
        CoMA(weight=1.1)
    with pytest.raises(ConfigError, match="clip must be positive, or null, got 0"):
        build("consolidators", {"name": "cofima", "clip": 0.0})
    with pytest.raises(ConfigError, match="Choose from: empirical, likelihood, expected"):
        CoFiMA(form="fisher")
    with pytest.raises(AggregationError, match=r"no client sent 'fisher\.empirical/adapter\.layer\.lora_B'"):
        CoFiMA().end_task(CoFiMA().init(), model(0), {}, torch.Generator())
