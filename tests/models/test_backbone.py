"""Where backbones come from, what they compute, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LayoutLMConfig, LayoutLMModel

from fedsim.core.config import ModelConfig, SimConfig, TransformConfig
from fedsim.core.errors import ModelError
from fedsim.models import backbone, pretrained, timm_names
from fedsim.models import model as models
from tests.models.zoo import BERT, LENGTHS, VIT, images, model, texts


def config(source: str | Path, **options: Any) -> ModelConfig:
    return ModelConfig(backbone=str(source), **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A ViT as `save_pretrained` writes it, in float16."""
    path = tmp_path / "vit"
    encoder: Any = backbone.load(config("random", config=VIT)).encoder
    encoder.half().save_pretrained(path)
    return path


def timm_file(
    path: Path, width: int = 128, depth: int = 2, patch: int = 2, channels: int = 1, side: int = 3, bias: bool = True
) -> Path:
    g = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width), "pos_embed": (1, 1 + side * side, width), "head.weight": (5, width), "head.bias": (5,),
        "patch_embed.proj.weight": (width, channels, patch, patch), "patch_embed.proj.bias": (width,),
        "norm.weight": (width,), "norm.bias": (width,),
    }  # fmt: skip
    for i in range(depth):
        for layer, rows, cols in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 40, width),
            ("mlp.fc2", width, 40),
        ):
            shapes |= {f"blocks.{i}.{layer}.weight": (rows, cols), f"blocks.{i}.{layer}.bias": (rows,)}
        shapes |= {f"blocks.{i}.norm{k}.{leaf}": (width,) for k in (1, 2) for leaf in ("weight", "bias")}
    if not bias:
        shapes = {n: s for n, s in shapes.items() if not n.endswith("qkv.bias")}
    save_file({n: (torch.randn(s, generator=g) * 0.2).half() for n, s in shapes.items()}, path)
    return path


def timm_forward(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The class token of timm's VisionTransformer.forward_features, written from its definition; width 64 per head."""
    patch = w["patch_embed.proj.weight"]
    x = F.conv2d(x, patch, w["patch_embed.proj.bias"], stride=patch.shape[-1]).flatten(2).transpose(1, 2)
    b, width = len(x), x.shape[-1]
    x = torch.cat([w["cls_token"].expand(b, -1, -1), x], dim=1) + w["pos_embed"]

    def norm(name: str, z: Tensor) -> Tensor:
        centred = z - z.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def layer(name: str, z: Tensor) -> Tensor:
        y = z @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    i = 0
    while f"blocks.{i}.norm1.weight" in w:
        block = f"blocks.{i}"
        q, k, v = layer(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).reshape(b, -1, 3, width // 64, 64).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.transpose(-1, -2)) / 8).softmax(-1) @ v
        x = x + layer(f"{block}.attn.proj", mixed.transpose(1, 2).reshape(b, -1, width))
        hidden = layer(f"{block}.mlp.fc1", norm(f"{block}.norm2", x))
        x = x + layer(f"{block}.mlp.fc2", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))
        i += 1
    return norm("norm", x)[:, 0]


def test_random_weights_are_the_same_in_every_process_and_leave_the_global_generator_alone() -> None:
    torch.random.manual_seed(11)
    state = torch.random.get_rng_state()
    first = backbone.load(config("random", config=VIT)).encoder.state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.random.manual_seed(12)
    second = backbone.load(config("random", config=VIT)).encoder.state_dict()
    assert all(torch.equal(t, second[n]) for n, t in first.items())
    assert first["layers.0.mlp.fc1.weight"].std() > 0.01
    assert abs(float(first["layers.0.mlp.fc1.weight"].mean())) < 0.01


def test_the_digest_is_of_the_weights_as_they_lie_in_the_file(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    found = backbone.load(config(folder), hashed=True)
    by_hand = hashlib.sha256()
    for name, tensor in sorted(found.encoder.state_dict().items()):
        by_hand.update(f"{name} torch.float32 {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    assert found.digest.partition(".")[0] == by_hand.hexdigest()
    assert backbone.load(config(folder)).digest == ""
    other = tmp_path / "elsewhere"
    shutil.copytree(folder, other)
    larger = backbone.load(config(other, image_size=2 * found.image_size[0]), hashed=True)
    assert larger.digest == found.digest, "wherever they lie, and before positions are interpolated"
    name = next(n for n in tensors if "weight" in n)
    save_file({**tensors, name: tensors[name].flip(0).contiguous()}, other / "model.safetensors", metadata={"format": "pt"})
    changed = backbone.load(config(other), hashed=True).digest
    assert changed.partition(".")[0] != found.digest.partition(".")[0]
    assert changed.partition(".")[2] == found.digest.partition(".")[2]


@pytest.mark.parametrize(
    ("layout", "file", "change"),
    [
        (VIT, "config.json", {"num_attention_heads": 1}),
        (VIT, "config.json", {"layer_norm_eps": 1e-5}),
        (VIT, "preprocessor_config.json", {"image_mean": [0.4]}),
        (VIT, "preprocessor_config.json", {"do_normalize": False}),
        (BERT, "config.json", {"hidden_act": "relu"}),
    ],
)
def test_the_digest_is_of_what_no_weight_tells_too(
    tmp_path: Path, layout: dict[str, Any], file: str, change: dict[str, Any]
) -> None:
    encoder: Any = backbone.load(config("random", config=layout)).encoder
    encoder.save_pretrained(tmp_path)
    weights, _, use = backbone.load(config(tmp_path), hashed=True).digest.partition(".")
    path = tmp_path / file
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **change}))
    same, _, other = backbone.load(config(tmp_path), hashed=True).digest.partition(".")
    assert (same, other == use) == (weights, False)


def test_a_pooler_that_a_checkpoint_lacks_is_the_same_in_every_process(tmp_path: Path) -> None:
    """Of a family that always has one; features do not pass through it."""
    layout = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    made = LayoutLMModel(LayoutLMConfig(**layout))
    made.config.save_pretrained(tmp_path)
    tensors = {n: t for n, t in made.state_dict().items() if "pooler" not in n}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = set[str]()
    for seed in (1, 2):
        torch.random.manual_seed(seed)
        found.add(backbone.load(config(tmp_path), hashed=True).digest)
    assert len(found) == 1


def test_embedded_backbone_loads_frozen() -> None:
    built = models.build(SimConfig(adapter={"name": "none"}), num_classes=7)
    loaded = built.backbone
    assert (loaded.kind, loaded.width, loaded.image_size, loaded.num_channels, loaded.pooling) == (
        "image",
        128,
        (28, 28),
        1,
        "cls",
    )
    assert not loaded.encoder.training
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in loaded.encoder.parameters())
    assert not any("pooler" in n for n, _ in loaded.encoder.named_parameters())
    features = built.features(images(2, 28, 28))
    assert features.shape == (2, 128)
    assert bool(torch.isfinite(features).all())
    assert built.init_adapter(torch.Generator()) == {}
    head = built.init_head()
    assert {n: (tuple(t.shape), float(t.abs().sum())) for n, t in head.items()} == {
        "head.weight": ((7, 128), 0),
        "head.bias": ((7,), 0),
    }


def test_local_folder_gives_the_weights_that_were_saved(folder: Path) -> None:
    saved = backbone.load(config("random", config=VIT)).encoder.state_dict()
    loaded = backbone.load(config(folder))
    assert loaded.tokenizer_source is None
    assert (loaded.mean, loaded.std) == ((0.5,), (0.5,))
    for name, tensor in loaded.encoder.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, saved[name].half().float()), name


def test_normalisation_of_the_preprocessor(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1], "image_std": [0.2]}))
    loaded = backbone.load(config(folder))
    assert (loaded.mean, loaded.std) == ((0.1,), (0.2,))
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "image_mean": [0.1]}))
    assert backbone.load(config(folder)).mean == (0.0,)


def test_bert_checkpoint_with_heads_loads_as_encoder(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    whole = BertForMaskedLM(BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"}))
    whole.save_pretrained(tmp_path)
    loaded = backbone.load(config(tmp_path))
    assert (loaded.kind, loaded.pooling, loaded.width) == ("text", "mean", 16)
    want = whole.bert.state_dict()
    assert all(torch.equal(t, want[n]) for n, t in loaded.encoder.state_dict().items())
    assert pretrained.tokenizer_name(config(tmp_path)) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert pretrained.tokenizer_name(config(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("name", ["random", "omniglot-vit", "some/vit.safetensors"])
def test_backbones_without_a_tokenizer(name: str) -> None:
    assert pretrained.tokenizer_name(config(name, config={"model_type": "vit"} if name == "random" else {})) is None


def test_hub_id_is_its_own_tokenizer() -> None:
    assert pretrained.tokenizer_name(config("google-bert/bert-base-uncased")) == "google-bert/bert-base-uncased"


def test_columns_of_padding_cost_nothing() -> None:
    built, inputs = model(BERT, {"name": "none"}), texts()
    wide = {n: F.pad(t, (0, 30)) for n, t in inputs.items()}  # far beyond the positions that the backbone has
    assert torch.equal(built.features(wide), built.features(inputs))
    empty = {n: torch.zeros_like(t) for n, t in inputs.items()}
    assert bool(torch.isfinite(built.features(empty)).all())


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_text_features_do_not_depend_on_padding(pooling: str) -> None:
    built, inputs = model(BERT, {"name": "none"}, pooling=pooling), texts()
    together = built.features(inputs)
    for i, n in enumerate(LENGTHS):
        alone: Any = built.backbone.encoder(input_ids=inputs["input_ids"][i : i + 1, :n]).last_hidden_state[0]
        want = alone.mean(dim=0) if pooling == "mean" else alone[0]
        assert torch.allclose(together[i], want, rtol=0, atol=1e-12)


def test_image_pooling() -> None:
    built = model(VIT, {"name": "none"}, pooling="mean")
    assert built._transform is not None
    tokens: Any = built.backbone.encoder(pixel_values=built._transform(images()["pixel_values"])).last_hidden_state
    assert tokens.shape == (3, 5, 16)
    assert torch.equal(built.features(images()), tokens[:, 1:].mean(dim=1))


# ---------------------------------------------------------------- timm names


@pytest.mark.parametrize("bias", [True, False])
def test_timm_names_give_timm_features(tmp_path: Path, bias: bool) -> None:
    file = timm_file(tmp_path / "small.safetensors", bias=bias)
    loaded = backbone.load(config(file))
    assert (loaded.width, loaded.image_size, loaded.num_channels, loaded.mean) == (128, (6, 6), 1, (0.5,))
    x = torch.randn(2, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = timm_forward({n: t.double() for n, t in load_file(file).items()}, x)
    loaded.encoder.double()
    assert torch.allclose(loaded.image_features(x), want, rtol=0, atol=1e-11)


def test_a_file_that_does_not_say_how_images_were_normalised_is_spoken_of(tmp_path: Path) -> None:
    """Until transform.mean and transform.std are set; a folder says it itself."""
    file, half = timm_file(tmp_path / "small.safetensors", bias=True), [0.5]
    (note,) = pretrained.notes(config(file), TransformConfig())
    assert note.startswith("model.backbone small.safetensors does not say how its images were normalised")
    assert pretrained.notes(config(file), TransformConfig(mean=half))  # one of the two alone
    assert not pretrained.notes(config(file), TransformConfig(mean=half, std=half))
    assert not pretrained.notes(config("omniglot-vit"), TransformConfig())


def test_deit_tiny_gives_timm_features(shared_data: Callable[[str], Path]) -> None:
    file = shared_data("deit_tiny_patch16_224_fp16.safetensors")
    loaded = backbone.load(config(file))
    assert (loaded.width, loaded.image_size, loaded.mean) == (192, (224, 224), (0.485, 0.456, 0.406))
    assert sum(p.numel() for p in loaded.encoder.parameters()) == 5_717_416 - 1000 * 193
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    want = timm_forward({n: t.float() for n, t in load_file(file).items()}, x)
    assert float(want.std()) > 0.1
    assert torch.allclose(loaded.image_features(x), want, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- refused


def one_line(source: str | Path, **options: Any) -> str:
    with pytest.raises(ModelError) as e:
        backbone.load(config(source, **options))
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 600
    return str(e.value)


def rewritten(file: Path, change: Any) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_missing_folder_and_unreachable_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no folder" in one_line(tmp_path / "nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "'no/such-model', which is neither a folder nor a hub id that can be reached" in one_line("no/such-model")


def test_empty_folder(tmp_path: Path) -> None:
    assert "cannot be loaded from folder" in one_line(tmp_path)


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in one_line(folder)


def test_truncated_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot be loaded from folder" in one_line(folder)


def test_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{not json")
    assert "cannot be loaded from folder" in one_line(folder)


def test_missing_tensor_is_not_drawn_at_random(folder: Path) -> None:
    rewritten(folder / "model.safetensors", lambda t: t.pop(next(n for n in t if n.startswith("encoder.layer.1.output"))))
    assert "1 tensor(s) are missing, the first is 'layers.1.mlp.fc2." in one_line(folder)


def test_tensor_of_another_shape(folder: Path) -> None:
    rewritten(folder / "model.safetensors", lambda t: t.update({"layernorm.weight": torch.zeros(17)}))
    assert "'layernorm.weight' has shape [17], expected [16]" in one_line(folder)


def test_weights_of_another_depth(folder: Path) -> None:
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(plain | {"num_hidden_layers": 3}))
    assert "tensor(s) are missing, the first is 'layers.2." in one_line(folder)


@pytest.mark.parametrize("layout", [{"model_type": "no_such_type"}, VIT | {"hidden_size": "wide"}, {"model_type": "whisper"}])
def test_random_backbone_that_cannot_be_built(layout: dict[str, Any]) -> None:
    one_line("random", config=layout)


def test_class_token_that_is_not_there() -> None:
    swin = {
        "model_type": "swin",
        "image_size": 8,
        "patch_size": 2,
        "num_channels": 1,
        "embed_dim": 8,
        "depths": [1],
        "num_heads": [2],
        "window_size": 2,
    }
    assert backbone.load(config("random", config=swin)).pooling == "mean"
    assert "has no class token: use mean" in one_line("random", config=swin, pooling="cls")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), "it lacks 'layernorm.weight'"),
        (lambda t: t.update({"dist_token": torch.zeros(1, 1, 128)}), "nothing takes"),
        (lambda t: t.update({"blocks.1.norm1.bias": torch.zeros(3)}), "has shape [3], expected [128]"),
        (lambda t: t.pop("pos_embed"), "holds no ViT with timm's names"),
        (lambda t: t.update({"pos_embed": torch.zeros(1, 9, 128)}), "9 positions"),
        (lambda t: t.update({"blocks.4.norm1.bias": torch.zeros(128)}), "it lacks 'layers.2."),
    ],
)
def test_timm_files_that_do_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    file = timm_file(tmp_path / "vit.safetensors")
    rewritten(file, change)
    assert message in one_line(file)


def test_timm_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no file" in one_line(tmp_path / "nowhere.safetensors")
    file = timm_file(tmp_path / "vit.safetensors", width=timm_names.HEAD_DIM)
    file.write_bytes(file.read_bytes()[:-10])
    assert "is damaged" in one_line(file)


def test_batches_that_do_not_fit() -> None:
    vit, bert = model(VIT, {"name": "none"}), model(BERT, {"name": "none"})
    with pytest.raises(ModelError, match="takes images, but the data hold input_ids"):
        vit.features(texts())
    with pytest.raises(ModelError, match="takes text, but the data hold pixel_values"):
        bert.features(images())
    with pytest.raises(ModelError, match="13 tokens do not fit a backbone of 12 positions"):
        bert.features({"input_ids": torch.ones(1, 13, dtype=torch.long)})


def test_layer_of_a_parameter() -> None:
    built = model(VIT, {"name": "none"})
    assert built.layer("adapter.layers.0.mlp.fc1.lora_A") is built.backbone.encoder.get_submodule("layers.0.mlp.fc1")
    for wrong in ("head.weight", "adapter.lora_A", "adapter.layers.0.mlp.fc9.lora_A"):
        with pytest.raises(ModelError):
            built.layer(wrong)
