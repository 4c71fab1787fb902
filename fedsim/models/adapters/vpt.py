"""Deep visual prompts: Visual Prompt Tuning (Jia et al., 2022, arXiv:2203.12119), VPT-Deep."""

# b samples, L tokens, P prompts, D width, K clients

from __future__ import annotations

from collections.abc import Callable, Iterator
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


@dataclass(frozen=True)
class Adapter(contracts.Adapter):
    """`[x_1; P_i; x_2 … x_L]` (x_1: the class token) goes into each chosen block i; the outputs at P_i are dropped after it.

    P_i (P, D) are trained, for all samples the same. Works on any encoder with a list of blocks; padding stays masked.
    A fresh prompt is random and changes the outputs: prompts take part in the softmax whatever their values are.

    length: P; blocks: "all", or indices (negative ones count from the end); init_std: of the normal start of the prompts.
    """

    lean: ClassVar[bool] = True
    length: int = 10
    blocks: Any = "all"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        _prompts.check_options(self.length, self.blocks, self.init_std)

    def init(self, backbone: BackboneLike, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh `<block>.prompt` (P, D)."""
        names = inject.blocks(backbone.encoder, self.blocks)
        return {n + PROMPT: _prompts.normal(self.length, backbone.width, self.init_std, generator) for n in names}

    @contextmanager
    def applied(self, backbone: BackboneLike, tensors: Tensors, dropout: torch.Generator | None = None) -> Iterator[None]:
        """Prompts go in before and come out after the blocks that the tensors name, while open."""
        hooks: list[Callable[..., Any]] = []
        for name in (n for n in tensors if n.endswith(PROMPT)):
            block = inject.submodule(backbone.encoder, name.removesuffix(PROMPT))
            hooks.append(partial(block.register_forward_pre_hook, _inserting(tensors[name]), with_kwargs=True))
            hooks.append(partial(block.register_forward_hook, _dropping(tensors[name].shape[-2])))
        with inject.installed(hooks):
            yield

    def stacked(self, backbone: BackboneLike, tensors: Tensors, slots: Slots) -> AbstractContextManager[None]:
        """Every sample gets the prompts of its client, from tensors (K, P, D)."""
        return self.applied(backbone, tensors)


def _inserting(prompt: Tensor) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """A pre-hook that puts the prompts, (P, D) or (K, P, D), into a block's tokens (b, L, D) and makes room for them in its
    attention mask."""
    length = prompt.shape[-2]

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x_bLD, *rest = args
        x_bLD = torch.cat([x_bLD[:, :PLACE], _prompts.per_sample(prompt.to(x_bLD.dtype), len(x_bLD)), x_bLD[:, PLACE:]], dim=1)
        if rest and rest[0] is not None:
            rest[0] = _prompts.widened(rest[0], PLACE, length, queries=True)
        if kwargs.get("attention_mask") is not None:
            kwargs = kwargs | {"attention_mask": _prompts.widened(kwargs["attention_mask"], PLACE, length, queries=True)}
        return (x_bLD, *rest), kwargs

    return hook


def _dropping(length: int) -> Callable[..., Any]:
    """A hook that takes the tokens of the prompts out of a block's output."""

    def hook(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x_bLD = output[0] if isinstance(output, tuple) else output
        x_bLD = torch.cat([x_bLD[:, :PLACE], x_bLD[:, PLACE + length :]], dim=1)
        return (x_bLD, *output[1:]) if isinstance(output, tuple) else x_bLD

    return hook
