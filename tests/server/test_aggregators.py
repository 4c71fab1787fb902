"""Every merging rule against the laws, and each against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedsim import laws
from fedsim.core import plugins
from fedsim.core.config import build
from fedsim.core.contracts import Aggregator
from fedsim.core.errors import AggregationError, ConfigError
from fedsim.core.messages import ClientUpdate
from fedsim.core.rng import torch_stream
from fedsim.core.tensors import matching, upper_triangle
from server.aggregators.fairavg import Aggregator as FairAvg
from server.aggregators.fedavg import Aggregator as FedAvg
from server.aggregators.lorm import Aggregator as LoRM
from server.aggregators.regmean import Aggregator as RegMean
from server.aggregators.variance_weighted import Aggregator as VarianceWeighted

MEDIAN = '''
"""Median of the clients, number by number."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedsim.core import contracts


@dataclass(frozen=True)
class Aggregator(contracts.Aggregator):
    """The middle value of the clients (mean of the middle two when their number is even)."""

    exempt: ClassVar[Mapping[str, str]] = {"weights": "every client counts once"}

    def combine(self, state, params, updates, draw):
        contracts.require_updates(updates)
        held = [u for u in updates if u.num_samples]
        merged = {n: torch.stack([u.params[n] for u in held]).quantile(0.5, dim=0) for n in held[0].params}
        return state, {**params, **merged}
'''


@pytest.mark.parametrize("name", plugins.names("aggregators"))
def test_rule_keeps_the_laws(name: str) -> None:
    """A new file in server/aggregators is found and held against the laws without a line here."""
    for options in plugins.load("aggregators", name).examples:
        broken = [r for r in laws.check("aggregators", build("aggregators", {"name": name, **options})) if not r.ok]
        assert not broken, "\n".join(f"{name} {dict(options)}, {r.name}: {r.explanation}" for r in broken)


@pytest.mark.parametrize("name", plugins.names("aggregators"))
def test_rule_says_what_it_computes(name: str) -> None:
    doc = plugins.load("aggregators", name).__doc__
    assert doc is not None
    assert len(doc) > 80


def two_clients() -> list[ClientUpdate]:
    """1 and 3 samples, w = (1, 2) and (5, 10)."""
    sent = [(1, torch.tensor([1.0, 2.0])), (3, torch.tensor([5.0, 10.0]))]
    return [ClientUpdate(k, n, {"head.bias": w}) for k, (n, w) in enumerate(sent)]


def test_fedavg_by_hand() -> None:
    """(1·1 + 3·5)/4 = 4, (1·2 + 3·10)/4 = 8; what nobody trained stays."""
    params = {"head.bias": torch.zeros(2), "adapter.x": torch.ones(3)}
    state, out = FedAvg().combine({}, params, two_clients(), torch.Generator())
    assert state == {}
    assert out["head.bias"].tolist() == [4.0, 8.0]
    assert out["head.bias"].dtype == torch.float32
    assert torch.equal(out["adapter.x"], torch.ones(3))


def test_fairavg_by_hand() -> None:
    """(1 + 5)/2 = 3, (2 + 10)/2 = 6; a client without samples does not count."""
    empty = ClientUpdate(2, 0, {"head.bias": torch.tensor([99.0, 99.0])})
    for updates in (two_clients(), [*two_clients(), empty]):
        _, out = FairAvg().combine({}, {"head.bias": torch.zeros(2)}, updates, torch.Generator())
        assert out["head.bias"].tolist() == [3.0, 6.0]


def test_fairavg_is_fedavg_for_equal_sizes() -> None:
    equal = [ClientUpdate(u.client_id, 4, u.params) for u in two_clients()]
    params = {"head.bias": torch.zeros(2)}
    assert torch.equal(
        FairAvg().combine({}, params, equal, torch.Generator())[1]["head.bias"],
        FedAvg().combine({}, params, equal, torch.Generator())[1]["head.bias"],
    )


def test_median_in_a_users_own_file(tmp_path: Path) -> None:
    path = tmp_path / "median.py"
    path.write_text(MEDIAN)
    rule = build("aggregators", {"name": str(path)})
    sent = [torch.tensor([1.0, 50.0]), torch.tensor([2.0, -7.0]), torch.tensor([90.0, 3.0])]
    updates = [ClientUpdate(k, 1, {"head.bias": w}) for k, w in enumerate(sent)]
    assert rule.combine({}, {"head.bias": torch.zeros(2)}, updates, torch.Generator())[1]["head.bias"].tolist() == [2.0, 3.0]
    assert [r.name for r in laws.check("aggregators", rule) if not r.ok] == []


# ---------------------------------------------------------------- RegMean


def regmean_clients(name: str, key: str, decay: float) -> tuple[list[ClientUpdate], torch.Tensor]:
    """Three clients with weights (3, 5) and inputs (n, 5), and numpy's solution of the stacked systems."""
    updates, rows, right = [], [], []
    for k in range(3):
        generator = torch_stream(3, "regmean", k)
        w = torch.randn(3, 5, dtype=torch.float64, generator=generator)
        x = (1 + k) * torch.randn(9 + k, 5, dtype=torch.float64, generator=generator) + 1
        energy = x.square().sum(0)
        gram = decay * x.T @ x + (1 - decay) * torch.diag(energy)
        sent = energy if "diagonal" in key else upper_triangle(gram)
        updates.append(ClientUpdate(k, len(x), {name: w}, {key: sent}))
        z = torch.cat([decay**0.5 * x, (1 - decay) ** 0.5 * torch.diag(energy.sqrt())])
        rows.append(z)
        right.append(z @ w.T)
    return updates, torch.from_numpy(np.linalg.lstsq(torch.cat(rows).numpy(), torch.cat(right).numpy(), rcond=None)[0].T)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["head.weight", "adapter.x.lora_A", "adapter.x.lora_B"])
def test_regmean_is_the_least_squares_solution(name: str, decay: float) -> None:
    form = "diagonal" if decay == 0 else "full"
    updates, want = regmean_clients(name, f"gram.{form}/{name}", decay)
    got = RegMean(decay=decay).combine({}, {name: torch.zeros(3, 5, dtype=torch.float64)}, updates, torch.Generator())[1][name]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


class Wire:
    """A model of one layer that is shown its inputs."""

    def __init__(self) -> None:
        self.inputs = nn.Identity()

    def layer(self, parameter: str) -> nn.Module:
        return self.inputs


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rule", [RegMean, partial(LoRM, train="B")], ids=["regmean", "lorm"])
def test_b_is_the_least_squares_solution_with_the_decay_in_its_place(rule: Callable[..., Aggregator], decay: float) -> None:
    """argmin_B Σ ‖(B − B_i) Z_i‖² from what the statistic itself makes of raw inputs x. RegMean's off-diagonals are those of
    what B is applied to, Z Zᵀ = decayed(A_i x xᵀ A_iᵀ); LoRM's those of the layer's inputs, Z Zᵀ = A decayed(x xᵀ) Aᵀ."""
    a, b = "adapter.x.lora_A", "adapter.x.lora_B"
    chosen = rule(decay=decay)
    request = next(r for r in chosen.plan({}, 0).statistics if matching([b], r.match))
    draw = partial(torch.randn, dtype=torch.float64)
    a_RI = draw(3, 7, generator=torch_stream(4, "A"))
    updates, rows, right = [], [], []
    for k in range(4):
        generator = torch_stream(4, "own", k)
        own = {a: a_RI + (0.3 * draw(3, 7, generator=generator) if rule is RegMean else 0), b: draw(5, 3, generator=generator)}
        x_NI, model = (1 + k) * draw(20 + k, 7, generator=generator) + 0.5, Wire()
        with build("statistics", {"name": request.name, **request.options}).collect(model, own, [b]) as accumulator:
            for batch in x_NI.split(6):
                model.inputs(batch)
        sent = {f"gram.{key}": t.double() for key, t in accumulator.result().items()}
        updates.append(ClientUpdate(k, len(x_NI), {b: own[b]}, sent))
        seen = x_NI @ own[a].T if rule is RegMean else x_NI
        z = torch.cat([decay**0.5 * seen, (1 - decay) ** 0.5 * torch.diag(seen.square().sum(0).sqrt())])
        z = z if rule is RegMean else z @ own[a].T
        rows.append(z)
        right.append(z @ own[b].T)
    want = torch.from_numpy(np.linalg.lstsq(torch.cat(rows).numpy(), torch.cat(right).numpy(), rcond=None)[0].T)
    params = {a: a_RI, b: torch.zeros(5, 3, dtype=torch.float64)}
    torch.testing.assert_close(chosen.combine({}, params, updates, torch.Generator())[1][b], want, rtol=1e-4, atol=1e-5)


def test_regmean_averages_what_is_no_linear_map_by_samples() -> None:
    params = {"head.bias": torch.zeros(2)}
    assert RegMean().combine({}, params, two_clients(), torch.Generator())[1]["head.bias"].tolist() == [4.0, 8.0]


def test_regmean_asks_for_the_form_that_its_decay_leaves() -> None:
    forms = {decay: [r.options["form"] for r in RegMean(decay=decay).plan({}, 0).statistics] for decay in (0.0, 0.5)}
    assert forms == {0.0: ["diagonal"] * 2, 0.5: ["full"] * 2}  # of LoRA's factors, and of the head
    assert RegMean(form="full", decay=0.0).plan({}, 0).statistics[0].options["form"] == "full"


def test_regmean_without_its_statistics() -> None:
    bare = [ClientUpdate(4, 2, {"head.weight": torch.zeros(2, 2)})]
    with pytest.raises(AggregationError, match=r"client 4 sent 'head\.weight' without its gram"):
        RegMean().combine({}, {"head.weight": torch.zeros(2, 2)}, bare, torch.Generator())


# ---------------------------------------------------------------- variance weighting


def spread_clients(*spreads: list[float]) -> list[ClientUpdate]:
    """Client k sends rows that are all k + 1, and samples k + 1."""
    updates = []
    for k, spread in enumerate(spreads):
        value, classes = float(k + 1), len(spread)
        own = {
            "head.weight": torch.full((classes, 2), value),
            "head.bias": torch.full((classes,), 10 * value),
            "adapter.x": torch.tensor([value]),
        }
        updates.append(ClientUpdate(k, k + 1, own, {"class_moments.spread/head.weight": torch.tensor(spread)}))
    return updates


def test_rows_are_weighted_by_spread() -> None:
    """Class 0: (3·1 + 1·2)/4 = 1.25. Class 1 is client 1's alone. Class 2 is nobody's: the server's row.
    The rest by samples: (1·1 + 2·2)/3 = 5/3."""
    params = {"head.weight": torch.full((3, 2), -1.0), "head.bias": torch.full((3,), -2.0), "adapter.x": torch.zeros(1)}
    out = VarianceWeighted().combine({}, params, spread_clients([3.0, 0.0, 0.0], [1.0, 0.5, 0.0]), torch.Generator())[1]
    assert out["head.weight"].tolist() == [[1.25, 1.25], [2.0, 2.0], [-1.0, -1.0]]
    assert out["head.bias"].tolist() == [12.5, 20.0, -2.0]
    assert out["adapter.x"].item() == pytest.approx(5 / 3)


def test_scaling_all_spreads_changes_nothing() -> None:
    params = {"head.weight": torch.zeros(2, 2, dtype=torch.float64)}
    outs = []
    for scale in (1.0, 1e6):
        updates = spread_clients([2.0 * scale, 0.3 * scale], [0.7 * scale, 1.1 * scale])
        outs.append(VarianceWeighted().combine({}, params, updates, torch.Generator())[1]["head.weight"])
    torch.testing.assert_close(*outs, rtol=1e-6, atol=0)


def test_variance_weighting_needs_a_head() -> None:
    with pytest.raises(ConfigError, match=r"variance_weighted weighs the rows of 'head\.weight'"):
        VarianceWeighted().init({"adapter.x": torch.zeros(1)})
    with pytest.raises(AggregationError, match=r"client 0 sent no 'class_moments\.spread/head\.weight'"):
        VarianceWeighted().combine({}, {"head.bias": torch.zeros(2)}, two_clients(), torch.Generator())
