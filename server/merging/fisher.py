"""Fisher merging: every number's mean weighed by how much it matters (Matena & Raffel 2022, "Merging models with Fisher-weighted
averaging")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import Member
from fedsim.core.errors import AggregationError, ConfigError, require_choice
from fedsim.core.messages import StatisticRequest, Tensors

FORMS, CLASSES = ("likelihood", "empirical", "expected"), ("task", "seen")


@dataclass(frozen=True)
class Merging(contracts.AdditiveMerging):
    """θ⁺ = Σ_i F_i ⊙ θ_i / Σ_i F_i, number by number, F_i the diagonal of the Fisher information of member i's samples at θ_i.

    F_i sums over samples, so that who has more data counts more. Asks for `fisher`: as many numbers again as are merged. Over
    tasks, where LoRA pairs come as products, it is that of the layers' weights, m·d numbers for each layer: clients send them
    once, in a pass through the model that the task ended with (not through a blend: F_i belongs to θ_i).
    Where F is 0 for all, ε makes it the mean, by samples over clients [ours; the published codes add ε to every F alike].

    form: likelihood (as in fed-mammoth) | empirical | expected, see the statistic. classes: of its softmax, task (as in
    fed-mammoth) | seen. epsilon: ε, added to F_i once per unit of a member's weight; 1e-12 in fed-mammoth, 1e-6 in MergeLM.
    normalise: F_i / ‖F_i‖ over all numbers together, so that all members count alike (an option of MergeLM).
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"normalise": True, "form": "empirical"})
    form: str = "likelihood"
    classes: str = "task"
    epsilon: float = 1e-12
    normalise: bool = False

    def __post_init__(self) -> None:
        require_choice("form", self.form, FORMS)
        require_choice("classes", self.classes, CLASSES)
        if not self.epsilon > 0:
            raise ConfigError(f"epsilon must be positive, got {self.epsilon}")
        kept = {"weights": "a member's Fisher information is divided by its size"} if self.normalise else {}
        object.__setattr__(self, "exempt", kept)  # of this object: which laws hold depends on the options

    def asks(self, products: bool = False) -> tuple[StatisticRequest, ...]:
        options = {"form": self.form, "classes": self.classes, "products": products}
        return (StatisticRequest("fisher", ("*",), options),)

    def lift(self, member: Member) -> Tensors:
        fisher = {name: self._received(member, name).double() for name in member.params}
        size = sum(float(f.square().sum()) for f in fisher.values()) ** 0.5 if self.normalise else 1.0
        out = {}
        for name, t in member.params.items():
            out[f"fisher/{name}"] = fisher[name] / (size or 1.0) + self.epsilon * member.weight
            out[f"sum/{name}"] = out[f"fisher/{name}"] * t.double()
        return out

    def _received(self, member: Member, name: str) -> Tensor:
        sent = member.statistics.get(f"fisher.{self.form}/{name}")
        if sent is None:
            raise AggregationError(
                f"{member.who} sent '{name}' without its Fisher information: the plan of this rule must reach the clients"
            )
        return sent

    def finish(self, base: Tensors, total: Tensors, draw: torch.Generator) -> Tensors:
        """A member's share is at most 1, so that what comes out lies between the members."""
        return {n: (total[f"sum/{n}"] / total[f"fisher/{n}"]).to(t.dtype) for n, t in base.items()}
