"""Server optimisers: the mean of a round is not taken over, it is a direction in which the server steps (Reddi et al. 2021,
"Adaptive federated optimization")."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import OUTSIDE_SPAN, UNIFORM_MEAN, UNIFORM_SUM, Traits, holding
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import ClientUpdate, State, Tensors
from server.merging import mean

REMEMBERS = "rule remembers tasks"
Moments = Mapping[str, Tensor]


@dataclass(frozen=True)
class ServerOptimizer(contracts.AdditiveAggregator):
    """w⁺ = w + step(Δ), Δ = Σ_i p_i w_i − w, tensor by tensor, from a sum over clients. −Δ is called the pseudo-gradient.

    A number of a LoRA factor has moments of its own, as every other number has: they are about factors, not products.
    Moments are float64. They live for a task, or for the run (`reset_on_task`: false); tensors that nobody trained in a round
    stay as they are, and so do their moments. Asks for no statistics. Raises AggregationError when nobody sent an update or
    nobody holds samples.

    lr: η. weights: p_i by `samples` (published codes), or `uniform` over those that hold samples (the paper's algorithm; then it
    goes with the noise of `clip_noise`). reset_on_task: moments of the last task point at its classes; without a reset they go on
    by name, be it that a consolidator starts a fresh module or not.
    State: name -> how often the tensor was trained (`rounds`), and its moments.
    """

    lr: float = 1e-2
    weights: str = "samples"
    reset_on_task: bool = True

    def __post_init__(self) -> None:
        require_choice("weights", self.weights, ("samples", "uniform"))
        if not self.lr > 0:
            raise ConfigError(f"lr must be above 0, got {self.lr}")
        own = {} if self.is_mean else dict.fromkeys(("fixed_point", "one_client"), "goes a step of its own size from w")
        if self.weights == "uniform":
            own["weights"] = "every client counts once, whatever the number of its samples"
        object.__setattr__(self, "exempt", own)  # of this object: which laws hold depends on the options

    @property
    def is_mean(self) -> bool:
        """Whether step(Δ) = Δ with these options: the rule is the mean."""
        return False

    @property
    def traits(self) -> Traits:
        uniform = self.weights == "uniform"
        words = {UNIFORM_SUM: uniform, UNIFORM_MEAN: uniform and self.is_mean, REMEMBERS: not self.reset_on_task}
        return Traits(gives=holding(words))

    @abstractmethod
    def first(self, delta: Tensor) -> Moments:
        """Moments of a tensor before it was trained."""

    @abstractmethod
    def step(self, delta: Tensor, moments: Moments, round: int) -> tuple[Tensor, Moments]:
        """step(Δ) and the new moments, float64. round: how often the tensor has been trained, this time included."""

    def next_task(self, state: State, params: Tensors, task: int) -> State:
        if self.reset_on_task:
            return self.init(params, task)
        fits = {n: all(t.shape == params[n].shape for t in kept["moments"].values()) for n, kept in state.items() if n in params}
        return {name: state[name] for name, same in fits.items() if same}

    def lift(self, update: ClientUpdate) -> dict[str, Tensor]:
        return mean.lift(update.params, float(update.num_samples if self.weights == "samples" else update.num_samples > 0))

    def finish(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> tuple[State, Tensors]:
        kept, out = dict(state), dict(params)
        for name in (n for n in params if n in total):
            clients = total[name] / total[mean.WEIGHT]
            delta = clients - params[name].double()
            before = kept.get(name) or {"rounds": 0, "moments": self.first(delta)}
            step, moments = self.step(delta, before["moments"], before["rounds"] + 1)
            kept[name] = {"rounds": before["rounds"] + 1, "moments": dict(moments)}
            out[name] = (clients + (step - delta)).to(params[name].dtype)  # w + step, and the mean's own bits if step is Δ
        return kept, out


@dataclass(frozen=True)
class Adaptive(ServerOptimizer):
    """step(Δ) = η m / (√v + τ), m = β₁ m + (1 − β₁) Δ, m_0 = 0, every number by itself; v is what the rules differ in.

    tau: τ, how much a number may be adapted: the smaller, the more alike all steps are. v0: where v starts; null: τ², the least
    that the paper allows (published codes, Flower's among them, start from 0).
    """

    beta1: float = 0.9
    tau: float = 1e-3
    v0: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_beta("beta1", self.beta1)
        if not self.tau > 0:
            raise ConfigError(f"tau must be above 0, got {self.tau}")
        if self.v0 is not None and not self.v0 >= 0:
            raise ConfigError(f"v0 must not be negative (null: tau²), got {self.v0}")

    @abstractmethod
    def second(self, v: Tensor, squared: Tensor) -> Tensor:
        """The new v. squared: Δ²."""

    def rate(self, round: int) -> float:
        """η of a round."""
        return self.lr

    @property
    def traits(self) -> Traits:
        return Traits(gives={*super().traits.gives, OUTSIDE_SPAN})

    def first(self, delta: Tensor) -> Moments:
        return {"m": torch.zeros_like(delta), "v": torch.full_like(delta, self.tau**2 if self.v0 is None else self.v0)}

    def step(self, delta: Tensor, moments: Moments, round: int) -> tuple[Tensor, Moments]:
        m = self.beta1 * moments["m"] + (1 - self.beta1) * delta
        v = self.second(moments["v"], delta.square())
        return self.rate(round) * m / (v.sqrt() + self.tau), {"m": m, "v": v}


def require_beta(key: str, value: float) -> None:
    """Raise ConfigError unless the value is in [0, 1)."""
    if not 0 <= value < 1:
        raise ConfigError(f"{key} must be in [0, 1), got {value}")
