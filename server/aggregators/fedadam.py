"""FedAdam: Adam on the server (Reddi et al. 2021, "Adaptive federated optimization")."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fedsim.core.errors import require_choice
from server.aggregators import _server_optimizer
from server.aggregators._server_optimizer import require_beta

EXPONENTS = {"adam": 0, "flower": 1}  # beyond the round


@dataclass(frozen=True)
class Aggregator(_server_optimizer.Adaptive):
    """v⁺ = β₂ v + (1 − β₂) Δ², m⁺ = β₁ m + (1 − β₁) Δ, w⁺ = w + η m⁺ / (√v⁺ + τ), every number by itself, m_0 = 0.
    Δ = Σ_i p_i w_i − w, see `ServerOptimizer`.

    A number moves by about η in every round, whatever the size of its Δ, as long as that is far above τ.
    beta1, beta2: published 0.9 and 0.99. lr: η, which the paper tunes from 1e-3 to 10 (Flower: 0.1). tau: τ, published 1e-3.
    v0: where v starts; null: τ², the least that the paper allows (Flower: 0). bias_correction: none, as in the paper | adam,
    η times √(1 − β₂ᵗ) / (1 − β₁ᵗ) in the t-th round (Kingma & Ba, with v0: 0) | flower, the same with t + 1, as Flower has it.
    weights: p_i by samples | uniform. reset_on_task: false keeps the moments over tasks. What travels is as with FedAvg.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"v0": 0.0, "bias_correction": "adam", "weights": "uniform"},
        {"reset_on_task": False, "bias_correction": "flower"},
    )

    beta2: float = 0.99
    bias_correction: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_beta("beta2", self.beta2)
        require_choice("bias_correction", self.bias_correction, ("none", *EXPONENTS))

    def rate(self, round: int) -> float:
        if self.bias_correction == "none":
            return self.lr
        t = round + EXPONENTS[self.bias_correction]
        return self.lr * math.sqrt(1 - self.beta2**t) / (1 - self.beta1**t)

    def second(self, v: Tensor, squared: Tensor) -> Tensor:
        return self.beta2 * v + (1 - self.beta2) * squared
