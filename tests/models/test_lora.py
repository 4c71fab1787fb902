"""LoRA against PEFT and against dense float64 weights; what it must leave alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsim.core.errors import ConfigError, ModelError
from fedsim.core.tensors import stack_modules
from fedsim.laws.adapters import traces
from fedsim.models import inject
from fedsim.models.adapters import lora
from fedsim.models.model import Model
from tests.models.zoo import BERT, VIT, images, model, texts, trained

FAMILIES = [(VIT, images(), "all-linear"), (VIT, images(), ["q_proj", "mlp.fc*"]), (BERT, texts(), ["query", "output.dense"])]


def lora_of(targets: Any = "all-linear", rank: int = 3, **options: Any) -> dict[str, Any]:
    return {"name": "lora", "targets": targets, "rank": rank, **options}


@contextmanager
def dense(built: Model, deltas: dict[str, Tensor]) -> Iterator[None]:
    """The reference: weights of a copy of the encoder changed by hand."""
    kept = built.backbone.encoder
    changed = copy.deepcopy(kept)
    for name, delta in deltas.items():
        layer = changed.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layer.weight.data += delta
    object.__setattr__(built.backbone, "encoder", changed)
    try:
        yield
    finally:
        object.__setattr__(built.backbone, "encoder", kept)


def products(params: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    names = [n.removeprefix("adapter.").removesuffix(".lora_A") for n in params if n.endswith(".lora_A")]
    return {n: scale * params[f"adapter.{n}.lora_B"] @ params[f"adapter.{n}.lora_A"] for n in names}


@pytest.mark.parametrize(("layout", "inputs", "targets"), FAMILIES)
def test_forward_and_gradients_are_those_of_peft(layout: dict[str, Any], inputs: dict[str, Tensor], targets: Any) -> None:
    built = model(layout, lora_of(targets, alpha=5.0))
    params = {n: t.requires_grad_() for n, t in trained(built).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a package that is only an oracle here
        import peft

        layers = list(inject.match_linear(built.backbone.encoder, targets))
        reference = copy.deepcopy(built.backbone.encoder)
        peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=5, target_modules=layers, lora_dropout=0.0), reference)
    theirs = {
        f"adapter.{n.replace('.default.weight', '')}": p.data.double().requires_grad_()
        for n, p in reference.named_parameters()
        if ".lora_" in n
    }
    assert theirs.keys() == params.keys()
    reference.double()
    for name, p in reference.named_parameters():
        if ".lora_" in name:
            p.data.copy_(params[f"adapter.{name.replace('.default.weight', '')}"].data)
    weights = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    with built.applied(params):
        ours = built.features(inputs)
    grads = torch.autograd.grad((ours * weights).sum(), list(params.values()))
    object.__setattr__(built.backbone, "encoder", reference.eval())
    want = built.features(inputs)
    want_grads = torch.autograd.grad(
        (want * weights).sum(), [p for n, p in reference.named_parameters() if ".lora_" in n], allow_unused=False
    )
    by_name = dict(zip([n for n, _ in reference.named_parameters() if ".lora_" in n], want_grads, strict=True))
    assert torch.allclose(ours, want, rtol=0, atol=1e-12)
    for name, grad in zip(params, grads, strict=True):
        key = next(n for n in by_name if f"adapter.{n.replace('.default.weight', '')}" == name)
        assert torch.allclose(grad, by_name[key], rtol=1e-10, atol=1e-12), name


@pytest.mark.parametrize(("layout", "inputs", "targets"), FAMILIES)
def test_fresh_module_changes_no_bit(layout: dict[str, Any], inputs: dict[str, Tensor], targets: Any) -> None:
    built = model(layout, lora_of(targets), double=False)
    fresh = built.init_adapter(torch.Generator().manual_seed(0))
    bare = built.features(inputs)
    with built.applied(fresh):
        assert torch.equal(built.features(inputs), bare)
    with built.merged(fresh):
        assert torch.equal(built.features(inputs), bare)


def test_fresh_tensors_are_addressed_and_bounded() -> None:
    built = model(VIT, lora_of(["fc1"], rank=4), double=False)
    fresh = built.init_adapter(torch.Generator().manual_seed(7))
    again = built.init_adapter(torch.Generator().manual_seed(7))
    assert list(fresh) == [f"adapter.layers.{i}.mlp.fc1.lora_{x}" for i in range(2) for x in "AB"]
    assert all(torch.equal(fresh[n], again[n]) and fresh[n].dtype == torch.float32 for n in fresh)
    a, b = fresh["adapter.layers.0.mlp.fc1.lora_A"], fresh["adapter.layers.0.mlp.fc1.lora_B"]
    assert a.shape == (4, 16)
    assert b.shape == (24, 4)
    assert 0.2 < float(a.abs().max()) <= 1 / 4  # uniform in ±1/√16
    assert not b.any()


@pytest.mark.parametrize(("layout", "inputs", "targets"), FAMILIES)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_applied_merged_and_dense_agree(
    layout: dict[str, Any], inputs: dict[str, Tensor], targets: Any, alpha: float | None
) -> None:
    built = model(layout, lora_of(targets, alpha=alpha))
    params = trained(built)
    bare = built.features(inputs)
    with built.applied(params):
        applied = built.features(inputs)
    with built.merged(params):
        merged = built.features(inputs)
    with dense(built, products(params, 1.0 if alpha is None else alpha / 3)):
        want = built.features(inputs)
    assert not torch.allclose(bare, want)
    assert torch.allclose(applied, want, rtol=0, atol=1e-12)
    assert torch.allclose(merged, want, rtol=0, atol=1e-12)


@settings(max_examples=10)
@given(weights=st.lists(st.floats(-2, 2), min_size=1, max_size=3), alpha=st.sampled_from([None, 1.5]))
def test_stacked_modules_act_as_their_weighted_sum(weights: list[float], alpha: float | None) -> None:
    built = model(VIT, lora_of(alpha=alpha))
    modules = [trained(built, seed) for seed in range(len(weights))]
    stacked = stack_modules(modules, weights)
    scale = 1.0 if alpha is None else alpha / 3
    deltas = [products(m, scale) for m in modules]
    with dense(built, {n: sum(w * d[n] for w, d in zip(weights, deltas, strict=True)) for n in deltas[0]}):  # type: ignore[misc]
        want = built.features(images())
    for context in (built.applied(stacked), built.merged(stacked)):
        with context:
            assert torch.allclose(built.features(images()), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("form", ["applied", "merged"])
def test_base_is_untouched_bit_for_bit_whatever_happens(form: str) -> None:
    built = model(VIT, lora_of(), double=False)
    params, before = trained(built), traces(built.backbone.encoder)
    with getattr(built, form)(params):
        built.features(images())
        assert traces(built.backbone.encoder) != before
    assert traces(built.backbone.encoder) == before
    with pytest.raises(RuntimeError, match="in the middle"), getattr(built, form)(params):
        raise RuntimeError("in the middle")
    assert traces(built.backbone.encoder) == before
    wrong = params | {"adapter.layers.1.mlp.fc2.lora_B": torch.zeros(5, 3)}
    with pytest.raises(RuntimeError), getattr(built, form)(wrong):
        built.features(images())
    assert traces(built.backbone.encoder) == before
    with pytest.raises(ModelError, match=r"no module 'layers\.9\.mlp\.fc1'"):
        getattr(built, form)({f"adapter.layers.9.mlp.fc1.lora_{x}": torch.zeros(3, 3) for x in "AB"}).__enter__()
    assert traces(built.backbone.encoder) == before


def test_only_what_is_trained_gets_a_gradient() -> None:
    built = model(VIT, lora_of(["fc1"]), double=False)
    params = trained(built)
    for name, t in params.items():
        t.requires_grad_(name.endswith(".lora_B"))
    with built.applied(params):
        built.features(images()).sum().backward()  # type: ignore[no-untyped-call]
    assert all((t.grad is not None) == n.endswith(".lora_B") for n, t in params.items())
    assert all(p.grad is None and not p.requires_grad for p in built.backbone.encoder.parameters())


def test_dropout_is_inverted_and_draws_from_its_own_generator() -> None:
    built = model(VIT, lora_of(["layers.0.attention.q_proj"], dropout=0.25), double=False)
    params, state = trained(built), torch.random.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        with built.applied(params, torch.Generator().manual_seed(seed)):
            runs.append(built.features(images()))
    with built.applied(params):
        plain = built.features(images())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], plain)
    assert torch.equal(torch.random.get_rng_state(), state)
    x = torch.full((100, 100), 3.0)
    dropped = lora._dropped(x, 0.25, torch.Generator().manual_seed(0))
    assert set(dropped.flatten().tolist()) == {0.0, 4.0}
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_patterns() -> None:
    encoder = model(VIT, lora_of(), double=False).backbone.encoder
    assert len(inject.match_linear(encoder, "all-linear")) == 12
    assert list(inject.match_linear(encoder, ["mlp.fc1", "layers.0.*.q_proj"])) == [
        "layers.0.attention.q_proj", "layers.0.mlp.fc1", "layers.1.mlp.fc1",
    ]  # fmt: skip
    assert list(inject.match_linear(encoder, ["fc?", "fc1"])) == [f"layers.{i}.mlp.fc{j}" for i in range(2) for j in (1, 2)]


def test_pattern_that_matches_nothing_lists_what_there_is() -> None:
    built = model(BERT, lora_of(["query", "q_proj"]), double=False)
    with pytest.raises(
        ModelError, match=r"'q_proj' matches no linear layer .* encoder\.layer\.\*\.attention\.self\.query, "
    ) as e:
        built.init_adapter(torch.Generator())
    assert "\n" not in str(e.value)


def test_rank_larger_than_a_layer_names_it() -> None:
    built = model(VIT, lora_of(["fc1", "q_proj"], rank=17), double=False)
    with pytest.raises(ModelError, match=r"rank 17 is larger than layer 'layers\.0\.attention\.q_proj' .* at most 16"):
        built.init_adapter(torch.Generator())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": []}, "targets"),
        ({"targets": [3]}, "targets"),
    ],
)
def test_options_that_can_never_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lora.Adapter(**options)
