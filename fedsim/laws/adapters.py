"""The laws that every adapter keeps: what it does to features it does by its tensors alone, and it leaves no trace.

An adapter is held against them on a small random ViT and a small random BERT in float64; a backbone that it refuses in one line
is passed over. Every law is a function of a `Scene`, so that other backbones can be gone through too.

Shapes: b samples, D features, S sources, K clients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core.config import ModelConfig, TransformConfig
from fedsim.core.contracts import Adapter, Slots
from fedsim.core.errors import ModelError
from fedsim.core.messages import Tensors
from fedsim.core.tensors import matching, without_prefix
from fedsim.laws.comparing import expect_bits, expect_close, expect_unchanged
from fedsim.laws.frame import Law, LawBroken
from fedsim.models import backbone as backbones
from fedsim.models import transform
from fedsim.models.adapters import full
from fedsim.models.backbone import Backbone
from fedsim.models.model import ADAPTER, Model

CLASSES = 4
CLOSE = 1e-10  # of features of about 1, in float64
EFFECT = 1e-4  # that trained tensors have at least
LENGTHS = (3, 7, 5)  # tokens of the texts in a batch
SIZES: Mapping[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
BACKBONES: Mapping[str, Mapping[str, Any]] = {
    "vit": {
        "model_type": "vit", **SIZES, "image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_act": "gelu", "qkv_bias": True,
        "layer_norm_eps": 1e-6,
    },
    "bert": {"model_type": "bert", **SIZES, "vocab_size": 50, "max_position_embeddings": 12},
}  # fmt: skip
# What `stacked` says where clients cannot share a batch: they are then trained one by one.
ONE_BY_ONE = ("cannot be told apart", "cannot train several clients at once")


@dataclass(frozen=True)
class Scene:
    """A backbone with an adapter, a raw batch, and fresh `adapter.*` tensors, float64. told: why the adapter refuses it."""

    backbone: str
    model: Model
    inputs: Tensors
    fresh: Tensors
    told: str = ""


def random_backbone(layout: Mapping[str, Any]) -> tuple[Backbone, transform.Transform | None]:
    """An encoder in float64, with weights that are large enough for every part to matter, and the transform of its images."""
    loaded = backbones.load(ModelConfig(backbone="random", config=dict(layout)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in loaded.encoder.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    loaded.encoder.double()
    if loaded.kind == "text":
        return loaded, None
    scales = loaded.image_size, loaded.num_channels, loaded.mean, loaded.std
    images = transform.build(TransformConfig(), *scales, torch.device("cpu"))
    return loaded, dataclasses.replace(images, mean=images.mean.double(), std=images.std.double())


_known = cache(lambda name: random_backbone(BACKBONES[name]))


def batch(kind: str, side: int = 8) -> dict[str, Tensor]:
    """Three raw samples: grey images, or texts of 3, 7 and 5 tokens that are padded on the right."""
    generator = torch.Generator().manual_seed(2)
    if kind == "image":
        return {"pixel_values": torch.randint(0, 256, (len(LENGTHS), side, side), dtype=torch.uint8, generator=generator)}
    mask = torch.tensor([[1] * n + [0] * (max(LENGTHS) - n) for n in LENGTHS])
    return {"input_ids": torch.randint(3, 50, mask.shape, generator=generator) * mask, "attention_mask": mask}


def scene_of(name: str, model: Model, inputs: Tensors) -> Scene:
    """With fresh tensors, or with what the adapter says against this backbone."""
    try:
        fresh = {n: t.double() for n, t in model.init_adapter(torch.Generator().manual_seed(0)).items()}
    except ModelError as e:
        return Scene(name, model, inputs, {}, str(e))
    return Scene(name, model, inputs, fresh)


def scenes(adapter: Adapter) -> Iterator[Scene]:
    """Those backbones that it takes. Raises LawBroken where there is none, or a refusal is not one line."""
    refused = []
    for name in BACKBONES:
        backbone, images = deepcopy(_known(name))
        scene = scene_of(name, Model(backbone, adapter, CLASSES, torch.device("cpu"), images), batch(backbone.kind))
        if not scene.told:
            yield scene
        elif "\n" in scene.told:
            raise LawBroken(f"{name}: it is refused in more than one line: {scene.told!r}")
        else:
            refused.append(f"{name}: {scene.told}")
    if len(refused) == len(BACKBONES):
        raise LawBroken(f"it takes no backbone; {'; '.join(refused)}")


def moved(tensors: Tensors, seed: int) -> dict[str, Tensor]:
    """The tensors as after training, nothing being where it began."""
    generator = torch.Generator().manual_seed(seed)
    return {n: t + 0.3 * torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in tensors.items()}


@torch.no_grad()
def features(model: Model, inputs: Tensors, params: Tensors | None = None, lean: bool = False) -> Tensor:
    """(b, D) with an adapter's tensors, or without an adapter."""
    if params is None:
        return model.features(inputs)
    with model.applied(params):
        return model.features(inputs, lean=lean)


# ---------------------------------------------------------------- the laws, one backbone at a time


def fresh(scene: Scene) -> None:
    """Fresh tensors change nothing."""
    bare = features(scene.model, scene.inputs)
    _expect(features(scene.model, scene.inputs, scene.fresh), bare, f"{scene.backbone}, with a fresh adapter against none")


def gradients(scene: Scene) -> None:
    """Moved tensors change the features, and a gradient reaches each of them."""
    if not scene.fresh:
        return
    bare, away = features(scene.model, scene.inputs), {n: t.requires_grad_() for n, t in moved(scene.fresh, 4).items()}
    with scene.model.applied(away):
        out, query = scene.model.asked(scene.inputs)
    own_term = scene.model.loss(away, query)
    change = float((out.detach() - bare).abs().max())
    if not change > EFFECT:
        raise LawBroken(f"{scene.backbone}: trained tensors move the features by {change:.2g} at most: it has no effect")
    moved_by = (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)).sum()
    (moved_by if own_term is None else moved_by + own_term).backward()  # type: ignore[no-untyped-call]
    idle = matching(away, scene.model.frozen(away))
    for name, tensor in away.items():
        if name in idle:
            continue
        if tensor.grad is None or not bool(tensor.grad.any()):
            raise LawBroken(f"{scene.backbone}: '{name}' gets no gradient")
        if not bool(torch.isfinite(tensor.grad).all()):
            raise LawBroken(f"{scene.backbone}: the gradient of '{name}' is not finite")


@torch.no_grad()
def merged(scene: Scene) -> None:
    """`merged` gives what `applied` gives."""
    params = moved(scene.fresh, 4)
    applied = features(scene.model, scene.inputs, params)
    with scene.model.merged(params):
        _expect(scene.model.features(scene.inputs), applied, f"{scene.backbone}, merged against applied")


def stacked(scene: Scene) -> bool:
    """Two clients in one batch, the second with a sample less, have the features that each has alone. False where the adapter
    says that they cannot share a batch."""
    own = [moved(scene.fresh, seed) for seed in (4, 6)]
    together = {n: torch.stack([params[n] for params in own]) for n in scene.fresh}
    count = len(next(iter(scene.inputs.values())))
    slots = Slots(count, (count, count - 1))
    try:
        with torch.no_grad(), scene.model.stacked(together, slots):
            doubled = {n: torch.cat([t, t]) for n, t in scene.inputs.items()}
            got = scene.model.stacked_features(doubled, slots, [torch.Generator()] * 2)
    except ModelError as e:
        if any(reason in str(e) for reason in ONE_BY_ONE):
            return False
        raise
    want = [features(scene.model, scene.inputs, params) for params in own]
    rows = 2 * count - 1  # the last row only fills the slot
    _expect(got[:rows], torch.cat(want)[:rows], f"{scene.backbone}, two clients in one batch against one by one")
    return True


def padding(scene: Scene) -> None:
    """A text's features do not depend on how long the other texts of its batch are."""
    if "attention_mask" not in scene.inputs:
        return
    params = moved(scene.fresh, 4)
    together = features(scene.model, scene.inputs, params)
    for i, length in enumerate(LENGTHS):
        alone = features(scene.model, {n: t[i : i + 1, :length] for n, t in scene.inputs.items()}, params)
        _expect(alone[0], together[i], f"{scene.backbone}, text {i} alone against padded")


def untouched(scene: Scene) -> None:
    """Nothing is left in the encoder: by `applied` and `merged`, by an error on the way."""
    encoder, params = scene.model.backbone.encoder, moved(scene.fresh, 4)
    before = traces(encoder)
    for opened in (scene.model.applied, scene.model.merged):
        for fails in (False, True):
            _pass_through(opened, scene, params, fails)
            after = traces(encoder)
            left = [name for name in before if after.get(name) != before[name]]
            if left or after.keys() != before.keys():
                what = left[0] if left else f"{min(after.keys() ^ before.keys())}"
                when = "an error in" if fails else "a pass through"
                raise LawBroken(f"{scene.backbone}: '{what}' of the encoder is another one after {when} '{opened.__name__}'")


@torch.no_grad()
def _pass_through(opened: Callable[[Tensors], Any], scene: Scene, params: Tensors, fails: bool) -> None:
    try:
        with opened(params):
            scene.model.features(scene.inputs)
            if fails:
                raise InterruptedError
    except InterruptedError:
        pass


def traces(encoder: nn.Module) -> dict[str, Any]:
    """All that an adapter could leave behind: weights with their storage, hooks, attributes, the attention function."""
    config: Any = encoder.config
    left: dict[str, Any] = {"attention": config._attn_implementation}
    for name, module in encoder.named_modules():
        left[f"{name} hooks"] = len(module._forward_hooks) + len(module._forward_pre_hooks)
        left[f"{name} attributes"] = sorted(module.__dict__)
        for key, p in module._parameters.items():
            left[f"{name}.{key}"] = None if p is None else (id(p), p.data_ptr(), p.detach().numpy().tobytes())
    return left


def deterministic(scene: Scene) -> None:
    """The same tensors give the same bits; in training, the same generator the same dropout."""
    params = moved(scene.fresh, 4)
    first, again = (features(scene.model, scene.inputs, params) for _ in range(2))
    expect_bits({"features": again}, {"features": first}, f"{scene.backbone}, applied twice")
    first, again = (_in_training(scene, params) for _ in range(2))
    expect_bits({"features": again}, {"features": first}, f"{scene.backbone}, applied twice in training")


@torch.no_grad()
def _in_training(scene: Scene, params: Tensors) -> Tensor:
    with scene.model.applied(params, torch.Generator().manual_seed(7)):
        return scene.model.features(scene.inputs)


def no_mutation(scene: Scene) -> None:
    """Tensors that go in are as they were."""
    params = moved(scene.fresh, 4)
    before = deepcopy(params)
    for opened in (scene.model.applied, scene.model.merged):
        _pass_through(opened, scene, params, False)
        expect_unchanged({"tensors": params}, {"tensors": before}, f"{scene.backbone}, {opened.__name__}")


def lean(scene: Scene) -> None:
    """Where blocks may leave out tokens on which no feature depends, features are the same."""
    params = moved(scene.fresh, 4)
    want, got = (features(scene.model, scene.inputs, params, lean) for lean in (False, True))
    _expect(got, want, f"{scene.backbone}, with tokens left out")


def affine(scene: Scene) -> None:
    """An adapter that says so has features that are affine in its tensors."""
    if "affine features" not in scene.model.adapter.traits.gives:
        return
    one, other = moved(scene.fresh, 4), moved(scene.fresh, 6)
    beyond = {n: 2 * t - other[n] for n, t in one.items()}
    want = 2 * features(scene.model, scene.inputs, one) - features(scene.model, scene.inputs, other)
    _expect(features(scene.model, scene.inputs, beyond), want, f"{scene.backbone}, 2a − b against twice a's features minus b's")


def sources(scene: Scene) -> None:
    """Tensors with an axis of sources give each one's features, to the same bits whatever the others are."""
    if "composes modules" not in scene.model.adapter.traits.gives:
        return
    first, second, third = (moved(scene.fresh, seed) for seed in (4, 6, 8))
    pairs = [{n: torch.stack([t, other[n]]) for n, t in first.items()} for other in (second, third)]
    one, another = (features(scene.model, scene.inputs, pair) for pair in pairs)
    if one.dim() != 3 or one.shape[1] != 2:
        raise LawBroken(f"{scene.backbone}: features of two sources are {tuple(one.shape)}, not (b, 2, D)")
    expect_bits({"features": another[:, 0]}, {"features": one[:, 0]}, f"{scene.backbone}, a source beside another one")
    _expect(one[:, 0], features(scene.model, scene.inputs, first), f"{scene.backbone}, a source among two against alone")


@torch.no_grad()
def weights(scene: Scene) -> None:
    """The bare backbone with the weights that stand for the module, if any do, gives what `merged` gives; and they are the
    backbone's own plus `changes`."""
    backbone, params = scene.model.backbone, moved(scene.fresh, 4)
    own = {n: t.detach().clone() for n, t in backbone.encoder.named_parameters()}
    found = scene.model.adapter.weights(backbone, without_prefix(params, ADAPTER))
    if found is None:
        return
    if unknown := [n for n in found if n not in own or own[n].shape != found[n].shape]:
        raise LawBroken(
            f"{scene.backbone}: weights gives '{unknown[0]}', which is no tensor of the backbone, or of another shape"
        )
    with full.Adapter().applied(backbone, found):
        got = scene.model.features(scene.inputs)
    with scene.model.merged(params):
        _expect(got, scene.model.features(scene.inputs), f"{scene.backbone}, the backbone with other weights against merged")
    for layer, factors in scene.model.changes(params).items():
        name = f"{layer.removeprefix(ADAPTER)}.weight"
        if name not in found:
            raise LawBroken(f"{scene.backbone}: weights gives no '{name}', which changes")
        change = factors[0] if len(factors) == 1 else factors[0] @ factors[1]
        _expect(found[name], own[name] + change, f"{scene.backbone}, '{name}' against the backbone's plus its change")


@torch.no_grad()
def alone(scene: Scene) -> None:
    """In inference a sample's features do not depend on the others of its batch."""
    params = moved(scene.fresh, 4)
    with scene.model.merged(params):
        together = scene.model.features(scene.inputs)
        for i in range(len(together)):
            by_itself = scene.model.features({n: t[i : i + 1] for n, t in scene.inputs.items()})
            _expect(by_itself[0], together[i], f"{scene.backbone}, sample {i} alone against in a batch")


@torch.no_grad()
def unasked(scene: Scene) -> None:
    """An adapter with queries does nothing to a pass that it is not asked for: so queries are the bare backbone's features."""
    if not scene.model.adapter.queries:
        return
    bare, params = scene.model.query(scene.inputs), moved(scene.fresh, 4)
    for opened in (scene.model.applied, scene.model.merged):
        with opened(params):
            inside = scene.model.query(scene.inputs)
        expect_bits({"features": inside}, {"features": bare}, f"{scene.backbone}, not asked inside '{opened.__name__}'")


def grown(scene: Scene) -> None:
    """What a second task brings is new, comes from the generator alone and can be trained; what was there stays as it is."""
    adapter = scene.model.adapter
    if type(adapter).grown is Adapter.grown:
        return
    plain = deepcopy(scene.model.backbone)
    plain.encoder.float()
    before = {n: t.float() for n, t in without_prefix(scene.fresh, ADAPTER).items()}
    first, again = (adapter.grown(plain, before, torch.Generator().manual_seed(3)) for _ in range(2))
    expect_bits(again, first, f"{scene.backbone}, grown with the same generator")
    expect_bits(
        {n: t for n, t in first.items() if n in before}, before, f"{scene.backbone}, tensors of the first task once grown"
    )
    new = first.keys() - before.keys()
    for name in new:
        if first[name].dtype != torch.float32 or first[name].device.type != "cpu":
            raise LawBroken(f"{scene.backbone}: new '{name}' must be float32 on the CPU")
    if new and new.issubset(matching(first, adapter.frozen(first))):
        raise LawBroken(f"{scene.backbone}: all that a second task brings is frozen: {', '.join(sorted(new))}")
    later = dataclasses.replace(scene, fresh={ADAPTER + n: t.double() for n, t in first.items()})
    for law in (gradients, stacked, alone, lean, deterministic):
        law(later)


def init(scene: Scene) -> None:
    """Fresh tensors are CPU float32, and come from the generator alone."""
    plain = deepcopy(scene.model.backbone)
    plain.encoder.float()
    first, again = (scene.model.adapter.init(plain, torch.Generator().manual_seed(3)) for _ in range(2))
    for name, tensor in first.items():
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise LawBroken(f"{scene.backbone}: fresh '{name}' is {tensor.dtype} on {tensor.device}: float32 on the CPU travels")
        if name.startswith(ADAPTER):
            raise LawBroken(f"{scene.backbone}: '{name}' has the prefix that the model adds")
    expect_bits(again, first, f"{scene.backbone}, fresh tensors of the same generator")


def _expect(got: Tensor, want: Tensor, when: str) -> None:
    expect_close({"features": got}, {"features": want}, when, CLOSE)


def _everywhere(law: Callable[[Scene], object]) -> Callable[[Adapter], None]:
    def check(adapter: Adapter) -> None:
        for scene in scenes(adapter):
            law(scene)

    return check


LAWS: tuple[Law[Adapter], ...] = tuple(
    Law(law.__name__, statement, _everywhere(law))
    for law, statement in (
        (init, "fresh tensors are float32 on the CPU, and come from the generator alone"),
        (fresh, "a fresh adapter changes no feature"),
        (gradients, "moved tensors move the features, and a finite gradient reaches every one of them"),
        (merged, "merged into the backbone, the tensors give the features that they give when applied"),
        (weights, "weights that stand for the module, if any do, give the features that it gives when merged"),
        (stacked, "several clients in one batch have the features that each has alone, if it can train them together"),
        (padding, "a text's features do not depend on its padding"),
        (untouched, "the backbone is as it was, bit for bit, without hooks, after an error too"),
        (deterministic, "the same tensors give the same bits, and the same generator the same dropout"),
        (no_mutation, "tensors that go in are not changed"),
        (alone, "in inference a sample's features do not depend on the others of its batch"),
        (unasked, "an adapter with queries does nothing to a pass that it is not asked for"),
        (grown, "what a second task brings can be trained, comes from the generator alone, and changes nothing that was there"),
        (lean, "features are the same where tokens are left out on which none depends"),
        (affine, "features of an adapter that says so are affine in its tensors"),
        (sources, "sources have the features that each has alone, if it takes several"),
    )
)
