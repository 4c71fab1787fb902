"""Deep visual prompts: Visual Prompt Tuning (Jia et al., 2022, arXiv:2203.12119), VPT-Deep."""

# b samples, L tokens, P prompts, D width, K clients

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedsim.core import contracts
from fedsim.core.contracts import BackboneLike, Slots
from fedsim.core.messages import Tensors
from fedsim.models import inject
from fedsim.models.adapters import _prompts

PROMPT = ".prompt"
PLACE = 1  # prompts go in after the class token, as published; attention does not care where
MASK, ROTATION, POSITIONS = "attention_mask", "position_embeddings", "position_ids"
WITHOUT_TOKENS = frozenset(  # what a block may be given beside these: nothing of it has an axis of tokens
    (
        "args", "kwargs", "first", "encoder_hidden_states", "encoder_attention_mask", "past_key_value", "past_key_values",
        "use_cache", "cache_position", "output_attentions", "output_hidden_states", "interpolate_pos_encoding", "resolution",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Adapter(contracts.Adapter):
    """`[x_1; P_i; x_2 … x_L]` (x_1: the class token) goes into each chosen block i; the outputs at P_i are dropped after it.

    P_i (P, D) are trained, for all samples the same. Padding stays masked. A prompt sees what the first token sees, and all
    prompts of its block; every token sees the prompts, in causal models too; with rotary positions they stand where the first
    token does. A fresh prompt is random and changes the outputs: prompts take part in the softmax whatever their values are.
    Works on encoders with a list of attention blocks that know tokens by states, mask and rotation alone; where a block is also
    told how tokens lie to each other (relative positions, windows), and in state space models, it is refused.

    length: P; blocks: "all", or indices (negative ones count from the end); init_std: of the normal start of the prompts.
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
        """Fresh `<block>.prompt` (P, D)."""
        names = _prompts.blocks("vpt", backbone.encoder, self.blocks)
        for name, block in names.items():
            why = obstacle(block)
            if why is not None:
                raise _prompts.refuse("vpt", backbone.encoder, f"block '{name}' {why}")
        return {n + PROMPT: _prompts.normal(self.length, backbone.width, self.init_std, generator) for n in names}

    @contextmanager
    def applied(self, backbone: BackboneLike, tensors: Tensors, dropout: torch.Generator | None = None) -> Iterator[None]:
        """Prompts go in before and come out after the blocks that the tensors name, while open."""
        hooks: list[Callable[..., Any]] = []
        for name in (n for n in tensors if n.endswith(PROMPT)):
            block = inject.submodule(backbone.encoder, name.removesuffix(PROMPT))
            hooks.append(inserting(block, tensors[name].shape[-2], tensors[name]))
            hooks.append(partial(block.register_forward_hook, _dropping(tensors[name].shape[-2])))
        with inject.installed(hooks):
            yield

    def stacked(self, backbone: BackboneLike, tensors: Tensors, slots: Slots) -> AbstractContextManager[None]:
        """Every sample gets the prompts of its client, from tensors (K, P, D)."""
        return self.applied(backbone, tensors)


def obstacle(block: nn.Module) -> str | None:
    """Why tokens cannot be put into a block and taken out again; None if they can."""
    _, *others = _signature(block).parameters
    unknown = [n for n in others if n not in {MASK, ROTATION, POSITIONS, *WITHOUT_TOKENS}]
    if unknown:
        return f"reads '{unknown[0]}', in which prompts have no place"
    if not _prompts.attention_of(block):
        return "has no attention that prompts could take part in"
    relative = next((n for n, _ in block.named_parameters() if "relative" in n), None)
    return None if relative is None else f"has '{relative}' for as many tokens as an image has"


def _signature(block: nn.Module) -> inspect.Signature:
    return inspect.signature(block.forward)


def inserting(block: nn.Module, length: int, prompt: Tensor | None) -> Callable[..., inject.Removable]:
    """Registers a pre-hook that puts `length` prompts, (P, D) or (K, P, D), into a block's tokens (b, L, D) and makes room for
    them in all that the block is told of its tokens; without prompts they are among the tokens already."""
    signature = _signature(block)
    causal = any(module.is_causal for module in _prompts.attention_of(block))
    wideners: dict[str, Callable[[Any], Any]] = {
        MASK: lambda mask: _prompts.widened(mask, PLACE, length, queries=True),
        ROTATION: lambda parts: tuple(_repeated(part_bLe, length) for part_bLe in parts),
        POSITIONS: lambda ids_bL: _repeated(ids_bL[..., None], length)[..., 0],
    }

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        named, unnamed = given.arguments, given.arguments.get("kwargs", {})
        states = next(iter(named))
        x_bLD = named[states]
        tokens = x_bLD.shape[1] - (length if prompt is None else 0)
        if prompt is not None:
            prompts_bPD = _prompts.per_sample(prompt.to(x_bLD.dtype), len(x_bLD))
            named[states] = torch.cat([x_bLD[:, :PLACE], prompts_bPD, x_bLD[:, PLACE:]], dim=1)
        for name, wider in wideners.items():
            told = named if name in named else unnamed
            if told.get(name) is not None:
                told[name] = wider(told[name])
            elif name == MASK and causal:
                told[name] = wider(_prompts.causal_mask(tokens, tokens, x_bLD.device))
        return given.args, given.kwargs

    return partial(block.register_forward_pre_hook, hook, with_kwargs=True)


def _repeated(x_bLe: Tensor, length: int) -> Tensor:
    """With `length` copies of the first token's row at the prompts' place."""
    return torch.cat([x_bLe[:, :PLACE], x_bLe[:, :1].expand(-1, length, -1), x_bLe[:, PLACE:]], dim=1)


def _dropping(length: int) -> Callable[..., Any]:
    """A hook that takes the tokens of the prompts out of a block's output."""

    def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x_bLD = output[0] if isinstance(output, tuple) else output
        x_bLD = torch.cat([x_bLD[:, :PLACE], x_bLD[:, PLACE + length :]], dim=1)
        return (x_bLD, *output[1:]) if isinstance(output, tuple) else x_bLD

    return hook
