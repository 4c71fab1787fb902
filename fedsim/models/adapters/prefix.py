"""Prefix prompts: trainable keys and values in the attention of chosen blocks (Li & Liang, 2021, arXiv:2101.00190;
for continual learning with vision transformers: DualPrompt, Wang et al., 2022, arXiv:2204.04799)."""

# b samples, h heads, L tokens, P prompts, e head width, D = h·e, K clients

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedsim.core import contracts
from fedsim.core.contracts import BackboneLike, Slots
from fedsim.core.messages import Tensors
from fedsim.models import inject
from fedsim.models.adapters import _prompts

KEY, VALUE = ".prefix_key", ".prefix_value"
ATTENTION = "fedsim_prefix"  # our name in transformers' table of attention functions
SLOT = "_fedsim_prefix"  # attribute of an attention module that holds its (keys, values) while an adapter is applied
KEY_LAYERS = ("k_proj", "key", "k_lin", "k")
FUSED_LAYERS = ("Wqkv", "c_attn")  # queries, keys and values in one product, of one width each


@dataclass(frozen=True)
class Adapter(contracts.Adapter):
    """`softmax(Q [K_p; K]ᵀ / √e) [V_p; V]` in each chosen block, K_p and V_p (P, D) being trained, for all samples the same.

    A fresh prompt is random and changes the outputs: prompts take part in the softmax whatever their values are.
    Padding stays masked, prompts are visible to every token, in causal models too; they have no position (a bias of 0).
    Works on encoders whose blocks have one attention each, through transformers' attention interface; others are refused.

    length: P; blocks: "all", or indices (negative ones count from the end); init_std: of the normal start of keys and values.
    """

    exempt: ClassVar[Mapping[str, str]] = {"fresh": "prompts take part in the softmax, whatever their values are"}
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"length": 2}, {"length": 3, "blocks": [1]})
    lean: ClassVar[bool] = True
    length: int = 10
    blocks: Any = "all"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        _prompts.check_options(self.length, self.blocks, self.init_std)

    def init(self, backbone: BackboneLike, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh `<block>.prefix_key` and `<block>.prefix_value` (P, D). Raises ModelError if a block has no such attention."""
        tensors: dict[str, Tensor] = {}
        for name in _prompts.blocks("prefix", backbone.encoder, self.blocks):
            _, width = attention(backbone.encoder, name)
            for part in (KEY, VALUE):
                tensors[name + part] = _prompts.normal(self.length, width, self.init_std, generator)
        return tensors

    def applied(
        self, backbone: BackboneLike, tensors: Tensors, dropout: torch.Generator | None = None
    ) -> AbstractContextManager[None]:
        """Attention with the prefixes that the tensors name, while open."""
        names = [n.removesuffix(KEY) for n in tensors if n.endswith(KEY)]
        return attending(backbone.encoder, {name: (tensors[name + KEY], tensors[name + VALUE]) for name in names})

    def stacked(self, backbone: BackboneLike, tensors: Tensors, slots: Slots) -> AbstractContextManager[None]:
        """Every sample's attention gets the prefixes of its client, from tensors (K, P, D)."""
        return self.applied(backbone, tensors)


@contextmanager
def attending(encoder: nn.Module, prefixes: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """While open, attention in these blocks has these keys and values before its own: (P, D) each for all samples, or (K, P, D),
    the k-th for the k-th of K equal parts of the batch, which may be single samples."""
    if not prefixes:
        yield
        return
    _register()
    config: Any = encoder.config
    before, changed = config._attn_implementation, []
    try:
        config._attn_implementation = ATTENTION
        for name, prefix in prefixes.items():
            module, _ = attention(encoder, name)
            module.__dict__[SLOT] = prefix
            changed.append(module)
        yield
    finally:
        config._attn_implementation = before
        for module in changed:
            del module.__dict__[SLOT]


def prefix_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' scaled-dot-product attention, with the module's prefix before keys (b, h, L, e) and values if it has one."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    prefix = module.__dict__.get(SLOT)
    if prefix is not None:
        causal = options.get("is_causal")
        if attention_mask is None and (module.is_causal if causal is None else causal) and query.shape[2] > 1:
            attention_mask = _prompts.causal_mask(query.shape[2], key.shape[2], query.device)
        key, value = (torch.cat([_heads(p.to(kv.dtype), kv), kv], dim=2) for p, kv in zip(prefix, (key, value), strict=True))
        if attention_mask is not None:
            attention_mask = _prompts.widened(attention_mask, 0, prefix[0].shape[-2])
        if options.get("position_bias") is not None:
            options["position_bias"] = _prompts.widened(options["position_bias"], 0, prefix[0].shape[-2])
    out: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
    return out, None


def _heads(prefix: Tensor, like_bhLe: Tensor) -> Tensor:
    """(P, D) or (K, P, D) as (b, h, P, e)."""
    b, h, _, e = like_bhLe.shape
    if prefix.dim() == 2:
        return prefix.view(-1, h, e).transpose(0, 1).expand(b, -1, -1, -1)
    return _prompts.per_sample(prefix, b).view(b, -1, h, e).transpose(1, 2)


def attention(encoder: nn.Module, name: str, adapter: str = "prefix") -> tuple[nn.Module, int]:
    """The self-attention module of a block and the width of its keys. Raises ModelError, which
    names the adapter, if it takes no prefixes."""
    modules = _prompts.attention_of(inject.submodule(encoder, name))
    for child in KEY_LAYERS + FUSED_LAYERS if len(modules) == 1 else ():
        layer = getattr(modules[0], child, None)
        if isinstance(layer, nn.Linear):
            return modules[0], layer.out_features // (3 if child in FUSED_LAYERS else 1)
    has = (
        "no attention that takes",
        "an attention of unknown layout, and no place for",
        "several attentions, and no one place for",
    )
    raise _prompts.refuse(adapter, encoder, f"block '{name}' has {has[min(len(modules), 2)]} more keys and values")


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, prefix_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
