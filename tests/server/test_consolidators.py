"""Merging over tasks: low-rank forms against dense ones.

Shapes: T tasks, K clients, O outputs, I inputs, R rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.core.contracts import Consolidator, Past
from fedsim.core.errors import AggregationError, ConfigError, PluginError
from fedsim.core.messages import State
from fedsim.core.rng import torch_stream
from fedsim.core.tensors import stack_modules, upper_triangle
from server.consolidators.mean import Consolidator as Mean
from server.consolidators.none import Consolidator as NoMerge
from server.consolidators.regmean import Consolidator as RegMean

T, K, O, I, R = 3, 2, 5, 6, 2  # noqa: E741
LAYER = "adapter.layer"
A, B = LAYER + ".lora_A", LAYER + ".lora_B"
Module = dict[str, Tensor]


def draw(*shape: int, address: str) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch_stream(4, "consolidators", address))


def module(task: int) -> Module:
    return {A: draw(R, I, address=f"A{task}"), B: draw(O, R, address=f"B{task}")}


def fresh() -> Module:
    """What a task starts from: B is zero."""
    return {**module(99), B: torch.zeros(O, R, dtype=torch.float64)}


def inputs(task: int, client: int) -> Tensor:
    return (1 + task) * draw(11, I, address=f"x{task}.{client}") + client


def gram(task: int, client: int, decay: float) -> Tensor:
    x = inputs(task, client)
    return decay * x.T @ x + (1 - decay) * torch.diag(x.square().sum(0))


def delta(tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors[B] @ tensors[A]


def total_of(rule: Consolidator, state: State, params: Module, task: int) -> dict[str, Tensor]:
    """The sum of what the clients answer to the plan at a task's end."""
    plan = rule.plan(state, params)
    if plan is None:
        return {}
    assert plan.train == ()
    (request,) = plan.statistics
    assert request.blended
    form, decay = request.options["form"], request.options["decay"]
    grams = [gram(task, k, decay) for k in range(K)]
    sent = [g.diagonal() if form == "diagonal" else upper_triangle(g) for g in grams]
    return {f"gram.{form}/{A}": torch.stack(sent).sum(0), "num_samples": torch.tensor(11.0 * K, dtype=torch.float64)}


def play(rule: Consolidator, tasks: list[int]) -> tuple[State, Module]:
    """State and parameters after these tasks; every task trains its own module."""
    state, params = rule.init(), {"head.weight": draw(4, 3, address="head")}
    for task in tasks:
        params = {**rule.start_task(state, params, fresh(), {}).params, **module(task)}
        state = rule.end_task(state, params, total_of(rule, state, params, task), torch.Generator())
    return state, params


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_regmean_is_the_dense_least_squares_solution(decay: float) -> None:
    """argmin_Δ Σ_t ‖(Δ − B_t A_t) X_t‖² over the rows of all clients of all tasks, by numpy."""
    rule = RegMean(decay=decay)
    state, params = play(rule, list(range(T)))
    rows, right = [], []
    for task, k in itertools.product(range(T), range(K)):
        x = inputs(task, k)
        z = torch.cat([decay**0.5 * x, (1 - decay) ** 0.5 * torch.diag(x.square().sum(0).sqrt())])
        rows.append(z)
        right.append(z @ delta(module(task)).T)
    want = np.linalg.lstsq(torch.cat(rows).numpy(), torch.cat(right).numpy(), rcond=None)[0].T
    got = rule.deployed(state, params, finished=True)
    assert got[A].shape == (T * R, I)
    assert got[B].shape == (O, T * R)
    torch.testing.assert_close(delta(got), torch.from_numpy(want), rtol=0, atol=1e-9)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_regmean_does_not_depend_on_the_order_of_tasks(decay: float) -> None:
    rule = RegMean(decay=decay)
    merged = [delta(rule.deployed(*play(rule, list(order)), finished=True)) for order in itertools.permutations(range(T))]
    for other in merged[1:]:
        torch.testing.assert_close(other, merged[0], rtol=0, atol=1e-10)


def test_regmean_full_form_of_a_diagonal_gram_is_the_diagonal_form() -> None:
    full, diagonal = RegMean(decay=0.0, form="full"), RegMean(decay=0.0)
    got, want = (delta(r.deployed(*play(r, [0, 1]), finished=True)) for r in (full, diagonal))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_regmean_after_the_first_task_is_that_tasks_module() -> None:
    rule = RegMean()
    out = rule.deployed(*play(rule, [0]), finished=True)
    assert torch.equal(out[A], module(0)[A])
    assert torch.equal(out[B], module(0)[B])


def test_equal_modules_stay_whatever_their_grams() -> None:
    rule = RegMean(decay=0.5)
    state, params = rule.init(), {}
    for task in range(T):
        params = {**rule.start_task(state, params, fresh(), {}).params, **module(0)}
        state = rule.end_task(state, params, total_of(rule, state, params, task), torch.Generator())
    torch.testing.assert_close(delta(rule.deployed(state, params, finished=True)), delta(module(0)), rtol=0, atol=1e-10)


def test_inputs_that_no_task_has_get_no_residual() -> None:
    rule, state, params = RegMean(), {"past": [], "grams": []}, {}
    silent = torch.tensor([0.0, 0, 1, 1, 1, 1], dtype=torch.float64)
    for task in range(2):
        params = module(task)
        state = rule.end_task(state, params, {f"gram.diagonal/{A}": silent}, torch.Generator())
    out = delta(rule.deployed(state, params, finished=True))
    assert torch.equal(out[:, :2], torch.zeros(O, 2, dtype=torch.float64))
    torch.testing.assert_close(out[:, 2:], ((delta(module(0)) + delta(module(1))) / 2)[:, 2:])


@pytest.mark.parametrize("rule", [Mean(), RegMean()])
def test_mean_of_modules_during_a_task(rule: Consolidator) -> None:
    state, params = play(rule, [0, 1])
    params = {**rule.start_task(state, params, fresh(), {}).params, **module(2)}
    got = rule.deployed(state, params, finished=False)
    torch.testing.assert_close(delta(got), sum(delta(module(t)) for t in range(3)) / 3)
    assert torch.equal(got["head.weight"], params["head.weight"])


def test_mean_at_the_end_of_a_task() -> None:
    rule = Mean()
    torch.testing.assert_close(
        delta(rule.deployed(*play(rule, [0, 1, 2]), finished=True)), sum(delta(module(t)) for t in range(3)) / 3
    )
    assert torch.equal(rule.deployed(*play(rule, [0]), finished=True)[A], module(0)[A])


def test_mean_of_prompts_is_element_by_element() -> None:
    rule, name = Mean(), "adapter.0.keys"
    state, params = rule.init(), {}
    for value in (1.0, 2.0, 6.0):
        params = {name: torch.full((2, 2), value)}
        state = rule.end_task(state, params, {}, torch.Generator())
    torch.testing.assert_close(rule.deployed(state, params, finished=True)[name], torch.full((2, 2), 3.0))


@pytest.mark.parametrize("rule", [Mean(), RegMean()])
def test_blend_of_past_and_own_module_is_the_uniform_mean(rule: Consolidator) -> None:
    first = rule.start_task(rule.init(), {}, module(0), {}).past
    assert (first.together(), first.share) == ({}, 1.0)
    past = rule.start_task(*play(rule, [0, 1]), fresh(), {}).past
    assert past.share == pytest.approx(1 / 3)
    blend = stack_modules([past.together(), module(2)], [1.0, past.share])
    torch.testing.assert_close(delta(blend), sum(delta(module(t)) for t in range(3)) / 3)


def test_past_modules_need_a_weight_each() -> None:
    with pytest.raises(PluginError, match="Past has 2 modules and 1 weights"):
        Past([module(0), module(1)], [1.0])


def test_tasks_start_from_a_fresh_module_and_the_head_goes_on() -> None:
    params = {"head.weight": torch.ones(2, 2), **module(0)}
    for rule in (Mean(), RegMean()):
        started = rule.start_task(rule.init(), params, module(1), {}).params
        assert torch.equal(started[A], module(1)[A])
        assert torch.equal(started["head.weight"], params["head.weight"])


def test_none_goes_on_with_one_module() -> None:
    rule, params = NoMerge(), {"head.weight": torch.ones(2, 2), **module(0)}
    start = rule.start_task(rule.init(), params, module(1), {})
    assert start.params is params
    assert start.past == Past()
    assert rule.deployed(rule.init(), params, finished=False) is params
    assert rule.deployed(rule.init(), params, finished=True) is params
    assert rule.plan(rule.init(), params) is None
    first = rule.start_task(rule.init(), {"head.weight": torch.ones(2, 2)}, module(1), {}).params
    assert torch.equal(first[A], module(1)[A])


def test_regmean_refuses_adapters_without_lora_pairs() -> None:
    rule = RegMean()
    with pytest.raises(
        ConfigError, match=r"consolidator regmean .* 'adapter\.0\.keys' is none: use adapter: lora, or consolidator: mean"
    ):
        rule.start_task(rule.init(), {}, {"adapter.0.keys": torch.zeros(2, 2)}, {})
    with pytest.raises(ConfigError, match="and there are none"):
        rule.start_task(rule.init(), {"head.weight": torch.zeros(2, 2)}, {}, {})


def test_regmean_without_statistics() -> None:
    rule = RegMean()
    with pytest.raises(AggregationError, match=r"no client sent 'gram\.diagonal/adapter\.layer\.lora_A'"):
        rule.end_task(rule.init(), module(0), {}, torch.Generator())


def test_regmean_bad_options() -> None:
    with pytest.raises(ConfigError, match=r"decay must be in \[0, 1\]"):
        RegMean(decay=2.0)
    with pytest.raises(ConfigError, match=r"form 'diag' is unknown\. Did you mean 'diagonal'"):
        RegMean(form="diag")
