"""Prefix and deep prompts against hand-written float64 computations, with padding."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.core.errors import ConfigError, ModelError
from fedsim.laws.adapters import traces
from fedsim.models import inject
from fedsim.models.adapters import _prompts, prefix, vpt
from fedsim.models.model import Model
from tests.models.zoo import BERT, LENGTHS, VIT, images, model, texts, trained

FAMILIES = [(VIT, images(), "layers"), (BERT, texts(), "encoder.layer")]
NAMES = {"layers": ("attention", "q_proj", "k_proj", "v_proj"), "encoder.layer": ("attention.self", "query", "key", "value")}


def watched(built: Model, inputs: dict[str, Tensor], modules: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """(input, output) of modules in one forward pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = args[0], output[0]

        return hook

    with ExitStack() as stack:
        for name in modules:
            stack.callback(built.backbone.encoder.get_submodule(name).register_forward_hook(note(name)).remove)
        built.features(inputs)
    return seen


def attention_by_hand(module: nn.Module, names: tuple[str, ...], x_LD: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Multi-head attention of one sample without padding, one head and one query at a time, (L, D) before any output layer."""
    q, k, v = (F.linear(x_LD, getattr(module, n).weight, getattr(module, n).bias) for n in names)
    k, v = torch.cat([keys, k]), torch.cat([values, v])
    out = torch.zeros_like(x_LD)
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        for i in range(len(x_LD)):
            scores = torch.stack([(q[i, part] * k[j, part]).sum() for j in range(len(k))]) / 8**0.5
            weights = scores.exp() / scores.exp().sum()
            out[i, part] = sum(w * v[j, part] for j, w in enumerate(weights))
    return out


@pytest.mark.parametrize(("layout", "inputs", "stack"), FAMILIES)
@pytest.mark.parametrize("blocks", ["all", [-1]])
def test_prefix_is_attention_with_more_keys_and_values(
    layout: dict[str, Any], inputs: dict[str, Tensor], stack: str, blocks: Any
) -> None:
    built = model(layout, {"name": "prefix", "length": 3, "blocks": blocks})
    params = trained(built)
    where, *names = NAMES[stack]
    modules = [f"{stack}.{i}.{where}" for i in range(2)]
    with built.applied(params), torch.no_grad():
        seen = watched(built, inputs, modules)
    for i, name in enumerate(modules):
        module = built.backbone.encoder.get_submodule(name)
        none = torch.zeros(0, 16, dtype=torch.float64)
        keys = params.get(f"adapter.{stack}.{i}.prefix_key", none)
        values = params.get(f"adapter.{stack}.{i}.prefix_value", none)
        assert len(keys) == (3 if blocks == "all" or i == 1 else 0)
        x, got = seen[name]
        for sample, tokens in zip(range(3), LENGTHS if stack != "layers" else (5, 5, 5), strict=True):
            want = attention_by_hand(module, tuple(names), x[sample, :tokens], keys, values)
            if stack == "layers":
                want = module.o_proj(want)  # type: ignore[operator]
            assert torch.allclose(got[sample, :tokens], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("blocks", ["all", [1]])
def test_deep_prompts_are_tokens_put_in_and_taken_out_on_vit(blocks: Any) -> None:
    built = model(VIT, {"name": "vpt", "length": 3, "blocks": blocks})
    params = trained(built)
    encoder: Any = built.backbone.encoder
    assert built._transform is not None
    x = encoder.embeddings(built._transform(images()["pixel_values"]).double())
    for i, block in enumerate(encoder.layers):
        if f"adapter.layers.{i}.prompt" in params:
            prompt = params[f"adapter.layers.{i}.prompt"]
            x = block(torch.cat([x[:, :1], torch.stack([prompt] * 3), x[:, 1:]], dim=1))
            x = torch.cat([x[:, :1], x[:, 4:]], dim=1)
        else:
            x = block(x)
    want = encoder.layernorm(x)[:, 0]
    with built.applied(params):
        assert torch.allclose(built.features(images()), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_deep_prompts_on_bert_do_not_see_padding(attention: str) -> None:
    built = model(BERT, {"name": "vpt", "length": 3})
    params, inputs = trained(built), texts()
    encoder: Any = built.backbone.encoder
    encoder.config._attn_implementation = attention
    with built.applied(params):
        got = built.features(inputs)
    for sample, tokens in enumerate(LENGTHS):  # each sentence alone, so that there is nothing to mask
        x = encoder.embeddings(input_ids=inputs["input_ids"][sample : sample + 1, :tokens])
        for i, block in enumerate(encoder.encoder.layer):
            x = block(torch.cat([x[:, :1], params[f"adapter.encoder.layer.{i}.prompt"][None], x[:, 1:]], dim=1))
            x = torch.cat([x[:, :1], x[:, 4:]], dim=1)
        assert torch.allclose(got[sample], x[0].mean(dim=0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["prefix", "vpt"])
@pytest.mark.parametrize(("layout", "inputs", "stack"), FAMILIES)
def test_gradients_are_those_of_finite_differences(
    name: str, layout: dict[str, Any], inputs: dict[str, Tensor], stack: str
) -> None:
    built = model(layout, {"name": name, "length": 2})
    params = {n: t.requires_grad_() for n, t in trained(built).items()}
    with built.applied(params):
        built.features(inputs).square().sum().backward()  # type: ignore[no-untyped-call]
    for tensor in params.values():
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                tensor[1, 3] += step
                with built.applied(params):
                    values.append(built.features(inputs).square().sum().item())
                tensor[1, 3] -= step
        assert tensor.grad is not None
        assert tensor.grad[1, 3].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", ["prefix", "vpt"])
@pytest.mark.parametrize(("layout", "inputs", "stack"), FAMILIES)
def test_everything_comes_off(name: str, layout: dict[str, Any], inputs: dict[str, Tensor], stack: str) -> None:
    built = model(layout, {"name": name, "length": 2}, double=False)
    params, before, bare = trained(built), traces(built.backbone.encoder), built.features(inputs)
    for form in (built.applied, built.merged):
        with form(params):
            assert traces(built.backbone.encoder) != before
            assert not torch.allclose(built.features(inputs), bare)
        assert traces(built.backbone.encoder) == before
        with pytest.raises(RuntimeError, match="in the middle"), form(params):
            raise RuntimeError("in the middle")
        assert traces(built.backbone.encoder) == before
        lost = {n.replace(f"{stack}.1", f"{stack}.7"): t for n, t in params.items()}
        with pytest.raises(ModelError, match=f"no module '{stack}.7'"), form(lost):
            pass
        assert traces(built.backbone.encoder) == before
    assert torch.equal(built.features(inputs), bare)


@pytest.mark.parametrize("name", ["prefix", "vpt"])
def test_fresh_prompts(name: str) -> None:
    built = model(VIT, {"name": name, "length": 50, "blocks": [0], "init_std": 0.1}, double=False)
    fresh, again = (built.init_adapter(torch.Generator().manual_seed(0)) for _ in range(2))
    leaves = ["prefix_key", "prefix_value"] if name == "prefix" else ["prompt"]
    assert list(fresh) == [f"adapter.layers.0.{leaf}" for leaf in leaves]
    for key, tensor in fresh.items():
        assert tensor.shape == (50, 16)
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, again[key])
        assert float(tensor.std()) == pytest.approx(0.1, rel=0.1)
        assert built.layer(key) is built.backbone.encoder.get_submodule("layers.0")


@pytest.mark.parametrize("name", ["prefix", "vpt"])
def test_block_that_is_not_there(name: str) -> None:
    built = model(VIT, {"name": name, "blocks": [0, 2]}, double=False)
    with pytest.raises(ModelError, match=r"names block 2, but the backbone has blocks 0 to 1"):
        built.init_adapter(torch.Generator())


def test_encoder_without_blocks_or_attention_is_refused() -> None:
    built = model(VIT, {"name": "prefix"}, double=False)
    with pytest.raises(ModelError, match=r"block '1' has no attention that takes more keys and values; use the adapter lora"):
        prefix.attention(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), "1")
    with pytest.raises(ModelError, match="Linear has no list of blocks"):
        inject.blocks(nn.Linear(2, 2))
    assert list(inject.blocks(built.backbone.encoder, [-1, 0])) == ["layers.0", "layers.1"]


@pytest.mark.parametrize("cls", [prefix.Adapter, vpt.Adapter])
@pytest.mark.parametrize(
    ("options", "message"),
    [({"length": 0}, "length"), ({"blocks": "some"}, "blocks"), ({"blocks": []}, "blocks"), ({"init_std": -1.0}, "init_std")],
)
def test_options_that_can_never_work(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls(**options)


@pytest.mark.parametrize("additive", [False, True])
def test_widened_masks(additive: bool) -> None:
    seen = torch.tensor([[[[True, True, False]] * 3], [[[True, False, False]] * 3]])
    wide = torch.tensor([[[[True, True, True, True, False]] * 5], [[[True, True, True, False, False]] * 5]])
    if additive:
        seen, wide = (torch.zeros(m.shape).masked_fill(~m, -1e9) for m in (seen, wide))
    assert torch.equal(_prompts.widened(seen, 1, 2, queries=True), wide)
    assert torch.equal(_prompts.widened(seen, 1, 2), wide[..., :3, :])
    assert torch.equal(_prompts.widened(seen[..., :1, :], 1, 2, queries=True), wide[..., :1, :])


def test_prefix_of_a_causal_model_is_seen_by_all_and_hides_nothing() -> None:
    """Without a mask, attention is causal by itself: every query sees the prefix, and of the tokens those up to its own."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64, generator=generator)  # 2 samples, 2 heads, 5 tokens
    keys, values = torch.randn(2, 3, 8, dtype=torch.float64, generator=generator)
    module = nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    module.__dict__[prefix.SLOT] = keys, values
    got, _ = prefix.prefix_attention(module, q, k, v, None, scaling=0.5)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(5)).tolist():
        own = slice(4 * h, 4 * h + 4)
        seen, read = torch.cat([keys[:, own], k[b, h, : i + 1]]), torch.cat([values[:, own], v[b, h, : i + 1]])
        want = (0.5 * seen @ q[b, h, i]).softmax(0) @ read
        assert torch.allclose(got[b, i, h], want, rtol=0, atol=1e-12)


def test_deep_prompts_of_a_causal_model_with_rotary_positions() -> None:
    """Tokens keep their positions and see all prompts, as if these were tokens at the first one's place that nobody hides."""
    from tests.models.families import FAMILIES

    built = model(FAMILIES["llama"].layout, {"name": "vpt", "length": 2}, pooling="mean")
    params, encoder = trained(built), built.backbone.encoder
    ids = torch.tensor([[5, 9, 3, 7]])
    with built.applied(params):
        got = built.features({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    where = torch.tensor([[0, 0, 0, 1, 2, 3]])  # positions of x_1, two prompts, x_2 … x_4
    sees = torch.ones(6, 6, dtype=torch.bool).tril()
    sees[:, :3] = True  # prompts, and x_1, which is before all of them
    x = encoder.embed_tokens(ids)  # type: ignore[operator]
    rotation = encoder.rotary_emb(x, where)  # type: ignore[operator]
    for i, block in enumerate(encoder.layers):  # type: ignore[arg-type]
        x = torch.cat([x[:, :1], params[f"adapter.layers.{i}.prompt"][None], x[:, 1:]], dim=1)
        x = block(x, attention_mask=sees[None, None], position_embeddings=rotation)
        x = torch.cat([x[:, :1], x[:, 3:]], dim=1)
    assert torch.allclose(got, encoder.norm(x).mean(dim=1), rtol=0, atol=1e-12)  # type: ignore[operator]
