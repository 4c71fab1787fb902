"""Server optimisers against Flower's strategies over several rounds, and against formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.core.config import build, build_aggregator
from fedsim.core.contracts import Aggregator
from fedsim.core.errors import ConfigError, FedsimError
from fedsim.core.messages import ClientUpdate, State, Tensors
from fedsim.core.rng import torch_stream
from fedsim.laws.made_up import make_params
from fedsim.simulation import prepare, run
from server.aggregators.fedavg import Aggregator as FedAvg
from tests.tiny import final_state, same_bits, tiny

ADAPTIVE = ("fedadam", "fedyogi", "fedadagrad")
NAMES = ("fedavgm", *ADAPTIVE)
ROUNDS, CLIENTS = 4, 3


def rule(name: str, **options: Any) -> Aggregator:
    made: Aggregator = build("aggregators", {"name": name, **options})
    return made


def updates(params: Tensors, round: int) -> list[ClientUpdate]:
    """Clients of 1, 2 and 3 samples, each a step of its own from the parameters."""
    out = []
    for k in range(CLIENTS):
        drawn = {n: torch.randn(t.shape, dtype=t.dtype, generator=torch_stream(round, k, n)) for n, t in params.items()}
        out.append(ClientUpdate(k, k + 1, {n: t + 0.1 * drawn[n] for n, t in params.items()}))
    return out


def played(rule: Aggregator, rounds: int = ROUNDS) -> tuple[State, Tensors]:
    params: Tensors = make_params(torch.float64)
    state = rule.init(params)
    for number in range(rounds):
        state, params = rule.combine(state, params, updates(params, number), torch.Generator())
    return state, params


def walk(rule: Aggregator, deltas: Sequence[float], start: float = 0.0) -> list[float]:
    """Where one number goes when the clients' mean is so far from it in every round."""
    found, w, state = [], torch.tensor([start], dtype=torch.float64), rule.init({"w": torch.zeros(1)})
    for delta in deltas:
        state, out = rule.combine(state, {"w": w}, [ClientUpdate(0, 5, {"w": w + delta})], torch.Generator())
        w = out["w"]
        found.append(float(w))
    return found


# ---------------------------------------------------------------- oracles


@pytest.mark.parametrize(
    ("name", "ours", "strategy", "theirs"),
    [
        ("fedavgm", {"momentum": 0.7, "lr": 0.5}, "FedAvgM", {"server_momentum": 0.7, "server_learning_rate": 0.5}),
        ("fedadam", {"lr": 0.1, "v0": 0.0, "bias_correction": "flower"}, "FedAdam", {"eta": 0.1}),
        ("fedyogi", {"lr": 0.05, "v0": 0.0, "tau": 0.01}, "FedYogi", {"eta": 0.05, "tau": 0.01}),
        ("fedadagrad", {"lr": 0.1, "v0": 0.0}, "FedAdagrad", {"eta": 0.1}),
    ],
)
def test_flower_goes_the_same_way(name: str, ours: dict[str, Any], strategy: str, theirs: dict[str, Any]) -> None:
    flower = pytest.importorskip("server.flower")
    _, got = played(rule(name, **ours))
    _, want = played(flower.Aggregator(strategy, theirs))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_momentum_zero_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    """Of float64 tensors, and of a run: the sum is divided in the same place."""
    assert same_bits(dict(played(rule("fedavgm", momentum=0.0))[1]), dict(played(FedAvg())[1]))
    states = []
    for section in ({"name": "fedavgm", "momentum": 0.0}, "fedavg"):
        config = tiny(output=tmp_path, server={"aggregator": section, "consolidator": "none"}, stream={"tasks": 1})
        states.append(final_state(run(config).path, config))  # type: ignore[arg-type]
    assert same_bits(dict(states[0].params), dict(states[1].params)) and states[0].bytes == states[1].bytes


def test_momentum_of_a_constant_step_is_a_geometric_sum() -> None:
    """v_t = Δ (1 − βᵗ) / (1 − β); Nesterov steps Δ + β v_t."""
    v = [0.3 * (1 - 0.9**t) / 0.1 for t in range(1, 41)]
    got = walk(rule("fedavgm", lr=0.5), [0.3] * 40)
    assert got == pytest.approx(torch.tensor(v).double().mul(0.5).cumsum(0).tolist(), rel=1e-6)
    assert (got[-1] - got[-2]) / 0.5 == pytest.approx(0.3 / 0.1, rel=0.02)
    nesterov = walk(rule("fedavgm", nesterov=True), [0.3] * 5)
    assert nesterov == pytest.approx(torch.tensor([0.3 + 0.9 * x for x in v[:5]]).double().cumsum(0).tolist(), rel=1e-6)


def test_nesterov_is_that_of_torch() -> None:
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer, want = torch.optim.SGD([w], lr=0.5, momentum=0.8, nesterov=True), []
    deltas = [1.0, -0.5, 2.0, 0.25]
    for delta in deltas:
        w.grad = torch.tensor([-delta], dtype=torch.float64)
        optimizer.step()
        want.append(w.item())
    assert walk(rule("fedavgm", lr=0.5, momentum=0.8, nesterov=True), deltas) == pytest.approx(want, rel=1e-12)


def test_adam_is_that_of_torch_with_its_bias_corrected() -> None:
    """But for τ, which torch adds to √v where v is corrected: τ is all but nothing here."""
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer, want = torch.optim.Adam([w], lr=0.1, betas=(0.9, 0.99), eps=1e-12), []
    deltas = [1.0, -0.5, 2.0, 0.25]
    for delta in deltas:
        w.grad = torch.tensor([-delta], dtype=torch.float64)
        optimizer.step()
        want.append(w.item())
    adam = rule("fedadam", lr=0.1, v0=0.0, tau=1e-12, bias_correction="adam")
    assert walk(adam, deltas) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("delta", [2.0, -0.004])
def test_first_steps_by_formula(delta: float) -> None:
    """Adam's and Yogi's η (1 − β₁) Δ / (√v + τ), with v = (1 − β₂) Δ² from 0, and from τ² where v_0 is left to the paper."""
    squared = 0.01 * delta**2
    for name in ("fedadam", "fedyogi"):
        assert walk(rule(name, v0=0.0), [delta]) == pytest.approx([0.01 * 0.1 * delta / (math.sqrt(squared) + 1e-3)])
    adam, yogi = 0.99e-6 + squared, 1e-6 + squared  # v_0 = τ² < Δ²: Yogi's grows
    assert walk(rule("fedadam"), [delta]) == pytest.approx([0.01 * 0.1 * delta / (math.sqrt(adam) + 1e-3)])
    assert walk(rule("fedyogi"), [delta]) == pytest.approx([0.01 * 0.1 * delta / (math.sqrt(yogi) + 1e-3)])
    assert walk(rule("fedadagrad"), [delta]) == pytest.approx([0.01 * delta / (math.sqrt(1e-6 + delta**2) + 1e-3)])


def test_yogi_forgets_a_large_step_slowly() -> None:
    """v changes by (1 − β₂) Δ² at most; Adam's falls by (1 − β₂) v."""
    kept: dict[str, list[float]] = {}
    for name in ("fedadam", "fedyogi"):
        made, state = rule(name, v0=0.0), {}
        for delta in (10.0, 0.1, 0.1, 0.1):
            state, _ = made.combine(
                state, {"w": torch.zeros(1)}, [ClientUpdate(0, 1, {"w": torch.tensor([delta])})], torch.Generator()
            )
            kept.setdefault(name, []).append(float(state["w"]["moments"]["v"]))
    assert kept["fedyogi"] == pytest.approx([1.0, 1 - 1e-4, 1 - 2e-4, 1 - 3e-4], rel=1e-6)
    assert kept["fedadam"][1:] == pytest.approx([0.99**t + 1e-4 * sum(0.99**k for k in range(t)) for t in (1, 2, 3)], rel=1e-6)


def test_adagrads_steps_shrink_with_the_root_of_the_rounds() -> None:
    got = walk(rule("fedadagrad", v0=0.0, tau=1e-12), [1.0] * 9)
    assert got == pytest.approx(torch.arange(1, 10).double().rsqrt().mul(0.01).cumsum(0).tolist(), rel=1e-9)


# ---------------------------------------------------------------- tensors, tasks and other parts


@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_nobody_trained_stay_with_their_moments(name: str) -> None:
    made, params = rule(name), make_params(torch.float64)
    state, first = made.combine({}, params, updates(params, 0), torch.Generator())
    only = {n: t for n, t in first.items() if n.startswith("head.")}
    after, second = made.combine(state, first, updates(only, 1), torch.Generator())
    for n in params:
        assert torch.equal(second[n], first[n]) is (n not in only)
        assert same_bits(after[n], state[n]) is (n not in only)
    assert {kept["rounds"] for kept in after.values()} == {1, 2}
    assert all(t.dtype == torch.float64 for kept in after.values() for t in kept["moments"].values())


@pytest.mark.parametrize("name", NAMES)
def test_moments_go_on_over_tasks_if_they_are_told_to(name: str) -> None:
    """Those of tensors that have kept their shape."""
    state, params = played(rule(name), 2)
    assert rule(name).next_task(state, params, 1) == {}
    grown = {**params, "head.bias": torch.zeros(9), "adapter.new": torch.zeros(2)}
    kept = rule(name, reset_on_task=False).next_task(state, grown, 1)
    assert kept.keys() == params.keys() - {"head.bias"}
    assert all(same_bits(kept[n], state[n]) for n in kept)


def test_a_run_begins_a_task_with_the_moments_that_it_was_told_to_keep(tmp_path: Path) -> None:
    """Two tasks of two rounds: a tensor was trained in four rounds, or in two since the reset. In a list of rules each has its
    own."""
    sections: list[dict[str, Any]] = [
        {"match": "head.*", "name": "fedadam", "reset_on_task": False},
        {"match": "*", "name": "fedavgm"},
    ]
    config = tiny(output=tmp_path, server={"aggregator": sections, "consolidator": "none"})
    head, rest = final_state(run(config).path, config).aggregator["states"]  # type: ignore[arg-type]
    assert {n: kept["rounds"] for n, kept in head.items()} == {"head.weight": 4, "head.bias": 4}
    assert rest and {kept["rounds"] for kept in rest.values()} == {2}


def test_in_a_list_of_rules_each_steps_as_it_does_alone() -> None:
    both = build_aggregator([{"match": "head.*", "name": "fedyogi"}, {"match": "*", "name": "fedavgm"}])
    assert both.additive
    _, out = played(both)
    for prefix, name in (("head.", "fedyogi"), ("adapter.", "fedavgm")):
        alone = played(rule(name))[1]
        assert all(torch.equal(out[n], alone[n]) for n in out if n.startswith(prefix))


def test_uniform_weights_are_those_of_the_papers_algorithm() -> None:
    """Clients at 1, 2 and 6 with 1, 2 and 3 samples: means 23/6 and 3; one without samples counts nowhere."""
    sent = [ClientUpdate(k, n, {"w": torch.tensor([v])}) for k, (n, v) in enumerate([(1, 1.0), (2, 2.0), (3, 6.0), (0, 99.0)])]
    for weights, want in (("samples", 23 / 6), ("uniform", 3.0)):
        _, out = rule("fedavgm", weights=weights).combine({}, {"w": torch.zeros(1)}, sent, torch.Generator())
        assert float(out["w"]) == pytest.approx(want)


def test_noise_on_the_sum_needs_uniform_weights(tmp_path: Path) -> None:
    """Δ is then the noisy mean of clipped updates, as with fairavg: with momentum 0 to the bit."""
    channel = [{"name": "clip_noise", "clip": 0.5, "noise": 0.1}]
    states = []
    for section in ({"name": "fedavgm", "momentum": 0.0, "weights": "uniform"}, "fairavg"):
        server = {"aggregator": section, "consolidator": "none", "channel": channel}
        config = tiny(output=tmp_path, server=server, stream={"tasks": 1})
        states.append(dict(final_state(run(config).path, config).params))  # type: ignore[arg-type]
    assert same_bits(*states)
    with pytest.raises(ConfigError, match="aggregator fedadam weighs them"):
        prepare(tiny(output=tmp_path, server={"aggregator": "fedadam", "consolidator": "none", "channel": channel}))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("fedavgm", {"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1\.0"),
        ("fedavgm", {"lr": 0.0}, "lr must be above 0"),
        ("fedadam", {"beta1": -0.1}, r"beta1 must be in \[0, 1\)"),
        ("fedadam", {"beta2": 1.0}, r"beta2 must be in \[0, 1\)"),
        ("fedadam", {"bias_correction": "yes"}, "bias_correction 'yes' is unknown"),
        ("fedyogi", {"beta2": 1.0}, r"beta2 must be in \[0, 1\)"),
        ("fedyogi", {"tau": 0.0}, "tau must be above 0"),
        ("fedadagrad", {"v0": -1.0}, r"v0 must not be negative \(null: tau²\), got -1\.0"),
        ("fedadagrad", {"weights": "clients"}, "weights 'clients' is unknown"),
    ],
)
def test_bad_options_are_one_line(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(FedsimError, match=says) as told:
        rule(name, **options)
    assert "\n" not in str(told.value)
