"""FedAdagrad: Adagrad on the server (Reddi et al. 2021, "Adaptive federated optimization")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from server.aggregators import _server_optimizer


@dataclass(frozen=True)
class Aggregator(_server_optimizer.Adaptive):
    """v⁺ = v + Δ², m⁺ = β₁ m + (1 − β₁) Δ, w⁺ = w + η m⁺ / (√v⁺ + τ), every number by itself, m_0 = 0.
    Δ = Σ_i p_i w_i − w, see `ServerOptimizer`.

    v only grows: steps shrink with the rounds, as 1/√t where Δ stays the same; with `reset_on_task` in every task anew.
    beta1: published 0, as in Flower (m = Δ). lr: η, which the paper tunes from 1e-3 to 10 (Flower: 0.1). tau: τ, published 1e-3.
    v0: where v starts; null: τ², the least that the paper allows (Flower: 0).
    weights: p_i by samples | uniform. reset_on_task: false keeps the moments over tasks. What travels is as with FedAvg.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"beta1": 0.9, "v0": 0.0, "weights": "uniform"},
        {"reset_on_task": False},
    )

    beta1: float = 0.0

    def second(self, v: Tensor, squared: Tensor) -> Tensor:
        return v + squared
