"""Rules for LoRA pairs against products formed densely in float64, and whole runs against what their messages should weigh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedsim import simulation
from fedsim.core import config as configs
from fedsim.core.contracts import Aggregator
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate, Tensors
from fedsim.core.ranks import cut
from fedsim.core.tensors import LORA_A, LORA_B, folded, lora_layers, stack_modules
from server import loop
from server.beneath import Beneath
from tests.tiny import final_state, tiny

EXACT = ("flora", "fedex_lora")
RULES = (*EXACT, "lora_fair", "rolora")
SHAPES = {"adapter.0.q": (7, 6, 2), "adapter.1.v": (5, 9, 2)}  # outputs, inputs, rank


def drawn(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    found = {"head.weight": (3, 4)}
    for p, (outputs, inputs, rank) in SHAPES.items():
        found |= {p + LORA_A: (rank, inputs), p + LORA_B: (outputs, rank)}
    return {n: torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for n, shape in found.items()}


def sent(clients: int = 3, names: Sequence[str] = ("*",), dtype: torch.dtype = torch.float64) -> list[ClientUpdate]:
    updates = []
    for k in range(clients):
        own = {n: t for n, t in drawn(100 + k, dtype).items() if any(n.endswith(end) or end == "*" for end in names)}
        updates.append(ClientUpdate(k, 2 + 3 * k, own))
    return updates


def product(tensors: Tensors, p: str) -> Tensor:
    return tensors[p + LORA_B].double() @ tensors[p + LORA_A].double()


def mean_product(updates: Sequence[ClientUpdate], p: str, params: Mapping[str, Tensor]) -> Tensor:
    total = sum(u.num_samples for u in updates)
    dense = torch.zeros(SHAPES[p][:2], dtype=torch.float64)
    for u in updates:
        dense += u.num_samples / total * product({**params, **u.params}, p)
    return dense


def merged(name: str, updates: Sequence[ClientUpdate], params: Tensors, **options: object) -> tuple[Tensors, Tensors]:
    """What a rule makes of a round: the parameters, and the whole model."""
    rule: Aggregator = configs.build("aggregators", {"name": name, **options})
    state, out = rule.combine(rule.init(params), params, updates, torch.Generator().manual_seed(0))
    return out, Beneath().with_part("0", rule.beneath(state)).under(out)


@pytest.mark.parametrize("rule", EXACT)
@pytest.mark.parametrize("clients", [1, 3, 20])
def test_the_model_is_the_mean_of_products(rule: str, clients: int) -> None:
    """20 clients have more ranks than the layers have inputs: the stack is folded."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        params, updates = drawn(0, dtype), sent(clients, dtype=dtype)
        _, model = merged(rule, updates, params)
        for p, (outputs, inputs, _) in SHAPES.items():
            torch.testing.assert_close(product(model, p), mean_product(updates, p, params), atol=tolerance, rtol=tolerance)
            assert len(model[p + LORA_A]) <= min(outputs, inputs) + 2


def test_the_stack_has_the_weights_on_one_factor() -> None:
    params, updates = drawn(0), sent()
    rule: Aggregator = configs.build("aggregators", {"name": "flora"})
    state, out = rule.combine(rule.init(params), params, updates, torch.Generator().manual_seed(0))
    shares = [u.num_samples / 15 for u in updates]
    for p in SHAPES:
        stack = rule.beneath(state)
        torch.testing.assert_close(stack[p + LORA_B], torch.cat([u.params[p + LORA_B] for u in updates], dim=1))
        rows = [w * u.params[p + LORA_A] for w, u in zip(shares, updates, strict=True)]
        torch.testing.assert_close(stack[p + LORA_A], torch.cat(rows))
        assert not out[p + LORA_B].any()
        assert 0.5 < float(out[p + LORA_A].abs().max()) * SHAPES[p][1] ** 0.5 <= 1
    other = rule.combine(rule.init(params), params, updates, torch.Generator().manual_seed(1))[1]
    assert not torch.equal(other["adapter.0.q" + LORA_A], out["adapter.0.q" + LORA_A])


def test_one_client_alone_leaves_no_residual() -> None:
    rule: Aggregator = configs.build("aggregators", {"name": "fedex_lora"})
    state, _ = rule.combine(rule.init(drawn(0)), drawn(0), sent(1), torch.Generator())
    assert all(not t.any() for t in rule.beneath(state).values())


@pytest.mark.parametrize("factor", [LORA_A, LORA_B])
@pytest.mark.parametrize("rule", RULES)
def test_with_one_factor_common_the_mean_of_the_other_is_exact_and_nothing_is_left(rule: str, factor: str) -> None:
    params, updates = drawn(0), sent(names=(factor, "head.weight"))
    out, model = merged(rule, updates, params)
    for p in SHAPES:
        torch.testing.assert_close(product(out, p), mean_product(updates, p, params))
    assert model is out
    other = [n for n in params if not n.endswith((factor, "head.weight"))]
    assert all(torch.equal(out[n], params[n]) for n in other)


@pytest.mark.parametrize("penalty", [0.0, 0.01, 10.0])
def test_lora_fair_solves_its_least_squares(penalty: float) -> None:
    """Against torch's lstsq on the stacked system [Āᵀ; √λ I] ΔBᵀ = [Eᵀ; 0]."""
    params, updates = drawn(0), sent()
    out, _ = merged("lora_fair", updates, params, penalty=penalty)
    plain, _ = merged("fedavg", updates, params)
    for p, (outputs, _, rank) in SHAPES.items():
        mean_a, mean_b = plain[p + LORA_A], plain[p + LORA_B]
        lost = mean_product(updates, p, params) - mean_b @ mean_a
        left = torch.cat([mean_a.T, penalty**0.5 * torch.eye(rank, dtype=torch.float64)])
        right = torch.cat([lost.T, torch.zeros(rank, outputs, dtype=torch.float64)])
        torch.testing.assert_close(out[p + LORA_B], mean_b + torch.linalg.lstsq(left, right).solution.T)
        assert torch.equal(out[p + LORA_A], mean_a)
        assert (product(out, p) - mean_b @ mean_a - lost).norm() < lost.norm()


@pytest.mark.parametrize("rank", [1, 2])
def test_the_first_ranks_of_flexlora_are_the_best_that_so_many_can_hold(rank: int) -> None:
    """Against singular values of the dense mean: a client of rank r_i, which is sent the first r_i, loses Σ_{k > r_i} σ_k²."""
    params, updates = drawn(0), sent()
    updates[0] = replace(updates[0], params={**updates[0].params, **cut(updates[0].params, 1)})  # a client of rank 1
    out, _ = merged("merged", updates, params, rule="mean", pairs="products")
    for p in SHAPES:
        dense = mean_product(updates, p, params)
        lost = (out[p + LORA_B][:, :rank] @ out[p + LORA_A][:rank] - dense).square().sum()
        torch.testing.assert_close(lost, torch.linalg.svdvals(dense)[rank:].square().sum())


@pytest.mark.parametrize("clients", [2, 3])
@pytest.mark.parametrize("rule", EXACT)
def test_ranks_that_a_client_does_not_have_take_no_place(rule: str, clients: int) -> None:
    params, updates = drawn(0), sent(clients)
    updates[0] = replace(updates[0], params={**updates[0].params, **cut(updates[0].params, 1)})
    _, model = merged(rule, updates, params)
    for p in SHAPES:
        torch.testing.assert_close(product(model, p), mean_product(updates, p, params))
    if rule == "flora":
        state, _ = configs.build("aggregators", {"name": rule}).combine({}, params, updates, torch.Generator())
        assert len(state["stack"]["adapter.0.q" + LORA_A]) == 2 * clients - 1


@pytest.mark.parametrize("rule", RULES)
def test_an_adapter_without_pairs_is_refused(rule: str) -> None:
    with pytest.raises(ConfigError, match=f"{rule} merges pairs of LoRA factors and 'adapter.0.prompts' is none"):
        configs.build("aggregators", {"name": rule}).init({"adapter.0.prompts": torch.zeros(2, 3)})


def test_folding_keeps_the_product_and_leaves_small_pairs_alone() -> None:
    module = {n: t for n, t in drawn(0).items() if n.startswith("adapter.")}
    assert all(folded(module)[n] is t for n, t in module.items())
    wide = stack_modules([drawn(k) for k in range(6)], [0.5] * 6)
    for p in lora_layers(wide):
        torch.testing.assert_close(product(folded(wide), p), product(wide, p))
        assert len(folded(wide)[p + LORA_A]) == min(SHAPES[p][:2])


# ---------------------------------------------------------------- whole runs

ONE_TASK = ("stream.tasks=1", "server.consolidator=none")


def run_of(rule: str, path: Path, *overrides: str) -> tuple[simulation.Results, loop.ServerState]:
    config = tiny(f"server.aggregator={rule}", *overrides, output=path)
    results = simulation.run(config)
    return results, final_state(results.path, config)  # type: ignore[arg-type]


def test_a_stack_travels_once_to_every_client(tmp_path: Path) -> None:
    """3 clients, rank 2: Σ r_i (m + d) = 6 (m + d) numbers a layer, or m·d where that is less, after every round but the last; up
    what FedAvg's clients send."""
    results, state = run_of("flora", tmp_path / "flora", *ONE_TASK, "server.rounds=3")
    down, up = results.costs["bytes"]["down"], results.costs["bytes"]["up"]
    layers = [(len(state.params[p + LORA_B]), state.params[p + LORA_A].shape[1]) for p in lora_layers(state.params)]
    stack = sum(min(6 * (m + d), m * d) for m, d in layers)
    assert down["beneath"] == 4 * 3 * 2 * stack
    assert list(state.beneath.parts) == ["0.0", "0.1", "0.2"]
    pair = sum(t.numel() for n, t in state.params.items() if n.startswith("adapter."))
    drawn_anew = sum(t.numel() for n, t in state.params.items() if n.endswith(LORA_A))
    assert down["adapter"] == 4 * 3 * (pair + 2 * drawn_anew)
    assert up["adapter"] == 4 * 3 * 3 * pair


def test_one_factor_travels_in_a_round(tmp_path: Path) -> None:
    """B up in rounds 0 and 2, A in round 1; down all at first, then what was merged."""
    results, state = run_of("rolora", tmp_path / "rolora", *ONE_TASK, "server.rounds=3")
    a, b = (sum(t.numel() for n, t in state.params.items() if n.endswith(f)) for f in (LORA_A, LORA_B))
    assert results.costs["bytes"]["up"]["adapter"] == 4 * 3 * (2 * b + a)
    assert results.costs["bytes"]["down"]["adapter"] == 4 * 3 * (a + b + b + a)


def test_frozen_factors_keep_their_bits_in_a_task_and_are_drawn_anew_in_the_next(tmp_path: Path) -> None:
    seen: dict[int, list[Tensors]] = {}
    config = tiny("server.aggregator={name: rolora, train: B}", "server.consolidator=mean", output=tmp_path)
    parts = simulation.prepare(config)
    with simulation.ClientStore(3) as store, simulation._wired(parts, store) as sim:
        for step in simulation._steps(sim, parts.state):
            if isinstance(step, loop.ServerState) and step.round:
                seen.setdefault(step.task, []).append({n: t for n, t in step.params.items() if n.endswith(LORA_A)})
    first, second = seen[0], seen[1]
    assert all(torch.equal(t, first[1][n]) for n, t in first[0].items())
    assert not any(torch.equal(t, second[0][n]) for n, t in first[0].items())


def test_one_round_of_the_stack_is_what_the_clients_products_average_to(tmp_path: Path) -> None:
    """After one round FLoRA and FedEx-LoRA evaluate the same model, up to rounding; so the next round begins from the same."""
    models = []
    for rule in EXACT:
        _, state = run_of(rule, tmp_path / rule, *ONE_TASK, "server.rounds=1")
        models.append(state.beneath.under(state.params))
    for p in lora_layers(models[0]):
        torch.testing.assert_close(product(models[0], p), product(models[1], p), atol=1e-6, rtol=1e-4)
        assert product(models[0], p).any()


@pytest.mark.parametrize(("rule", "consolidator"), [("flora", "none"), ("fedex_lora", "sum"), ("flora", "regmean")])
def test_what_lies_beneath_goes_on_only_where_the_module_does(rule: str, consolidator: str, tmp_path: Path) -> None:
    _, state = run_of(rule, tmp_path, f"server.consolidator={consolidator}")
    goes_on = ["0.0", "0.1"] if consolidator == "none" else []
    assert list(state.beneath.parts) == [*goes_on, "1.0", "1.1"]
    assert state.began == (0 if consolidator == "none" else 1)
    if consolidator != "none":
        past = state.consolidator["past"]
        own = state.beneath.under(state.params)
        for p in lora_layers(past[1]):
            torch.testing.assert_close(product(past[1], p), product(own, p))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "server.consolidator=coma",
            "consolidator coma compares tensors with those of an earlier round or task, but aggregator flora",
        ),
        ("client.learners=[moon]", "learner moon compares tensors"),
        ("client.learners=[scaffold]", "learner scaffold compares tensors"),
        ("server.unlearning=true", "aggregator flora leaves part of the model beneath the module"),
    ],
)
def test_what_cannot_be_right_on_top_of_it_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulation.prepare(tiny("server.aggregator=flora", "server.consolidator=none", override))
