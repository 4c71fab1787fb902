"""What a part of the server has made of the parameters, held against what it was given."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.core.blame import who
from fedsim.core.contracts import Part, Plugin
from fedsim.core.errors import PluginError
from fedsim.core.messages import State, Tensors
from fedsim.core.names import HEAD
from fedsim.core.tensors import require_finite, with_prefix

# what a checkpoint may hold: torch reads nothing else without running code that lies in the file
PLAIN = frozenset((bool, int, float, complex, str, type(None)))
PLAIN |= {Tensor, nn.Parameter, torch.Size, torch.dtype, torch.device}
EVERY_MODULE = "keeps every module"  # a word of `Traits`
MAPPINGS, SEQUENCES = (dict, OrderedDict, Counter), (list, tuple, set)


def outcome(part: Plugin, when: str, params: Tensors, make: Callable[[], tuple[State, Tensors]]) -> tuple[State, Tensors]:
    """The new state and parameters that a part makes of these.

    Raises PluginError unless the new ones have the names, shapes and types of those that it was given, which are as they were;
    NonFinite if they hold NaN or infinity. when: "task 0, round 2"."""
    before = {name: (tensor, _version(tensor)) for name, tensor in params.items()}
    made, blame = make(), f"{who(part)}: {when}: it"
    if not (isinstance(made, tuple) and len(made) == 2):
        raise PluginError(f"{blame} gives {_named(made)} where a pair of its state and the parameters is wanted")
    for name in (*before, *(n for n in params if n not in before)):
        old, version = before.get(name, (None, 0))
        if params.get(name) is not old or (old is not None and _version(old) != version):
            raise PluginError(f"{blame} changes '{name}' of the parameters that it is given: change a copy")
    state, tensors = made
    require_layout(tensors, params, blame)
    require_finite(tensors, f"{blame} gives parameters of which")
    return state, tensors


def shown(part: Part, when: str, params: Tensors, deployed: Tensors) -> Tensors:
    """What a part deploys in the place of these parameters. Raises PluginError unless it is tensors with a head of the same
    layout, NonFinite if they hold NaN or infinity."""
    blame = f"{who(part)}: {when}: it"
    if not isinstance(deployed, Mapping):
        raise PluginError(f"{blame} deploys {_named(deployed)} where tensors by name are wanted")
    if EVERY_MODULE not in part.traits.gives:  # those have heads of several tasks side by side
        require_layout(with_prefix(deployed, HEAD), with_prefix(params, HEAD), blame)
    require_finite(deployed, f"{blame} deploys parameters of which")
    return deployed


def require_layout(made: Any, wanted: Tensors, blame: str) -> None:
    """Raise PluginError unless these are tensors of the names, shapes and types that are wanted. blame: who gives them."""
    if not isinstance(made, Mapping):
        raise PluginError(f"{blame} gives {_named(made)} where tensors by name are wanted")
    for name in made:
        if name not in wanted:
            raise PluginError(f"{blame} gives '{name}', which is none of the tensors that it was given")
    for name, tensor in wanted.items():
        if name not in made:
            raise PluginError(f"{blame} gives no '{name}': all tensors are wanted, those too that stay as they are")
        found = made[name]
        if not isinstance(found, Tensor):
            raise PluginError(f"{blame} gives '{name}' as {_named(found)} where a tensor is wanted")
        if found.shape != tensor.shape:
            raise PluginError(f"{blame} gives '{name}' with shape {tuple(found.shape)} where {tuple(tensor.shape)} is wanted")
        if found.dtype != tensor.dtype:
            raise PluginError(f"{blame} gives '{name}' as {found.dtype} where {tensor.dtype} is wanted")


def require_plain(part: Plugin, state: Any) -> None:
    """Raise PluginError for a part's state that a checkpoint cannot hold: a run that was stopped could not go on."""
    for place, value in _unkept(state):
        at = f" at '{'.'.join(place)}'" if place else ""
        raise PluginError(
            f"{who(part)}: its state holds {_named(value)}{at}, which a checkpoint cannot keep: use tensors or plain numbers, in "
            f"dicts, lists and tuples"
        )


def _unkept(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What cannot be kept, and the keys and numbers that lead to it."""
    kind = type(value)
    if kind in MAPPINGS:
        for key, inner in value.items():
            yield from _unkept(key, (*place, str(key)))
            yield from _unkept(inner, (*place, str(key)))
    elif kind in SEQUENCES:
        for number, inner in enumerate(value):
            if type(inner) not in PLAIN:
                yield from _unkept(inner, (*place, str(number)))
    elif kind not in PLAIN:
        yield place, value


def _version(tensor: Tensor) -> int:
    """Grows whenever the tensor is changed in place."""
    return 0 if tensor.is_inference() else int(tensor._version)


def _named(value: Any) -> str:
    kind = type(value)
    return (
        "nothing" if value is None else kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    )
