"""SCAFFOLD against what its paper says of it: control variates are mean gradients, the server's is the mean of the clients'."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clients import local
from clients.learners.scaffold import Learner
from fedsim.core import contracts
from fedsim.core.contracts import LocalState
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate, RoundPlan, Tensors
from fedsim.simulation import prepare, run
from tests.clients.test_fused import Here, doubled, require_same, work
from tests.tiny import final_state, kept, tiny

SGD = ("client.optimizer=sgd", "client.lr=0.05", "server.aggregator=fairavg", "server.consolidator=none")


@dataclass(frozen=True)
class Gradients(contracts.Learner):
    """Writes down the gradients before anybody corrects them."""

    seen: list[dict[str, Tensor]] = field(default_factory=list)

    def corrected(self, state: LocalState, gradients: Tensors, params: Tensors) -> Tensors:
        self.seen.append({n: g.clone() for n, g in gradients.items()})
        return gradients


def drawn(here: Here, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: 0.1 * torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in here.jobs[0].params.items()}


def test_control_variates_are_the_mean_gradients_along_the_path() -> None:
    """In float64, from control variates that are not zero: c_i⁺ = 1/K Σ g_i(y_k), and a step is −η (g − c_i + c)."""
    here = doubled(work("client.optimizer=sgd", "client.lr=0.05"))
    common, own, gradients = drawn(here, 1), drawn(here, 2), Gradients()
    plan = RoundPlan(context={"learner.scaffold": {f"control/{n}": t for n, t in common.items()}})
    memory = {f"learner.scaffold/control/{n}": t for n, t in own.items()} | {"learner.scaffold/task": torch.tensor(1)}
    (job,) = here.jobs[:1]
    here.jobs[:1] = [replace(job, plan=plan, memory=memory)]
    here.jobs[1:] = [replace(j, plan=plan) for j in here.jobs[1:]]
    here.learners |= {"gradients": gradients, "scaffold": Learner()}
    update = local.train(here.works()[0])
    assert isinstance(update, ClientUpdate)
    for name, start in here.jobs[0].params.items():
        mean = torch.stack([g[name] for g in gradients.seen]).mean(0)
        torch.testing.assert_close(update.memory[f"learner.scaffold/control/{name}"], mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(update.statistics[f"scaffold.control/{name}"], mean - own[name], rtol=1e-9, atol=1e-12)
        path = -0.05 * sum(g[name] - own[name] + common[name] for g in gradients.seen)
        torch.testing.assert_close(update.params[name] - start, path, rtol=1e-9, atol=1e-12)
    here.learners = {"scaffold": Learner()}
    require_same(here.together(), here.one_by_one())


@pytest.mark.parametrize("without", [(), ("partition.clients=4", "server.without=[1, 1]")], ids=["all", "one left out"])
def test_the_servers_control_variate_is_the_mean_of_the_clients(without: tuple[str, ...], tmp_path: Path) -> None:
    """All take part: after every round of a task c = 1/N Σ c_i. Both start anew in a new task. Who is left out does not count."""
    config = tiny(*SGD, *without, "client.learners=[scaffold]", output=tmp_path)
    results = run(config)
    common, own = final_state(results.path, config).learners["scaffold"], kept(results.path)["memory"]
    assert len(own) == 3 and all(int(m["learner.scaffold/task"]) == 1 for m in own.values())
    assert common
    for name, c in common.items():
        mean = torch.stack([m[f"learner.scaffold/{name}"].double() for m in own.values()]).mean(0)
        torch.testing.assert_close(c, mean, rtol=1e-4, atol=1e-7)
    assert not results.notes
    assert results.costs["bytes"]["down"]["context"] > 0


def test_one_client_is_fedavg(tmp_path: Path) -> None:
    """Its own control variate is the server's, so nothing is corrected, but for rounding."""
    states = []
    for learners in ("[]", "[scaffold]"):
        config = tiny(*SGD, "partition.clients=1", "server.rounds=3", f"client.learners={learners}", output=tmp_path / learners)
        states.append(final_state(run(config).path, config).params)
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (("client.optimizer=adamw",), "client.optimizer is adamw"),
        (("client.optimizer_options={momentum: 0.9}",), "client.optimizer_options.momentum is set"),
        (("client.optimizer_options={maximize: true}",), "client.optimizer_options.maximize is set"),
        (("client.weight_decay=0.1",), "there is weight decay"),
        (("client.clip_norm=1.0",), "client.clip_norm is set"),
    ],
)
def test_what_makes_it_a_heuristic_is_said(overrides: tuple[str, ...], note: str) -> None:
    notes = prepare(tiny(*SGD, "client.learners=[scaffold]", *overrides)).notes
    assert any(note in line and line.endswith("a heuristic") for line in notes)


def test_a_schedule_of_learning_rates_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"scaffold divides by the learning rate, and client.schedule changes it"):
        prepare(tiny(*SGD, "client.learners=[scaffold]", "client.schedule=linearlr"))
