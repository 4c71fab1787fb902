"""FedSum: sums of updates, or of tensors."""

from __future__ import annotations

import pytest
import torch

from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate
from fedsim.core.rng import torch_stream
from server.aggregators.fairavg import Aggregator as FairAvg
from server.aggregators.fedsum import Aggregator


def merged(rule: Aggregator | FairAvg, values: list[float], samples: list[int], start: float = 10.0) -> float:
    updates = [ClientUpdate(k, n, {"w": torch.tensor([v])}) for k, (v, n) in enumerate(zip(values, samples, strict=True))]
    params = {"w": torch.tensor([start]), "untrained": torch.ones(2)}
    _, out = rule.combine({}, params, updates, torch_stream(0, "sum"))
    assert torch.equal(out["untrained"], params["untrained"])
    return out["w"].item()


def test_updates_add_up_whatever_clients_hold() -> None:
    """From 10: +1, +2, −5 give 8; the tensors themselves 11 + 12 + 5. Who holds nothing has no part in it."""
    values, samples = [11.0, 12.0, 5.0, 99.0], [1, 50, 7, 0]
    assert merged(Aggregator(), values, samples) == 8.0
    assert merged(Aggregator(sum_of="weights"), values, samples) == 28.0
    assert merged(Aggregator(), [11.0], [3]) == 11.0
    mean = merged(FairAvg(), values, samples)
    assert merged(Aggregator(), values, samples) == pytest.approx(10 + 3 * (mean - 10))


def test_the_threshold_leaves_out_those_who_hold_next_to_nothing() -> None:
    """Of two clients 1/(10 N) is a twentieth: 5 of 100 samples are not above it, 6 of 100 are."""
    assert merged(Aggregator(threshold=True), [11.0, 12.0, 99.0], [5, 95, 0]) == 12.0
    assert merged(Aggregator(threshold=True), [11.0, 12.0, 99.0], [6, 94, 0]) == 13.0
    assert not Aggregator(threshold=True).additive and Aggregator().additive


def test_it_sums_one_or_the_other() -> None:
    with pytest.raises(ConfigError, match="sum_of 'deltas' is unknown"):
        Aggregator(sum_of="deltas")
