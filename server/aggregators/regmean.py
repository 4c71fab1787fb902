"""RegMean: linear maps merged in closed form (Jin et al. 2023, "Dataless knowledge fusion by merging weights of language
models").

Shapes: O outputs, I inputs of a linear map (weight_OI, gram_II = Σ x xᵀ over its inputs).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedsim.core import contracts
from fedsim.core.contracts import OUTSIDE_SPAN, Member, Traits
from fedsim.core.messages import ClientUpdate, RoundPlan, State, Tensors
from server.merging.regmean import Merging


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
        self._merging()  # checks the options

    @property
    def traits(self) -> Traits:
        return Traits(gives={OUTSIDE_SPAN})

    def plan(self, state: State, round: int) -> RoundPlan:
        return RoundPlan(statistics=self._merging().asks())

    def lift(self, update: ClientUpdate) -> Tensors:
        return self._merging().lift(Member.client(update))

    def finish(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> tuple[State, Tensors]:
        return state, self._merging().finish(params, total, draw)

    def _merging(self) -> Merging:
        return Merging(self.decay, self.form, self.ridge)
