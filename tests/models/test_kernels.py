"""Frozen linear layers against plain formulas in float64, and models with them against models without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim.core import config as configs
from fedsim.core import hardware
from fedsim.core.config import SimConfig
from fedsim.core.errors import ConfigError, ModelError
from fedsim.laws.adapters import traces
from fedsim.models import backbone as backbones
from fedsim.models import kernels
from fedsim.models import model as models
from fedsim.models.kernels import TALL, FrozenLinear
from fedsim.models.model import Model
from tests.models.zoo import BERT, VIT, images, texts
from tests.tiny import tiny

# r rank, d inputs, m outputs, N rows
D, M, R, SCALE = 12, 20, 3, 1.5
SHAPES = {"few rows": (2, D), "rows": (40, D), "tokens": (4, 9, D), "tall": (2, TALL // 2, D), "one": (D,)}


@pytest.fixture(autouse=True)
def no_layer_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of the size of these tests would stay in float32."""
    monkeypatch.setattr(kernels, "SMALL", 0)


BOTH = pytest.mark.parametrize("name", ["torch", "onednn"])
needs_onednn = pytest.mark.skipif(hardware.onednn_product() is None, reason="this build of torch has no such operator")


def layer(name: str = "torch", precision: str = "fp32", bias: bool = True, weight: Tensor | None = None) -> FrozenLinear:
    """A frozen layer with random weights (or these), W (m, d)."""
    if name == "onednn" and hardware.onednn_product() is None:
        pytest.skip("this build of torch has no oneDNN operator")
    holder = nn.ModuleList([nn.Linear(D, M, bias=bias)])
    with torch.no_grad():
        for p in holder.parameters():
            p.copy_(draw(*p.shape, seed=1))
        if weight is not None:
            holder[0].weight.copy_(weight)
    kernels.freeze(holder, name, precision)
    made = holder[0]
    assert isinstance(made, FrozenLinear)
    return made


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.5


def formula(frozen: FrozenLinear, x: Tensor, a_rd: Tensor | None = None, b_mr: Tensor | None = None) -> Tensor:
    """`x Wᵀ + b + s x Aᵀ Bᵀ` in float64; gradients flow to what is handed in."""
    y = x.double() @ frozen.weight.detach().double().T
    if frozen.bias is not None:
        y = y + frozen.bias.detach().double()
    return y if a_rd is None or b_mr is None else y + SCALE * (x.double() @ a_rd.double().T @ b_mr.double().T)


def gradients(y: Tensor, dy: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(y, wanted, dy.to(y.dtype)))


def require_close(got: Tensor, want: Tensor, share: float = 1e-5) -> None:
    """Equal within a share of the largest value."""
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=share * float(want.detach().abs().max()))


@BOTH
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_frozen_layer(name: str, shape: tuple[int, ...], bias: bool) -> None:
    frozen, x = layer(name, bias=bias), draw(*shape, seed=2).requires_grad_()
    got, want = frozen(x), formula(frozen, x)
    require_close(got, want)
    dy = draw(*got.shape, seed=3)
    require_close(gradients(got, dy, [x])[0], gradients(want, dy, [x])[0])
    assert not any(p.requires_grad for p in frozen.parameters())


@BOTH
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("trained", ["A", "B", "AB", ""])
@pytest.mark.parametrize("below", [True, False], ids=["trained below", "nothing below"])
def test_low_rank_layer(name: str, shape: tuple[int, ...], trained: str, below: bool) -> None:
    frozen, x = layer(name), draw(*shape, seed=2).requires_grad_(below)
    a_rd, b_mr = draw(R, D, seed=4).requires_grad_("A" in trained), draw(M, R, seed=5).requires_grad_("B" in trained)
    path = frozen.beside(a_rd, b_mr, SCALE)
    got, want = frozen(x), formula(frozen, x, a_rd, b_mr)
    path.remove()
    require_close(got, want)
    wanted = [t for t in (x, a_rd, b_mr) if t.requires_grad]
    assert got.requires_grad == bool(wanted)
    if wanted:
        dy = draw(*got.shape, seed=3)
        for g, w in zip(gradients(got, dy, wanted), gradients(want, dy, wanted), strict=True):
            require_close(g, w)
            assert g.is_contiguous()
    require_close(frozen(x), formula(frozen, x))  # the path is closed


@BOTH
def test_inputs_and_gradients_may_be_strided(name: str) -> None:
    frozen, a_rd, b_mr = layer(name), draw(R, D, seed=4).requires_grad_(), draw(M, R, seed=5).requires_grad_()
    base = draw(9, 4, D, seed=2).requires_grad_()
    frozen.beside(a_rd, b_mr, SCALE)
    got, want = frozen(base.transpose(0, 1)), formula(frozen, base.transpose(0, 1), a_rd, b_mr)
    dy = draw(1, 1, M, seed=3).expand(4, 9, M)
    for g, w in zip(gradients(got, dy, [base, a_rd, b_mr]), gradients(want, dy, [base, a_rd, b_mr]), strict=True):
        require_close(g, w)
    for g in gradients(frozen(base).sum(), torch.ones(()), [base, a_rd, b_mr]):
        assert torch.isfinite(g).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_go_through_torch(dtype: torch.dtype) -> None:
    frozen, x = layer(), draw(5, D, seed=2)
    a_rd, b_mr = draw(R, D, seed=4), draw(M, R, seed=5)
    frozen.beside(a_rd, b_mr, SCALE)
    got = frozen(x.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), formula(frozen, x, a_rd, b_mr), rtol=0, atol=0.05 if dtype.itemsize == 2 else 1e-6)


@BOTH
def test_an_empty_batch(name: str) -> None:
    assert layer(name)(torch.zeros(0, D)).shape == (0, M)


def test_a_second_path_is_refused() -> None:
    frozen = layer()
    frozen.beside(draw(R, D, seed=4), draw(M, R, seed=5), SCALE)
    with pytest.raises(ModelError, match="stack the modules"):
        frozen.beside(draw(R, D, seed=4), draw(M, R, seed=5), SCALE)


@BOTH
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("form", ["frozen", "beside", "summed", "merged", "without gradient"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_outputs_may_be_changed_in_place(
    name: str, shape: tuple[int, ...], form: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a ReLU of the model's own after one of our products: the same values and gradients as by one that copies."""
    frozen, x = layer(name, precision), draw(*shape, seed=2).requires_grad_(form != "without gradient")
    a_rd, b_mr = draw(R, D, seed=4).requires_grad_(), draw(M, R, seed=5).requires_grad_()
    if form in ("beside", "summed"):
        monkeypatch.setattr(FrozenLinear, "_sum_pays", lambda self, rows: form == "summed")
        frozen.beside(a_rd, b_mr, SCALE)
    elif form == "merged":
        frozen.weight = nn.Parameter((frozen.weight + SCALE * b_mr @ a_rd).detach(), requires_grad=False)
    copied, changed = torch.relu(frozen(x)), torch.relu_(frozen(x))
    assert torch.equal(copied, changed)
    wanted = [t for t in (x, a_rd, b_mr) if t.requires_grad and (t is x or form in ("beside", "summed"))]
    if form != "without gradient":
        dy = draw(*copied.shape, seed=3)
        for g, w in zip(gradients(changed, dy, wanted), gradients(copied, dy, wanted), strict=True):
            assert torch.equal(g, w)


# ---------------------------------------------------------------- bfloat16


@BOTH
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("trained", ["A", "B", "AB"])
def test_bf16_rounds_factors_and_nothing_else(name: str, shape: tuple[int, ...], trained: str) -> None:
    frozen, x = layer(name, "bf16"), draw(*shape, seed=2).requires_grad_()
    a_rd, b_mr = draw(R, D, seed=4).requires_grad_("A" in trained), draw(M, R, seed=5).requires_grad_("B" in trained)
    frozen.beside(a_rd, b_mr, SCALE)
    got, want = frozen(x), formula(frozen, x, a_rd, b_mr)
    require_close(got, want, 2e-2)
    wanted = [t for t in (x, a_rd, b_mr) if t.requires_grad]
    dy = draw(*got.shape, seed=3)
    for i, (g, w) in enumerate(zip(gradients(got, dy, wanted), gradients(want, dy, wanted), strict=True)):
        require_close(g, w, 2e-2 if i == 0 else 1e-5)  # what is trained has its gradient in float32
    assert frozen.weight.dtype == torch.float32


def test_bf16_keeps_small_changes_of_weights_that_are_rounded_already() -> None:
    """W + s B A rounds to W when W has bfloat16 values and B A is small: then it may not be made."""
    coarse = (draw(M, D, seed=1).sign() + draw(M, D, seed=7) / 8).bfloat16().float()
    frozen, x = layer(precision="bf16", weight=coarse), draw(40, D, seed=2).bfloat16().float()
    a_rd, b_mr = draw(R, D, seed=4), draw(M, R, seed=5) * 1e-4
    before = frozen(x)
    assert not kernels.mergeable(frozen)
    assert kernels.mergeable(layer(precision="bf16"))
    assert torch.equal((coarse + SCALE * b_mr @ a_rd).bfloat16().float(), coarse)
    frozen.beside(a_rd, b_mr, SCALE)
    change = SCALE * x.double() @ a_rd.double().T @ b_mr.double().T
    assert float((frozen(x) - before - change).abs().max()) < 0.01 * float(change.abs().max())


def test_bf16_leaves_small_layers_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(40, D, seed=2)
    for small, share in ((D * M, 2e-2), (D * M + 1, 1e-6)):
        monkeypatch.setattr(kernels, "SMALL", small)
        frozen = layer(precision="bf16")
        require_close(frozen(x), formula(frozen, x), share)
        assert frozen.bf16 == (small == D * M)


def test_bf16_copy_made_in_evaluation_serves_training() -> None:
    frozen, x = layer(precision="bf16"), draw(5, D, seed=2).requires_grad_()
    with torch.inference_mode():
        frozen(x.detach())
    frozen(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        replaced = frozen.weight + 1
    frozen.weight = nn.Parameter(replaced, requires_grad=False)
    require_close(frozen(x), formula(frozen, x), 2e-2)


# ---------------------------------------------------------------- whole models

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 3, "targets": "all-linear", "alpha": 4.0},
    "lora on few": {"name": "lora", "rank": 3, "targets": ["q_proj", "query"][:1]},
    "dropout": {"name": "lora", "rank": 3, "targets": "all-linear", "dropout": 0.4},
    "prefix": {"name": "prefix", "length": 2},
    "vpt": {"name": "vpt", "length": 2},
    "none": {"name": "none"},
}


def built(adapter: str, layout: dict[str, Any] = VIT, **runtime: Any) -> Model:
    """A model on the CPU with random weights that are large enough for every part to matter."""
    config = tiny(model={"backbone": "random", "config": layout}, adapter=ADAPTERS[adapter], runtime=runtime)
    model = models.build(config, num_classes=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.backbone.encoder.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def trained(model: Model) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    fresh = model.init_adapter(torch.Generator().manual_seed(0))
    return {n: (torch.randn(t.shape, generator=generator) * 0.3).requires_grad_() for n, t in fresh.items()}


def pass_of(model: Model, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Features in training, features in inference, and the gradients of a loss."""
    params, dropout = trained(model), torch.Generator().manual_seed(5)
    with model.applied(params, dropout):
        features = model.features(inputs)
        loss = (features * draw(*features.shape, seed=6)).sum()
        grads = list(torch.autograd.grad(loss, list(params.values()))) if params else []
    with torch.inference_mode(), model.merged(params):
        return features.detach(), model.features(inputs), grads


@needs_onednn
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(("layout", "inputs"), [(VIT, images()), (BERT, texts())], ids=["vit", "bert"])
@pytest.mark.parametrize(("precision", "share"), [("fp32", 1e-5), ("bf16", 6e-2)])
def test_models_agree_with_torch(
    adapter: str, layout: dict[str, Any], inputs: dict[str, Tensor], precision: str, share: float
) -> None:
    if adapter == "lora on few" and layout is BERT:
        pytest.skip("BERT names its layers otherwise")
    want = pass_of(built(adapter, layout, kernels="torch"), inputs)
    got = pass_of(built(adapter, layout, kernels="onednn", precision=precision), inputs)
    for g, w in zip(got[:2], want[:2], strict=True):
        require_close(g, w, share)
    for g, w in zip(got[2], want[2], strict=True):
        assert float((g - w).norm()) <= 2 * share * float(w.norm())


@needs_onednn
def test_torch_kernels_leave_the_encoder_alone() -> None:
    plain, fast = built("lora", kernels="torch"), built("lora", kernels="onednn")
    assert not any(isinstance(m, FrozenLinear) for m in plain.backbone.encoder.modules())
    assert all(isinstance(m, FrozenLinear) for m in fast.backbone.encoder.modules() if isinstance(m, nn.Linear))
    before = traces(fast.backbone.encoder)
    pass_of(fast, images())
    assert traces(fast.backbone.encoder) == before


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_backbone_that_is_bf16_as_a_whole(adapter: str) -> None:
    """As on a GPU: activations are bfloat16, what is trained and the features are float32."""
    want = pass_of(built(adapter, kernels="torch"), images())
    model = built(adapter, kernels="torch")
    model.backbone.encoder.to(torch.bfloat16)
    object.__setattr__(model.backbone, "half", True)
    got = pass_of(model, images())
    assert [t.dtype for t in got[2]] == [torch.float32] * len(want[2])
    for g, w in zip(got[:2], want[:2], strict=True):
        require_close(g, w, 6e-2)
    for g, w in zip(got[2], want[2], strict=True):
        assert float((g - w).norm()) < 0.15 * float(w.norm()) + 1e-3


# ---------------------------------------------------------------- what a run says it used


def test_auto_is_resolved_when_a_config_is_read_and_names_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name in ("onednn", "torch"):
        monkeypatch.setattr(hardware, "best_kernels", lambda device, name=name: name)
        found[name] = tiny()
        assert found[name].runtime.kernels == name
        assert configs.from_dict(found["onednn"].to_dict()) == found["onednn"]  # also on a machine that would choose otherwise
    assert found["onednn"].identity() != found["torch"].identity()


def test_kernels_of_the_cpu_are_for_the_cpu() -> None:
    assert hardware.best_kernels("cuda") == "torch"
    with pytest.raises(ConfigError, match=r"runtime\.kernels onednn is for the CPU, but runtime\.device is cuda"):
        tiny("runtime.device=cuda", "runtime.kernels=onednn")


def test_missing_kernels_are_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "onednn_product", lambda: None)
    assert hardware.best_kernels("cpu") == "torch"
    with pytest.raises(ModelError, match=r"runtime\.kernels is onednn.*set it to torch"):
        built("none", kernels="onednn")


def test_bf16_falls_back_where_a_new_run_would_not_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    layers: list[dict[str, Any]] = [tiny().to_dict(), {"runtime": {"precision": "bf16"}}]
    monkeypatch.setattr(hardware, "has_bf16", lambda device: True)
    kept: SimConfig = configs.compose(layers)
    assert kept.runtime.precision == "bf16"
    monkeypatch.setattr(hardware, "has_bf16", lambda device: False)
    with pytest.warns(UserWarning, match=r"runtime\.precision is bf16.*fp32 is used instead"):
        fallen = configs.compose(layers)
    assert fallen.runtime.precision == "fp32"
    assert configs.from_dict(kept.to_dict()) == kept  # a run that was made elsewhere is what it was
    assert configs.compose(layers, begun=True) == kept
    assert fallen.identity() != kept.identity()


def test_onednn_is_trusted_only_if_it_multiplies_right(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        @staticmethod
        def _linear_pointwise(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
            return x @ weight.T + 1

    monkeypatch.setattr(torch.ops, "mkldnn", Wrong, raising=False)
    assert hardware.onednn_product.__wrapped__() is None


def test_features_do_not_depend_on_what_prepared_the_backbone() -> None:
    config = tiny(runtime={"kernels": "torch"})
    backbone = backbones.load(config.model)
    assert backbones.prepared(backbone, config.runtime, torch.device("cpu")) is backbone


@pytest.mark.parametrize("part", ["bias", "weight"])
def test_what_an_adapter_trains_in_the_place_of_a_frozen_tensor_gets_its_gradient(part: str) -> None:
    """BitFit, DoRA and the like put a tensor of their own in a layer; a plain linear layer is the oracle."""
    frozen = layer()
    x = torch.randn(3, frozen.in_features, generator=torch.Generator().manual_seed(1))
    gradients = []
    plain = nn.Linear(frozen.in_features, frozen.out_features)
    plain.load_state_dict(frozen.state_dict())
    for linear in (frozen, plain):
        base = getattr(linear, part).detach()
        delta = torch.zeros_like(base, requires_grad=True)
        del linear._parameters[part]
        setattr(linear, part, base + delta)
        linear(x).square().sum().backward()
        gradients.append(delta.grad)
    assert gradients[0] is not None and bool(gradients[0].any())
    assert torch.equal(*gradients)
