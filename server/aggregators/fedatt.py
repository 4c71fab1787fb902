"""FedAtt: clients weighted by how far they went, tensor by tensor (Ji et al. 2019, "Learning private neural language modeling
with attentive aggregation").

Shapes: K clients with samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import OUTSIDE_SPAN, Traits
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import ClientUpdate, State, Tensors
from fedsim.core.tensors import sum_in_order

NORMS = ("spectral", "frobenius")


@dataclass(frozen=True)
class Aggregator(contracts.Aggregator):
    """w⁺ = w − step · Σ_i α_i (w − w_i) + noise · N(0, 1), α = softmax_i(‖w − w_i‖), each tensor with an α of its own.

    A client that went farther counts more; numbers of samples do not count. Clients without samples are left out, tensors that
    nobody trained stay as they are. Asks for no statistics. All updates are needed at once: the rule is not additive.

    step: ε, 1.2 in the authors' code (past the clients' mean). norm: of a matrix, spectral (the code's; its largest singular
    value) | frobenius (of its numbers); vectors have their Euclidean norm either way, tensors of more dimensions the Frobenius
    norm. noise: standard deviation of what is added to every trained number, 0 for none (the code has 1e-3; it is no guarantee of
    privacy).

    Raises AggregationError when nobody sent an update or nobody holds samples.
    """

    exempt: ClassVar[Mapping[str, str]] = {
        "weights": "clients are weighted by how far they went, not by numbers of samples",
        "fixed_point": "with the published step of 1.2 it goes past what all clients agree on",
        "one_client": "with the published step of 1.2 it goes past what the client sent",
    }
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"step": 1.0, "norm": "frobenius", "noise": 1e-6})

    step: float = 1.2
    norm: str = "spectral"
    noise: float = 0.0

    def __post_init__(self) -> None:
        require_choice("norm", self.norm, NORMS)
        if not self.step > 0:
            raise ConfigError(f"step must be positive, got {self.step}")
        if not self.noise >= 0:
            raise ConfigError(f"noise must not be negative, got {self.noise}")

    @property
    def traits(self) -> Traits:
        return Traits(gives={OUTSIDE_SPAN} if self.noise else ())

    def combine(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        updates = contracts.require_updates(updates)
        out = dict(params)
        for name in (n for n in params if n in updates[0].params):
            old = params[name].double()
            ways = [old - u.params[name].double() for u in updates]
            alpha_K = torch.softmax(torch.stack([self._distance(way) for way in ways]), dim=0)  # subtracts the largest itself
            new = old - self.step * sum_in_order([a * way for a, way in zip(alpha_K, ways, strict=True)])
            if self.noise:
                new = new + self.noise * torch.randn(new.shape, dtype=torch.float64, generator=draw)
            out[name] = new.to(params[name].dtype)
        return state, out

    def _distance(self, way: Tensor) -> Tensor:
        matrix = way.dim() == 2 and self.norm == "spectral"
        distance: Tensor = torch.linalg.matrix_norm(way, ord=2) if matrix else torch.linalg.vector_norm(way)
        return distance
