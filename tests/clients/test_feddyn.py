"""FedDyn against what its paper says of it: clients that hold other data agree on the minimum of all, and h is the mean of the
clients' gradients."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.learners.feddyn import Learner
from fedsim.core import config as configs
from fedsim.core.errors import ConfigError
from fedsim.simulation import prepare, run
from tests.clients.works import step_of
from tests.tiny import final_state, kept, same_bits, tiny

UNIFORM = ("client.optimizer=sgd", "client.lr=0.05", "server.aggregator=fairavg", "server.consolidator=none")
SIZE, CLIENTS, DRAW = 3, 4, torch.Generator()


def quadratics() -> tuple[Tensor, Tensor]:
    """½ (θ − a_i)ᵀ H_i (θ − a_i): the H_i and a_i."""
    draw = torch.Generator().manual_seed(0)
    roots = torch.randn(CLIENTS, SIZE, SIZE, dtype=torch.float64, generator=draw)
    return roots @ roots.mT + torch.eye(SIZE, dtype=torch.float64), torch.randn(
        CLIENTS, SIZE, dtype=torch.float64, generator=draw
    )


def test_the_loss_and_its_gradient() -> None:
    w, start, g = (torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(3))
    w.requires_grad_()
    step = step_of(params={"w": w, "new": w[0]}, start={"w": start, "new": start[0]})
    value = Learner(alpha=0.3).loss({"known": {"gradient/w": g}}, step)
    assert value is not None
    gone = (w - start).detach()
    want = 0.15 * (float(gone.square().sum()) + float(gone[0].square().sum())) - float((g * gone).sum())
    assert value.item() == pytest.approx(want, rel=1e-12)
    (gradient,) = torch.autograd.grad(value, w)
    slope = 0.3 * gone - g
    slope[0] += 0.3 * gone[0]
    torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize("drawn", [CLIENTS, 2])
def test_clients_agree_on_the_minimum_of_all(drawn: int) -> None:
    """Each finds its own minimum: (H_i + α) θ_i = H_i a_i + g_i + α θ. The rounds come to rest at (Σ H_i)⁻¹ Σ H_i a_i, which the
    mean of the a_i is not, with all clients or two of four; g_i is ∇L_i where it was last, and h the mean of all of them."""
    learner, (h_KDD, a_KD) = Learner(alpha=0.5), quadratics()
    theta, state, memory = torch.zeros(SIZE, dtype=torch.float64), learner.opened(None, {}, 0), dict[int, Any]()
    draw = torch.Generator().manual_seed(1)
    for _ in range(400):
        taken = torch.randperm(CLIENTS, generator=draw)[:drawn].tolist()
        found = []
        for i in taken:
            work: Any = SimpleNamespace(params={"w": theta}, trained=("w",), task=0)
            begun = learner.begin(work, memory.get(i, {}), {}, DRAW)
            g = begun["known"].get("gradient/w", torch.zeros(SIZE, dtype=torch.float64))
            own = torch.linalg.solve(h_KDD[i] + 0.5 * torch.eye(SIZE, dtype=torch.float64), h_KDD[i] @ a_KD[i] + g + 0.5 * theta)
            memory[i] = learner.end(begun, work, {"w": own}, DRAW).memory
            torch.testing.assert_close(memory[i]["gradient/w"], h_KDD[i] @ (own - a_KD[i]), rtol=1e-8, atol=1e-10)
            found.append(own)
        state, params = learner.merged(state, {"w": theta}, {"w": torch.stack(found).mean(0)}, drawn, CLIENTS)
        mean = torch.stack([m["gradient/w"] for m in memory.values()]).sum(0) / CLIENTS
        torch.testing.assert_close(state["w"], mean, rtol=1e-8, atol=1e-10)
        theta = params["w"]
    best = torch.linalg.solve(h_KDD.sum(0), torch.einsum("kij,kj->i", h_KDD, a_KD))
    torch.testing.assert_close(theta, best, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(best, a_KD.mean(0), atol=0.05)


def test_what_was_not_trained_stays_where_it_is() -> None:
    learner, w = Learner(alpha=0.5), torch.ones(2)
    state, params = learner.merged({"a": w.double(), "b": w.double()}, {"a": w, "b": w}, {"a": 3 * w, "b": w}, 1, 2)
    torch.testing.assert_close(params, {"a": 3 * w - (1 - 0.5 * 2 / 2) / 0.5, "b": w})
    assert torch.equal(state["b"], w.double()) and float(state["a"][0]) == 0.5


def test_in_a_run_h_is_the_mean_of_what_clients_keep_and_nothing_more_travels(tmp_path: Path) -> None:
    """Both of the last task alone; a device keeps P numbers and the task's. α = 0 is the uniform mean, to the bit."""
    items = {"feddyn": "{name: feddyn, alpha: 0.1}", "null": "{name: feddyn, alpha: 0}", "none": ""}
    told = {n: tiny(*UNIFORM, f"client.learners=[{item}]", output=tmp_path / n) for n, item in items.items()}
    results = {name: run(config) for name, config in told.items()}
    ended = {name: final_state(results[name].path, config) for name, config in told.items()}  # type: ignore[arg-type]
    assert same_bits(ended["null"].params, ended["none"].params)
    assert results["feddyn"].costs["bytes"] == results["null"].costs["bytes"] == results["none"].costs["bytes"]
    memory = kept(results["feddyn"].path)["memory"]  # type: ignore[arg-type]
    assert len(memory) == 3 and all(int(m["learner.feddyn/task"]) == 1 for m in memory.values())
    for name, h in ended["feddyn"].learners["feddyn"].items():
        mean = torch.stack([m[f"learner.feddyn/gradient/{name}"].double() for m in memory.values()]).mean(0)
        torch.testing.assert_close(h, mean, rtol=1e-4, atol=1e-7)
    size = sum(t.nbytes for t in ended["none"].params.values())
    assert results["feddyn"].costs["stored"] == {"clients": 3, "mean": size + 8, "max": size + 8}
    assert not any("stored" in results[name].costs for name in ("null", "none"))


def test_clients_that_never_take_part_are_not_of_the_mean(tmp_path: Path) -> None:
    left_out = ("partition.clients=4", "server.without=[1, 1]", "server.rounds=3", "client.learners=[{name: feddyn, alpha: 0.1}]")
    config = tiny(*UNIFORM, *left_out, output=tmp_path)
    path = run(config).path
    memory = kept(path)["memory"]  # type: ignore[arg-type]
    assert sorted(memory) == [0, 2, 3]
    for name, h in final_state(path, config).learners["feddyn"].items():  # type: ignore[arg-type]
        mean = torch.stack([m[f"learner.feddyn/gradient/{name}"].double() for m in memory.values()]).mean(0)
        torch.testing.assert_close(h, mean, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["server.aggregator=fedavg"], r"^learner feddyn takes the uniform mean .* fedavg .* use aggregator: fairavg$"),
        (["server.aggregator=fedsum"], r"feddyn takes the uniform mean .* fedsum does not give"),
        (["server.aggregator={name: fedadam, weights: uniform}"], r"feddyn takes the uniform mean .* fedadam does not give"),
        (["server.aggregator={name: fedavgm, weights: uniform}"], r"feddyn takes the uniform mean .* fedavgm does not give"),
        (["server.aggregator=[{match: 'head.*', name: fairavg}, {match: '*', name: fairavg}]"], "feddyn .* is a list of rules"),
    ],
)  # fmt: skip
def test_another_mean_is_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        prepare(tiny(*UNIFORM, "client.learners=[feddyn]", *overrides))
    prepare(tiny(*UNIFORM, "client.learners=[{name: feddyn, alpha: 0}]", *overrides))


def test_a_server_that_steps_as_far_as_the_mean_is_the_mean() -> None:
    still = "server.aggregator={name: fedavgm, weights: uniform, momentum: 0, lr: 1}"
    prepare(tiny(*UNIFORM, "client.learners=[feddyn]", still))


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match="alpha"):
        configs.build("learners", {"name": "feddyn", "alpha": -0.1})
