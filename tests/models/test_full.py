"""Full fine-tuning against a plain torch loop over a copy of the encoder, and what it must leave as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clients import local
from clients.samples import Samples
from clients.work import Work
from fedsim import simulation
from fedsim.core import config as configs
from fedsim.core.contracts import ArraySplit
from fedsim.core.errors import ConfigError, ModelError
from fedsim.core.messages import ClientJob, ClientUpdate, RoundPlan
from fedsim.core.rng import torch_stream
from fedsim.models import model as models
from fedsim.models.model import Model
from tests.models.zoo import BERT
from tests.tiny import final_state, same_bits, tiny

FULL: dict[str, Any] = {"adapter": "full"}
CLASSES, COUNT = (1, 2, 4), 12


def built(*overrides: str, **sections: Any) -> tuple[Model, Samples, dict[str, Tensor], configs.SimConfig]:
    """A tiny model, some samples, and parameters with a head that is not zero."""
    config = tiny("client.batch_size=16", "client.epochs=3", *overrides, **{**FULL, **sections})
    model = models.build(config, num_classes=6)
    numbers = np.random.default_rng(0)
    inputs: dict[str, Any] = {"pixel_values": numbers.integers(0, 256, (COUNT, 8, 8), dtype=np.uint8)}
    if model.backbone.kind == "text":
        inputs = {"input_ids": numbers.integers(1, 50, (COUNT, 7))}
    samples = Samples(ArraySplit(inputs, numbers.choice(CLASSES, COUNT)), torch.device("cpu"))
    head = {n: 0.1 * torch.randn(t.shape, generator=torch_stream(1, n)) for n, t in model.init_head().items()}
    return model, samples, model.init_adapter(torch_stream(0, "adapter")) | head, config


def trained(
    model: Model, samples: Samples, params: dict[str, Tensor], config: configs.SimConfig, plan: RoundPlan
) -> ClientUpdate:
    update = local.train(Work.of(model, samples, np.arange(COUNT), CLASSES, ClientJob(0, 0, 0, params, plan), config))
    assert isinstance(update, ClientUpdate), str(update)
    return update


def plain_loop(model: Model, samples: Samples, params: dict[str, Tensor], rates: dict[str, float]) -> dict[str, Tensor]:
    """Three full-batch AdamW steps on a copy of the encoder and a linear head, as anybody would write it."""
    encoder, head = copy.deepcopy(model.backbone.encoder), nn.Linear(model.backbone.width, 6)
    head.load_state_dict({n: params[f"head.{n}"] for n in ("weight", "bias")})
    own = {n: p.requires_grad_() for n, p in encoder.named_parameters() if f"adapter.{n}" in params}
    groups = [{"params": [*own.values()], "lr": rates["backbone"]}, {"params": [*head.parameters()], "lr": rates["head"]}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    inputs, labels = samples.batch(np.arange(COUNT))
    for _ in range(3):
        if model.backbone.kind == "text":
            features = encoder(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])).last_hidden_state.mean(dim=1)
        else:
            assert model._transform is not None
            features = encoder(pixel_values=model._transform(inputs["pixel_values"], None)).last_hidden_state[:, 0]
        logits = head(features)
        mask = torch.full_like(logits, float("-inf")).index_fill(1, torch.tensor(CLASSES), 0.0)
        optimizer.zero_grad()
        F.cross_entropy(logits + mask, labels).backward()
        optimizer.step()
    return {f"adapter.{n}": p.detach() for n, p in own.items()} | {f"head.{n}": p.detach() for n, p in head.named_parameters()}


@pytest.mark.parametrize("case", ["vit", "vit, onednn", "bert"])
def test_one_client_is_a_plain_loop(case: str) -> None:
    kernels = "onednn" if case == "vit, onednn" and torch.backends.mkldnn.is_available() else "torch"
    sections = {"model": {"backbone": "random", "config": BERT}} if case == "bert" else {}
    groups = 'client.groups=[{match: "adapter.*", lr: 1e-3}]'
    model, samples, params, config = built("client.lr=1e-2", groups, f"runtime.kernels={kernels}", **sections)
    before = {n: t.clone() for n, t in model.backbone.encoder.state_dict().items()}
    want = plain_loop(model, samples, params, {"backbone": 1e-3, "head": 1e-2})
    got = trained(model, samples, params, config, RoundPlan()).params
    assert got.keys() == want.keys() == params.keys()
    assert sum(n.startswith("adapter.") for n in got) > 30
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=2e-5 if "k_proj.bias" in name or "key.bias" in name else 5e-6)
        assert not torch.equal(got[name], params[name]), name
    assert same_bits(before, dict(model.backbone.encoder.state_dict()))


def test_fresh_tensors_are_the_backbones_and_it_comes_back_whatever_happens() -> None:
    model, samples, params, _ = built()
    inputs, _ = samples.batch(np.arange(COUNT))
    own = dict(model.backbone.encoder.named_parameters())
    bare = model.features(inputs)
    context = model.applied({n: t + 1 for n, t in params.items()})
    context.__enter__()
    assert not torch.allclose(model.features(inputs), bare)
    assert not context.__exit__(RuntimeError, RuntimeError("on purpose"), None)
    assert all(p is own[n] for n, p in model.backbone.encoder.named_parameters())
    with model.merged(params):
        assert torch.equal(model.features(inputs), bare)
    params["adapter.layernorm.weight"].add_(1)  # a copy: what travels is not what is kept
    assert torch.equal(model.features(inputs), bare)


def test_targets_choose_tensors_and_what_lies_below_is_computed_once() -> None:
    model, samples, params, config = built("adapter.targets=['layers.1.*', 'layernorm.*']", "client.epochs=2")
    names = [n.removeprefix("adapter.") for n in params if n.startswith("adapter.")]
    assert {n.split(".")[0] for n in names} == {"layers", "layernorm"}
    assert model.untouched_blocks(params) == 1
    assert built()[0].untouched_blocks(built()[2]) == 0
    cached = trained(model, samples, params, config, RoundPlan()).params
    anew = dict(params)
    model._enterable = False
    assert all(
        torch.allclose(t, cached[n], atol=1e-6) for n, t in trained(model, samples, anew, config, RoundPlan()).params.items()
    )


@pytest.mark.parametrize(
    ("overrides", "error", "says"),
    [
        (
            ["adapter.targets=[layers.9.*]"],
            ModelError,
            r"^adapter target 'layers\.9\.\*' matches no tensor of the backbone on which",
        ),
        (["adapter.targets=[]"], ConfigError, r"^adapter\.targets must be 'all' or a list of globs"),
        (["server.aggregator=lorm"], ConfigError, r"^lorm merges pairs of LoRA factors"),
        (["server.consolidator=dolfin"], ConfigError, r"^consolidator dolfin designs pairs of LoRA factors"),
        (["server.consolidator=regmean"], ConfigError, r"^consolidator regmean merges pairs of LoRA factors"),
    ],
)
def test_what_does_not_suit_is_refused_before_training(overrides: list[str], error: type[Exception], says: str) -> None:
    plain = {"server": {"aggregator": "fedavg", "consolidator": "none"}}
    with pytest.raises(error, match=says) as told:
        simulation.prepare(tiny(*overrides, **FULL, **plain))
    assert "\n" not in str(told.value)


def test_rounded_weights_are_refused() -> None:
    model = built()[0]
    model.backbone.encoder.bfloat16()
    with pytest.raises(
        ModelError, match=r"^adapter full trains the backbone's weights, which bf16 would round: set runtime\.preci"
    ):
        model.init_adapter(torch_stream(0, "adapter"))


def test_the_mean_of_tasks_is_the_pretrained_model_and_the_mean_task_vector(tmp_path: Path) -> None:
    config = tiny("server.rounds=1", output=tmp_path, **FULL, server={"aggregator": "fedavg", "consolidator": "mean"})
    results = simulation.run(config)
    state = final_state(results.path, config)
    model = models.build(config, num_classes=6)
    base = model.init_adapter(torch_stream(0, "adapter"))
    consolidator = configs.build("consolidators", config.server.consolidator)
    deployed = consolidator.deployed(state.consolidator, state.params, finished=True)
    first, second = state.consolidator["past"]
    for name, tensor in base.items():
        want = tensor.double() + (first[name].double() - tensor + second[name] - tensor) / 2
        torch.testing.assert_close(deployed[name].double(), want, rtol=0, atol=1e-6)
    whole = sum(t.nbytes for t in base.values())
    assert results.costs["bytes"]["up"]["adapter"] == whole * 3 * 2  # clients, tasks
    assert results.costs["bytes"]["down"]["adapter"] == whole * 3  # the second task starts from what everybody has


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_regmean_of_every_linear_layer(decay: float) -> None:
    """Weights of linear layers by least squares over the inputs of each client's own model, all else by FedAvg."""
    model, samples, params, config = built("server.aggregator.name=regmean", f"server.aggregator.decay={decay}", "client.lr=3e-2")
    rule = configs.build_aggregator(config.server.aggregator)
    updates = [
        local.train(Work.of(model, samples, shard, CLASSES, ClientJob(k, 0, 0, params, rule.plan({}, 0)), config))
        for k, shard in enumerate((np.arange(5), np.arange(5, COUNT)))
    ]
    merged = rule.combine({}, params, updates, torch.Generator())[1]  # type: ignore[arg-type]
    name = "layers.0.mlp.fc2"
    rows, right = [], []
    for update, shard in zip(updates, (np.arange(5), np.arange(5, COUNT)), strict=True):
        assert isinstance(update, ClientUpdate)
        seen: list[Tensor] = []
        with torch.no_grad(), model.applied(update.params):
            hook = model.layer(f"adapter.{name}.weight").register_forward_pre_hook(lambda m, args: seen.append(args[0]))  # noqa: B023
            model.features(samples.batch(shard)[0])
            hook.remove()
        x = seen[0].flatten(0, -2).double()
        z = torch.cat([decay**0.5 * x, (1 - decay) ** 0.5 * torch.diag(x.square().sum(0).sqrt())])
        rows.append(z)
        right.append(z @ update.params[f"adapter.{name}.weight"].double().T)
    want = torch.from_numpy(np.linalg.lstsq(torch.cat(rows).numpy(), torch.cat(right).numpy(), rcond=None)[0].T)
    torch.testing.assert_close(merged[f"adapter.{name}.weight"].double(), want, rtol=0, atol=1e-4)
    norm = "adapter.layers.0.layernorm_before.weight"
    mean = sum(u.num_samples * u.params[norm].double() for u in updates) / COUNT  # type: ignore[union-attr]
    torch.testing.assert_close(merged[norm].double(), mean, rtol=0, atol=1e-6)
