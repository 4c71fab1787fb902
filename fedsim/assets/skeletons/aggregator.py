"""NAME: one line that says what it computes, and the paper (authors, year, "title").

Hold it against the laws of its kind, then use it:

    fedsim check ./NAME.py
    fedsim run quickstart server.aggregator=./NAME.py
    fedsim run quickstart 'server.aggregator={name: ./NAME.py, power: 0.5}'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedsim import AdditiveAggregator, ClientUpdate, State, Tensors
from fedsim.core.errors import ConfigError


@dataclass(frozen=True)
class Aggregator(AdditiveAggregator):
    """w⁺ = Σ n_i^power w_i / Σ n_i^power. Say here what travels, what happens without data, and what is yours.

    power: of the clients' numbers of samples; 1 is FedAvg, 0 the uniform mean.

    A rule that must see all clients at once (a median) derives from `fedsim.Aggregator`, with `combine` in the place of `lift`
    and `finish`.
    """

    # Fields are the options of the YAML. `examples` are those under which `fedsim check` holds it against the laws.
    power: float = 1.0
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    def __post_init__(self) -> None:
        if not self.power >= 0:
            raise ConfigError(f"power must not be negative, got {self.power}")

    def lift(self, update: ClientUpdate) -> Tensors:
        """One client's term of the sum, beside the client. `params`: what it trained; `statistics`: what `plan` asks for."""
        weight = torch.tensor(update.num_samples**self.power if update.num_samples else 0.0, dtype=torch.float64)
        return {**{name: t.double() * weight for name, t in update.params.items()}, "weight": weight}

    def finish(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> tuple[State, Tensors]:
        """The new state and all parameters, from the sum. `params`: the server's own; who draws, draws from `draw`."""
        merged = {n: (total[n] / total["weight"]).to(t.dtype) if n in total else t for n, t in params.items()}
        return state, merged
