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
from fedsim.models.adapters.lora import Adapter as Lora
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


@pytest.mark.parametrize("form", ["likelihood", "empirical"])
def test_the_products_is_that_of_the_layers_weight(form: str) -> None:
    """Against autograd through a weight of the layer's own, sample by sample, with a rank that is less than the layer's."""
    one = doubled(work()).works()[1]
    one = replace(one, shard=one.shard[:5])
    name = next(n for n in one.params if n.endswith("fc1.lora_A"))
    params = {n: t + 0.1 * torch.arange(t.numel()).view(t.shape).sin() for n, t in one.params.items()}
    got = Statistic(form, "task", products=True).measured(one, params, [name, "head.bias"])
    assert isinstance(one.model.adapter, Lora) and one.model.adapter.scale != 1
    linear = one.model.layer(name)
    assert isinstance(linear, torch.nn.Linear)
    want, seen = torch.zeros(linear.weight.shape, dtype=torch.float64), {}
    linear.register_forward_hook(lambda _, args, output: seen.update(x=args[0], y=output))
    for position in one.shard:
        inputs, labels = one.samples.batch(np.array([position]))
        with torch.enable_grad(), one.model.applied({n: t.detach().requires_grad_() for n, t in params.items()}):
            logits = one.model.logits(one.model.features(inputs), params)
            log_q = logits[:, list(CLASSES)].log_softmax(1)[0, list(CLASSES).index(int(labels))]
            (slope,) = torch.autograd.grad(log_q, [seen["y"]])
        gradient = one.model.adapter.scale * slope.flatten(0, -2).double().T @ seen["x"].flatten(0, -2).detach().double()
        want += gradient.square() * (float(log_q.detach().double().exp()) if form == "likelihood" else 1.0)
    torch.testing.assert_close(got[f"{form}/{name}"].double(), want, rtol=1e-4, atol=1e-9)
    alone = Statistic(form, "task").measured(one, params, ["head.bias"])
    torch.testing.assert_close(got[f"{form}/head.bias"], alone[f"{form}/head.bias"])
