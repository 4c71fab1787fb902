"""À-la-carte prompts: a computation by hand in float64, who sees whom, and sources whose bits do not depend on the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.core import config as configs
from fedsim.core import hardware
from fedsim.core.config import RuntimeConfig, SimConfig
from fedsim.core.contracts import Slots
from fedsim.core.errors import ConfigError, ModelError
from fedsim.laws.adapters import traces
from fedsim.models import inject
from fedsim.models import model as models
from fedsim.models.adapters import apt
from fedsim.models.heads import mixture
from fedsim.models.model import Model
from tests.models.zoo import BERT, VIT, images, model, trained

DEEP = VIT | {"num_hidden_layers": 4}
OPTIONS: list[dict[str, Any]] = [{}, {"share": 1.0}, {"memory": 0}, {"blocks": [-1]}, {"blocks": [1, 3], "memory": 2}]
KERNELS = ["torch", pytest.param("onednn", marks=pytest.mark.skipif(hardware.onednn_product() is None, reason="no oneDNN"))]
SUBSETS = [[0], [4], [4, 0], [5, 3, 1], [5, 4, 3, 2, 1, 0], [2, 2, 2]]


def omniglot(kernels: str = "torch", pooling: str = "auto", **options: Any) -> Model:
    """The embedded backbone, which is our own ViT, as a run prepares it."""
    config = SimConfig(
        adapter={"name": "apt", **options}, head={"name": "mixture"}, runtime=RuntimeConfig(kernels=kernels, device="cpu")
    )
    return models.build(config, num_classes=4)


def drawings(count: int = 5) -> dict[str, Tensor]:
    return images(count, 28, 28)


def real_drawings(count: int = 40) -> dict[str, Tensor]:
    split = configs.build("sources", {"source": "omniglot"}).load().test
    every = len(split) // count
    return {"pixel_values": torch.from_numpy(split.inputs["pixel_values"][::every][:count].copy())}


def stacked(built: Model, count: int = 6) -> dict[str, Tensor]:
    """Sources in which nothing is zero."""
    each = [trained(built, seed) for seed in range(count)]
    return {n: torch.stack([source[n] for source in each]) for n in each[0]}


def chosen(tensors: dict[str, Tensor], sources: Sequence[int]) -> dict[str, Tensor]:
    return {n: t[list(sources)] for n, t in tensors.items()}


@torch.inference_mode()
def evaluated(built: Model, tensors: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """Features as evaluation computes them."""
    with built.merged(tensors):
        return built.features(inputs, lean=True)


def of_image(built: Model, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What comes out of every block for the tokens of the image."""
    seen: list[Tensor] = []
    blocks = inject.blocks(built.backbone.encoder).values()
    keep = [lambda b=b: b.register_forward_hook(lambda m, args, out: seen.append(out)) for b in blocks]
    with inject.installed(keep):
        built.features(inputs)
    return seen


def by_hand(built: Model, params: dict[str, Tensor], share: float) -> Tensor:
    """The features, one sample, head and key at a time, from the states of the bare backbone."""
    encoder: Any = built.backbone.encoder
    assert built._transform is not None
    states = [encoder.embeddings(built._transform(images()["pixel_values"]).double()), *of_image(built, images())]
    named = sorted({int(n.split(".")[2]) for n in params})
    features = []
    for sample in range(3):
        p = states[named[0]][sample, 0]
        for i, block in list(enumerate(encoder.layers))[named[0] :]:
            p = p + params[f"adapter.layers.{i}.apt_prompt"][0] if i in named else p
            memory = params.get(f"adapter.layers.{i}.apt_memory", torch.zeros(0, 16, dtype=torch.float64))
            tokens = [block.layernorm_before(t) for t in (*states[i][sample, 1:], p, *memory)]
            counts = [1.0] * (len(tokens) - len(memory)) + [share] * len(memory)
            attention, read = block.attention, torch.zeros_like(p)
            query = attention.q_proj(block.layernorm_before(p))
            for part in (slice(0, 8), slice(8, 16)):
                scores = [(query[part] * attention.k_proj(t)[part]).sum() / 8**0.5 for t in tokens]
                weights = torch.stack([n * s.exp() for n, s in zip(counts, scores, strict=True)])
                read[part] = weights / weights.sum() @ torch.stack([attention.v_proj(t)[part] for t in tokens])
            p = p + attention.o_proj(read)
            p = p + block.mlp(block.layernorm_after(p))
        features.append(encoder.layernorm(p))
    return torch.stack(features)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_features_are_those_of_a_computation_by_hand(options: dict[str, Any]) -> None:
    built = model(DEEP, {"name": "apt", **options})
    params = trained(built)
    with torch.no_grad(), built.applied(params):
        got = built.features(images())
    assert torch.allclose(got, by_hand(built, params, options.get("share", 0.05)), rtol=0, atol=1e-12)


# ---------------------------------------------------------------- who sees whom


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_images_stream_is_the_backbones_own(kernels: str) -> None:
    built = omniglot(kernels)
    bare = of_image(built, drawings())
    assert len(bare) == 6
    for tensors in (trained(built), stacked(built)):
        for form in (built.applied, built.merged):
            with form(tensors):
                assert all(torch.equal(a, b) for a, b in zip(of_image(built, drawings()), bare, strict=True))


@pytest.mark.parametrize("layout", [DEEP, DEEP | {"model_type": "deit"}], ids=["vit", "deit"])
def test_the_images_stream_is_the_backbones_own_in_transformers(layout: dict[str, Any]) -> None:
    built = model(layout, {"name": "apt"}, double=False)
    bare = of_image(built, images())
    with built.applied(stacked(built)):
        assert all(torch.equal(a, b) for a, b in zip(of_image(built, images()), bare, strict=True))
        assert built.features(images()).shape == (3, 6, 16)


def test_gradients_stay_with_their_source() -> None:
    built = model(DEEP, {"name": "apt", "memory": 2})
    params = {n: t.requires_grad_() for n, t in stacked(built, 3).items()}
    with built.applied(params):
        built.features(images())[:, 1].square().sum().backward()  # type: ignore[no-untyped-call]
    for name, tensor in params.items():
        assert tensor.grad is not None
        assert not tensor.grad[[0, 2]].any()
        assert (tensor.grad[1].abs() > 1e-9).all(), name
    assert all(p.grad is None for p in built.backbone.encoder.parameters())


@pytest.mark.parametrize("kernels", KERNELS)
def test_gradients_reach_prompts_and_memories_through_the_kernels_of_a_run(kernels: str) -> None:
    built = omniglot(kernels)
    params = {n: t.requires_grad_() for n, t in trained(built).items()}
    with built.applied(params):
        built.features(drawings(), lean=True)[:, 7].sum().backward()  # type: ignore[no-untyped-call]
    assert len(params) == 12
    assert all(t.grad is not None and bool(torch.isfinite(t.grad).all() and t.grad.any()) for t in params.values())
    assert all(p.grad is None for p in built.backbone.encoder.parameters())


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_gradients_are_those_of_finite_differences(options: dict[str, Any]) -> None:
    built = model(VIT, {"name": "apt", **options})
    params = {n: t.requires_grad_() for n, t in trained(built).items()}
    with built.applied(params):
        built.features(images()).square().sum().mul(0.1).sin().backward()  # type: ignore[no-untyped-call]
    for tensor in params.values():
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                tensor[-1, 3] += step
                with built.applied(params):
                    values.append(built.features(images()).square().sum().mul(0.1).sin().item())
                tensor[-1, 3] -= step
        assert tensor.grad is not None
        assert tensor.grad[-1, 3].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-8)


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("options", [{}, {"blocks": [2, 5], "memory": 3}], ids=str)
def test_a_sources_features_have_the_same_bits_whoever_else_is_there(kernels: str, options: dict[str, Any]) -> None:
    built = omniglot(kernels, **options)
    every, inputs = stacked(built), drawings(7)
    want = evaluated(built, every, inputs)
    assert want.shape == (7, 6, 128)
    assert len({tuple(f.flatten().tolist()) for f in want.unbind(1)}) == 6
    for sources in SUBSETS:
        assert torch.equal(evaluated(built, chosen(every, sources), inputs), want[:, sources])
    for s in range(6):
        alone = {n: t[s] for n, t in every.items()}
        assert torch.equal(evaluated(built, alone, inputs), want[:, s])


def test_sources_are_the_same_bits_on_widths_that_fill_no_vector() -> None:
    """Slices of the stacked tensors start at odd places in memory here."""
    layout = DEEP | {"hidden_size": 15, "num_attention_heads": 3, "intermediate_size": 21}
    built = model(layout, {"name": "apt", "memory": 1}, double=False)
    every = stacked(built)
    want = evaluated(built, every, images())
    for sources in SUBSETS:
        assert torch.equal(evaluated(built, chosen(every, sources), images()), want[:, sources])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("weighting", ["prototypes", "uniform"])
def test_a_removed_source_leaves_the_logits_of_the_others(kernels: str, weighting: str) -> None:
    built, inputs = omniglot(kernels), drawings(7)
    every = stacked(built)
    draw = torch.Generator().manual_seed(0)
    every |= {
        "head.weight": torch.randn(6, 9, 128, generator=draw),
        "head.bias": torch.randn(6, 9, generator=draw),
        "head.count": torch.randint(0, 3, (6, 9), generator=draw).float() + torch.eye(6, 9),
    }
    if weighting == "prototypes":
        every |= {"head.prototypes": torch.randn(6, 9, 128, generator=draw), "head.scale": torch.rand(6, generator=draw) * 30}
    features = evaluated(built, every, inputs)
    parts = mixture.source_log_probabilities(features, every), mixture.source_weights(features, every)
    for sources in SUBSETS:
        fewer = chosen(every, sources)
        again = evaluated(built, fewer, inputs)
        assert torch.equal(mixture.source_log_probabilities(again, fewer), parts[0][:, sources])
        assert torch.equal(mixture.source_weights(again, fewer), parts[1][:, sources])
    order = [3, 0, 5, 1, 4, 2]
    mixed, permuted = (built.logits(evaluated(built, t, inputs), t).exp() for t in (every, chosen(every, order)))
    assert torch.allclose(mixed, permuted, rtol=1e-4, atol=1e-6)
    assert torch.allclose(mixed.sum(dim=1), torch.ones(7), atol=1e-4)


# ---------------------------------------------------------------- a fresh source


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_fresh_source_without_memory_has_the_class_tokens_feature(pooling: str) -> None:
    built = model(DEEP, {"name": "apt", "memory": 0, "blocks": [1, 2]}, pooling=pooling)
    encoder: Any = built.backbone.encoder
    class_token = encoder.layernorm(of_image(built, images())[-1][:, 0])
    with built.applied(built.init_adapter(torch.Generator())):
        assert torch.allclose(built.features(images()), class_token, rtol=0, atol=1e-12)


def test_a_fresh_source_with_memory_is_near_the_class_tokens_feature() -> None:
    """On drawings and the embedded backbone; memories that count like tokens of the image push it far away."""
    near, inputs = [], real_drawings()
    for share in (0.05, 1.0):
        built = omniglot(share=share)
        with torch.no_grad():
            bare = built.features(inputs)
            with built.applied(built.init_adapter(torch.Generator().manual_seed(0))):
                near.append(torch.cosine_similarity(built.features(inputs), bare).mean().item())
    assert near[0] > 0.95
    assert near[1] < 0.8


def test_fresh_tensors() -> None:
    built = model(DEEP, {"name": "apt", "memory": 40, "blocks": [1, -1], "init_std": 0.1}, double=False)
    fresh, again = (built.init_adapter(torch.Generator().manual_seed(0)) for _ in range(2))
    names = [f"adapter.layers.{i}.apt_{kind}" for i in (1, 3) for kind in ("prompt", "memory")]
    assert list(fresh) == names
    for name, tensor in fresh.items():
        assert torch.equal(tensor, again[name])
        assert tensor.dtype == torch.float32
        assert tensor.shape == (1 if name.endswith("prompt") else 40, 16)
        assert float(tensor.std() if len(tensor) > 1 else tensor.abs().max()) == pytest.approx(
            0.1 if len(tensor) > 1 else 0.0, rel=0.1
        )
        assert built.layer(name) is built.backbone.encoder.get_submodule(name.split("adapter.")[1].rpartition(".")[0])
    assert built.untouched_blocks(fresh) == 1


# ---------------------------------------------------------------- as an adapter among others


def test_blocks_below_the_first_prompt_may_be_kept() -> None:
    built = omniglot(blocks=[4, 5])
    params, inputs = trained(built), drawings()
    assert built.untouched_blocks(params) == 4
    assert built.enterable(inputs)
    with torch.no_grad():
        states = built.lower_states(inputs, 4)
        with built.applied(params):
            want = built.features(inputs)
            for lean in (False, True):
                assert torch.allclose(built.upper_asked(inputs, states, 4, lean).features, want, rtol=0, atol=1e-5)


def test_clients_side_by_side_get_what_each_gets_alone() -> None:
    built = model(DEEP, {"name": "apt", "blocks": [1, 3]})
    every, inputs = stacked(built, 2), images(6)
    with torch.no_grad():
        with built.stacked(every, Slots(3, (3, 3))):
            together = built.features(inputs)
        for k in range(2):
            with built.applied({n: t[k] for n, t in every.items()}):
                own = built.features({"pixel_values": inputs["pixel_values"][3 * k : 3 * k + 3]})
            assert torch.allclose(together[3 * k : 3 * k + 3], own, rtol=0, atol=1e-12)


def test_half_precision_in_and_float32_out() -> None:
    built = model(DEEP, {"name": "apt"}, double=False)
    params = trained(built)
    with torch.no_grad(), built.applied(params):
        whole = built.features(images())
        built.backbone.encoder.bfloat16()
        half = built.backbone.encoder(pixel_values=built._transform(images()["pixel_values"]).bfloat16()).last_hidden_state
    assert half.dtype == torch.bfloat16
    assert torch.cosine_similarity(half[:, 0].float(), whole).min() > 0.99


@pytest.mark.parametrize("several", [False, True])
def test_everything_comes_off(several: bool) -> None:
    built = model(DEEP, {"name": "apt"}, double=False)
    params, before, bare = (
        stacked(built) if several else trained(built),
        traces(built.backbone.encoder),
        built.features(images()),
    )
    for form in (built.applied, built.merged):
        with form(params):
            assert traces(built.backbone.encoder) != before
            assert built.features(images()).shape == ((3, 6, 16) if several else (3, 16))
        assert traces(built.backbone.encoder) == before
        with pytest.raises(RuntimeError, match="in the middle"), form(params):
            raise RuntimeError("in the middle")
        assert traces(built.backbone.encoder) == before
        lost = {n.replace("layers.1", "layers.7"): t for n, t in params.items()}
        with pytest.raises(ModelError, match=r"no module 'layers\.7'"), form(lost):
            pass
        assert traces(built.backbone.encoder) == before
    assert torch.equal(built.features(images()), bare)
    with built.applied({}):
        assert torch.equal(built.features(images()), bare)


def test_a_backbone_that_is_no_plain_vit_is_refused() -> None:
    for layout in (BERT, {**VIT, "model_type": "beit"}):
        built = model(layout, {"name": "apt"}, double=False)
        with pytest.raises(ModelError, match=rf"a '{layout['model_type']}': use the adapter lora"):
            built.init_adapter(torch.Generator())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"memory": -1}, "memory"), ({"share": 0.0}, "share"), ({"share": 1.5}, "share"), ({"blocks": "some"}, "blocks"),
     ({"blocks": []}, "blocks"), ({"init_std": -1.0}, "init_std")],
)  # fmt: skip
def test_options_that_can_never_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apt.Adapter(**options)
