"""FedYogi: Yogi on the server (Reddi et al. 2021, "Adaptive federated optimization")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from server.aggregators import _server_optimizer
from server.aggregators._server_optimizer import require_beta


@dataclass(frozen=True)
class Aggregator(_server_optimizer.Adaptive):
    """v⁺ = v − (1 − β₂) Δ² sign(v − Δ²), m⁺ = β₁ m + (1 − β₁) Δ, w⁺ = w + η m⁺ / (√v⁺ + τ), every number by itself, m_0 = 0.
    Δ = Σ_i p_i w_i − w, see `ServerOptimizer`.

    v changes by (1 − β₂) Δ² at most in a round, so that it forgets large steps slowly, where FedAdam's falls at once.
    beta1, beta2: published 0.9 and 0.99. lr: η, which the paper tunes from 1e-3 to 10 (Flower has 0.01). tau: τ, published 1e-3.
    v0: where v starts; null: τ², the least that the paper allows (Flower: 0).
    weights: p_i by samples | uniform. reset_on_task: false keeps the moments over tasks. What travels is as with FedAvg.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"v0": 0.0, "weights": "uniform"}, {"reset_on_task": False})

    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        require_beta("beta2", self.beta2)

    def second(self, v: Tensor, squared: Tensor) -> Tensor:
        return v - (1 - self.beta2) * squared * (v - squared).sign()
