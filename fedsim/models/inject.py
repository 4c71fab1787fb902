"""Finding places in an encoder by pattern, and hooking into them in a way that always comes undone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Protocol

from torch import nn

from fedsim.core.errors import ModelError

ALL_LINEAR = "all-linear"
PAST_THE_LAYER = ("dt_proj",)  # a state space model's time steps: their weight is read, the layer is never called


class Removable(Protocol):
    """What registering a hook gives."""

    def remove(self) -> None: ...


def submodule(encoder: nn.Module, name: str) -> nn.Module:
    """The module of that dotted name. Raises ModelError for a name that the encoder does not have."""
    try:
        return encoder.get_submodule(name)
    except AttributeError as e:
        raise ModelError(f"the backbone has no module '{name}': its linear layers are {summary(linear_names(encoder))}") from e


def linear(encoder: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that dotted name. Raises ModelError for any other module."""
    module = submodule(encoder, name)
    if not isinstance(module, nn.Linear):
        raise ModelError(
            f"module '{name}' of the backbone is a {type(module).__name__}, not a linear layer or a convolution of 1 × 1"
        )
    return module


def linear_names(encoder: nn.Module) -> list[str]:
    """Names of the encoder's linear layers in order, but for a pooler's, through which features do not pass, and for those whose
    weight is read without a call of the layer: what is put beside such a layer would do nothing."""
    return [
        n
        for n, m in encoder.named_modules()
        if isinstance(m, nn.Linear)
        and not isinstance(m, nn.modules.linear.NonDynamicallyQuantizableLinear)  # in torch's own attention
        and not n.startswith("pooler")
        and n.rpartition(".")[2] not in PAST_THE_LAYER
    ]


def match_linear(encoder: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers that match any of the patterns, by name, in the encoder's order.

    A pattern is a glob: without a dot it is held against the last part of a name ("q_proj", "fc*"), with dots against the
    whole name or its end ("layers.0.*", "mlp.fc1"). "all-linear" is every linear layer.
    Raises ModelError for a pattern that matches nothing.
    """
    names = linear_names(encoder)
    chosen: set[str] = set()
    for pattern in [targets] if isinstance(targets, str) else targets:
        hits = [n for n in names if _matches(n, pattern)]
        if not hits:
            has = summary(names) if names else "none: use the adapter none, which trains the head alone"
            raise ModelError(f"adapter target '{pattern}' matches no linear layer of the backbone, which has {has}")
        chosen.update(hits)
    return {n: linear(encoder, n) for n in names if n in chosen}


def blocks(encoder: nn.Module, which: str | Sequence[int] = "all") -> dict[str, nn.Module]:
    """The chosen transformer blocks by name ("layers.0", "encoder.layer.0"), in order.

    which: "all", or indices from 0 (negative ones count from the end). Raises ModelError for an index that is not there.
    """
    found = _stack(encoder)
    if found is None:
        raise ModelError(f"{type(encoder).__name__} has no list of blocks that prompts could go into: use the adapter lora")
    prefix, stack = found
    if isinstance(which, str):
        indices = list(range(len(stack)))
    else:
        wrong = [i for i in which if not -len(stack) <= i < len(stack)]
        if wrong:
            raise ModelError(f"adapter.blocks names block {wrong[0]}, but the backbone has blocks 0 to {len(stack) - 1}")
        indices = sorted({i % len(stack) for i in which})
    return {f"{prefix}.{i}": stack[i] for i in indices}


def has_blocks(encoder: nn.Module) -> bool:
    """Whether there is a list of as many blocks as the config says."""
    return _stack(encoder) is not None


def _stack(encoder: nn.Module) -> tuple[str, nn.ModuleList] | None:
    depth = getattr(getattr(encoder, "config", None), "num_hidden_layers", None)
    stacks = [(n, m) for n, m in encoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return stacks[0] if stacks else None


@contextmanager
def installed(hooks: Iterable[Callable[[], Removable]]) -> Iterator[None]:
    """Hooks that are registered on entry and removed on exit, whatever happens in between."""
    with ExitStack() as stack:
        for register in hooks:
            stack.callback(register().remove)
        yield


def _matches(name: str, pattern: str) -> bool:
    if pattern == ALL_LINEAR:
        return True
    if "." not in pattern:
        return fnmatchcase(name.rpartition(".")[2], pattern)
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def summary(names: Iterable[str]) -> str:
    """Distinct names with block numbers starred: `layers.*.mlp.fc1, layers.*.mlp.fc2`."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", n) for n in names)) or "none"
