"""Our plain ViT beside transformers' own: the same weights under the same names, the same bits, and nothing else is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from fedsim.core import hardware
from fedsim.core.config import ModelConfig, RuntimeConfig
from fedsim.core.errors import ModelError
from fedsim.models import backbone, vit
from fedsim.models.adapters import lora, prefix, vpt
from fedsim.models.backbone import Backbone
from fedsim.models.pretrained import OMNIGLOT_VIT

SMALL: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40, "image_size": 12,
    "patch_size": 4, "num_channels": 3, "layer_norm_eps": 1e-6,
}  # fmt: skip


@pytest.fixture(params=["embedded", "no bias", "classifier"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Folders with a plain ViT: the embedded one, and others as `save_pretrained` writes them."""
    if request.param == "embedded":
        return OMNIGLOT_VIT
    torch.manual_seed(3)
    layout = ViTConfig(**SMALL, qkv_bias=request.param != "no bias")
    network: Any = ViTModel(layout) if request.param == "no bias" else ViTForImageClassification(layout)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(tmp_path)
    return tmp_path


def both(folder: Path) -> tuple[nn.Module, nn.Module]:
    """Ours and transformers', in evaluation mode."""
    ours = vit.load(folder)
    assert ours is not None
    theirs: Any = ViTModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
    return ours.eval().requires_grad_(False), theirs.eval().requires_grad_(False)


def pixels(encoder: nn.Module, count: int) -> Tensor:
    layout: Any = encoder.config
    side = layout.image_size
    return torch.randn(count, layout.num_channels, side, side, generator=torch.Generator().manual_seed(count))


def test_tensors_have_the_names_and_values_of_transformers(folder: Path) -> None:
    ours, theirs = (encoder.state_dict() for encoder in both(folder))
    assert list(ours) == list(theirs)
    assert all(ours[n].dtype == torch.float32 and torch.equal(ours[n], theirs[n]) for n in theirs)


@pytest.mark.parametrize("adapter", [None, lora.Adapter(targets="all-linear", rank=2), prefix.Adapter(), vpt.Adapter()])
def test_outputs_and_gradients_have_the_bits_of_transformers(folder: Path, adapter: Any) -> None:
    outputs, gradients = [], []
    for encoder in both(folder):
        layout: Any = encoder.config
        body = Backbone(encoder, layout.hidden_size, "image", "cls")
        tensors: dict[str, Tensor] = {} if adapter is None else adapter.init(body, torch.Generator().manual_seed(1))
        for n, t in tensors.items():
            tensors[n] = torch.randn(t.shape, generator=torch.Generator().manual_seed(len(n))).requires_grad_()
        x = pixels(encoder, 5).requires_grad_()
        with nullcontext() if adapter is None else adapter.applied(body, tensors):
            outputs.append(body.image_features(x))
        outputs[-1].square().sum().backward()  # type: ignore[no-untyped-call]
        gradients.append([x.grad, *(t.grad for t in tensors.values())])
    assert torch.equal(*outputs)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        told = json.loads((folder / "config.json").read_text())
        change(told)
        (folder / "config.json").write_text(json.dumps(told))

    return edit


def with_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


OTHERS: dict[str, Callable[[Path], object]] = {
    "another architecture": edited(lambda told: told.update(model_type="deit")),
    "another activation": edited(lambda told: told.update(hidden_act="relu")),
    "a size that is not told": edited(lambda told: told.pop("layer_norm_eps")),
    "oblong images": edited(lambda told: told.update(image_size=[12, 24])),
    "quantised": edited(lambda told: told.update(quantization_config={})),
    "a tensor too few": with_tensors(lambda tensors: tensors.pop("layernorm.bias")),
    "a tensor too many": with_tensors(lambda tensors: tensors.update(extra=torch.zeros(2))),
    "a wrong shape": with_tensors(lambda tensors: tensors.update({"layernorm.bias": torch.zeros(5)})),
    "a damaged file": lambda folder: (folder / "model.safetensors").write_bytes(b"damaged"),
    "a damaged config": lambda folder: (folder / "config.json").write_text("{"),
    "a list as config": lambda folder: (folder / "config.json").write_text("[]"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
}


@pytest.mark.parametrize("other", OTHERS)
def test_anything_else_is_left_to_transformers(tmp_path: Path, other: str) -> None:
    ViTModel(ViTConfig(**SMALL)).save_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    assert vit.load(tmp_path) is not None
    OTHERS[other](tmp_path)
    assert vit.load(tmp_path) is None


def test_a_damaged_preprocessor_is_one_clear_error(tmp_path: Path) -> None:
    ViTModel(ViTConfig(**SMALL)).save_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        backbone.load(ModelConfig(backbone=str(tmp_path)))


def test_images_of_another_size_are_refused() -> None:
    encoder = vit.load(OMNIGLOT_VIT)
    assert encoder is not None
    with pytest.raises(ValueError, match="the backbone takes 28"):
        encoder(pixel_values=torch.zeros(1, 1, 32, 32))


# ---------------------------------------------------------------- without tokens that nobody needs


@pytest.mark.parametrize(
    "adapter",
    [
        lora.Adapter(targets="all-linear", rank=3),
        prefix.Adapter(length=3),
        vpt.Adapter(length=3),
    ],
    ids=["lora", "prefix", "vpt"],
)
def test_the_last_block_may_leave_out_what_the_class_token_does_not_need(adapter: Any) -> None:
    """Features and gradients, in float64."""
    encoder, _ = both(OMNIGLOT_VIT)
    bones = Backbone(encoder.double(), 128, "image", "cls", lean=True)
    draw = torch.Generator().manual_seed(5)
    tensors = {
        n: (0.1 * torch.randn(t.shape, generator=draw)).double().requires_grad_()
        for n, t in adapter.init(bones, torch.Generator().manual_seed(0)).items()
    }
    x, found, seen = pixels(encoder, 4).double(), [], list[int]()
    fc2 = encoder.get_submodule("layers.5.mlp.fc2")
    for lean in (False, True):
        hook = fc2.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
        with adapter.applied(bones, tensors):
            features = bones.image_features(x, lean=lean)
        hook.remove()
        weight = torch.linspace(-1, 1, features.numel(), dtype=torch.float64).view_as(features)
        found.append((features, torch.autograd.grad((features * weight).sum(), list(tensors.values()))))
    assert seen[0] >= 17 and seen[1] == 1
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


def test_lean_is_for_our_encoder_its_class_token_and_kernels_that_round_anew(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    embedded = backbone.load(ModelConfig())
    if hardware.onednn_product() is not None:
        assert backbone.prepared(embedded, RuntimeConfig(kernels="onednn"), cpu).lean
    assert not backbone.prepared(backbone.load(ModelConfig()), RuntimeConfig(kernels="torch"), cpu).lean
    mean = backbone.load(ModelConfig(pooling="mean"))
    assert not backbone.prepared(mean, RuntimeConfig(kernels="auto"), cpu).lean
    x = pixels(mean.encoder, 2)
    assert torch.equal(mean.image_features(x, lean=True), mean.image_features(x))
