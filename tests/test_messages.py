"""The cost ledger counts what messages really weigh; sampling and optimizers do what their names say."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from clients import optim
from clients.pools.serial import Pool
from fedsim.core.config import ClientConfig, ParameterGroup, SimConfig, build_aggregator
from fedsim.core.contracts import Past, TaskStart
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientJob, ClientUpdate, RoundPlan, StatisticRequest, Tensors, bytes_up
from fedsim.core.tensors import stack_modules
from fedsim.models import model as models
from fedsim.simulation import first_state, prepare, prepare_data, run
from server import sampling
from server.ledger import charged, mean_loss
from server.state import ServerState
from server.store import ClientStore
from tests.tiny import final_state, tiny


@pytest.mark.parametrize("round", [0, 1], ids=["B-round", "A-round"])
def test_counted_bytes_are_the_serialised_ones(round: int) -> None:
    """estimate <= length of the safetensors file <= estimate + its header; energies of q, k and v, which are equal, once."""
    config = tiny()
    manifest, spec, _ = prepare_data(config)
    rule = build_aggregator(config.server.aggregator)
    state, *_ = first_state(config, models.build(config, len(manifest.class_order)), rule)
    job = ClientJob(0, 0, round, state.params, rule.plan(rule.init(state.params), round))
    with Pool(spec) as pool:
        ((update,),) = (bundle.results for bundle in pool.train([job]))
    assert isinstance(update, ClientUpdate)
    distinct: dict[str, Tensor] = {}
    for name, tensor in {**update.params, **update.statistics}.items():
        if name not in update.statistics or not any(
            n in update.statistics and torch.equal(tensor, t) for n, t in distinct.items()
        ):
            distinct[name] = tensor
    estimate, length = sum(bytes_up(update).values()), len(save({n: t.contiguous() for n, t in distinct.items()}))
    assert estimate <= length <= estimate + 8 + 2 + sum(len(n) + 90 for n in distinct) + 16
    assert estimate == sum(t.nbytes for t in distinct.values())
    thrice = sum(t.nbytes for t in update.statistics.values()) - sum(
        distinct[n].nbytes for n in distinct if n in update.statistics
    )
    assert thrice == (0 if round == 0 else 2 * 2 * 16 * 4)  # blocks x (k and v beside q) x width x float32
    other = "lora_A" if round == 0 else "lora_B"
    assert not any(n.endswith(other) for n in update.params)
    assert not any(t.shape == (16, 16) for n, t in update.statistics.items() if "head" not in n)  # no d x d matrix travels


@pytest.fixture
def sim() -> Iterator[Any]:
    with parts() as simulation:
        yield simulation


@contextmanager
def parts() -> Iterator[Any]:
    """What the ledger looks at."""
    with ClientStore(10**6 + 1) as store:
        yield SimpleNamespace(store=store, config=SimConfig())


def charge(
    sim: Any, state: ServerState, clients: Sequence[int], params: Tensors, past: Sequence[Tensors] = (), looks: bool = False
) -> ServerState:
    """One message to these clients in the ledger."""
    request = StatisticRequest("gram", blended=looks)
    plan = RoundPlan(statistics=(request,), context={"background": stack_modules(past, [1.0] * len(past))} if past else {})
    state = replace(state, start=TaskStart({}, past=Past(past, [1.0] * len(past))))
    return charged(sim, state, [ClientJob(c, 0, 0, params, plan) for c in clients], [])


def empty() -> ServerState:
    return ServerState(0, 0, {}, None)


def test_the_ledger_adds_up(sim: Any) -> None:
    params = {"adapter.x": torch.ones(3), "head.weight": torch.ones(2)}
    update = ClientUpdate(0, 4, {"head.weight": torch.zeros(2)}, {"gram.full/head.weight": torch.zeros(5)})
    jobs = [ClientJob(c, 0, 0, params, RoundPlan()) for c in (0, 1)]
    state = charged(sim, empty(), jobs, [update, update])
    assert state.bytes == {
        "down": {"adapter": 24, "head": 16, "background": 0}, "up": {"head": 16, "statistics": 40},
    }  # fmt: skip


def test_what_a_client_has_is_not_sent_again(sim: Any) -> None:
    """Client 0 takes part in every message, 1 in the first and the third: it gets what changed in one of two rounds."""
    a, b = (
        {"adapter.a": torch.ones(10), "head.weight": torch.ones(2)},
        {"adapter.a": torch.ones(10), "head.weight": torch.zeros(2)},
    )
    state = charge(sim, empty(), [0, 1], a)
    assert state.bytes["down"] == {"adapter": 80, "head": 16, "background": 0}
    state = charge(sim, state, [0], b)
    assert state.bytes["down"] == {"adapter": 80, "head": 24, "background": 0}
    state = charge(sim, state, [0, 1, 2], b)
    assert state.bytes["down"] == {"adapter": 120, "head": 40, "background": 0}


def test_past_modules_travel_once_and_never_if_they_were_had_as_parameters(sim: Any) -> None:
    modules = [{"adapter.a": torch.full((10,), float(t))} for t in range(3)]
    state = charge(sim, empty(), [0, 1], modules[0], looks=True)  # the pass at the end of the first task
    state = charge(sim, state, [0], {"adapter.a": torch.full((10,), 7.0)}, modules[:1], looks=True)
    assert state.bytes["down"] == {"adapter": 120, "background": 0}
    state = charge(sim, state, [2], {"adapter.a": torch.full((10,), 7.0)}, modules[:1], looks=True)
    assert state.bytes["down"] == {"adapter": 160, "background": 40}
    state = charge(sim, state, [0, 1, 2], {"adapter.a": torch.full((10,), 8.0)})  # a round that looks through no past module
    state = charge(sim, state, [0, 1, 2], {"adapter.a": torch.full((10,), 8.0)}, modules[:2], looks=True)
    assert state.bytes["down"] == {"adapter": 280, "background": 160}  # module 1 to all three; module 0 all had


@settings(max_examples=60)
@given(st.data())
def test_the_ledger_is_that_of_clients_that_keep_their_messages(data: st.DataObject) -> None:
    """Against clients that each hold a set of contents: those of the last message, and of the last that looked at the past."""
    names, past = ["adapter.a", "adapter.b", "head.weight"], list[Tensors]()
    values = {n: -1 - i for i, n in enumerate(names)}
    held: dict[int, tuple[set[float], set[float]]] = {}
    with parts() as sim:
        state, sent, number, always = empty(), 0, 0, data.draw(st.booleans())
        for _ in range(data.draw(st.integers(2, 9))):
            for name in data.draw(st.sets(st.sampled_from(names))):
                values[name] = number = number + 1
            if data.draw(st.integers(0, 3)) == 0:  # a task ends
                past.append({n: torch.full((4,), float(values[n])) for n in names if n.startswith("adapter.")})
                values |= {n: number + 1 + i for i, n in enumerate(names[:2])}
                number += 2
            params, looks = {n: torch.full((4,), float(v)) for n, v in values.items()}, always or data.draw(st.booleans())
            modules = past if looks else []
            clients = sorted(data.draw(st.sets(st.integers(0, 10**6), min_size=1, max_size=3) | st.just({0, 1})))
            message = {float(t[0]) for group in (params, *modules) for t in group.values()}
            for client in clients:
                latest, looking = held.get(client, (set(), set()))
                sent += 16 * len(message - latest - looking)
                held[client] = (message, message if looks else looking)
            state = ServerState.from_plain(charge(sim, state, clients, params, modules, looks).to_plain())
        counted = sum(state.bytes["down"].values())
        assert counted >= sent
        if always:
            assert counted == sent
        assert set(np.flatnonzero(sim.store.last[:, 0] >= 0)) == held.keys()


def test_what_a_lorm_run_sends_down(tmp_path: Path) -> None:
    """Two tasks of three rounds (B, A, B) and a pass, everybody takes part: what the round before trained, and fresh modules."""
    config = tiny("server.rounds=3", output=tmp_path)
    results = run(config)
    params = final_state(results.path, config).params
    a, b, head = (sum(t.nbytes for n, t in params.items() if part in n) for part in ("lora_A", "lora_B", "head."))
    down = results.costs["bytes"]["down"]
    assert down == {"adapter": 3 * 2 * (2 * a + 3 * b), "head": 3 * (1 + 2 * 3) * head, "background": 0}


def test_mean_loss_is_weighted_by_samples() -> None:
    updates = [ClientUpdate(0, 1, {}, metrics={"loss": 1.0}), ClientUpdate(1, 3, {}, metrics={"loss": 2.0})]
    updates.append(ClientUpdate(2, 9, {}))
    assert mean_loss(updates) == pytest.approx(1.75)
    assert mean_loss([ClientUpdate(0, 1, {})]) != mean_loss([])  # NaN


def test_sampling_is_uniform_and_without_replacement() -> None:
    counts: collections.Counter[int] = collections.Counter()
    for round in range(400):
        drawn = sampling.draw(0, 0, round, 10, 0.3)
        assert drawn == sorted(set(drawn))
        assert len(drawn) == 3
        counts.update(drawn)
    assert all(80 < counts[c] < 160 for c in range(10))  # 120 expected, standard deviation 9
    assert sampling.draw(0, 1, 2, 10, 0.3) == sampling.draw(0, 1, 2, 10, 0.3)
    assert len({tuple(sampling.draw(0, 0, r, 1_000_000, 1e-5)) for r in range(20)}) == 20


def test_sampling_of_nobody() -> None:
    with pytest.raises(ConfigError, match="selects nobody"):
        sampling.draw(0, 0, 0, 10, 0.04)


@pytest.mark.parametrize("name", ["adamw", "SGD", "Adagrad", "RMSprop"])
def test_any_torch_optimizer(name: str) -> None:
    parameter = torch.ones(3, requires_grad=True)
    optimizer, schedule = optim.build(ClientConfig(optimizer=name, lr=0.1), {"p": parameter}, 4)
    (parameter.sum()).backward()
    optimizer.step()
    assert type(optimizer).__name__.lower() == name.lower()
    assert schedule is None
    assert (parameter < 1).all()


def test_a_schedule_over_the_steps_of_the_round() -> None:
    client = ClientConfig(
        optimizer="sgd",
        lr=1.0,
        optimizer_options={"momentum": 0.5},
        schedule="CosineAnnealingLR",
        schedule_options={"T_max": "steps"},
    )
    optimizer, schedule = optim.build(client, {"p": torch.ones(1, requires_grad=True)}, 8)
    assert schedule is not None
    rates = []
    for _ in range(8):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    assert rates[3] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)


def rates_of(client: ClientConfig, names: Sequence[str], steps: int = 4) -> dict[str, list[float]]:
    """How far one step after the other moves each tensor at a gradient of 1: SGD's learning rates."""
    tensors = {n: torch.zeros(1, dtype=torch.float64, requires_grad=True) for n in names}
    optimizer, schedule = optim.build(client, tensors, steps)
    found: dict[str, list[float]] = {n: [] for n in names}
    for _ in range(steps):
        before = {n: float(t.detach()) for n, t in tensors.items()}
        for tensor in tensors.values():
            tensor.grad = torch.ones_like(tensor)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        for name, tensor in tensors.items():
            found[name].append(before[name] - float(tensor.detach()))
    return found


NAMES = ("adapter.x.lora_A", "adapter.x.lora_B", "head.weight", "head.bias")


def test_every_group_has_its_own_rate_and_a_schedule_multiplies_it() -> None:
    groups = [ParameterGroup("head.weight", lr=3.0), ParameterGroup("head.*", lr=2.0), ParameterGroup("*_B", weight_decay=0.5)]
    client = ClientConfig(optimizer="sgd", lr=1.0, groups=groups)
    assert {n: r[0] for n, r in rates_of(client, NAMES).items()} == dict(zip(NAMES, (1.0, 1.0, 3.0, 2.0), strict=True))
    client = replace(client, schedule="StepLR", schedule_options={"step_size": 1, "gamma": 0.5})
    rates = rates_of(client, NAMES[::2])
    assert rates["adapter.x.lora_A"] == [1.0, 0.5, 0.25, 0.125]
    assert rates["head.weight"] == [3.0, 1.5, 0.75, 0.375]


def test_a_group_has_its_own_weight_decay() -> None:
    client = ClientConfig(optimizer="sgd", lr=0.1, weight_decay=0.5, groups=[ParameterGroup("head.*", weight_decay=0.0)])
    tensors = {n: torch.ones(1, dtype=torch.float64, requires_grad=True) for n in NAMES}
    optimizer, _ = optim.build(client, tensors, 1)
    for tensor in tensors.values():
        tensor.grad = torch.zeros_like(tensor)
    optimizer.step()
    assert [float(t.detach()) for t in tensors.values()] == pytest.approx([0.95, 0.95, 1.0, 1.0])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ['client.groups=[{match: "haed.*", lr: 1}]'],
            r"^client\.groups\.0\.match 'haed\.\*' decides for no tensor that is trained: it matches none; .*'head\.bias'$",
        ),
        (
            ['client.groups=[{match: "*", lr: 1}, {match: "head.*", lr: 2}]'],
            r"^client\.groups\.1\.match 'head\.\*' decides for no tensor that is trained: earlier groups take",
        ),
        (
            ["server.aggregator={name: lorm, train: B}", 'client.groups=[{match: "*_A", lr: 1}]'],
            r"groups\.0\.match '\*_A' decides for",
        ),
        (['client.groups=[{match: "head.*", lr: 0}]'], r"^client\.groups\.0\.lr must be positive \(what is not to be trained"),
        (['client.groups=[{match: "head.*"}]'], r"^client\.groups\.0\.lr or weight_decay must be given"),
        (["client.groups=[{lr: 0.1}]"], r"^client\.groups\.0\.match must be given"),
        (
            ["client.optimizer=rprop", 'client.groups=[{match: "head.*", weight_decay: 0.1}]'],
            r"^client\.groups\.0\.weight_decay is no option of Rprop",
        ),
        (
            [
                "client.schedule=onecyclelr",
                "client.schedule_options={max_lr: 1, total_steps: 50}",
                'client.groups=[{match: "head.*", lr: 0.1}]',
            ],
            r"^client\.schedule onecyclelr sets every learning rate itself",
        ),
    ],
)
def test_groups_that_decide_nothing_are_refused_before_training(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as told:
        prepare(tiny(*overrides))
    assert "\n" not in str(told.value)


def test_rounds_take_turns_and_a_group_of_any_of_them_is_fine() -> None:
    prepare(tiny('client.groups=[{match: "*_A", lr: 0.1}, {match: "*_B", lr: 0.2}, {match: "head.*", lr: 0.3}]'))


def test_weight_decay_is_off_unless_asked_for() -> None:
    """torch's AdamW would decay by 0.01, which moves head rows of old tasks."""
    still: Tensor = torch.ones(2, requires_grad=True)
    optimizer, _ = optim.build(ClientConfig(), {"still": still}, 1)
    still.grad = torch.zeros(2)
    optimizer.step()
    assert torch.equal(still.detach(), torch.ones(2))


def test_readme_median_is_the_rule_it_claims_to_be(tmp_path: Path) -> None:
    from fedsim.core import config as configs
    from tests.pages import median_rule

    (tmp_path / "my_rule.py").write_text(median_rule())
    rule = configs.build("aggregators", {"name": str(tmp_path / "my_rule.py")})
    updates = [ClientUpdate(i, 1, {"head.bias": torch.tensor([float(x)])}) for i, x in enumerate((1, 9, 2))]
    _, merged = rule.combine({}, {"head.bias": torch.zeros(1), "adapter.x": torch.ones(1)}, updates, torch.Generator())
    assert merged["head.bias"].item() == 2.0
    assert merged["adapter.x"].item() == 1.0
