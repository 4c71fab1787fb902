"""The Gaussian mechanism: every client's update is clipped, and noise is added once to the sum, so that no client stands out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from fedsim.core import contracts
from fedsim.core.contracts import OUTSIDE_SPAN, UNIFORM_SUM, Parcel, Traits
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.core.tensors import matching


@dataclass(frozen=True)
class Group:
    """Trained tensors that are clipped together. match: a glob over their names ("head.*"); clip: the bound of their norm."""

    match: str
    clip: float

    def __post_init__(self) -> None:
        if not self.match:
            raise ConfigError('match must be a glob such as "head.*"')
        if self.clip <= 0:
            raise ConfigError(f"clip must be positive, got {self.clip}")


@dataclass(frozen=True)
class Channel(contracts.Channel):
    """DP-FedAvg, for clients as a whole. Each sends, and the server makes of the sum over N clients with samples,

        Δ_i = w_i − w₀,    Δ̄_i = Δ_i · min(1, S / ‖Δ_i‖₂),    w⁺ = w₀ + (Σ_i Δ̄_i + z S n) / N,    n standard normal.

    clip: S, over all trained tensors together; null: nothing is clipped. groups: in its place, a bound S_g for each group of
    tensors, of which the first that matches decides; S² = Σ_g S_g². A group that decides for none is refused. noise: z, the
    noise's standard deviation in units of S. Norms are float64: ‖Δ̄_i‖ ≤ S (1 + 1e-6) for what is sent. The noise is added to the
    sum, in float64, from a generator with an address (seed, task, round): a simulation, no source of secrets.

    delta: δ of the promise that is printed.

    What is promised, with noise: let one client's updates be there or be zero, in all R rounds of the run. The merged tensors of
    all rounds are ρ-zCDP with ρ = R / (2 z²), whoever takes part, so (ε, δ)-DP with ε = ρ + 2 (ρ ln(1/δ))^½ (Bun & Steinke 2016).
    That clients are drawn (`server.participation`) makes it no smaller here: a bound for full participation. Not covered: N and
    who took part, the sizes of shards, statistics, and what the simulator itself looks at (losses, drift, failures).

    With noise the rule must add clients up with equal weights (fairavg): with weights by samples a client's part of the sum is
    n_i S, which no S bounds. No channel may come after it, and a statistic that clients send is refused, since it would be a
    release of its own. public: globs over names of statistics that travel all the same, without any protection.

    McMahan et al. 2018, "Learning differentially private recurrent language models", flat and per-layer clipping, with the noise
    on the sum; there clients are drawn one by one and the divisor is their expected number, here it is the number that took part.
    """

    clip: float | None = None
    groups: list[Group] = field(default_factory=list)
    noise: float = 0.0
    delta: float = 1e-5
    public: list[str] = field(default_factory=list)

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"clip": 0.5},
        {"clip": 0.5, "noise": 1.0},
        {"groups": [{"match": "head.*", "clip": 0.1}, {"match": "*", "clip": 0.5}], "noise": 2.0},
    )
    scales: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.clip is not None and self.clip <= 0:
            raise ConfigError(f"clip must be positive, got {self.clip}")
        if self.groups and self.clip is not None:
            raise ConfigError("clip and groups exclude each other: give each group its own clip")
        if self.noise < 0:
            raise ConfigError(f"noise must not be negative, got {self.noise}")
        if not 0 < self.delta < 1:
            raise ConfigError(f"delta must be in (0, 1), got {self.delta}")
        if self.noise and not math.isfinite(self.sensitivity):
            raise ConfigError("noise is in units of clip, which is not given: set clip, or a clip for each of groups")

    @property
    def sensitivity(self) -> float:
        """S: the most that one client can change the sum by, in the L2 norm; infinity where nothing is clipped."""
        if self.groups:
            return math.hypot(*(g.clip for g in self.groups))
        return math.inf if self.clip is None else self.clip

    def rho(self, rounds: int) -> float:
        """ρ of zero-concentrated differential privacy after so many rounds; infinity without noise."""
        return rounds / (2 * self.noise**2) if self.noise else math.inf

    def epsilon(self, rounds: int) -> float:
        """ε at δ = `delta` after so many rounds; infinity without noise."""
        rho = self.rho(rounds)
        return rho + 2 * math.sqrt(rho * math.log(1 / self.delta))

    @property
    def covers(self) -> Sequence[str]:
        return self.public if self.noise else ("*",)

    @property
    def receives(self) -> bool:
        return self.noise > 0

    @property
    def last(self) -> str:
        return "what it clips must not grow any more, or its noise is too little" if self.noise else ""

    @property
    def traits(self) -> Traits:
        if not self.noise:
            return Traits()
        weighed = (
            "adds noise for a sum in which every client counts the same, but {aggregator} weighs them (by samples, a client's "
            "part of the sum has no bound) or merges in another way: use aggregator fairavg, or noise: 0"
        )
        several = "adds noise to one sum over all tensors, which a list of rules does not make: use one rule, or noise: 0"
        return Traits(gives={OUTSIDE_SPAN}, needs={UNIFORM_SUM: weighed}, refuses={"several rules": several})

    def suits(self, trained: Sequence[str], rounds: int, clients: int) -> tuple[str, ...]:
        idle = [g.match for g, (names, _) in zip(self.groups, self._members(trained), strict=False) if not names]
        if idle:
            raise ConfigError(
                f"server.channel: clip_noise has a group '{idle[0]}' that decides for no trained tensor, and its bound would "
                "make the noise larger for nothing: correct the glob, or leave the group out"
            )
        if not self.noise:
            return ()
        lost = f", nor statistics ({', '.join(self.public)})" if self.public else ""
        return (
            f"clip_noise: ρ = {self.rho(rounds):.4g} (zCDP), ε = {self.epsilon(rounds):.4g} at δ = {self.delta:g}, for one "
            f"client's updates, there or zero, in the merged tensors of {rounds} rounds, as if all clients took part in every "
            f"round; the numbers of clients and samples, losses and drift are not covered{lost}",
        )

    def send(self, start: Tensors, parcel: Parcel, memory: Tensors, draw: torch.Generator) -> tuple[Parcel, Tensors]:
        delta = dict(parcel.delta)
        for names, clip in self._members([*delta]):
            norm = _norm({n: delta[n] for n in names})
            if norm > clip:
                delta |= {n: (delta[n].double() * (clip / norm)).to(delta[n].dtype) for n in names}
        return replace(parcel, delta=delta), memory

    def receive(self, start: Tensors, total: Tensors, clients: int, draw: torch.Generator) -> Tensors:
        std, names = self.noise * self.sensitivity, [n for n in total if n in start]
        noise = {n: std * torch.randn(total[n].shape, generator=draw, dtype=torch.float64) for n in names}
        return {**total, **{n: total[n] + noise[n] for n in names}}

    def bound(self, delta: Tensors) -> float:
        """(Σ_groups max(0, ‖Δ_g‖ − S_g)²)^½."""
        excess = (max(0.0, _norm({n: delta[n] for n in names}) - clip) for names, clip in self._members([*delta]))
        return math.hypot(*excess)

    def _members(self, trained: Sequence[str]) -> list[tuple[list[str], float]]:
        """The groups' tensors and bounds. Raises ConfigError for a tensor in none of them."""
        if not self.groups:
            return [([*trained], self.sensitivity)]
        deciders = {n: next((k for k, g in enumerate(self.groups) if matching([n], [g.match])), None) for n in trained}
        free = [n for n, k in deciders.items() if k is None]
        if free:
            raise ConfigError(
                f"server.channel: clip_noise has no group for '{free[0]}', so nothing bounds it: add a last one with match '*'"
            )
        return [([n for n in trained if deciders[n] == k], g.clip) for k, g in enumerate(self.groups)]


def _norm(tensors: Tensors) -> float:
    """‖·‖₂ over all numbers, in float64."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))
