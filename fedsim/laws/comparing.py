"""How laws compare what came out with what should have, in words that say where they differ and by how much."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedsim.core.messages import ClientUpdate, Tensors
from fedsim.core.sums import summed
from fedsim.laws.frame import LawBroken

V = TypeVar("V")
EXACT, ROUNDED = 1e-9, 1e-4  # tolerances, relative to 1 + |value|, in float64 and in float32


def expect_close(got: Tensors, want: Tensors, when: str, tolerance: float = EXACT) -> None:
    """Names and shapes are the same, and values to a tolerance."""
    if got.keys() != want.keys():
        raise LawBroken(f"{when}: {layout_difference(got, want)}")
    for name, expected in want.items():
        if got[name].shape != expected.shape:
            raise LawBroken(f"{when}: {layout_difference(got, want)}")
        off = (got[name].double() - expected.double()).abs() / (1 + expected.double().abs())
        if off.numel() and not bool((off <= tolerance).all()):
            at = tuple(int(i) for i in torch.unravel_index(off.nan_to_num(float("inf")).argmax(), off.shape))
            value, right = float(got[name][at]), float(expected[at])
            raise LawBroken(
                f"{when}: '{name}'{list(at)} is {value:.6g} and should be {right:.6g} (off by {abs(value - right):.2g})"
            )


def expect_bits(got: Tensors, want: Tensors, when: str) -> None:
    """The same tensors, bit for bit."""
    expect_close(got, want, when)
    for name, expected in want.items():
        if not torch.equal(got[name], expected):
            off = float((got[name].double() - expected.double()).abs().max())
            raise LawBroken(f"{when}: '{name}' is not the same to the bit (off by {off:.2g})")


def expect_finite(tensors: Tensors, when: str) -> None:
    """No number is NaN or infinite."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            bad = f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} numbers of '{name}' are NaN or infinite"
            raise LawBroken(f"{when}: {bad}")


def expect_unchanged(given: Mapping[str, Any], before: Mapping[str, Any], when: str) -> None:
    """What a plug-in was handed is as it was. Both by a word that says what it is."""
    for what, old in before.items():
        if not same(given[what], old):
            raise LawBroken(f"{when}: the {what} that it was given changed under its hands: return new values")


def expect_layout(got: Tensors, want: Tensors, when: str) -> None:
    """Names, shapes and types are the same."""
    if {n: (t.shape, t.dtype) for n, t in got.items()} != {n: (t.shape, t.dtype) for n, t in want.items()}:
        raise LawBroken(f"{when}: {layout_difference(got, want)}")


def layout_difference(got: Tensors, want: Tensors) -> str:
    """The first difference in names, shapes or types."""
    lost, new = [n for n in want if n not in got], [n for n in got if n not in want]
    if lost or new:
        return f"lost {lost or 'no'} and added {new or 'no'} tensors"
    name = next(n for n in want if got[n].shape != want[n].shape or got[n].dtype != want[n].dtype)
    return f"'{name}' is {tuple(got[name].shape)} {got[name].dtype} and should be {tuple(want[name].shape)} {want[name].dtype}"


def through_file(value: Any, what: str, when: str) -> Any:
    """A value that was written to a file and read back as a checkpoint is, without code in it."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
    except Exception as e:
        first = str(e).splitlines()[0]
        raise LawBroken(
            f"{when}: a file cannot hold the {what} ({type(e).__name__}: {first}): "
            f"build it from dicts, lists, tuples, tensors, numbers and strings"
        ) from e
    if not same(loaded, value):
        raise LawBroken(f"{when}: the {what} that comes back from a file is another one")
    return loaded


def copied(value: V) -> V:
    """A value with new tensors in new containers, as `copy.deepcopy` makes it, in a tenth of the time."""
    new: V = _copied(value)
    return new


def _copied(value: Any) -> Any:
    if type(value) is Tensor and not value.requires_grad:
        return value.clone()
    if type(value) is dict:
        return {key: _copied(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    if isinstance(value, ClientUpdate):
        return replace(value, **{f.name: _copied(getattr(value, f.name)) for f in fields(value)})
    return deepcopy(value)


def same(a: Any, b: Any) -> bool:
    """Equality of nested values, tensors and arrays by their bits."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if is_dataclass(a) and not isinstance(a, type):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return type(a) is type(b) and bool(a == b)


def sum_of_lifts(terms: Sequence[Tensors]) -> dict[str, Tensor]:
    """The sum of what `lift` gave of several clients. Raises LawBroken where there is none."""
    layouts = {tuple(sorted((n, tuple(t.shape)) for n, t in term.items())) for term in terms}
    if len(layouts) > 1:
        raise LawBroken("lift gives different names or shapes for different clients, so that they cannot be summed")
    narrow = [n for n, t in terms[0].items() if t.dtype != torch.float64]
    if narrow:
        raise LawBroken(f"lift gives '{narrow[0]}' as {terms[0][narrow[0]].dtype}: sums are kept in float64")
    return summed(terms)
