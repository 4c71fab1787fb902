"""The contrastive continual loss (C2) of Fed-CPrompt (Bagwe et al. 2023, "Fed-CPrompt: Contrastive prompt for rehearsal-free
federated continual learning"), for prompts of CODA-Prompt."""

# b samples of the client's own batch, D features

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clients.learners import _teacher
from fedsim.core import contracts
from fedsim.core.contracts import ClientWork, Context, LocalState, Step, Traits
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import Tensors

TRIPLET, INFONCE = "triplet", "infonce"


@dataclass(frozen=True)
class Learner(contracts.Learner):
    """Holds a sample's features f near to those of the model that the round began with, f_g (all clients then stay together), and
    away from those of the model that the last task ended with, f_p (prompts of tasks then differ). Added to the cross-entropy:

        triplet   λ · max(0, Σ_b (α ‖f − f_g‖² − β ‖f − f_p‖²) + m);   in a first task   λ · Σ_b α ‖f − f_g‖²
        infonce   λ · mean over b of −log(e^{s_g} / (e^{s_g} + e^{s_p})),   s = cos(f, f_·) / τ;   in a first task nothing

    It is 0 at the first step of a round of a first task. For f_p a client keeps the last task's tensors over the task. They come
    down once, and cost nothing where the task begins with them, as with consolidator none; up goes nothing more. A step costs two
    forward passes more.

    kind: triplet | infonce. weight: λ, 0 for nothing. positive, negative, margin: α, β, m; temperature: τ. Defaults are those of
    the published code, which works on features before the head. Its quirks, kept: the sum over the batch stands within the
    maximum, so that the loss grows with the batch; α is a hundred times β; with the triplet λ is 1, whatever its configs say
    (0.1). Not kept: its CODA-Prompt takes a softmax of A over the features. Its configs: Adam, lr 1e-4, cosine over 5 epochs,
    batches of 64, 10 clients, 40 rounds. The paper also has clients that are in different tasks at a time; here all are in the
    same.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (  # the laws take large steps, which α = 1000 would blow up
        {"positive": 1.0, "negative": 0.1},
        {"kind": "infonce", "weight": 0.1},
    )
    kind: str = TRIPLET
    weight: float = 1.0
    positive: float = 1e3
    negative: float = 1e1
    margin: float = 1.0
    temperature: float = 0.5

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, (TRIPLET, INFONCE))
        for key in ("weight", "positive", "negative", "margin"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"{key} must not be negative, got {getattr(self, key)}")
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be positive, got {self.temperature}")

    @property
    def traits(self) -> Traits:
        composed = "compares features with one model's, but what {other} deploys are the clients' models side by side"
        return Traits(needs=_teacher.NEEDS, refuses={"a module per client": f"{composed}: use another aggregator"})

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        return {"received": work.params, "last": _teacher.teacher(context)}

    def loss(self, state: LocalState, step: Step) -> Tensor | None:
        last, own = state["last"], step.own
        if not self.weight or (self.kind == INFONCE and last is None):
            return None
        features_bD, common_bD = step.features[own], step.model(state["received"]).features[own]
        past_bD = None if last is None else step.model(last).features[own]
        if self.kind == TRIPLET or past_bD is None:
            return self.weight * self._triplet(features_bD, common_bD, past_bD)
        return self.weight * infonce(features_bD, common_bD, past_bD, self.temperature)

    def _triplet(self, features_bD: Tensor, common_bD: Tensor, past_bD: Tensor | None) -> Tensor:
        near = self.positive * (features_bD - common_bD).square().sum()
        if past_bD is None:
            return near
        return F.relu(near - self.negative * (features_bD - past_bD).square().sum() + self.margin)


def infonce(features_bD: Tensor, near_bD: Tensor, far_bD: Tensor, temperature: float) -> Tensor:
    """The mean of −log(e^{s} / (e^{s} + e^{s'})), s = cos(f, near) / τ, s' = cos(f, far) / τ: softplus(s' − s)."""
    near_b, far_b = (F.cosine_similarity(features_bD, others, dim=-1) for others in (near_bD, far_bD))
    return F.softplus((far_b - near_b) / temperature).mean()
