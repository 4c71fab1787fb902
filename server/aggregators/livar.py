"""LIVAR: LoRA layers weighted by the training's own signals, head rows by the spread of their class ("Intrinsic training
signals for federated learning aggregation", arXiv 2507.06813).

Shapes: K clients with samples, L LoRA layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import Traits
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import ClientUpdate, RoundPlan, State, StatisticRequest, Tensors
from fedsim.core.names import HEAD_WEIGHT
from fedsim.core.tensors import LORA_A, LORA_B, lora_layers, stack_modules, sum_in_order, weighted
from server.aggregators import variance_weighted

HEAD = variance_weighted.Aggregator()  # what merges the head's rows, and what is no LoRA pair beside them
A_QUANTILES, B_QUANTILES = (0.25, 0.50), (0.60, 0.80)
SCORES = (  # of a client on a layer; columns: s^A low, middle, high; rows: s^B low, middle, high
    (0.03813978, 0.03813978, 0.03813978),
    (0.09813978, 0.08813978, 0.07813978),
    (0.19313978, 0.11813978, 0.09313978),
)


@dataclass(frozen=True)
class Aggregator(contracts.Aggregator):
    """A⁺_ℓ = Σ_i ω_iℓ A_iℓ, B⁺_ℓ = Σ_i ω_iℓ B_iℓ, ω_iℓ = score_iℓ / Σ_j score_jℓ; head rows by spread; the rest by FedAvg.

    score_iℓ is read from the authors' table (the outcome of an offline SHAP study): s^A below the 25 %, up to the 50 %, above
    the 50 % quantile against s^B below the 60 %, up to the 80 %, above the 80 % quantile. Much movement in B with little in A
    scores highest. Quantiles pool all clients and layers, so the rule is not additive: it needs every client's update at once.
    s^A_iℓ, s^B_iℓ: the statistic `path_integral` of the layer's two factors over the client's local steps.
    Head: H⁺[c] = Σ_i v_ic H_i[c] / Σ_j v_jc with v_ic the spread of class c, as `variance_weighted` says; its bias alike.
    Asks for `path_integral` (2 numbers a layer) and `class_moments` in scalar form (2 numbers a class), each if the rule's
    tensors have layers, or the head's weight.

    signal: movement | gradient, see `path_integral`.
    cumulative: signals are summed over the rounds of a task, client by client. The reference does so (it never resets them);
    our default takes each round's own.
    evaluated: merged | products. What is evaluated and handed to the consolidator: the merged factors, or Σ_i p_i B_iℓ A_iℓ with
    p_i = n_i / n, as one LoRA of rank K·r. The reference evaluates the latter and starts the next round from the former.
    total_weights_sum: ω is divided by it (the reference's knob; anything but 1 scales A and B).

    Not copied from the reference: it takes v_ic from the bare backbone on images that are not normalised, so that the head's
    weights never change; here they come from the client's own module, blended with those of past tasks where that is deployed, on
    inputs as in testing. Clients without samples count nowhere, not in the quantiles either. A layer on which some signal is not
    finite falls back to p_i.
    The reference has no task stream (it runs one task). Here every task begins with fresh signals and any consolidator will do.
    Prompts and single factors have no layer signals: they are averaged by samples. Without a head's weight, the bias too.

    State: `layers`, `head`, `signals` (cumulative: client id -> (2, L)), `factors` and `shares` (products: the last round's).
    Raises ConfigError when its tensors hold neither LoRA pairs nor the head's weight, and AggregationError when nobody sent an
    update, nobody holds samples or a statistic is missing.
    """

    exempt: ClassVar[Mapping[str, str]] = {
        "weights": "layers are weighted by signals of the training and rows by the spread of their class, not by samples"
    }
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"signal": "gradient", "cumulative": True, "evaluated": "products"},
    )

    signal: str = "movement"
    cumulative: bool = False
    evaluated: str = "merged"
    total_weights_sum: float = 1.0

    def __post_init__(self) -> None:
        require_choice("signal", self.signal, ("movement", "gradient"))
        require_choice("evaluated", self.evaluated, ("merged", "products"))
        if not self.total_weights_sum > 0:
            raise ConfigError(f"total_weights_sum must be above 0, got {self.total_weights_sum}")

    @property
    def traits(self) -> Traits:
        return Traits(gives={"other tensors deployed"} if self.evaluated == "products" else ())

    def init(self, params: Tensors, task: int = 0) -> State:
        layers = lora_layers(params)
        if not layers and HEAD_WEIGHT not in params:
            raise ConfigError(
                f"livar weighs LoRA layers and the rows of '{HEAD_WEIGHT}', and its tensors hold neither: give them name: fedavg"
            )
        if self.evaluated == "products" and not layers:
            raise ConfigError("evaluated: products is about pairs of LoRA factors, and there are none: use evaluated: merged")
        return {"layers": layers, "head": HEAD_WEIGHT in params, "signals": {}, "factors": [], "shares": []}

    def plan(self, state: State, round: int) -> RoundPlan:
        signals = StatisticRequest("path_integral", ("*" + LORA_A, "*" + LORA_B), {"form": self.signal})
        asked = ((signals,) if state["layers"] else ()) + (HEAD.plan({}, round).statistics if state["head"] else ())
        return RoundPlan(statistics=asked)

    def combine(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        updates = contracts.require_updates(updates)
        counts_K = torch.tensor([float(u.num_samples) for u in updates], dtype=torch.float64)
        shares_K = counts_K / counts_K.sum()
        pairs = {p + factor: k for k, p in enumerate(state["layers"]) for factor in (LORA_A, LORA_B)}
        rest = [replace(u, params={n: t for n, t in u.params.items() if n not in pairs}) for u in updates]
        out = {**params, **self._rest(state, {n: t for n, t in params.items() if n not in pairs}, rest, shares_K, draw)}
        if not pairs:
            return state, out
        own = [self._signals(u, state["layers"]) for u in updates]
        if self.cumulative:
            before = state["signals"]
            own = [before[u.client_id] + s if u.client_id in before else s for u, s in zip(updates, own, strict=True)]
            state = {**state, "signals": before | {u.client_id: s for u, s in zip(updates, own, strict=True)}}
        signals_2KL = torch.stack(own, dim=1)
        weights_KL = layer_weights(signals_2KL[0], signals_2KL[1], shares_K) / self.total_weights_sum
        for name, layer in pairs.items():
            if name in updates[0].params:
                out[name] = _mean([u.params[name] for u in updates], weights_KL[:, layer])
        if self.evaluated == "products":
            factors = [{n: u.params.get(n, params[n]) for n in pairs} for u in updates]
            state = {**state, "factors": factors, "shares": shares_K.tolist()}
        return state, out

    def deployed(self, state: State, params: Tensors) -> Tensors:
        if not state["factors"]:
            return params
        return {**params, **stack_modules(state["factors"], state["shares"])}

    def _rest(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], shares_K: Tensor, draw: torch.Generator
    ) -> dict[str, Tensor]:
        """What is no LoRA pair: the head's rows by spread, the others by samples."""
        if not state["head"]:
            sent = [n for n in params if n in updates[0].params]
            return {n: _mean([u.params[n] for u in updates], shares_K) for n in sent}
        return dict(HEAD.combine({}, params, updates, draw)[1])

    def _signals(self, update: ClientUpdate, layers: Sequence[str]) -> Tensor:
        """s^A and s^B of every layer, (2, L)."""
        keys = [f"path_integral.{self.signal}/{p}{factor}" for factor in (LORA_A, LORA_B) for p in layers]
        return torch.stack([contracts.statistic(update, key).double() for key in keys]).view(2, len(layers))


def layer_weights(signal_a_KL: Tensor, signal_b_KL: Tensor, shares_K: Tensor) -> Tensor:
    """ω (K, L), every column summing to 1: scores over their sum, or `shares_K` on layers with a signal that is not finite."""
    finite_L = (torch.isfinite(signal_a_KL) & torch.isfinite(signal_b_KL)).all(dim=0)
    if not bool(finite_L.any()):
        return shares_K[:, None].expand_as(signal_a_KL)
    level_a, level_b = _levels(signal_a_KL, finite_L, A_QUANTILES), _levels(signal_b_KL, finite_L, B_QUANTILES)
    score_KL = torch.tensor(SCORES, dtype=torch.float64)[level_b, level_a]
    return torch.where(finite_L, score_KL / score_KL.sum(dim=0), shares_K[:, None])


def _levels(signal_KL: Tensor, finite_L: Tensor, quantiles: tuple[float, float]) -> Tensor:
    """0 strictly below the first quantile, 2 strictly above the second, 1 between; of all clients and layers together."""
    low, high = torch.quantile(signal_KL[:, finite_L].flatten(), torch.tensor(quantiles, dtype=torch.float64))
    level_KL: Tensor = 1 - (signal_KL < low).long() + (signal_KL > high).long()
    return level_KL


def _mean(tensors: Sequence[Tensor], weights_K: Tensor) -> Tensor:
    """Σ_i w_i t_i in float64, in the type that they came in."""
    return sum_in_order([weighted(t, w) for t, w in zip(tensors, weights_K, strict=True)]).to(tensors[0].dtype)
