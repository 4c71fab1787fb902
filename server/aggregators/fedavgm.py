"""FedAvgM: momentum on the server (Hsu et al. 2019, "Measuring the effects of non-identical data distribution for federated
visual classification")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from server.aggregators import _server_optimizer
from server.aggregators._server_optimizer import Moments, require_beta


@dataclass(frozen=True)
class Aggregator(_server_optimizer.ServerOptimizer):
    """v⁺ = β v + Δ, w⁺ = w + η v⁺, v_0 = 0; Nesterov: w⁺ = w + η (Δ + β v⁺). Δ = Σ_i p_i w_i − w, see `ServerOptimizer`.

    momentum: β, published 0.9 among others; 0 with lr 1 is FedAvg, bit for bit. lr: η, published 1. nesterov: as in torch's SGD,
    which a known code of baselines (FL-bench) steps by; Flower has none.
    weights: p_i by samples | uniform. reset_on_task: false keeps the moments over tasks. What travels is as with FedAvg.
    With a constant Δ the step tends to η Δ / (1 − β), ten times FedAvg's with 0.9: take smaller rates for clients, or lr 0.1.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"nesterov": True, "lr": 0.5, "weights": "uniform"},
        {"momentum": 0.0},
        {"reset_on_task": False},
    )

    lr: float = 1.0
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_beta("momentum", self.momentum)

    @property
    def is_mean(self) -> bool:
        return self.momentum == 0 and self.lr == 1

    def first(self, delta: Tensor) -> Moments:
        return {"v": torch.zeros_like(delta)} if self.momentum else {}

    def step(self, delta: Tensor, moments: Moments, round: int) -> tuple[Tensor, Moments]:
        if not self.momentum:
            return self.lr * delta, {}
        v = self.momentum * moments["v"] + delta
        return self.lr * (delta + self.momentum * v if self.nesterov else v), {"v": v}
