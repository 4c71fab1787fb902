"""RegMean: linear maps merged in closed form (Jin et al. 2023, "Dataless knowledge fusion by merging weights of language
models").

Shapes: O outputs, I inputs of a linear map (weight_OI, gram_II = Σ x xᵀ over its inputs).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.errors import AggregationError, ConfigError, require_choice
from fedsim.core.messages import ClientUpdate, RoundPlan, State, StatisticRequest, Tensors
from fedsim.core.tensors import LORA_A, LORA_B, from_upper_triangle, weighted
from server.linalg import ridged, solve_energies, solve_gram

HEAD = "head.weight"
MAPS = ("*" + LORA_A, "*" + LORA_B, "adapter.*.weight")


@dataclass(frozen=True)
class Aggregator(contracts.AdditiveAggregator):
    """W⁺ = (Σ W_i Ĝ_i)(Σ Ĝ_i)⁺ for `head.weight`, `lora_A` and `lora_B`, and every linear layer of a backbone that is trained
    itself (adapter `full`); every other tensor (biases, norms, embeddings, prompts) by FedAvg.

    Ĝ_i = decay·G_i + (1 − decay)·diag(G_i), G_i = Σ x xᵀ over the inputs that client i's own model gives the map; those of a
    `lora_B` are A_i x, and it is their off-diagonals that decay (LoRM's decay those of x, before A). The head sees the features
    that will be deployed: where tasks are merged, those of a blend of past tasks' modules and the client's own. It minimises
    Σ_i ‖(W − W_i) X_i‖² (decay 1); clients with more samples weigh more by their Grams.
    Asks for `gram` of those maps: d(d+1)/2 numbers a map of d inputs, or d where the form is diagonal.

    decay: of the Gram's off-diagonals, in [0, 1]. form: full | diagonal | auto (diagonal when decay is 0).
    ridge: adds ridge · mean(diag Ĝ_i) to the diagonal of every client's Gram.
    Raises AggregationError when nobody sent an update or nobody holds samples. A singular Σ Ĝ_i is pseudo-inverted; an input
    that is zero for all clients keeps the server's column in the diagonal form.
    """

    decay: float = 0.5
    form: str = "auto"
    ridge: float = 0.0
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"decay": 0.0}, {"decay": 1.0, "ridge": 1e-3})

    def __post_init__(self) -> None:
        resolve_form(self.form, self.decay)
        require_in_unit("decay", self.decay)
        require_ridge(self.ridge)

    def plan(self, state: State, round: int) -> RoundPlan:
        form = resolve_form(self.form, self.decay)
        head = gram_request((HEAD,), form, self.decay, blended=True)
        return RoundPlan(statistics=(gram_request(MAPS, form, self.decay), head))

    def lift(self, update: ClientUpdate) -> dict[str, Tensor]:
        return lift_linear(update, self.ridge)

    def finish(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> tuple[State, Tensors]:
        return state, finish_linear(params, total)


def gram_request(match: tuple[str, ...], form: str, decay: float, blended: bool = False) -> StatisticRequest:
    """A request for `gram`, with every option written out."""
    return StatisticRequest("gram", match, {"form": form, "decay": decay}, blended)


def lift_linear(update: ClientUpdate, ridge: float = 0.0) -> dict[str, Tensor]:
    """One client's share of a RegMean, closed under +, in float64.

    `product/<name>` W_i Ĝ_i and `gram/<name>` Ĝ_i (energies (I,) in the diagonal form) for maps that come with a Gram;
    `sum/<name>` n_i w_i for the others; `num_samples`.
    """
    n = torch.tensor(float(update.num_samples), dtype=torch.float64)
    out = {"num_samples": n}
    for name, weight in update.params.items():
        gram = received_gram(update, name)
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
            new = total[f"sum/{name}"] / total["num_samples"]
        elif f"gram/{name}" in total:
            product, gram = total[f"product/{name}"], total[f"gram/{name}"]
            if gram.dim() == 1:
                new = solve_energies(product, gram, old)
            else:
                new = solve_gram(product, gram, old if keep_unseen else None, precision=old.dtype)
        out[name] = new.to(old.dtype)
    return out


def received_gram(update: ClientUpdate, name: str) -> Tensor | None:
    """The Gram that a client sent for a map, float64: (I, I), or its diagonal (I,). None if it sent none.

    Raises AggregationError when a map that needs one came without.
    """
    for form in ("projected", "full", "diagonal"):
        sent = update.statistics.get(f"gram.{form}/{name}")
        if sent is not None:
            return from_upper_triangle(sent.double()) if form == "full" else sent.double()
    if name == HEAD or name.endswith((LORA_A, LORA_B)):
        raise AggregationError(
            f"client {update.client_id} sent '{name}' without its gram statistic: the plan of this rule must reach the clients"
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
