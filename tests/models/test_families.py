"""Families of encoders: features against transformers' own models, whole checkpoints, image sizes, layers that are linear."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedsim import simulation
from fedsim.core import hardware
from fedsim.core.config import ModelConfig, RuntimeConfig, SimConfig
from fedsim.core.errors import ModelError
from fedsim.models import backbone as backbones
from fedsim.models import inject, layers, pretrained
from fedsim.models import model as models
from fedsim.models.adapters import lora
from fedsim.models.backbone import Backbone
from tests.models.families import FAMILIES, SIDE, TEXT_LENGTHS, VOCABULARY, Family, batch
from tests.tiny import tiny

EVERY = pytest.mark.parametrize("name", FAMILIES)
IMAGES = [n for n, family in FAMILIES.items() if family.kind == "image"]
TEXTS = [n for n, family in FAMILIES.items() if family.kind == "text"]


def layout_of(name: str, **changes: Any) -> Any:
    """transformers' config of a family."""
    return transformers.AutoConfig.for_model(**{**FAMILIES[name].layout, **changes})


def drawn(model: Any) -> Any:
    """The model with random weights that are large enough for every part to matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        for n, b in model.named_buffers():
            if n.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, generator=generator) * 0.3)
    return model.eval().requires_grad_(False)


def whole(cls: str, name: str, folder: Path, **changes: Any) -> Any:
    """A random model of that class of transformers, saved to the folder."""
    model = drawn(getattr(transformers, cls)(layout_of(name, **changes)))
    model.save_pretrained(folder)
    return model


def loaded(source: Path | str, **options: Any) -> Backbone:
    return backbones.load(ModelConfig(backbone=str(source), **options))


def random(name: str, **options: Any) -> Backbone:
    return loaded("random", config=FAMILIES[name].layout, **options)


def pixels(side: int = SIDE) -> Tensor:
    return torch.randn(3, 1, side, side, generator=torch.Generator().manual_seed(5))


def features(bones: Backbone, inputs: Any = None) -> Tensor:
    if bones.kind == "image":
        return bones.image_features(pixels() if inputs is None else inputs)
    return bones.text_features(batch(FAMILIES["bert"]) if inputs is None else inputs)


def close(got: Tensor, want: Tensor) -> None:
    assert float(want.detach().std()) > 1e-3
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1.0, float(want.detach().abs().max())))


# ---------------------------------------------------------------- every family


@EVERY
def test_features(name: str) -> None:
    family: Family = FAMILIES[name]
    config = SimConfig(model=ModelConfig(backbone="random", config=family.layout), adapter={"name": "none"})
    built = models.build(config, num_classes=4)
    bones = built.backbone
    assert (bones.kind, bones.pooling, bones.width) == (family.kind, family.pooling, family.width)
    assert not any(p.requires_grad for p in bones.encoder.parameters())
    drawn(bones.encoder)
    inputs = batch(family)
    got = built.features(inputs)
    assert got.shape == (3, family.width)
    assert bool(torch.isfinite(got).all())
    assert torch.equal(built.features(inputs), got)
    close(torch.cat([built.features({k: v[i : i + 1] for k, v in inputs.items()}) for i in range(3)]), got)  # each for itself
    assert not torch.allclose(got[0], got[1])


@pytest.mark.parametrize("name", TEXTS)
def test_features_of_texts_do_not_depend_on_padding(name: str) -> None:
    bones, inputs = random(name), batch(FAMILIES[name])
    drawn(bones.encoder)
    got = features(bones, inputs)
    alone = [features(bones, {k: v[i : i + 1, :n] for k, v in inputs.items()}) for i, n in enumerate(TEXT_LENGTHS)]
    close(got, torch.cat(alone))


@EVERY
def test_all_linear_layers_are_called(name: str) -> None:
    """A low-rank path beside a layer whose weight is only read would do nothing in training and something when merged."""
    bones, called = random(name), set[str]()
    for n in inject.linear_names(bones.encoder):
        inject.linear(bones.encoder, n).register_forward_hook(lambda *_, n=n: called.add(n))  # type: ignore[misc]
    features(bones, None if bones.kind == "image" else batch(FAMILIES[name]))
    assert called == set(inject.linear_names(bones.encoder))


@pytest.mark.skipif(hardware.onednn_product() is None, reason="this build of torch has no such operator")
@EVERY
def test_lora_under_onednn(name: str) -> None:
    """Forward and backward as with torch's products: in 29 models of transformers an operation in place follows a layer."""
    found = []
    for kernel in ("torch", "onednn"):
        config = SimConfig(
            model=ModelConfig(backbone="random", config=FAMILIES[name].layout),
            adapter={"name": "lora", "rank": 1, "targets": "all-linear"},
            runtime=RuntimeConfig(kernels=kernel, device="cpu"),
        )
        built = models.build(config, num_classes=4)
        generator = torch.Generator().manual_seed(1)
        fresh = built.init_adapter(generator)
        params = {n: (torch.randn(t.shape, generator=generator) * 0.1).requires_grad_() for n, t in fresh.items()}
        with built.applied(params):
            out = built.features(batch(FAMILIES[name]))
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), list(params.values()))])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * max(1.0, float(theirs.abs().max())))


# ---------------------------------------------------------------- checkpoints of whole models, against their own logits

CHECKPOINTS: dict[str, tuple[str, Callable[[Any, Any], Tensor], Callable[[Any, Tensor], Tensor]]] = {
    # class, what the whole model makes of inputs, the same from our features
    **{
        family: (f"{cls}ForImageClassification", lambda m, x: m(pixel_values=x).logits, lambda m, h: m.classifier(h))
        for family, cls in (
            ("vit", "ViT"), ("deit", "DeiT"), ("beit", "Beit"), ("vit_msn", "ViTMSN"), ("swin", "Swin"), ("swinv2", "Swinv2"),
            ("resnet", "ResNet"), ("convnext", "ConvNext"), ("convnextv2", "ConvNextV2"),
        )
    },
    **{
        family: (f"{cls}ForSequenceClassification", lambda m, x: m(**x).logits, lambda m, h: m.score(h))
        for family, cls in (("gpt2", "GPT2"), ("opt", "OPT"), ("llama", "Llama"), ("qwen3", "Qwen3"))
    },
    **{
        family: (f"{cls}ForMaskedLM", lambda m, x: mean(m.base_model(**x).last_hidden_state, x), lambda m, h: h)
        for family, cls in (
            ("bert", "Bert"), ("roberta", "Roberta"), ("distilbert", "DistilBert"), ("electra", "Electra"), ("albert", "Albert"),
            ("mpnet", "MPNet"), ("deberta_v2", "DebertaV2"), ("modernbert", "ModernBert"),
        )
    },
    "dinov2": ("Dinov2Model", lambda m, x: m(pixel_values=x).pooler_output, lambda m, h: h),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", lambda m, x: m(pixel_values=x).pooler_output, lambda m, h: h),
    "yolos": ("YolosForObjectDetection", lambda m, x: m.vit(x).last_hidden_state[:, 0], lambda m, h: h),
    "t5": ("T5ForConditionalGeneration", lambda m, x: mean(m.encoder(**x).last_hidden_state, x), lambda m, h: h),
    "xlnet": ("XLNetLMHeadModel", lambda m, x: last(m.transformer(**x).last_hidden_state), lambda m, h: h),
    "mamba": ("MambaForCausalLM", lambda m, x: last(m.backbone(**x).last_hidden_state), lambda m, h: h),
}  # fmt: skip


def mean(states_bLD: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    weight = inputs["attention_mask"].unsqueeze(-1).float()
    return (states_bLD * weight).sum(1) / weight.sum(1)


def last(states_bLD: Tensor) -> Tensor:
    return torch.stack([states_bLD[i, n - 1] for i, n in enumerate(TEXT_LENGTHS)])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_of_a_whole_model_gives_the_features_that_it_publishes(name: str, tmp_path: Path) -> None:
    cls, of_the_model, of_features = CHECKPOINTS[name]
    changes = {"pad_token_id": 0} if cls.endswith("SequenceClassification") else {}
    model = whole(cls, name, tmp_path, **changes)
    inputs = pixels() if FAMILIES[name].kind == "image" else batch(FAMILIES[name])
    got = loaded(tmp_path)
    assert (got.pooling, got.width) == (FAMILIES[name].pooling, FAMILIES[name].width)
    close(of_features(model, features(got, inputs)), of_the_model(model, inputs))


TOWERS = {
    "clip": ("CLIP", "clip_vision"),
    "siglip": ("Siglip", "siglip_vision"),
    "chinese_clip": ("ChineseCLIP", "clip_vision"),
}


def two_towers(name: str, folder: Path) -> Any:
    prefix, vision = TOWERS[name]
    sizes = {k: v for k, v in FAMILIES["bert"].layout.items() if k != "model_type"}
    text = {**sizes, "eos_token_id": 2, "pad_token_id": 0, "projection_size": 16}
    config = getattr(transformers, f"{prefix}Config")(
        text_config=text, vision_config={k: v for k, v in FAMILIES[vision].layout.items() if k != "model_type"}, projection_dim=8
    )
    model = drawn(getattr(transformers, f"{prefix}Model")(config))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", TOWERS)
def test_vision_tower_of_a_checkpoint_of_two(name: str, tmp_path: Path) -> None:
    """The features are what the published image embedding is made of; the file has the names of the hub's, with its prefixes."""
    model, x = two_towers(name, tmp_path), pixels()
    assert any(n.startswith("vision_model.encoder.layers.0.") for n in load_file(tmp_path / "model.safetensors"))
    got = loaded(tmp_path)
    embedded = model.get_image_features(pixel_values=x).pooler_output
    close(features(got, x) if name == "siglip" else model.visual_projection(features(got, x)), embedded)
    assert not any("text" in n for n, _ in got.encoder.named_parameters())


@pytest.mark.parametrize("name", TOWERS)
def test_vision_tower_with_a_tensor_that_is_missing(name: str, tmp_path: Path) -> None:
    two_towers(name, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    kept = {n: t for n, t in tensors.items() if not n.startswith("text_model.encoder.layers.1.")}
    save_file(kept, file, metadata={"format": "pt"})
    loaded(tmp_path)  # nothing of the text tower is asked for
    gone = next(n for n in kept if n.startswith("vision_model.encoder.layers.1."))
    save_file({n: t for n, t in kept.items() if n != gone}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensor\(s\) are missing, the first is 'encoder\.layers\.1\."):
        loaded(tmp_path)


def test_siglip_without_its_head_has_no_layers_of_it() -> None:
    bones = random("siglip_vision", pooling="mean")
    assert not any(n.startswith("head") for n, _ in bones.encoder.named_modules())
    close(features(bones), bones.encoder(pixel_values=pixels()).last_hidden_state.mean(1))


@pytest.mark.parametrize("name", ["mt5", "umt5", "bart"])
def test_encoder_of_an_encoder_with_a_decoder(name: str, tmp_path: Path) -> None:
    changes = {"model_type": name}
    if name == "bart":
        changes = {
            "model_type": "bart", "d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 12,
            "vocab_size": 50,
        }  # fmt: skip
    layout = transformers.AutoConfig.for_model(**({} if name == "bart" else FAMILIES["t5"].layout) | changes)
    model = drawn(transformers.AutoModelForSeq2SeqLM.from_config(layout))
    model.save_pretrained(tmp_path)
    got, inputs = loaded(tmp_path), batch(FAMILIES["bert"])
    assert (got.pooling, got.width) == ("mean", 16)
    close(features(got, inputs), mean(model.get_encoder()(**inputs).last_hidden_state, inputs))
    assert not any("decoder" in n for n, _ in got.encoder.named_parameters())


def test_checkpoint_of_an_encoder_alone(tmp_path: Path) -> None:
    """As sentence encoders made of T5 are published: no tensor of a decoder is asked for."""
    model, inputs = whole("T5EncoderModel", "t5", tmp_path), batch(FAMILIES["t5"])
    close(features(loaded(tmp_path), inputs), mean(model(**inputs).last_hidden_state, inputs))


# ---------------------------------------------------------------- pooling


@pytest.mark.parametrize(
    ("name", "patches"),
    [
        ("deit", slice(2, None)), ("yolos", slice(1, 17)), ("dinov2_with_registers", slice(4, None)), ("vit", slice(1, None)),
        ("clip_vision", slice(1, None)),
    ],
)  # fmt: skip
def test_the_mean_is_over_patches_alone(name: str, patches: slice) -> None:
    bones = random(name, pooling="mean")
    drawn(bones.encoder)
    tokens: Tensor = bones.encoder(pixel_values=pixels()).last_hidden_state
    assert tokens[:, patches].shape[1] == (SIDE // 4) ** 2
    close(features(bones), tokens[:, patches].mean(1))


@pytest.mark.parametrize("name", ["resnet", "convnext"])
def test_the_mean_is_over_places(name: str) -> None:
    bones = random(name, pooling="mean")
    states: Tensor = drawn(bones.encoder)(pixel_values=pixels()).last_hidden_state
    assert states.shape[1] == bones.width == 16
    close(features(bones), states.flatten(2).mean(2))


def test_the_last_token_is_the_last_one_in_the_mask_on_either_side_of_the_padding() -> None:
    bones, inputs = random("llama"), batch(FAMILIES["llama"])
    left = {k: torch.stack([row.roll(len(row) - n) for row, n in zip(v, TEXT_LENGTHS, strict=True)]) for k, v in inputs.items()}
    close(features(bones, left), features(bones, inputs))


@pytest.mark.parametrize(
    ("name", "pooling", "message"),
    [
        ("vit", "last", "model.pooling is last, which is for text"),
        ("gpt2", "cls", "whose first token sees no other: use last or mean"),
        ("swin", "cls", "has no class token: use mean"),
        ("resnet", "cls", "has no class token: use mean"),
    ],
)
def test_pooling_that_a_family_has_not(name: str, pooling: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        random(name, pooling=pooling)


def test_a_decoder_that_sees_both_ways_is_an_encoder() -> None:
    layout = {**FAMILIES["llama"].layout, "is_causal": False}
    assert loaded("random", config=layout).pooling == "mean"
    assert loaded("random", config={**FAMILIES["bert"].layout, "is_decoder": True}).pooling == "last"


@pytest.mark.parametrize("cls", ["ViTMAEModel", "ViTMAEForPreTraining"])
def test_vit_mae_is_a_plain_vit_that_hides_no_patch(cls: str, tmp_path: Path) -> None:
    decoder = {f"decoder_{k}": v for k, v in (("hidden_size", 8), ("num_hidden_layers", 1), ("num_attention_heads", 2))}
    model = whole(cls, "vit_mae", tmp_path, mask_ratio=0.0, **decoder)
    encoder = model if cls == "ViTMAEModel" else model.vit
    want = encoder(pixels(), noise=torch.arange(16.0).expand(3, -1)).last_hidden_state  # the order of the patches is kept
    torch.manual_seed(3)
    for source in (tmp_path, _without(tmp_path, "qkv_bias")):  # as a plain ViT, and by transformers
        close(features(loaded(source)), want[:, 0])
        close(features(loaded(source, pooling="mean")), want[:, 1:].mean(1))


def _without(folder: Path, key: str) -> Path:
    """The folder with a config that leaves something to transformers' defaults."""
    plain = json.loads((folder / "config.json").read_text())
    del plain[key]
    (folder / "config.json").write_text(json.dumps(plain))
    return folder


# ---------------------------------------------------------------- image sizes


RESIZABLE = ["vit", "deit", "dinov2", "dinov2_with_registers", "vit_msn", "vit_mae", "clip_vision", "siglip_vision"]


@pytest.mark.parametrize("side", [8, 24])
@pytest.mark.parametrize("name", RESIZABLE)
def test_image_size_has_the_bits_of_interpolation_in_every_step(name: str, side: int, tmp_path: Path) -> None:
    bones = random(name, image_size=side)
    small: Any = random(name).encoder
    options = {} if name.startswith("dinov2") else {"interpolate_pos_encoding": True}
    want = small(pixel_values=pixels(side), **options).last_hidden_state
    assert torch.equal(bones.encoder(pixel_values=pixels(side)).last_hidden_state, want)
    assert (bones.image_size, bones.width) == ((side, side), 16)


def test_image_size_of_the_plain_vit_is_that_of_transformers(tmp_path: Path) -> None:
    whole("ViTModel", "vit", tmp_path)
    plain = loaded(tmp_path, image_size=24)
    assert type(plain.encoder).__module__ == "fedsim.models.vit"
    theirs = transformers.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False)
    want = theirs(pixel_values=pixels(24), interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(plain.encoder(pixel_values=pixels(24)).last_hidden_state, want)
    assert torch.equal(features(loaded(tmp_path, image_size=SIDE)), features(loaded(tmp_path)))  # its own size changes nothing


@pytest.mark.parametrize("name", ["swin", "swinv2", "resnet", "convnext"])
def test_image_size_without_positions(name: str) -> None:
    bones = random(name, image_size=32)
    assert bones.image_size == (32, 32)
    close(features(bones, pixels(32)), features(random(name), pixels(32)))


def test_image_size_of_a_convolution_is_the_preprocessor_s(tmp_path: Path) -> None:
    whole("ResNetModel", "resnet", tmp_path)
    plain = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in plain.items() if k != "image_size"}))
    assert loaded(tmp_path).image_size == (224, 224)
    for told, side in (({"crop_size": {"height": 12, "width": 12}, "size": {"shortest_edge": 14}}, 12), ({"size": 14}, 14)):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
        assert loaded(tmp_path).image_size == (side, side)
    assert loaded(tmp_path, image_size=20).image_size == (20, 20)


@pytest.mark.parametrize(
    ("name", "side", "message"),
    [
        ("vit", 18, "model.image_size 18 is not a multiple of the backbone's patches of 4 pixels"),
        ("beit", 24, "positions of a BeitModel .* are no table that can be interpolated"),
        ("yolos", 24, "positions of a YolosModel .* are no table that can be interpolated"),
        ("bert", 24, "model.image_size is for images"),
    ],
)
def test_image_size_that_a_family_cannot_take(name: str, side: int, message: str) -> None:
    layout = {**FAMILIES[name].layout, **({"use_relative_position_bias": True} if name == "beit" else {})}
    with pytest.raises(ModelError, match=message) as e:
        loaded("random", config=layout, image_size=side)
    assert "\n" not in str(e.value)


# ---------------------------------------------------------------- layers that are linear


@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_layers_that_are_linear_under_another_name_compute_the_same(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(pretrained.RANDOM_WEIGHTS_SEED)
        theirs: Any = drawn(transformers.AutoModel.from_config(layout_of(name)))
    inputs = {"pixel_values": pixels()} if name == "resnet" else batch(FAMILIES[name])
    want = theirs(**inputs).last_hidden_state
    linear = len(inject.linear_names(theirs))
    layers.as_linear(theirs)
    assert len(inject.linear_names(theirs)) > linear == 0
    close(theirs(**inputs).last_hidden_state, want)


def test_pointwise_convolutions_are_linear_and_no_others_are() -> None:
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(1))
    kinds: dict[str, nn.Conv2d] = {
        "plain": nn.Conv2d(3, 6, 1), "strided": nn.Conv2d(3, 6, 1, stride=(2, 3), bias=False),
        "grouped": nn.Conv2d(3, 6, 1, groups=3), "wide": nn.Conv2d(3, 6, 3), "padded": nn.Conv2d(3, 6, 1, padding=1),
    }  # fmt: skip
    encoder = nn.ModuleDict({**kinds, "patch_embeddings": nn.Conv2d(3, 6, 1)})
    layers.as_linear(encoder)
    assert inject.linear_names(encoder) == ["plain.linear", "strided.linear"]
    for name, convolution in kinds.items():
        close(encoder[name](x), convolution(x))


def test_lora_in_convolutions() -> None:
    """Against one convolution of W + s B A in its place."""
    config = SimConfig(
        model=ModelConfig(backbone="random", config=FAMILIES["resnet"].layout),
        adapter={"name": "lora", "rank": 2, "targets": "all-linear"},
    )
    built = models.build(config, 4)
    drawn(built.backbone.encoder)
    generator = torch.Generator().manual_seed(3)
    fresh = built.init_adapter(generator)
    params = {n: torch.randn(t.shape, generator=generator) * 0.3 for n, t in fresh.items()}
    assert len(params) == 2 * len(inject.linear_names(built.backbone.encoder)) > 0
    with built.applied(params):
        got = built.features(batch(FAMILIES["resnet"]))
    bare = built.features(batch(FAMILIES["resnet"]))
    with torch.no_grad():
        for n, layer in inject.match_linear(built.backbone.encoder, "all-linear").items():
            layer.weight += params[f"adapter.{n}.lora_B"] @ params[f"adapter.{n}.lora_A"]
    close(got, built.features(batch(FAMILIES["resnet"])))
    assert not torch.allclose(got, bare)
    with pytest.raises(ModelError, match="is a Conv2d, not a linear layer or a convolution of 1 × 1"):
        inject.linear(built.backbone.encoder, "embedder.embedder.convolution")


def test_all_linear_leaves_out_layers_that_are_too_small_and_says_so() -> None:
    layout = {**FAMILIES["mamba"].layout, "state_size": 1}  # x_proj has 1 + 2 outputs, one of them the rank of the time steps
    config = SimConfig(
        model=ModelConfig(backbone="random", config=layout), adapter={"name": "lora", "rank": 4, "targets": "all-linear"}
    )
    built = models.build(config, 4)
    fresh = built.init_adapter(torch.Generator())
    assert {n.split(".mixer.")[1].partition(".")[0] for n in fresh} == {"in_proj", "out_proj"}
    (note,) = built.adapter.notes(built.backbone)
    assert note == "adapter.targets all-linear leaves out layers that are too small for rank 4: layers.*.mixer.x_proj"
    named = lora.Adapter(rank=4, targets=["x_proj"])
    with pytest.raises(ModelError, match=r"adapter.rank 4 is larger than layer 'layers.0.mixer.x_proj' \(32 inputs, 3 outputs\)"):
        named.init(built.backbone, torch.Generator())
    with pytest.raises(ModelError, match="use at most 16"):
        lora.Adapter(rank=33, targets="all-linear").init(built.backbone, torch.Generator())
    assert lora.Adapter(rank=2, targets="all-linear").notes(built.backbone) == ()


# ---------------------------------------------------------------- from a folder to numbers


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_a_stream_is_trained_on_a_checkpoint(name: str, tmp_path: Path) -> None:
    """Encoder of T5 with LoRA in q and v as LoRM has it; CLIP's tower at another image size."""
    if name == "t5":
        whole("T5ForConditionalGeneration", "t5", tmp_path / "checkpoint")
        data = {"kind": "tokens", "vocab": VOCABULARY, "length": 8}
        model, targets = {}, ["q", "v"]
    else:
        two_towers("clip", tmp_path / "checkpoint")
        data, model, targets = {}, {"image_size": 8}, ["q_proj", "v_proj"]
    config = tiny(
        data={"source": "synthetic", "classes": 4, "train_per_class": 16, "test_per_class": 8, "image_size": 8, **data},
        partition={"name": "dirichlet", "alpha": 5.0, "clients": 2},
        model={"backbone": str(tmp_path / "checkpoint"), "config": None, **model},
        adapter={"name": "lora", "rank": 2, "targets": targets},
        client={"epochs": 6, "batch_size": 8, "lr": 3e-2},
        runtime={"pool": "serial", "device": "cpu", "output": str(tmp_path / "runs")},
    )
    assert simulation.run(config).accuracy[0, 0] > 75  # of two classes


# ---------------------------------------------------------------- families whose outputs hold more than they seem to

ODD: dict[str, dict[str, Any]] = {
    "dinov3_convnext": {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "image_size": 32},
    "aimv2_vision_model": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 32,
        "patch_size": 16,
    },
    "hiera": {"embed_dim": 8, "image_size": [64, 64], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
    "cvt": {"image_size": 32, "embed_dim": [8, 8, 16], "depth": [1, 2, 3], "num_heads": [1, 1, 2]},
    "mobilenet_v1": {"image_size": 32, "depth_multiplier": 0.25},
    "pvt_v2": {
        "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 2], "image_size": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_families_of_many_stages_and_heads_of_their_own(name: str) -> None:
    """`auto` is what the encoder publishes, `mean` is over places or patches and nothing else, and there is no class token."""
    published, plain = (loaded("random", config={"model_type": name, **ODD[name]}, pooling=p) for p in ("auto", "mean"))
    if name != "mobilenet_v1":  # so many layers of such weights explode
        drawn(published.encoder), drawn(plain.encoder)
    x = torch.randn(2, 3, *published.image_size, generator=torch.Generator().manual_seed(2))
    out: Any = published.encoder(pixel_values=x)
    pooled = getattr(out, "pooler_output", None)
    if pooled is not None:
        torch.testing.assert_close(published.image_features(x), pooled.flatten(1))
    states: Tensor = plain.encoder(pixel_values=x).last_hidden_state
    assert plain.width == 256 if name == "mobilenet_v1" else 16
    if name == "dinov3_convnext":
        states = states[:, 1:]
    torch.testing.assert_close(plain.image_features(x), states.mean((2, 3)) if states.dim() == 4 else states.mean(1))
    with pytest.raises(ModelError, match="has no class token"):
        loaded("random", config={"model_type": name, **ODD[name]}, pooling="cls")
