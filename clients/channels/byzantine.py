"""Byzantine clients: some of them send what they please in place of what they learned, so that robust rules have something to be
robust against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from fedsim.core import contracts
from fedsim.core.contracts import OUTSIDE_SPAN, Parcel, Traits
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import Tensors


@dataclass(frozen=True)
class Channel(contracts.Channel):
    """The clients that are named send, in every round, in place of their change Δ = w_i − w of the tensors that they trained

        attack: sign_flip   −factor · Δ
                scale       factor · Δ
                gaussian    factor · ‖Δ‖ / √P · n,   n standard normal, P numbers in all tensors together.

    They train honestly and know nothing of each other or of the rule. Their statistics, and their numbers of samples, are honest
    too: rules that weigh by them are attacked in the tensors alone. A rule that looks again, part after part
    (`chain_of_merges`), looks through the tensors that they sent. All others send what they learned.

    clients: their numbers, from 0; nobody by default. factor: above 0; with 1 a sign is flipped and nothing else, and noise is as
    long as the change. Sign flips and noise are those of the literature on robust rules (Blanchard et al. 2017 draw noise with a
    fixed standard deviation of 200); that noise is measured by the change is ours: a factor means the same for any model.
    The list of channels says when it happens: before clipping, what they send is clipped as with the others. Costs no bytes.
    """

    clients: list[int] = field(default_factory=list)
    attack: str = "sign_flip"
    factor: float = 1.0

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"clients": [0, 2], "factor": 10.0},
        {"clients": [0], "attack": "scale", "factor": 0.5},
        {"clients": [0], "attack": "gaussian", "factor": 3.0},
    )

    def __post_init__(self) -> None:
        require_choice("attack", self.attack, ("sign_flip", "scale", "gaussian"))
        if not self.factor > 0:
            raise ConfigError(f"factor must be above 0, got {self.factor}")
        if any(c < 0 for c in self.clients) or len(set(self.clients)) < len(self.clients):
            raise ConfigError(f"clients must be numbers of clients, from 0, each once, got {self.clients}")

    @property
    def traits(self) -> Traits:
        return Traits(gives={OUTSIDE_SPAN} if self.clients and self.attack == "gaussian" else ())

    @property
    def covers(self) -> Sequence[str]:
        return ("*",)

    def suits(self, trained: Sequence[str], rounds: int, clients: int) -> tuple[str, ...]:
        if self.clients and max(self.clients) >= clients:
            raise ConfigError(
                f"server.channel: byzantine names client {max(self.clients)}, but there are clients 0 to {clients - 1}"
            )
        if not self.clients:
            return ()
        names = ", ".join(map(str, sorted(self.clients)))
        return (f"byzantine: of {clients} clients {len(self.clients)} ({names}) send {self.attack}, factor {self.factor:g}",)

    def send(self, start: Tensors, parcel: Parcel, memory: Tensors, draw: torch.Generator) -> tuple[Parcel, Tensors]:
        if parcel.client_id not in self.clients or not parcel.delta:
            return parcel, memory
        if self.attack != "gaussian":
            factor = -self.factor if self.attack == "sign_flip" else self.factor
            return replace(parcel, delta={n: factor * t for n, t in parcel.delta.items()}), memory
        squares = sum(float(t.double().square().sum()) for t in parcel.delta.values())
        numbers = sum(t.numel() for t in parcel.delta.values())
        deviation = self.factor * (squares / max(1, numbers)) ** 0.5
        noise = {n: deviation * torch.randn(t.shape, generator=draw, dtype=t.dtype) for n, t in parcel.delta.items()}
        return replace(parcel, delta=noise), memory
