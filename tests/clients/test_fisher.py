"""The Fisher information against its formula on a linear head, and against the gradients of single samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from clients import local
from clients.statistics.fisher import FORMS, Statistic
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate, RoundPlan, StatisticRequest
from tests.clients.test_fused import CLASSES, doubled, work

REQUEST = StatisticRequest("fisher", ("head.*", "*lora_B"), {"classes": "task"})


def in_closed_form(form: str, features: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Σ_n Σ_c weight (e_c − q)² f², of the head's weight."""
    q = logits[:, list(CLASSES)].softmax(1)
    total = torch.zeros(logits.shape[1], features.shape[1], dtype=torch.float64)
    for f, q_n, y in zip(features, q, labels.tolist(), strict=True):
        for place, c in enumerate(CLASSES):
            weight = {"likelihood": q_n[place] * (c == y), "empirical": float(c == y), "expected": q_n[place]}[form]
            slope = torch.zeros(logits.shape[1], dtype=torch.float64)
            slope[list(CLASSES)] = -q_n
            slope[c] += 1
            total += weight * slope.square()[:, None] * f.square()
    return total


@pytest.mark.parametrize("form", FORMS)
def test_the_heads_is_in_closed_form(form: str) -> None:
    one = doubled(work()).works()[2]
    outputs = one.outputs(one.shard, one.params)
    got = Statistic(form, "task").measured(one, one.params, ["head.weight", "head.bias"])
    want = in_closed_form(form, *(t.double() for t in outputs), one.labels(one.shard))
    torch.testing.assert_close(got[f"{form}/head.weight"].double(), want, rtol=1e-5, atol=1e-9)
    ones = torch.ones(len(one.shard), 1, dtype=torch.float64)
    bias = in_closed_form(form, ones, outputs.logits.double(), one.labels(one.shard))
    torch.testing.assert_close(got[f"{form}/head.bias"].double(), bias[:, 0], rtol=1e-5, atol=1e-9)


def test_it_comes_with_a_clients_update_and_adds_up() -> None:
    """Through the client's own model, after training; two halves of the samples add up."""
    here = doubled(work(plan=RoundPlan(statistics=(REQUEST,))))
    one = here.works()[1]
    update = local.train(one)
    assert isinstance(update, ClientUpdate)
    params = {**one.params, **update.params}
    names = [n for n in one.params if n.startswith("head.") or n.endswith("lora_B")]
    whole = Statistic(classes="task").measured(one, params, names)
    assert {n: t.shape for n, t in whole.items()} == {f"likelihood/{n}": one.params[n].shape for n in names}
    for name, value in whole.items():
        torch.testing.assert_close(update.statistics[f"fisher.{name}"], value)
        assert float(value.min()) >= 0 and float(value.max()) > 0
    halves = [
        Statistic(classes="task").measured(replace(one, shard=part), params, names) for part in np.array_split(one.shard, 2)
    ]
    for name, value in whole.items():
        torch.testing.assert_close(halves[0][name] + halves[1][name], value)


def test_wrong_options_are_one_line() -> None:
    for wrong in ({"form": "diagonal"}, {"classes": "old"}):
        with pytest.raises(ConfigError, match="is unknown"):
            Statistic(**wrong)
