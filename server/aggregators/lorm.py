"""LoRM: LoRA factors merged in closed form, one factor per round (Salami et al. 2025, "Closed-form merging of
parameter-efficient modules for federated continual learning").

Shapes: O outputs, I inputs, R rank (A_RI, B_OR, gram_II).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import OUTSIDE_SPAN, Member, Traits
from fedsim.core.errors import AggregationError, ConfigError, require_choice
from fedsim.core.messages import ClientUpdate, RoundPlan, State, StatisticRequest, Tensors
from fedsim.core.names import HEAD_WEIGHT
from fedsim.core.tensors import LORA_A, LORA_B, from_upper_triangle
from server.merging._factors import factor_of, require_pairs
from server.merging.regmean import (
    finish_linear,
    gram_request,
    lift_linear,
    require_in_unit,
    require_ridge,
    resolve_form,
)


@dataclass(frozen=True)
class Aggregator(contracts.AdditiveAggregator):
    """Trains and merges B in one round and A in the next, so that each merge is the unique least-squares fit of all clients.

    B-round (A common):  B⁺ = (Σ B_i M_i)(Σ M_i)⁺,  M_i = A Ĝ_i Aᵀ (r, r)     minimises Σ ‖(B − B_i) A X_i‖²
    A-round (B common):  A⁺ = (Σ A_i Ĝ_i)(Σ Ĝ_i)⁺                             minimises Σ ‖B (A − A_i) X_i‖²
    head, every round:   H⁺ = (Σ H_i Ĝ_i)(Σ Ĝ_i)⁺ with the Gram of the features; its bias by FedAvg.
    Ĝ_i = decay·G_i + (1 − decay)·diag(G_i) of the layer's inputs, from a pass through the mean of past modules and the
    client's own (blended). With the published decay 0 an A-round is the mean of columns weighted by feature energies.
    Asks for `gram`: M_i in B-rounds, d energies a layer (or d(d+1)/2 numbers) in A-rounds, the head's triangle in both.

    train: alternate | A | B (only that factor, every round; A for pairs whose B does not start at zero, see `rolora`). start: the
    factor of a task's first round: with A, and B at zero, the head alone learns in it.
    decay, head_decay: of the off-diagonals, in [0, 1]. form: of the Gram in A-rounds: full | diagonal | auto (diagonal when
    decay is 0 and gram is projected). gram: projected (only M_i travels in B-rounds) | full (d×d Grams in every round: the
    same result, dearer). keep_unseen: W_0 + (Σ (W_i − W_0) Ĝ_i)(Σ Ĝ_i)⁺, which keeps the server's W_0 in directions that no
    client's data has, where the reference form puts zero. ridge: adds ridge · mean(diag Ĝ_i) to every client's diagonal.
    Inputs without any energy keep the server's column in the diagonal form. Groups without LoRA or without a head are fine.
    Raises AggregationError when nobody sent an update or nobody holds samples.
    """

    train: str = "alternate"
    start: str = "B"
    decay: float = 0.0
    head_decay: float = 0.5
    form: str = "auto"
    gram: str = "projected"
    keep_unseen: bool = False
    ridge: float = 0.0
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"start": "A", "decay": 0.5, "keep_unseen": True},
        {"gram": "full", "decay": 1.0},
        {"train": "B", "ridge": 1e-3, "head_decay": 0.0},
    )

    def __post_init__(self) -> None:
        require_choice("train", self.train, ("alternate", "A", "B"))
        require_choice("start", self.start, ("A", "B"))
        require_choice("gram", self.gram, ("projected", "full"))
        resolve_form(self.form, self.decay)
        require_in_unit("decay", self.decay)
        require_in_unit("head_decay", self.head_decay)
        require_ridge(self.ridge)
        if self.gram == "full" and (self.ridge or self.form == "diagonal"):
            raise ConfigError("gram must be 'projected' with a ridge or with form: diagonal, got 'full'")

    @property
    def traits(self) -> Traits:
        return Traits(gives={OUTSIDE_SPAN})

    def init(self, params: Tensors, task: int = 0) -> State:
        """Raises ConfigError when an adapter's tensor is no LoRA factor."""
        require_pairs(params, "lorm")
        return {}

    def phase(self, round: int) -> str:
        """The factor that is trained in a round (0-based) of the task: "A" or "B"."""
        return factor_of(round, self.train, self.start)

    def plan(self, state: State, round: int) -> RoundPlan:
        phase = self.phase(round)
        head = gram_request((HEAD_WEIGHT,), resolve_form("auto", self.head_decay), self.head_decay, blended=True)
        return RoundPlan(train=(f"*.lora_{phase}", "head.*"), statistics=(*self._adapter_grams(phase), head))

    def _adapter_grams(self, phase: str) -> tuple[StatisticRequest, ...]:
        if phase == "A":
            form = "full" if self.gram == "full" else resolve_form(self.form, self.decay)
            return (gram_request(("*" + LORA_A,), form, self.decay, blended=True),)
        if self.gram == "projected":
            return (gram_request(("*" + LORA_B,), "projected", self.decay, blended=True),)
        cross = gram_request(("*" + LORA_B,), "cross", self.decay, blended=True)
        return cross, gram_request(("*" + LORA_A,), "full", self.decay, blended=True)

    def lift(self, update: ClientUpdate) -> dict[str, Tensor]:
        if self.gram == "projected":
            return lift_linear(Member.client(update), self.ridge)
        wide = [n for n in update.params if n.endswith(LORA_B)]
        rest = {n: t for n, t in update.params.items() if n not in wide}
        out = lift_linear(Member.client(replace(update, params=rest)))
        for name in wide:
            cross_RI, triangle = _wide_grams(update, name)
            out[f"wide_product/{name}"] = update.params[name].double() @ cross_RI
            out[f"wide_gram/{name}"] = from_upper_triangle(triangle)
        return out

    def finish(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> tuple[State, Tensors]:
        total = dict(total)
        for name in [n.removeprefix("wide_gram/") for n in total if n.startswith("wide_gram/")]:
            a_RI = params[name.removesuffix(LORA_B) + LORA_A].double()
            total[f"product/{name}"] = total[f"wide_product/{name}"] @ a_RI.T
            total[f"gram/{name}"] = a_RI @ total[f"wide_gram/{name}"] @ a_RI.T
        return state, finish_linear(params, total, self.keep_unseen)


def _wide_grams(update: ClientUpdate, name: str) -> tuple[Tensor, Tensor]:
    """`A Ĝ_i` (r, d) and the upper triangle of Ĝ_i, float64, of the layer that a lora_B belongs to."""
    keys = f"gram.cross/{name}", f"gram.full/{name.removesuffix(LORA_B)}{LORA_A}"
    for key in keys:
        if key not in update.statistics:
            raise AggregationError(
                f"client {update.client_id} sent '{name}' without '{key}': the plan of this rule must reach the clients"
            )
    return update.statistics[keys[0]].double(), update.statistics[keys[1]].double()
