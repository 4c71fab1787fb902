"""The cost ledger counts what messages really weigh; sampling and optimizers do what their names say."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from clients import optim
from clients.pools.serial import Pool
from fedsim.core.config import ClientConfig, build_aggregator
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientJob, ClientUpdate, RoundPlan, bytes_down, bytes_up
from fedsim.models import model as models
from fedsim.simulation import first_state, prepare_data
from server import sampling
from server.ledger import add_traffic, mean_loss
from tests.tiny import tiny


@pytest.mark.parametrize("round", [0, 1], ids=["B-round", "A-round"])
def test_counted_bytes_are_the_serialised_ones(round: int) -> None:
    """estimate <= length of the safetensors file <= estimate + its header, for a job and for the update it makes."""
    config = tiny()
    manifest, spec, _ = prepare_data(config)
    rule = build_aggregator(config.server.aggregator)
    state, _ = first_state(config, models.build(config, len(manifest.class_order)), rule)
    job = ClientJob(0, 0, round, state.params, rule.plan(rule.init(state.params), round))
    with Pool(spec) as pool:
        ((update,),) = (bundle.results for bundle in pool.train([job]))
    assert isinstance(update, ClientUpdate)
    for counted, tensors in [
        (bytes_down(job), {**job.params, **job.plan.background}),
        (bytes_up(update), {**update.params, **update.statistics}),
    ]:
        estimate, length = sum(counted.values()), len(save({n: t.contiguous() for n, t in tensors.items()}))
        header = 8 + 2 + sum(len(n) + 90 for n in tensors) + 16
        assert estimate <= length <= estimate + header
    other = "lora_A" if round == 0 else "lora_B"
    assert not any(n.endswith(other) for n in update.params)
    assert not any(t.shape == (16, 16) for n, t in update.statistics.items() if "head" not in n)  # no d x d matrix travels


def test_the_ledger_adds_up() -> None:
    job = ClientJob(0, 0, 0, {"adapter.x": torch.zeros(3), "head.weight": torch.zeros(2)}, RoundPlan())
    update = ClientUpdate(0, 4, {"head.weight": torch.zeros(2)}, {"gram.full/head.weight": torch.zeros(5)})
    first, _ = add_traffic({}, [job, job], [update, update])
    assert first["down"] == {"adapter": 24, "head": 16, "background": 0}
    assert first["up"] == {"head": 16, "statistics": 40}
    assert add_traffic(first, [job], [update])[0]["up"] == {"head": 24, "statistics": 60}


def test_the_background_is_sent_once_per_client_and_task() -> None:
    plan = RoundPlan(background={"adapter.x": torch.zeros(10)})
    jobs = [ClientJob(c, 1, 0, {}, plan) for c in (0, 1, 2)]
    first, holders = add_traffic({}, jobs[:2], [])
    assert (first["down"]["background"], holders) == (80, (0, 1))
    second, holders = add_traffic(first, jobs, [], holders)
    assert (second["down"]["background"], holders) == (120, (0, 1, 2))


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
    optimizer, schedule = optim.build(ClientConfig(optimizer=name, lr=0.1), [parameter], 4)
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
    optimizer, schedule = optim.build(client, [torch.ones(1, requires_grad=True)], 8)
    assert schedule is not None
    rates = []
    for _ in range(8):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    assert rates[3] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)


def test_weight_decay_is_off_unless_asked_for() -> None:
    """torch's AdamW would decay by 0.01, which moves head rows of old tasks."""
    still: Tensor = torch.ones(2, requires_grad=True)
    optimizer, _ = optim.build(ClientConfig(), [still], 1)
    still.grad = torch.zeros(2)
    optimizer.step()
    assert torch.equal(still.detach(), torch.ones(2))


def test_readme_median_is_the_rule_it_claims_to_be(tmp_path: Path) -> None:
    from fedsim.core import config as configs
    from tests.readme import median_rule

    (tmp_path / "my_rule.py").write_text(median_rule())
    rule = configs.build("aggregators", {"name": str(tmp_path / "my_rule.py")})
    updates = [ClientUpdate(i, 1, {"head.bias": torch.tensor([float(x)])}) for i, x in enumerate((1, 9, 2))]
    _, merged = rule.combine({}, {"head.bias": torch.zeros(1), "adapter.x": torch.ones(1)}, updates)
    assert merged["head.bias"].item() == 2.0
    assert merged["adapter.x"].item() == 1.0
