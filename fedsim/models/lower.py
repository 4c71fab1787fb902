"""The part of an encoder below the first block that an adapter touches: what comes out of it never changes, and may be kept."""

# b samples, L tokens, D width

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core.errors import ModelError
from fedsim.models import inject

FINAL = "layernorm."  # what tokens of a plain ViT pass after its last block


def untouched(encoder: nn.Module, tensors: Sequence[str]) -> int:
    """How many blocks, from the first on, lie below all modules that these adapter tensors belong to; 0 if that cannot be told.

    Without tensors that is every block.
    """
    try:
        names = list(inject.blocks(encoder))
    except ModelError:
        return 0
    above = getattr(encoder.config, "model_type", None) == "vit"
    first = len(names)
    for tensor in tensors:
        elsewhere = len(names) - 1 if above and tensor.startswith(FINAL) else 0
        place = next((i for i, name in enumerate(names) if tensor.startswith(f"{name}.")), elsewhere)
        first = min(first, place)
    return first


def is_chain(encoder: nn.Module, run: Callable[[], object]) -> bool:
    """Whether blocks hand on one tensor (b, L, D) each and nothing else, one after the other, in a forward pass `run`."""
    seen: list[tuple[nn.Module, Any, Any]] = []
    blocks = list(inject.blocks(encoder).values())

    def look(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append((block, args[0] if args else None, output))

    with torch.no_grad(), inject.installed([lambda b=b: b.register_forward_hook(look) for b in blocks]):  # type: ignore[misc]
        run()
    if [block for block, _, _ in seen] != blocks or not all(isinstance(y, Tensor) for _, _, y in seen):
        return False
    handed_on = all(seen[i][2] is seen[i + 1][1] for i in range(len(seen) - 1))
    return handed_on and isinstance(seen[0][1], Tensor) and all(y.shape == seen[0][1].shape for _, _, y in seen)


@contextmanager
def capturing(encoder: nn.Module, count: int) -> Iterator[list[Tensor]]:
    """While open, forward passes leave in the list what comes out of block `count` − 1; the blocks above do nothing."""
    blocks, found = list(inject.blocks(encoder).values()), list[Tensor]()

    def keep(block: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found.append(output)

    with inject.installed([lambda: blocks[count - 1].register_forward_hook(keep)]), _replaced(blocks[count:], _handed_on):
        yield found


@contextmanager
def watching(encoder: nn.Module) -> Iterator[list[Tensor]]:
    """While open, forward passes with gradients add to the list what comes out of every block, from the first on; those without
    (a teacher's, a query's) do not. Whoever reads it clears it."""
    found: list[Tensor] = []

    def keep(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.is_grad_enabled():
            found.append(output if isinstance(output, Tensor) else output[0])

    blocks = inject.blocks(encoder).values()
    with inject.installed([lambda b=b: b.register_forward_hook(keep) for b in blocks]):  # type: ignore[misc]
        yield found


@contextmanager
def entering(encoder: nn.Module, count: int, states_bLD: Tensor) -> Iterator[None]:
    """While open, forward passes go on from these outputs of block `count` − 1: the blocks up to it do nothing."""
    blocks = list(inject.blocks(encoder).values())

    def given(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return states_bLD

    with _replaced(blocks[: count - 1], _handed_on), _replaced(blocks[count - 1 : count], given):
        yield


def _handed_on(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x


@contextmanager
def _replaced(blocks: Sequence[nn.Module], forward: Callable[..., Tensor]) -> Iterator[None]:
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.__dict__.pop, "forward")
            block.__dict__["forward"] = forward
        yield
