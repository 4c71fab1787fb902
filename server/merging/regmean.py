"""RegMean: linear maps merged in closed form (Jin et al. 2023, "Dataless knowledge fusion by merging weights of language
models").

Shapes: O outputs, I inputs of a linear map (weight_OI, gram_II = Σ x xᵀ over its inputs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import Member
from fedsim.core.errors import AggregationError, ConfigError, require_choice
from fedsim.core.messages import StatisticRequest, Tensors
from fedsim.core.names import HEAD_WEIGHT
from fedsim.core.tensors import LORA_A, LORA_B, from_upper_triangle, sum_in_order, weighted
from server.linalg import ridged, solve_energies, solve_gram
from server.merging.mean import WEIGHT

MAPS = ("*" + LORA_A, "*" + LORA_B, "adapter.*.weight")


@dataclass(frozen=True)
class Merging(contracts.AdditiveMerging):
    """W⁺ = (Σ W_i Ĝ_i)(Σ Ĝ_i)⁺ for every linear map that comes with a Gram, Ĝ_i = decay·G_i + (1 − decay)·diag(G_i),
    G_i = Σ x xᵀ over its inputs in member i; every other tensor by the weighted mean.

    It minimises Σ_i ‖(W − W_i) X_i‖² (decay 1). Asks for `gram`: d(d+1)/2 numbers a map of d inputs, or d where the form is
    diagonal. A singular Σ Ĝ_i is pseudo-inverted; an input that is zero for all keeps the base's column in the diagonal form.

    decay: of the Gram's off-diagonals, in [0, 1]. form: full | diagonal | auto (diagonal when decay is 0). ridge: adds
    ridge · mean(diag Ĝ_i) to the diagonal of every Gram. Raises AggregationError for a LoRA factor or a head without a Gram.
    """

    decay: float = 0.5
    form: str = "auto"
    ridge: float = 0.0
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"decay": 0.0}, {"ridge": 1e-3})

    def __post_init__(self) -> None:
        resolve_form(self.form, self.decay)
        require_in_unit("decay", self.decay)
        require_ridge(self.ridge)

    def asks(self, products: bool = False) -> tuple[StatisticRequest, ...]:
        """The head's features are those that will be deployed (blended), and so are the inputs of layers whose products come."""
        form = resolve_form(self.form, self.decay)
        return gram_request(MAPS, form, self.decay, products), gram_request((HEAD_WEIGHT,), form, self.decay, blended=True)

    def lift(self, member: Member) -> Tensors:
        return lift_linear(member, self.ridge)

    def finish(self, base: Tensors, total: Tensors, draw: torch.Generator) -> Tensors:
        return finish_linear(base, total)


def gram_request(match: tuple[str, ...], form: str, decay: float, blended: bool = False) -> StatisticRequest:
    """A request for `gram`, with every option written out."""
    return StatisticRequest("gram", match, {"form": form, "decay": decay}, blended)


def lift_linear(member: Member, ridge: float = 0.0) -> dict[str, Tensor]:
    """One member's share of a RegMean, closed under +, in float64.

    `product/<name>` W_i Ĝ_i and `gram/<name>` Ĝ_i (energies (I,) in the diagonal form) for maps that come with a Gram;
    `sum/<name>` n_i w_i for the others; `weight` n_i.
    """
    n = torch.tensor(member.weight, dtype=torch.float64)
    out = {WEIGHT: n}
    for name, weight in member.params.items():
        gram = received_gram(member, name)
        if gram is None:
            out[f"sum/{name}"] = weighted(weight, n)
            continue
        gram = ridged(gram, ridge)
        out[f"gram/{name}"] = gram
        out[f"product/{name}"] = weight.double() * gram if gram.dim() == 1 else weight.double() @ gram
    return out


def finish_linear(params: Tensors, total: Tensors, keep_unseen: bool = False) -> dict[str, Tensor]:
    """All parameters from the sum of `lift_linear`; those that are not in it stay as they are."""
    out: dict[str, Tensor] = {}
    for name, old in params.items():
        new = old
        if f"sum/{name}" in total:
            new = total[f"sum/{name}"] / total[WEIGHT]
        elif f"gram/{name}" in total:
            product, gram = total[f"product/{name}"], total[f"gram/{name}"]
            if gram.dim() == 1:
                new = solve_energies(product, gram, old)
            else:
                new = solve_gram(product, gram, old if keep_unseen else None, precision=torch.float32)
        out[name] = new.to(old.dtype)
    return out


def stacked_factors(factors: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    """[A_0 G_0 Q⁺; …; A_T G_T Q⁺], (T·r, d), Q = Σ_t G_t: RegMean of products B_t A_t in low rank, beside [B_0 … B_T].

    Grams are energies (d,) or upper triangles, d(d+1)/2, float64; inputs that none has give 0.
    """
    dtype, total = factors[0].dtype, sum_in_order(grams)
    if len(total) == factors[0].shape[1]:
        product = torch.cat([a.double() * g for a, g in zip(factors, grams, strict=True)])
        return solve_energies(product, total, torch.zeros_like(product)).to(dtype)
    product = torch.cat([a.double() @ from_upper_triangle(g) for a, g in zip(factors, grams, strict=True)])
    return solve_gram(product, from_upper_triangle(total), precision=dtype).to(dtype)


def received_gram(member: Member, name: str) -> Tensor | None:
    """The Gram that came for a map, float64: (I, I), or its diagonal (I,). None if there is none.

    Raises AggregationError when a map that needs one came without.
    """
    for form in ("projected", "full", "diagonal"):
        sent = member.statistics.get(f"gram.{form}/{name}")
        if sent is not None:
            return from_upper_triangle(sent.double()) if form == "full" else sent.double()
    if name == HEAD_WEIGHT or name.endswith((LORA_A, LORA_B)):
        raise AggregationError(
            f"{member.who} sent '{name}' without its gram statistic: the plan of this rule must reach the clients"
        )
    return None


def resolve_form(form: str, decay: float) -> str:
    """diagonal or full; `auto` is diagonal when nothing but the diagonal is left."""
    require_choice("form", form, ("auto", "diagonal", "full"))
    if form == "diagonal" and decay != 0:
        raise ConfigError(f"decay must be 0 with form: diagonal (it keeps no off-diagonals), got {decay}")
    return form if form != "auto" else "diagonal" if decay == 0 else "full"


def require_in_unit(key: str, value: float) -> None:
    """Raise ConfigError unless the value is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{key} must be in [0, 1], got {value}")


def require_ridge(ridge: float) -> None:
    """Raise ConfigError unless the ridge is 0 or more."""
    if not ridge >= 0:
        raise ConfigError(f"ridge must not be negative, got {ridge}")
