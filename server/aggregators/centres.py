"""PILoRA's merge: class centres weighted by how near they are to all clients' features (Guo et al. 2024, "PILoRA: Prototype
guided incremental LoRA for federated class-incremental learning"; after the code of fed-mammoth)."""

# K clients with samples, C classes, H classes that a client tells of, D features

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import CENTRES, Traits, statistic
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate, RoundPlan, State, StatisticRequest, Tensors
from fedsim.core.names import HEAD_WEIGHT
from fedsim.core.sums import summed
from server.merging import mean

SHORTEST = 1e-300  # of summed distances, of which the inverse is taken


@dataclass(frozen=True)
class Aggregator(contracts.Aggregator):
    """Class by class, w_jc being client j's centre and μ_kc the mean of client k's features of the class, by their own modules:

        D_jc = Σ_k ‖w_jc − μ_kc‖  over the clients k that hold class c,   u_jc = 1 / D_jc, brought to [0, 1] over the clients j
        a_jc = softmax_j(u_jc / temperature),   w_c⁺ = Σ_j a_jc w_jc

    A class of which nobody tells, and one whose centres are all as near (a client alone: the reference divides 0 by 0), is the
    plain mean. Every other tensor is FedAvg's: Σ n_i w_i / Σ n_i. Alone it is PILoRA's whole merge; in a list of rules it may be
    that of `head.*`. A client with twice the samples has the same say in centres.

    temperature: of the softmax. more_than: of classes with more samples than this a client sends the mean. The reference's 5
    counts a sample once for every epoch of the round, so that with its ten epochs one sample is enough: as here.
    Asks for `class_moments` in the form mean: C + H D numbers. All updates are needed at once: the rule is not additive. Raises
    ConfigError when the head's centres are not among its tensors, and AggregationError when nobody holds samples.
    """

    exempt: ClassVar[Mapping[str, str]] = {"weights": "centres are weighted by distances, whatever the number of samples"}

    temperature: float = 0.2
    more_than: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be positive, got {self.temperature}")
        if self.more_than < 0:
            raise ConfigError(f"more_than must not be negative, got {self.more_than}")

    @property
    def traits(self) -> Traits:
        why = "weighs a head's rows by how near features are to them, which says nothing of {head}: use head: centres"
        return Traits(needs={CENTRES: why})

    def init(self, params: Tensors, task: int = 0) -> State:
        if HEAD_WEIGHT not in params:
            raise ConfigError(f"centres merges '{HEAD_WEIGHT}' by distances, which is not among its tensors: match \"head.*\"")
        return {}

    def plan(self, state: State, round: int) -> RoundPlan:
        return RoundPlan(statistics=(StatisticRequest("class_moments", (HEAD_WEIGHT,), {"form": "mean"}),))

    def combine(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        updates = contracts.require_updates(updates)
        others = [replace(u, params={n: t for n, t in u.params.items() if n != HEAD_WEIGHT}) for u in updates]
        out = mean.finish(params, summed(mean.lift(u.params, float(u.num_samples)) for u in others))
        if HEAD_WEIGHT in updates[0].params:
            centres_KCD = torch.stack([u.params[HEAD_WEIGHT].double() for u in updates])
            merged_CD = (self.weights(centres_KCD, updates)[:, :, None] * centres_KCD).sum(dim=0)
            out[HEAD_WEIGHT] = merged_CD.to(params[HEAD_WEIGHT].dtype)
        return state, out

    def weights(self, centres_KCD: Tensor, updates: Sequence[ClientUpdate]) -> Tensor:
        """a (K, C), summing to 1 over the clients."""
        distance_KC = centres_KCD.new_zeros(centres_KCD.shape[:2])
        for update in updates:
            count_C, mean_HD = (statistic(update, f"class_moments.{form}/{HEAD_WEIGHT}").double() for form in ("count", "mean"))
            told_C, told_H = count_C > self.more_than, count_C[count_C > 0] > self.more_than
            distance_KC[:, told_C] += (centres_KCD[:, told_C] - mean_HD[told_H]).norm(dim=2)
        near_KC = 1 / distance_KC.clamp_min(SHORTEST)
        least_C, most_C = near_KC.amin(dim=0), near_KC.amax(dim=0)
        scaled_KC = torch.where(most_C > least_C, (near_KC - least_C) / (most_C - least_C), 0.0)
        return (scaled_KC / self.temperature).softmax(dim=0)
