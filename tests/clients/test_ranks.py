"""Clients with fewer ranks than the server's pairs, against clients whose pairs are smaller; tensors that stay with clients."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clients import optim
from fedsim import simulation
from fedsim.core.config import ClientConfig, SimConfig
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate, RoundPlan
from fedsim.core.ranks import bytes_of, cut, rank_of
from fedsim.core.tensors import LORA_A, LORA_B, lora_layers
from fedsim.runs.results import Results
from server.drift import measure_drift
from server.state import ServerState
from tests.clients.test_fused import Here, doubled, work
from tests.tiny import final_state, kept, learned, same_bits, tiny

TURNS = {"law": "turns", "of": [2, 1, 2]}
TWO = {"name": "lora", "rank": 2, "targets": "all-linear"}
OPTIMIZERS = (
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "asgd",
    "muon",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
)


def smaller(here: Here, rank: int) -> Here:
    """The same clients with pairs of this rank, the first rows and columns of theirs, and nothing beyond."""
    params = {n: part(n, t, rank).clone() for n, t in here.jobs[0].params.items()}
    config = replace(here.config, client=replace(here.config.client, ranks=None))
    return replace(here, jobs=[replace(job, params=params) for job in here.jobs], config=config)


def part(name: str, tensor: Tensor, rank: int) -> Tensor:
    return tensor[:rank] if name.endswith(LORA_A) else tensor[:, :rank] if name.endswith(LORA_B) else tensor


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "fused"])
@pytest.mark.parametrize("factors", [("*",), ("*.lora_A", "head.*"), ("*.lora_B", "head.*")], ids=["both", "A", "B"])
def test_a_client_of_fewer_ranks_trains_as_a_smaller_module_does(factors: tuple[str, ...], together: bool) -> None:
    """With weight decay, clipping, and a learner that holds on to the start. All five clients have rank 1."""
    learners = [{"name": "proximal", "mu": 0.3}]
    client = {"ranks": TURNS, "weight_decay": 0.1, "clip_norm": 0.5, "learners": learners}
    here = doubled(work(plan=RoundPlan(train=factors), client=client))
    want = smaller(here, 1).one_by_one()
    for got, small in zip(here.together() if together else here.one_by_one(), want, strict=True):
        assert isinstance(got, ClientUpdate) and isinstance(small, ClientUpdate), (got, small)
        for name, tensor in got.params.items():
            torch.testing.assert_close(part(name, tensor, 1), small.params[name], atol=1e-9, rtol=1e-7)
            assert float(tensor.abs().sum()) == pytest.approx(float(part(name, tensor, 1).abs().sum()))
        assert {n: got.encoded.get(n, t.nbytes) for n, t in got.params.items()} == {n: t.nbytes for n, t in small.params.items()}


def test_clients_of_all_ranks_train_together_as_by_themselves() -> None:
    here = doubled(work(client={"ranks": {"law": "drawn", "of": [1, 2]}, "weight_decay": 0.1}))
    assert {rank_of(here.config, job.client_id) for job in here.jobs} == {1, 2}
    for got, want in zip(here.together(), here.one_by_one(), strict=True):
        assert isinstance(got, ClientUpdate) and isinstance(want, ClientUpdate), (got, want)
        for name, tensor in got.params.items():
            torch.testing.assert_close(tensor, want.params[name], atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_moves_a_zero_without_a_gradient(optimizer: str) -> None:
    """Weight decay included: what is beyond a client's rank stays zero, bit for bit."""
    draw = torch.Generator().manual_seed(0)
    tensor = torch.randn(4, 6, generator=draw)
    tensor[2:] = 0
    tensor.requires_grad_()
    client = ClientConfig(optimizer=optimizer, lr=0.1, weight_decay=0.0 if optimizer == "rprop" else 0.1)  # it has none
    stepping, _ = optim.build(client, {"adapter.0.lora_A": tensor}, 3)
    for _ in range(3):
        tensor.grad = torch.randn(4, 6, generator=draw)
        tensor.grad[2:] = 0
        stepping.step()
    assert not tensor[2:].any()
    assert tensor[:2].all()


def test_ranks_are_dealt_in_turn_listed_or_drawn_by_an_address() -> None:
    def ranks(value: Any, seed: int = 0, clients: int = 300) -> list[int | None]:
        config = replace(SimConfig(seed=seed), client=ClientConfig(ranks=value))
        return [rank_of(config, k) for k in range(clients)]

    assert ranks(None, clients=3) == [None, None, None]
    assert ranks([4, 2, 1], clients=3) == [4, 2, 1]
    assert ranks({"law": "turns", "of": [2, 4]}, clients=5) == [2, 4, 2, 4, 2]
    drawn = {"law": "drawn", "of": [2, 4, 8]}
    assert ranks(drawn) == ranks(drawn, clients=600)[:300]
    assert ranks(drawn) != ranks(drawn, seed=1)
    assert all(70 < n < 130 for n in Counter(ranks(drawn)).values())


def test_drift_of_a_client_is_that_of_the_ranks_that_it_has() -> None:
    params = {"adapter.0" + LORA_A: torch.randn(2, 3), "adapter.0" + LORA_B: torch.randn(4, 2)}
    begun = {**params, **cut(params, 1)}
    stayed = ClientUpdate(0, 5, begun)
    (row,) = measure_drift(0, 0, params, [stayed], lambda client: 1)
    assert row.relative_norm == 0
    (wrong,) = measure_drift(0, 0, params, [stayed])
    assert wrong.relative_norm is not None and wrong.relative_norm > 0


# ---------------------------------------------------------------- whole runs


def run_of(path: Path, *overrides: str, **sections: Any) -> tuple[Results, ServerState]:
    config = tiny("server.aggregator=fedavg", "server.consolidator=none", *overrides, output=path, **sections)
    results = simulation.run(config)
    assert results.path is not None
    return results, final_state(results.path, config)


def test_all_ranks_alike_are_the_bits_of_none(tmp_path: Path) -> None:
    _, plain = run_of(tmp_path / "plain", "stream.tasks=1")
    results, listed = run_of(tmp_path / "listed", "stream.tasks=1", client={"ranks": [2, 2, 2]})
    assert same_bits(learned(plain), learned(listed))
    assert tiny().identity() == replace(tiny(), client=replace(tiny().client, ranks=None)).identity()
    assert tiny().identity() != tiny(client={"ranks": [2, 2, 2]}).identity()
    assert results.finished


@pytest.mark.parametrize("rule", ["fedavg", "flora", "fedsa"])
def test_bytes_are_those_of_the_ranks_that_clients_have(rule: str, tmp_path: Path) -> None:
    """Clients of ranks 2, 1 and 2, two rounds: every factor up and down for as many of them; whole pairs in passes."""
    results, state = run_of(tmp_path, f"server.aggregator={rule}", "stream.tasks=1", client={"ranks": TURNS})
    factors = {n: t for n, t in state.params.items() if n.startswith("adapter.")}
    a, b = (sum(bytes_of(n, t, r) for n, t in factors.items() if n.endswith(f) for r in (2, 1, 2)) for f in (LORA_A, LORA_B))
    down, up = results.costs["bytes"]["down"], results.costs["bytes"]["up"]
    assert up["adapter"] == {"fedsa": 2 * a + b}.get(rule, 2 * (a + b))
    assert down["adapter"] == {"fedavg": 2 * (a + b)}.get(rule, 2 * a + b)
    if rule == "flora":
        layers = [(len(factors[p + LORA_B]), factors[p + LORA_A].shape[1]) for p in lora_layers(factors)]
        assert down["beneath"] == 3 * 4 * sum(min(5 * (m + d), m * d) for m, d in layers)  # Σ r_i = 5
        assert len(state.beneath.module[lora_layers(factors)[0] + LORA_A]) == 10


def test_a_pass_is_sent_the_ranks_that_a_client_lacks_once(tmp_path: Path) -> None:
    """One round and the pass at its end: what the round merged is sent whole, and nothing else."""
    results, state = run_of(
        tmp_path, "stream.tasks=1", "server.rounds=1", "server.consolidator=regmean", client={"ranks": [1, 1, 1]}
    )
    pairs = sum(t.nbytes for n, t in state.params.items() if n.startswith("adapter."))
    assert results.costs["bytes"]["down"]["adapter"] == 3 * (pairs // 2 + pairs)


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "fused"])
def test_a_client_begins_with_what_stayed_with_it_if_it_is_of_the_same_module(together: bool) -> None:
    plan = RoundPlan(keeps=("*.lora_B",), since=1)
    here = work("client.lr=1e-9", plan=plan)
    b = [n for n in here.jobs[0].params if n.endswith(LORA_B)]
    memories = [{f"stayed/{n}": torch.full_like(here.jobs[0].params[n], k) for n in b} for k in range(len(here.jobs))]
    for k, memory in enumerate(memories):
        memory["stayed/task"], memory["learner.other/x"] = torch.tensor(k % 2), torch.ones(1)
    here = replace(here, jobs=[replace(job, memory=m) for job, m in zip(here.jobs, memories, strict=True)])
    for k, update in enumerate(here.together() if together else here.one_by_one()):
        assert isinstance(update, ClientUpdate), update
        assert not set(b) & set(update.params)
        if not update.num_samples:
            continue
        assert update.memory is not None
        assert int(update.memory["stayed/task"]) == here.jobs[k].task == 1
        assert update.memory["learner.other/x"] == 1
        for n in b:
            start = memories[k][f"stayed/{n}"] if k % 2 else here.jobs[k].params[n]
            torch.testing.assert_close(update.memory[f"stayed/{n}"], start, atol=1e-6, rtol=0)
    handing = replace(
        here, jobs=[replace(job, plan=replace(plan, hand_in=True)) for job in here.jobs[:1]], shards=here.shards[:1]
    )
    (update,) = handing.one_by_one()
    assert isinstance(update, ClientUpdate) and set(b) <= set(update.params)


def test_the_last_rounds_model_is_the_mean_of_the_clients_own(tmp_path: Path) -> None:
    results, state = run_of(tmp_path, "server.aggregator=fedsa", "stream.tasks=1")
    assert results.path is not None
    memory, shares = kept(results.path)["memory"], results.holdings
    samples = Counter[int]()
    for holding in shares:
        samples[holding.client] += holding.samples
    for p in lora_layers(state.params):
        mean = sum(samples[k] / sum(samples.values()) * m[f"stayed/{p}{LORA_B}"].double() for k, m in memory.items())
        torch.testing.assert_close(state.params[p + LORA_B].double(), mean, atol=1e-7, rtol=1e-5)
        assert not torch.equal(memory[0][f"stayed/{p}{LORA_B}"], memory[1][f"stayed/{p}{LORA_B}"])


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        ([], [1, 2], "client.ranks is a list of 2 for 3 clients: give one for each"),
        ([], {"law": "turns", "of": [1, 4]}, "client.ranks has 4, but adapter.rank, of the server's pairs, is 2"),
        (["server.aggregator=lorm"], [1, 2, 2], "unequal ranks, which aggregator lorm cannot merge"),
        (["server.aggregator=regmean"], [1, 2, 2], "unequal ranks, which aggregator regmean cannot merge"),
        (["server.aggregator={name: merged, rule: ties}"], [1, 2, 2], "unequal ranks, which aggregator merged cannot merge"),
        (["server.channel=[quantise]"], [1, 2, 2], "client.ranks and server.channel exclude each other"),
        (["client.learners=[scaffold]"], [1, 2, 2], "learner scaffold keeps numbers for every tensor of a client"),
        ([], [0, 1, 2], "client.ranks must hold ranks of 1 or more"),
        ([], {"law": "random", "of": [1]}, "client.ranks.law 'random' is unknown. Choose from: turns, drawn"),
        ([], {"of": [1]}, "keys law and of"),
    ],
)
def test_ranks_that_cannot_be_are_refused_in_one_line(overrides: list[str], ranks: Any, message: str) -> None:
    def prepared() -> None:
        simulation.prepare(tiny("server.aggregator=fedavg", "server.consolidator=none", *overrides, client={"ranks": ranks}))

    with pytest.raises(ConfigError, match=re.escape(message)):
        prepared()


def test_an_adapter_without_pairs_has_no_ranks() -> None:
    adapter = {"name": "vpt", "length": 2}
    base = ("server.aggregator=fedavg", "server.consolidator=none")
    with pytest.raises(ConfigError, match="of LoRA pairs, and adapter vpt has none"):
        simulation.prepare(tiny(*base, adapter=adapter, client={"ranks": [1, 2, 2]}))
