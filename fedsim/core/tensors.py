"""Small functions on flat mappings of tensors. No state, no device."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from fedsim.core.errors import NonFinite
from fedsim.core.messages import Tensors

# r rank, d inputs, m outputs, T modules
LORA_A, LORA_B = ".lora_A", ".lora_B"


def matching(names: Iterable[str], globs: Iterable[str]) -> list[str]:
    """The names that match any of the globs (case-sensitive), in the order of `names`."""
    patterns = tuple(globs)
    return [n for n in names if any(fnmatchcase(n, g) for g in patterns)]


def lora_layers(params: Collection[str]) -> list[str]:
    """Prefixes `p` for which `p.lora_A` and `p.lora_B` are both there, in order."""
    return [n[: -len(LORA_A)] for n in params if n.endswith(LORA_A) and n[: -len(LORA_A)] + LORA_B in params]


def stack_modules(modules: Sequence[Tensors], weights: Sequence[float]) -> dict[str, Tensor]:
    """One module that acts as the weighted sum of several.

    LoRA pairs are stacked, so that the product is exact: `[B_1 … B_T] [w_1 A_1; …; w_T A_T] = Σ w_t B_t A_t` (rank Σ r_t).
    Any other tensor (prompts) is the weighted sum, element by element.
    """
    if len(modules) == 1 and weights[0] == 1.0:
        return dict(modules[0])
    layers = set(lora_layers(modules[0]))
    out: dict[str, Tensor] = {}
    for name in modules[0]:
        if name.endswith(LORA_A) and name[: -len(LORA_A)] in layers:
            out[name] = torch.cat([w * m[name] for m, w in zip(modules, weights, strict=True)])
        elif name.endswith(LORA_B) and name[: -len(LORA_B)] in layers:
            out[name] = torch.cat([m[name] for m in modules], dim=1)
        else:
            out[name] = sum_in_order([w * m[name] for m, w in zip(modules, weights, strict=True)])
    return out


def folded(module: Tensors) -> dict[str, Tensor]:
    """The same module with LoRA pairs of no more ranks than their layer's smaller side: a pair that has more becomes its product
    (m, d) and an identity, from products in float64."""
    out = dict(module)
    for layer in lora_layers(module):
        a_rd, b_mr = module[layer + LORA_A], module[layer + LORA_B]
        outputs, inputs = len(b_mr), a_rd.shape[1]
        if len(a_rd) <= min(outputs, inputs):
            continue
        delta_md = (b_mr.double() @ a_rd.double()).to(a_rd.dtype)
        square = torch.eye(min(outputs, inputs), dtype=a_rd.dtype)
        out[layer + LORA_A], out[layer + LORA_B] = (delta_md, square) if outputs < inputs else (square, delta_md)
    return out


def sum_in_order(tensors: Iterable[Tensor]) -> Tensor:
    """Σ from left to right: the order is part of the bits."""
    total: Tensor | None = None
    for t in tensors:
        total = t.clone() if total is None else total.add_(t)
    assert total is not None, "a sum needs at least one term"
    return total


def weighted(tensor: Tensor, weight: Tensor) -> Tensor:
    """`weight · tensor` in float64, with one copy."""
    return tensor.to(torch.float64, copy=True).mul_(weight)


def require_finite(tensors: Tensors, what: str) -> None:
    """Raise `NonFinite` with the name of the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NonFinite(f"{what} '{name}' holds NaN or infinity")


def upper_triangle(gram_DD: Tensor) -> Tensor:
    """The d(d+1)/2 numbers of a symmetric matrix, row by row: what travels."""
    return torch.cat([row_D[d:] for d, row_D in enumerate(gram_DD)]) if len(gram_DD) else gram_DD.reshape(0)


def from_upper_triangle(triangle: Tensor) -> Tensor:
    """The symmetric matrix that `upper_triangle` came from."""
    d = int(((8 * triangle.numel() + 1) ** 0.5 - 1) // 2)
    full = triangle.new_zeros(d, d)
    for k, row in enumerate(torch.split(triangle, [*range(d, 0, -1)])):
        full[k, k:] = row
    return full.add_(full.triu(1).T)


def with_prefix(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with the prefix."""
    return {n: t for n, t in tensors.items() if n.startswith(prefix)}


def without_prefix(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """The same, by what follows the prefix in their names."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def same_layout(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Same names, shapes and types."""
    return a.keys() == b.keys() and all(a[n].shape == b[n].shape and a[n].dtype == b[n].dtype for n in a)


def digest(tensors: Tensors) -> str:
    """sha256 of names, types, shapes and bytes, in any order of the names."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def wide(x: Tensor, copy: bool = False) -> Tensor:
    """float64, on the CPU where the device has none (Apple's)."""
    return x.detach().to(device="cpu" if x.device.type == "mps" else x.device, dtype=torch.float64, copy=copy)
