"""Keeps every client's module and head as a source of its own and merges nothing (for À-la-carte Prompt Tuning, APT, Bowman et
al., 2023, arXiv:2302.07994).

Shapes: S sources, C classes, D features, H classes that a client holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import ONE_ROUND, Traits
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import ClientUpdate, RoundPlan, State, StatisticRequest, Tensors
from fedsim.core.names import HEAD_COUNT, HEAD_PROTOTYPES, HEAD_SCALE, HEAD_WEIGHT, SOURCE_CLIENT

WEIGHTINGS = ("prototypes", "uniform")


@dataclass(frozen=True)
class Aggregator(contracts.Aggregator):
    """Deploys all clients side by side, `ŷ = log Σ_s w_s(x) softmax_s(h_s(f_s(x)))`, and leaves the parameters as the task began.

    Clients train alone, once per task, from the same start. Deployed is every tensor with a leading axis of sources, clients in
    order of their ids; clients without samples are none. Beside them: `head.count` (S, C), samples of every class: a source's
    softmax runs over the classes that it holds, and it says nothing about others; `source.client` (S,), ids. The server's memory
    grows with the number of sources, a whole head and its prototypes each: nothing can be summed.

    Weights: a source knows its task's classes alone, so a uniform mean of softmaxes cannot tell tasks apart.
    prototypes (after APT-W): w = softmax_s(−min_c ‖f_s(x) − μ_sc‖² / (τ V_s)), μ_sc (`head.prototypes`) the means of the source's
    features over its classes, V_s = mean over its samples of ‖f_s − mean‖², which makes distances of sources comparable
    (`head.scale` holds τ V_s). All of it is the source's own, so that leaving one out changes no other. uniform (APT): w = 1/S.
    APT-W takes features of the bare backbone, of which clients send no statistics; prompts that start from its class token have
    features of their own near to them. V_s and the minimum are our choice.
    Asks for `class_moments`, C + 2HD numbers (form full), or 2C for uniform weights (form scalar).

    weighting: prototypes | uniform; temperature: τ, above 0: the smaller, the more the nearest source decides alone. They are
    options of this rule, because they decide what clients are asked for. Raises ConfigError when its tensors do not hold the
    head, AggregationError when nobody sent an update or nobody holds samples.
    """

    exempt: ClassVar[Mapping[str, str]] = {
        "fixed_point": "nothing is merged into the parameters: clients are deployed side by side, even if they are equal",
        "one_client": "a client that is alone is the only source; the parameters stay as the task began",
    }
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"weighting": "uniform"})
    weighting: str = "prototypes"
    temperature: float = 0.3

    def __post_init__(self) -> None:
        require_choice("weighting", self.weighting, WEIGHTINGS)
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be above 0, got {self.temperature}")

    @property
    def traits(self) -> Traits:
        return Traits(
            gives={"a module per client"},
            needs={
                "composes modules": "composes clients at inference, which {adapter} cannot: use adapter: apt, or a rule that "
                "merges",
                "composes heads": "keeps a head per client, of which {head} makes no prediction: use head: mixture",
                "keeps every module": "hands on one module per client, which {consolidator} cannot keep: use consolidator: "
                "compose",
            },
            refuses={
                "several rules": "keeps every client's tensors by themselves, so it cannot be one of a list in server.aggregator",
                **ONE_ROUND,
                "unlearning": "keeps what every client becomes by itself, as server.unlearning would: leave that out, fedsim "
                "unlearn needs nothing else",
                "calibrator": "keeps a head per client: there is no common one for {other} to repair",
            },
        )

    def init(self, params: Tensors, task: int = 0) -> State:
        if HEAD_WEIGHT not in params:
            raise ConfigError(
                f"collect keeps a head per client, and '{HEAD_WEIGHT}' is not among its tensors: let it have all of them"
            )
        return {}

    def plan(self, state: State, round: int) -> RoundPlan:
        form = "full" if self.weighting == "prototypes" else "scalar"
        return RoundPlan(statistics=(StatisticRequest("class_moments", (HEAD_WEIGHT,), {"form": form}),))

    def combine(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        """The sources of this round take the place of those of an earlier one."""
        contracts.require_updates(updates)
        updates = sorted((u for u in updates if u.num_samples), key=lambda u: u.client_id)
        sources = [{**params, **u.params, **self._described(u, params[HEAD_WEIGHT])} for u in updates]
        stacked = {n: torch.stack([source[n] for source in sources]) for n in sources[0]}
        return {"sources": stacked | {SOURCE_CLIENT: torch.tensor([u.client_id for u in updates])}}, params

    def deployed(self, state: State, params: Tensors) -> Tensors:
        """The sources; before the first merge there are none, and it is the parameters."""
        sources: Tensors = state["sources"] if state else params
        return sources

    def _described(self, update: ClientUpdate, like_CD: Tensor) -> dict[str, Tensor]:
        """What a source tells of its classes and features."""
        count_C = _sent(update, "count")
        if self.weighting == "uniform":
            return {HEAD_COUNT: count_C}
        held_C, mean_HD, variance_HD = count_C > 0, _sent(update, "mean").double(), _sent(update, "variance").double()
        n_H1 = count_C[held_C].double()[:, None]
        centre_D = (n_H1 * mean_HD).sum(0) / n_H1.sum()
        spread = (n_H1 * (mean_HD - centre_D).square() + (n_H1 - 1) * variance_HD).sum() / n_H1.sum()
        prototypes_CD = torch.zeros_like(like_CD)
        prototypes_CD[held_C] = mean_HD.to(like_CD.dtype)
        return {HEAD_COUNT: count_C, HEAD_PROTOTYPES: prototypes_CD, HEAD_SCALE: (self.temperature * spread).to(like_CD.dtype)}


def _sent(update: ClientUpdate, form: str) -> Tensor:
    return contracts.statistic(update, f"class_moments.{form}/{HEAD_WEIGHT}")
