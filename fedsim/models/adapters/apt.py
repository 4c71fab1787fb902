"""À-la-carte prompts: a token per source with a memory of its own, trained in isolation and composed at inference (APT, Bowman et
al., 2023, "À-la-carte Prompt Tuning: Combining Distinct Data Via Composable Prompting", arXiv:2302.07994)."""

# b samples, L tokens of an image, m memory tokens, h heads, e head width, D = h·e, S sources, K clients

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.core import contracts
from fedsim.core.contracts import BackboneLike, Slots, Traits
from fedsim.core.errors import ConfigError, ModelError
from fedsim.core.messages import Tensors
from fedsim.models import inject
from fedsim.models.adapters import _prompts

PROMPT, MEMORY = ".apt_prompt", ".apt_memory"
KEYS, VALUES = "k_proj", "v_proj"
PLAIN = ("vit", "deit")  # architectures whose blocks are those of `models.vit`, under the same names


@dataclass(frozen=True)
class Adapter(contracts.Adapter):
    """One prompt token per source reads the image beside the frozen class token; its last state is the source's feature.

    Block i takes the prompt's state p on, with a memory M_i (m, D) that is the source's own in this block:
        p ← p + o_i;   n = norm(p);   p ← p + attention(query: n; keys and values: patches, n, norm(M_i));   p ← p + mlp(norm(p))
    p starts as the class token's state in front of the first chosen block. Feature: the final norm of p, (b, D).

    Attention is structured: tokens of the image see neither prompts nor memories, so their stream is the backbone's own, bit for
    bit, and is computed once for all sources; a prompt sees the patches, itself and its own memory, so sources are invisible to
    each other. Tensors with a leading axis of sources give (b, S, D): sources are computed one by one, each with the same bits
    whatever the others are. A source more costs one token per block.

    Trained are o_i (1, D), zero at the start, and M_i: (1 + m)·D numbers per chosen block; a block that is not chosen lets the
    prompt through without. Merged by a rule that averages, it is an ordinary prompt adapter.

    After the paper, as far as its abstract and summaries tell: a token per source, the memory, who sees whom. Ours: the prompt
    starts from the class token's state and stands in its place among the keys; the prompts of blocks are added to what it has
    read so far, which would be lost if they took its place; a memory token counts for little in the beginning (`share`). So the
    feature of a fresh source is the class token's without memory, and near to it with one: from few samples a source does not
    find back from a random start.

    memory: m, 0 for none; share: what a memory token counts for in the softmax beside a token of the image, in (0, 1]: its scores
    are raised by log(share), and training can outweigh that; 1 as published. blocks: "all", or indices (negative ones count from
    the end); init_std: of the normal start of memories. Raises ModelError for a backbone that is no plain ViT.
    """

    exempt: ClassVar[Mapping[str, str]] = {"fresh": "prompts take part in the softmax, whatever their values are"}
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"memory": 2}, {"memory": 0}, {"memory": 1, "share": 1.0, "blocks": [1]})
    lean: ClassVar[bool] = True
    memory: int = 5
    share: float = 0.05
    blocks: Any = "all"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.memory < 0:
            raise ConfigError(f"memory must not be negative (0: no memory), got {self.memory}")
        if not 0 < self.share <= 1:
            raise ConfigError(f"share must be in (0, 1], got {self.share}")
        _prompts.check_options(1, self.blocks, self.init_std)

    @property
    def traits(self) -> Traits:
        return Traits(gives={"composes modules"})

    def init(self, backbone: BackboneLike, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh `<block>.apt_prompt` (1, D), and `<block>.apt_memory` (m, D) if there is a memory."""
        _require_plain(backbone.encoder)
        tensors: dict[str, Tensor] = {}
        for name in inject.blocks(backbone.encoder, self.blocks):
            tensors[name + PROMPT] = torch.zeros(1, backbone.width)
            if self.memory:
                tensors[name + MEMORY] = _prompts.normal(self.memory, backbone.width, self.init_std, generator)
        return tensors

    def applied(
        self, backbone: BackboneLike, tensors: Tensors, dropout: torch.Generator | None = None
    ) -> AbstractContextManager[None]:
        """Features of one source, or of S from tensors (S, 1, D) and (S, m, D), while open."""
        if not any(t.dim() == 3 for t in tensors.values()):
            return _Stream(backbone.encoder, [tensors], math.log(self.share)).open()
        # Copies: a slice may lie in memory otherwise than a tensor of its own, and the bits of a product may depend on that.
        sources = [{n: t[s].clone() for n, t in tensors.items()} for s in range(len(next(iter(tensors.values()))))]
        return _Stream(backbone.encoder, sources, math.log(self.share), several=True).open()

    def stacked(self, backbone: BackboneLike, tensors: Tensors, slots: Slots) -> AbstractContextManager[None]:
        """Every sample's prompt and memory are its client's, from tensors (K, 1, D) and (K, m, D), or common ones."""
        return _Stream(backbone.encoder, [tensors], math.log(self.share)).open()


class _Stream:
    """The prompts of a forward pass beside the image's tokens, whose keys and values they read when these come by.

    bias: of the scores of memory tokens; several: features have an axis of sources.
    """

    def __init__(self, encoder: nn.Module, sources: Sequence[Tensors], bias: float, several: bool = False) -> None:
        self.encoder, self.sources, self.bias, self.several = encoder, sources, bias, several
        self.seen: dict[str, Tensor] = {}  # keys and values of the image in the block that runs, (b, L, D)
        self.states: list[Tensor] = []  # of every source's prompt, (b, D)

    @contextmanager
    def open(self) -> Iterator[None]:
        hooks: list[Callable[..., Any]] = []
        for name, block in _from_first(self.encoder, self.sources[0]).items():
            if not hooks:
                hooks.append(partial(block.register_forward_pre_hook, self._start))
            for part in (KEYS, VALUES):
                layer = inject.linear(self.encoder, f"{name}.attention.{part}")
                hooks.append(partial(layer.register_forward_hook, partial(self._see, part)))
            hooks.append(partial(block.register_forward_hook, partial(self._take_on, name)))
        if hooks:
            hooks.append(partial(self.encoder.register_forward_hook, self._finish))
        with inject.installed(hooks):
            yield

    def _start(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        self.states = [args[0][:, 0]] * len(self.sources)

    def _see(self, part: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.seen[part] = output

    def _take_on(self, name: str, block: Any, args: tuple[Any, ...], output: Any) -> None:
        """Every prompt goes through the block that the image's tokens have just gone through; what came out of that stays."""
        patches = [_heads(self.seen.pop(part)[:, 1:], block.attention.head_dim) for part in (KEYS, VALUES)]
        for s, source in enumerate(self.sources):
            prompt, memory = source.get(name + PROMPT), source.get(name + MEMORY)
            self.states[s] = _through(block, self.states[s], prompt, memory, patches, self.bias)

    def _finish(self, encoder: Any, args: tuple[Any, ...], output: Any) -> Any:
        """Features where the class token's last state is looked for, and one more for those who take the mean of the patches."""
        features = [encoder.layernorm(p_bD) for p_bD in self.states]
        self.states = []
        out = torch.stack(features, dim=1) if self.several else features[0]
        return SimpleNamespace(last_hidden_state=torch.stack((out, out), dim=1))


def _through(
    block: Any, p_bD: Tensor, prompt: Tensor | None, memory: Tensor | None, patches_bhLe: Sequence[Tensor], bias: float
) -> Tensor:
    """A prompt's state after a block. prompt (1, D), memory (m, D), or with a leading axis of clients; None for none.
    patches: their keys and values."""
    attention, b, dtype = block.attention, len(p_bD), p_bD.dtype
    if prompt is not None:
        p_bD = p_bD + _prompts.per_sample(prompt.to(dtype), b)[:, 0]
    n_bD = block.layernorm_before(p_bD)
    own = [n_bD[:, None]]
    raised = None
    if memory is not None:
        own.append(block.layernorm_before(memory.to(dtype)))
        raised = F.pad(p_bD.new_full((1, memory.shape[-2]), bias), (patches_bhLe[0].shape[2] + 1, 0))
    keys, values = (
        # `forward` goes past the hooks that look at the image's tokens
        torch.cat([of_image, *(_heads(_prompts.per_sample(layer.forward(t), b), attention.head_dim) for t in own)], dim=2)
        for layer, of_image in zip((attention.k_proj, attention.v_proj), patches_bhLe, strict=True)
    )
    query = _heads(attention.q_proj(n_bD)[:, None], attention.head_dim)
    read_bhLe = F.scaled_dot_product_attention(query, keys, values, attn_mask=raised, scale=attention.scaling)
    p_bD = p_bD + attention.o_proj(read_bhLe.transpose(1, 2).reshape(b, -1))
    out_bD: Tensor = p_bD + block.mlp(block.layernorm_after(p_bD))
    return out_bD


def _heads(x_bLD: Tensor, width: int) -> Tensor:
    """(b, L, D) as (b, h, L, e)."""
    return x_bLD.view(*x_bLD.shape[:2], -1, width).transpose(1, 2)


def _from_first(encoder: nn.Module, tensors: Tensors) -> dict[str, nn.Module]:
    """The blocks from the first one on that the tensors name."""
    chosen = dict.fromkeys(n.rpartition(".")[0] for n in tensors)
    for name in chosen:
        inject.submodule(encoder, name)  # says what is not there
    blocks = inject.blocks(encoder)
    first = min((i for i, name in enumerate(blocks) if name in chosen), default=len(blocks))
    return dict(list(blocks.items())[first:])


def _require_plain(encoder: nn.Module) -> None:
    """Raise ModelError unless it is a vision transformer whose parts are known."""
    kind = getattr(getattr(encoder, "config", None), "model_type", type(encoder).__name__)
    if kind not in PLAIN:
        raise ModelError(
            f"the adapter apt goes through the blocks of a plain vision transformer ({', '.join(PLAIN)}), and the backbone is a "
            f"'{kind}': use the adapter lora"
        )
