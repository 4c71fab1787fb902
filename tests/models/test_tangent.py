"""Tangent modules against `torch.func.jvp` of the encoder itself and finite differences; what adds up, what stays as it is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import ViTConfig, ViTModel

from fedsim.core import hardware
from fedsim.core.config import ModelConfig, RuntimeConfig
from fedsim.core.contracts import Slots
from fedsim.core.errors import ConfigError, ModelError
from fedsim.core.tensors import stack_modules
from fedsim.laws.adapters import traces
from fedsim.models import backbone, inject, lower, vit
from fedsim.models.adapters import tangent
from fedsim.models.backbone import Backbone
from fedsim.models.model import Model
from tests.models.zoo import BERT, VIT, images, model, texts, trained

LAYOUT = vit.Layout(
    hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4, num_channels=1,
    qkv_bias=True, layer_norm_eps=1e-6,
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "LoRA everywhere": {"targets": "all-linear", "rank": 3, "alpha": 6.0},
    "LoRA of values": {"targets": ["layers.1.*.v_proj"], "rank": 2},
    "LoRA of keys": {"targets": ["k_proj"], "rank": 2},
    "LoRA behind the attention": {"targets": ["layers.1.*.o_proj", "fc2"], "rank": 2},
    "last block": {"targets": [], "full_blocks": 1},
    "all blocks": {"targets": [], "full_blocks": 3},
    "mixed": {"targets": "all-linear", "rank": 2, "full_blocks": 1},
}


def ours(double: bool = True, bias: bool = True) -> Backbone:
    """A tiny ViT of the house with weights that are large enough for every part to matter, and no two modules alike."""
    encoder = vit.ViT(vit.Layout(**{**vars(LAYOUT), "qkv_bias": bias}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in encoder.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    encoder.eval().requires_grad_(False)
    if double:
        encoder.double()
    return Backbone(encoder, 16, "image", "cls", 1, (8, 8), 1, lean=True)


def direction(body: Backbone, adapter: tangent.Adapter, seed: int = 4, scale: float = 0.5) -> dict[str, Tensor]:
    """Tensors in which nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    fresh = adapter.init(body, torch.Generator())
    dtype = next(body.encoder.parameters()).dtype
    return {n: (torch.randn(t.shape, generator=generator) * scale).to(dtype) for n, t in fresh.items()}


def pixels(body: Backbone, count: int = 3) -> Tensor:
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    return x.to(next(body.encoder.parameters()).dtype)


def dense(adapter: tangent.Adapter, tensors: Mapping[str, Tensor], encoder: nn.Module) -> dict[str, Tensor]:
    """The same direction as changes of the encoder's parameters, all of them, by hand."""
    out = {n: torch.zeros_like(p) for n, p in encoder.named_parameters()}
    for name, t in tensors.items():
        module, kind = name.rsplit(".", 1)
        if kind == "tangent_B":
            layer = inject.linear(encoder, module)
            out[f"{module}.weight"] += t @ adapter._projection(module, layer, t.shape[1]).to(t)
        else:
            out[f"{module}.{kind.removeprefix('tangent_')}"] += t
    return out


def features_at(body: Backbone, x: Tensor, params: dict[str, Tensor]) -> Tensor:
    out: Tensor = torch.func.functional_call(body.encoder, params, (x,)).last_hidden_state
    return out


def by_jvp(body: Backbone, x: Tensor, change: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """All tokens and their derivative, by forward-mode differentiation of the encoder."""
    base = {n: p.detach() for n, p in body.encoder.named_parameters()}
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):  # the only one with a forward mode
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own code, at the first call
        value, derivative = torch.func.jvp(lambda p: features_at(body, x, p), (base,), (change,))
    return value, derivative


def tokens(body: Backbone, x: Tensor) -> Tensor:
    out: Tensor = body.encoder(pixel_values=x).last_hidden_state
    return out


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_value_plus_jvp(kind: str, double: bool) -> None:
    body, adapter = ours(double), tangent.Adapter(**KINDS[kind])
    w, x = direction(body, adapter), pixels(body)
    value, derivative = by_jvp(body, x, dense(adapter, w, body.encoder))
    assert derivative.abs().max() > 0.01
    with adapter.applied(body, w):
        got = tokens(body, x)
    torch.testing.assert_close(got, value + derivative, rtol=0, atol=1e-9 if double else 2e-5)


def test_layers_without_bias_have_no_tangent_of_it() -> None:
    body, adapter = ours(bias=False), tangent.Adapter(targets=[], full_blocks=2)
    w, x = direction(body, adapter), pixels(body)
    assert "layers.2.attention.q_proj.tangent_bias" not in w
    value, derivative = by_jvp(body, x, dense(adapter, w, body.encoder))
    with adapter.applied(body, w):
        torch.testing.assert_close(tokens(body, x), value + derivative, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_central_differences(kind: str) -> None:
    """(h(θ₀ + ε w) − h(θ₀ − ε w)) / 2ε is off by ε² times a third derivative."""
    body, adapter = ours(), tangent.Adapter(**KINDS[kind])
    w, x, step = direction(body, adapter, scale=0.1), pixels(body), 1e-5
    change = dense(adapter, w, body.encoder)
    plus, minus = (
        features_at(body, x, {n: p + sign * step * change[n] for n, p in body.encoder.named_parameters()}) for sign in (1, -1)
    )
    with adapter.applied(body, w):
        got = tokens(body, x) - tokens_bare(body, x)
    torch.testing.assert_close(got, (plus - minus) / (2 * step), rtol=0, atol=1e-7)


def tokens_bare(body: Backbone, x: Tensor) -> Tensor:
    """Through a copy of the method, so that an adapter that is open does not matter."""
    out: Tensor = type(body.encoder).forward(body.encoder, x).last_hidden_state  # type: ignore[operator]
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_autograd_through_jvp(kind: str) -> None:
    body, adapter = ours(), tangent.Adapter(**KINDS[kind])
    w = {n: t.requires_grad_() for n, t in direction(body, adapter).items()}
    x = pixels(body)
    weights = torch.randn(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with adapter.applied(body, w):
        loss = (tokens(body, x) * weights).square().sum()
    grads = torch.autograd.grad(loss, list(w.values()))
    value, derivative = by_jvp(body, x, dense(adapter, w, body.encoder))
    want = torch.autograd.grad(((value + derivative) * weights).square().sum(), list(w.values()))
    for name, a, b in zip(w, grads, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)
        assert b.abs().max() > 1e-6, name


@settings(max_examples=15)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    weights=st.lists(st.floats(-3, 3), min_size=1, max_size=3),
)
def test_derivatives_add_up(kind: str, weights: list[float]) -> None:
    """ḣ[Σ λ_t w_t] = Σ λ_t ḣ[w_t], and that sum is what merging modules makes of their tensors."""
    body, adapter = ours(), tangent.Adapter(**KINDS[kind])
    modules = [direction(body, adapter, seed) for seed in range(len(weights))]
    x = pixels(body)
    bare, want = tokens(body, x), torch.zeros(3, 5, 16, dtype=torch.float64)
    for module, weight in zip(modules, weights, strict=True):
        with adapter.applied(body, module):
            want += weight * (tokens(body, x) - bare)
    with adapter.merged(body, stack_modules(modules, weights)):
        torch.testing.assert_close(tokens(body, x) - bare, want, rtol=1e-10, atol=1e-10)


def test_modules_that_are_open_together_add_up() -> None:
    """A module that is trained beside a frozen one; the gradient is its own, at every step anew."""
    body, adapter = ours(), tangent.Adapter(**KINDS["mixed"])
    past, own = direction(body, adapter, 1), direction(body, adapter, 2)
    x = pixels(body)
    before = traces(body.encoder)
    leaf = {n: t.clone().requires_grad_() for n, t in own.items()}
    with adapter.merged(body, past), adapter.applied(body, leaf):
        for factor in (1.0, 2.0):  # training changes tensors in place while they are applied
            with torch.no_grad():
                for n in leaf:
                    leaf[n].copy_(factor * own[n])
            got = body.image_features(x, lean=True)
            with_grad = torch.autograd.grad(got.sum(), list(leaf.values()))
            summed = {n: past[n] + factor * own[n] for n in own}
            alone = ours()
            with adapter.applied(alone, {n: t.requires_grad_() for n, t in summed.items()}):
                want = alone.image_features(x)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
            want_grad = torch.autograd.grad(want.sum(), list(summed.values()))
            assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(with_grad, want_grad, strict=True))
    assert traces(body.encoder) == before


def test_equal_components_compose_to_that_component() -> None:
    """Their mean is the module itself."""
    body, adapter = ours(double=False), tangent.Adapter(**KINDS["mixed"])
    one, other = direction(body, adapter, 1), direction(body, adapter, 2)
    x = pixels(body)
    with adapter.applied(body, one):
        want = tokens(body, x)
    for k in (2, 3, 10):
        with adapter.applied(body, stack_modules([one] * k, [1 / k] * k)):
            torch.testing.assert_close(tokens(body, x), want, rtol=1e-5, atol=1e-5)
    with adapter.applied(body, stack_modules([one, other], [0.5, 0.5])):
        assert (tokens(body, x) - want).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["ours", "transformers"])
def test_fresh_module_changes_no_bit(family: str, kind: str) -> None:
    body = ours(double=False) if family == "ours" else theirs()
    adapter = tangent.Adapter(**KINDS[kind])
    fresh, x = adapter.init(body, torch.Generator()), pixels(body)
    assert fresh
    assert not any(t.any() for t in fresh.values())
    bare = tokens(body, x)
    for form in (adapter.applied, adapter.merged):
        with form(body, fresh):
            assert torch.equal(tokens(body, x), bare)


def theirs() -> Backbone:
    """transformers' own ViT with the weights of ours."""
    encoder: Any = ViTModel(ViTConfig(**vars(LAYOUT)), add_pooling_layer=False)
    encoder.load_state_dict(ours(double=False).encoder.state_dict())
    return Backbone(encoder.eval().requires_grad_(False), 16, "image", "cls", 1, (8, 8), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_own_encoder_gives_the_same_bits(kind: str) -> None:
    adapter, outputs = tangent.Adapter(**KINDS[kind]), []
    for body in (ours(double=False), theirs()):
        with adapter.applied(body, direction(body, adapter)):
            outputs.append(body.image_features(pixels(body)))
    assert torch.equal(*outputs)


def test_checkpoint_with_names_of_timm(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "cls_token": (1, 1, 64), "pos_embed": (1, 5, 64), "patch_embed.proj.weight": (64, 1, 4, 4),
        "patch_embed.proj.bias": (64,), "norm.weight": (64,), "norm.bias": (64,),
    }  # fmt: skip
    for i in range(2):
        block = {"norm1": (64,), "norm2": (64,), "attn.qkv": (192, 64), "attn.proj": (64, 64), "mlp.fc1": (96, 64)}
        for name, shape in {**block, "mlp.fc2": (64, 96)}.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    save_file({n: torch.randn(s, generator=generator) * 0.2 for n, s in shapes.items()}, tmp_path / "vit.safetensors")
    config = ModelConfig(backbone=str(tmp_path / "vit.safetensors"))
    body = backbone.load(config)
    adapter = tangent.Adapter(targets=["fc1"], rank=4, full_blocks=1)
    body.encoder.double()
    w, x = direction(body, adapter), pixels(body)
    value, derivative = by_jvp(body, x, dense(adapter, w, body.encoder))
    with adapter.applied(body, w):
        torch.testing.assert_close(body.image_features(x), (value + derivative)[:, 0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_lean_is_the_class_token_of_all(kind: str) -> None:
    body, adapter = ours(), tangent.Adapter(**KINDS[kind])
    assert adapter.lean
    w = {n: t.requires_grad_() for n, t in direction(body, adapter).items()}
    x, results = pixels(body), []
    for lean in (False, True):
        with adapter.applied(body, w):
            out = body.image_features(x, lean)
        results.append((out, torch.autograd.grad(out.square().sum(), list(w.values()))))
    (whole, grads), (short, short_grads) = results
    torch.testing.assert_close(short, whole, rtol=0, atol=1e-12)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(grads, short_grads, strict=True))


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"targets": ["layers.1.*", "layers.2.*"], "rank": 2}, 1),
        ({"targets": ["layers.2.mlp.fc1"], "rank": 2}, 2),
        ({"targets": [], "full_blocks": 1}, 2),
        ({"targets": ["layers.1.*"], "rank": 2, "full_blocks": 1}, 1),
        ({"targets": "all-linear", "rank": 2}, 0),
    ],
)
def test_blocks_below_are_told_and_left_out(options: dict[str, Any], count: int, lean: bool) -> None:
    body, adapter = ours(double=False), tangent.Adapter(**options)
    w, x = direction(body, adapter), pixels(body)
    assert lower.untouched(body.encoder, list(w)) == count
    with adapter.applied(body, w):
        want = body.image_features(x, lean)
    if not count:
        return
    with lower.capturing(body.encoder, count) as found:
        body.image_features(x)
    with adapter.applied(body, w), lower.entering(body.encoder, count, found[0]):
        assert torch.equal(body.image_features(torch.zeros_like(x), lean), want)


def test_untouched_blocks_of_a_final_norm_alone_and_of_other_encoders() -> None:
    """The norm comes after the last block, so that what can be kept ends below that; elsewhere nobody knows."""
    assert lower.untouched(ours().encoder, ["layernorm.tangent_weight"]) == 2
    bert = model(BERT, {"name": "none"}, double=False).backbone.encoder
    assert lower.untouched(bert, ["layernorm.tangent_weight"]) == 0


@pytest.mark.parametrize("form", ["applied", "merged"])
def test_base_is_untouched_bit_for_bit_whatever_happens(form: str) -> None:
    built = model(VIT, {"name": "tangent", "targets": "all-linear", "rank": 2, "full_blocks": 1}, double=False)
    params, before = trained(built), traces(built.backbone.encoder)
    with getattr(built, form)(params):
        built.features(images())
        assert traces(built.backbone.encoder) != before
    assert traces(built.backbone.encoder) == before
    with pytest.raises(RuntimeError, match="in the middle"), getattr(built, form)(params):
        raise RuntimeError("in the middle")
    assert traces(built.backbone.encoder) == before
    wrong = params | {"adapter.layers.0.mlp.fc2.tangent_B": torch.zeros(5, 2)}
    with pytest.raises(RuntimeError), getattr(built, form)(wrong):
        built.features(images())
    assert traces(built.backbone.encoder) == before
    with pytest.raises(ModelError, match=r"no module 'layers\.9\.mlp\.fc1'"):
        getattr(built, form)({"adapter.layers.9.mlp.fc1.tangent_B": torch.zeros(3, 3)}).__enter__()
    assert traces(built.backbone.encoder) == before


def test_only_what_is_trained_gets_a_gradient() -> None:
    built = model(VIT, {"name": "tangent", "targets": "all-linear", "rank": 2, "full_blocks": 1}, double=False)
    params = trained(built)
    for name, t in params.items():
        t.requires_grad_("fc1" in name)
    with built.applied(params):
        built.features(images()).square().sum().backward()  # type: ignore[no-untyped-call]
    assert all((t.grad is not None) == ("fc1" in n) for n, t in params.items())
    assert all(p.grad is None and not p.requires_grad for p in built.backbone.encoder.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_kernels_give_the_same_up_to_rounding(precision: str) -> None:
    plain, fast = model(VIT, {"name": "none"}, double=False).backbone, model(VIT, {"name": "none"}, double=False).backbone
    kernel = "onednn" if precision == "fp32" else "torch"
    if kernel == "onednn" and hardware.onednn_product() is None:
        pytest.skip("no oneDNN in this torch")
    fast = backbone.prepared(fast, RuntimeConfig(precision=precision, kernels=kernel), torch.device("cpu"))
    adapter, results = tangent.Adapter(targets="all-linear", rank=2, full_blocks=1), []
    w = {n: t.requires_grad_() for n, t in direction(plain, adapter, scale=0.3).items()}
    for body in (plain, fast):
        with adapter.applied(body, w):
            out = body.image_features(pixels(body))
        results.append((out, *torch.autograd.grad(out.square().sum(), list(w.values()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4 * float(a.detach().abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_clients_in_one_batch_are_as_alone(kind: str) -> None:
    """Features and gradients, with tensors of their own and tensors that all share."""
    body, adapter = ours(), tangent.Adapter(**KINDS[kind])
    clients = [direction(body, adapter, seed) for seed in range(2)]
    shared = list(clients[0])[::3] if len(clients[0]) > 1 else []
    for name in shared:
        clients[1][name] = clients[0][name]
    stacked = {n: t if n in shared else torch.stack([c[n] for c in clients]) for n, t in clients[0].items()}
    x = pixels(body, 6)
    leaves = {n: t.clone().requires_grad_() for n, t in stacked.items()}
    with adapter.stacked(body, leaves, Slots(3, (3, 3))):
        both = body.image_features(x, lean=True)
    grads = dict(zip(leaves, torch.autograd.grad(both.square().sum(), list(leaves.values())), strict=True))
    sums = {n: torch.zeros_like(clients[0][n]) for n in shared}
    for k, client in enumerate(clients):
        own = {n: t.clone().requires_grad_() for n, t in client.items()}
        with adapter.applied(body, own):
            alone = body.image_features(x[3 * k : 3 * k + 3])
        torch.testing.assert_close(both[3 * k : 3 * k + 3], alone, rtol=0, atol=1e-12)
        own_grads = dict(zip(own, torch.autograd.grad(alone.square().sum(), list(own.values())), strict=True))
        for name, g in own_grads.items():
            if name in shared:
                sums[name] += g
            else:
                torch.testing.assert_close(grads[name][k], g, rtol=1e-9, atol=1e-10)
    for name in shared:
        torch.testing.assert_close(grads[name], sums[name], rtol=1e-9, atol=1e-10)


def test_the_projection_is_the_same_everywhere() -> None:
    """It depends on its address alone, within ±1/√d, and is not what another layer, seed or option gets."""
    body = ours(double=False)
    layer = inject.linear(body.encoder, "layers.0.mlp.fc1")
    adapter = tangent.Adapter(rank=8, alpha=16.0)
    drawn = adapter._projection("layers.0.mlp.fc1", layer, 8)
    tangent._projection.cache_clear()
    again = adapter._projection("layers.0.mlp.fc1", layer, 8)
    assert torch.equal(drawn, again)
    assert drawn.shape == (8, 16)
    assert 0.4 < float(drawn.abs().max()) <= 2 / 4  # s = 2, uniform in ±1/√16
    for other in (tangent.Adapter(rank=8, alpha=16.0, projection_seed=1)._projection("layers.0.mlp.fc1", layer, 8),
                  adapter._projection("layers.1.mlp.fc1", layer, 8)):  # fmt: skip
        assert not torch.equal(drawn, other)


def test_evaluation_first_does_not_spoil_training() -> None:
    tangent._projection.cache_clear()
    body, adapter = ours(double=False), tangent.Adapter(targets=["fc1"], rank=2)
    w = {n: t.requires_grad_() for n, t in direction(body, adapter).items()}
    with torch.inference_mode(), adapter.merged(body, w):
        body.image_features(pixels(body))
    with adapter.applied(body, w):
        body.image_features(pixels(body)).sum().backward()  # type: ignore[no-untyped-call]
    assert all(t.grad is not None for t in w.values())


def test_a_bias_of_keys_is_left_out_because_nothing_depends_on_it() -> None:
    body, x = ours(), pixels(ours())
    change = {n: torch.zeros_like(p) for n, p in body.encoder.named_parameters()}
    change["layers.1.attention.k_proj.bias"] += torch.arange(16)
    _, derivative = by_jvp(body, x, change)
    assert derivative.abs().max() < 1e-12


def test_names_shapes_and_what_travels() -> None:
    body = ours()
    fresh = tangent.Adapter(targets=["q_proj", "fc1"], rank=3, full_blocks=1).init(body, torch.Generator())
    low = {n: tuple(t.shape) for n, t in fresh.items() if n.endswith(".tangent_B")}
    assert low == {f"layers.{i}.{n}.tangent_B": (m, 3) for i in (0, 1) for n, m in (("attention.q_proj", 16), ("mlp.fc1", 24))}
    full = {n: t for n, t in fresh.items() if n not in low}
    parts = {n.replace(".tangent_", "."): tuple(t.shape) for n, t in full.items()}
    weights = body.encoder.state_dict()
    wanted = {n: tuple(t.shape) for n, t in weights.items() if n.startswith(("layers.2.", "layernorm."))}
    assert wanted.pop("layers.2.attention.k_proj.bias") == (16,)
    assert parts == wanted
    assert all(t.dtype == torch.float32 for t in fresh.values())


def run(built: Model) -> None:
    built.init_adapter(torch.Generator())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"full_blocks": 3}, r"full_blocks is 3, but the backbone has 2 blocks"),
        ({"targets": ["fc1"], "rank": 17}, r"rank 17 is larger than layer 'layers\.0\.mlp\.fc1' \(16 inputs\): use at most 16"),
        ({"targets": ["query"]}, r"'query' matches no linear layer"),
    ],
)
def test_options_that_do_not_fit_a_backbone(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        run(model(VIT, {"name": "tangent", **options}, double=False))


@pytest.mark.parametrize("layout", [BERT, VIT | {"hidden_act": "relu"}])
def test_other_backbones_are_refused(layout: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"plain ViTs with GELU only .*use the adapter lora"):
        run(model(layout, {"name": "tangent", "targets": "all-linear"}, double=False))
    assert texts()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"targets": [3]}, "targets"),
        ({"targets": []}, "nothing to train"),
        ({"full_blocks": -1}, "full_blocks"),
        ({"projection_seed": -1}, "projection_seed"),
    ],
)
def test_options_that_can_never_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tangent.Adapter(**options)
