"""DARE: numbers of task vectors dropped at random and the rest rescaled, before any other rule (Yu et al. 2024, "Language models
are super Mario: absorbing abilities from homologous models as a free lunch")."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core.contracts import Member
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import Tensors
from fedsim.core.rng import torch_stream
from server.merging import _rule


@dataclass(frozen=True)
class Merging(_rule.Around):
    """τ̃_i = m_i ⊙ τ_i / (1 − p), m_i ∼ Bernoulli(1 − p) for every number of every member; then `then` merges θ_0 + τ̃_i.

    E τ̃_i = τ_i. A member's draws hang on who it is (client 3; task 2; of a run its config, wherever it lies)
    and the generator of the merge, not on its place among the others.
    DARE-TIES is `{name: dare, then: ties}`; of LoRA pairs in core space it is `{name: core_space, then: {name: dare}}`.

    p: the share that is dropped, in [0, 1). 0.3 as in Core Space's code; MergeLM's has 0.1, and the paper goes up to 0.9.
    strategy: random | magnitude: of each tensor the p that are smallest in size are dropped. rescale: divide by 1 − p; null: for
    random only, as is published. then: the rule that merges, mean by default.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"then": {"name": "ties", "density": 0.5}, "p": 0.7},
        {"strategy": "magnitude", "then": {"name": "task_arithmetic", "scale": 0.3}},
    )
    p: float = 0.3
    strategy: str = "random"
    rescale: bool | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ConfigError(f"p must be in [0, 1), got {self.p}")
        require_choice("strategy", self.strategy, ("random", "magnitude"))
        super().__post_init__()
        if self.inner.pairs:
            raise ConfigError("then must merge number by number: put dare into the rule on LoRA pairs, not around it")

    def breaks(self) -> Mapping[str, str]:
        reason = "numbers of every member's task vector are dropped"
        return dict.fromkeys(("fixed_point", "one_member"), reason) if self.p > 0 else {}

    def merge(self, members: Sequence[Member], base: Tensors, draw: torch.Generator) -> Tensors:
        seed = int(torch.randint(2**63 - 1, (), generator=draw))
        thinned = [replace(m, params=_Thinned(self, m, base, seed)) for m in members]
        return self.inner.merge(thinned if self.p > 0 else members, base, draw)

    def thinned(self, vector: Tensor, draw: torch.Generator) -> Tensor:
        """τ̃ of one tensor, in float64."""
        if self.strategy == "random":
            kept = torch.rand(vector.shape, dtype=torch.float64, generator=draw) >= self.p
        else:
            kept = torch.ones(vector.numel(), dtype=torch.bool)
            kept[vector.abs().flatten().argsort(stable=True)[: int(self.p * vector.numel())]] = False
        rescales = self.strategy == "random" if self.rescale is None else self.rescale
        return vector * kept.view(vector.shape) / (1 - self.p if rescales else 1)


class _Thinned(Mapping[str, Tensor]):
    """θ_0 + τ̃ of a member, each tensor made when it is looked at, with the same draws every time."""

    def __init__(self, rule: Merging, member: Member, base: Tensors, seed: int) -> None:
        self._rule, self._member, self._base, self._seed = rule, member, base, seed

    def __getitem__(self, name: str) -> Tensor:
        start = self._base[name].double()
        draw = torch_stream(self._seed, "dare", self._member.key or self._member.who, name)
        return start + self._rule.thinned(self._member.params[name].double() - start, draw)

    def __iter__(self) -> Iterator[str]:
        return iter(self._member.params)

    def __len__(self) -> int:
        return len(self._member.params)
