"""Modules of LoRA pairs as a merging rule sees them: every pair is one linear map, its product.

Shapes: O outputs, I inputs, R rank (A_RI, B_OR).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fedsim.core.contracts import Member, Merging
from fedsim.core.messages import StatisticRequest, Tensors
from fedsim.core.tensors import LORA_A, LORA_B, lora_layers, matching
from server.merging._core import Space, leading

WEIGHT = ".weight"


class Products(Mapping[str, Tensor]):
    """A module's tensors, LoRA pairs as `<layer>.weight` = B A (O, I), float64, each computed when it is looked at: only one of
    them is held at a time."""

    def __init__(self, module: Tensors) -> None:
        self._module = module
        self._names = names(module)

    def __getitem__(self, name: str) -> Tensor:
        layer = self._names[name]
        if layer is None:
            return self._module[name]
        return self._module[layer + LORA_B].double() @ self._module[layer + LORA_A].double()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def names(module: Iterable[str]) -> dict[str, str | None]:
    """Name that a rule sees -> the layer whose product it is, None for a tensor that is no LoRA factor."""
    known = list(module)
    layers = lora_layers(known)
    factors = {p + factor for p in layers for factor in (LORA_A, LORA_B)}
    return {p + WEIGHT: p for p in layers} | {name: None for name in known if name not in factors}


def merged(rule: Merging, members: Sequence[Member], base: Tensors, draw: torch.Generator) -> dict[str, Tensor]:
    """What a rule makes of modules, each LoRA pair as one product: a module of the names of `base`, in any floating type, whose
    pairs have any rank. Members' pairs, and the base's, may have ranks of their own; statistics are named as `asked` asked."""
    if rule.pairs:
        return dict(rule.merge(members, base, draw))
    seen = [replace(m, statistics=received(m.statistics, m.params)) for m in members]
    return in_core(partial(rule.merge, draw=draw), seen, base) if rule.linear else _whole(rule, seen, base, draw)


def in_core(merge: Callable[[Sequence[Member], Tensors], Tensors], members: Sequence[Member], base: Tensors) -> dict[str, Tensor]:
    """What `merge` makes of the cores of pairs, which it sees as `<layer>.weight` (p, q), as pairs of rank min(p, q)."""
    spaces = {p: Space.of([base, *(m.params for m in members)], p) for p in lora_layers(base)}
    cores = [replace(m, params=_cores(spaces, m.params)) for m in members]
    found = merge(cores, _cores(spaces, base))
    out = {name: found[name] for name, layer in names(base).items() if layer is None}
    for p, space in spaces.items():
        out[p + LORA_A], out[p + LORA_B] = space.pair(found[p + WEIGHT])
    return out


def _cores(spaces: Mapping[str, Space], module: Tensors) -> dict[str, Tensor]:
    shown = names(module).items()
    return {name: module[name] if p is None else spaces[p].core(module, p) for name, p in shown}


def _whole(rule: Merging, members: Sequence[Member], base: Tensors, draw: torch.Generator) -> dict[str, Tensor]:
    """What a rule makes of whole products."""
    return factored(rule.merge([replace(m, params=Products(m.params)) for m in members], Products(base), draw), base)


def factored(found: Tensors, like: Iterable[str]) -> dict[str, Tensor]:
    """What a rule gave, by the names of a module. A product is exact as a pair of rank min(O, I): one factor holds it, the
    other is the identity."""
    shown = {name: layer for name, layer in names(like).items() if name in found}
    out = {name: found[name] for name, layer in shown.items() if layer is None}
    for p in filter(None, shown.values()):
        delta_OI = found[p + WEIGHT]
        outputs, inputs = delta_OI.shape
        wide = outputs < inputs
        out[p + LORA_A] = delta_OI if wide else torch.eye(inputs, dtype=delta_OI.dtype)
        out[p + LORA_B] = torch.eye(outputs, dtype=delta_OI.dtype) if wide else delta_OI
    return out


def truncated(module: Tensors, like: Tensors) -> tuple[dict[str, Tensor], float]:
    """The module with every pair at the rank R that it has in `like`, nearest to its product: B = U_R S_R^½, A = S_R^½ V_Rᵀ of
    B A = U S Vᵀ; and ‖what was cut‖ / ‖all products‖ (Frobenius, 0 where there is nothing). No (O, I) matrix is made.

    A direction of no size has B's column 0 and A's row from `like`: it says nothing, and can still be trained."""
    out = dict(module)
    cut = whole = 0.0
    for p in lora_layers(like):
        left_OK, square_b = torch.linalg.qr(module[p + LORA_B].double())
        right_IK, square_a = torch.linalg.qr(module[p + LORA_A].double().T)
        u, sizes, vt = leading(square_b @ square_a.T, min(square_b.shape[0], square_a.shape[0]))
        a_RI, b_OR = like[p + LORA_A].clone(), torch.zeros_like(like[p + LORA_B])
        kept = min(len(a_RI), len(sizes))
        roots = sizes[:kept].sqrt()
        a_RI[:kept] = (roots[:, None] * (vt[:kept] @ right_IK.T)).to(a_RI.dtype)
        b_OR[:, :kept] = ((left_OK @ u[:, :kept]) * roots).to(b_OR.dtype)
        out[p + LORA_A], out[p + LORA_B] = a_RI, b_OR
        cut, whole = cut + float(sizes[kept:].square().sum()), whole + float(sizes.square().sum())
    return out, (cut / whole) ** 0.5 if whole else 0.0


def origin(module: Tensors) -> dict[str, Tensor]:
    """θ_0 = 0 of a module: pairs of rank 0, and zeros."""
    factors = {p + LORA_A for p in lora_layers(module)}, {p + LORA_B for p in lora_layers(module)}
    return {
        name: t[:0] if name in factors[0] else t[:, :0] if name in factors[1] else torch.zeros_like(t)
        for name, t in module.items()
    }


def asked(rule: Merging, module: Iterable[str]) -> tuple[StatisticRequest, ...]:
    """A rule's requests in the names of a module's tensors. What is asked of a product is asked of its `lora_A`: it has the same
    inputs."""
    return rule.asks() if rule.pairs else of_pairs(rule.asks(products=True), module)


def of_pairs(requests: Sequence[StatisticRequest], module: Iterable[str]) -> tuple[StatisticRequest, ...]:
    """Requests of a rule that is shown products, in the names of the module's tensors."""
    seen, told = names(module), []
    for request in requests:
        subjects = [name if seen[name] is None else f"{seen[name]}{LORA_A}" for name in matching(seen, request.match)]
        if subjects:
            told.append(replace(request, match=tuple(subjects)))
    return tuple(told)


def received(statistics: Tensors, module: Tensors) -> dict[str, Tensor]:
    """Statistics that were asked for so, under the names that the rule sees."""
    inputs = {f"{layer}{LORA_A}": name for name, layer in names(module).items() if layer is not None}
    out = {}
    for key, tensor in statistics.items():
        form, _, subject = key.partition("/")
        out[f"{form}/{inputs.get(subject, subject)}"] = tensor
    return out
