"""Prompts that all tasks share and prompts of each task's own, as prefixes of attention ("DualPrompt: Complementary Prompting for
Rehearsal-Free Continual Learning", Wang et al., 2022, arXiv:2204.04799)."""

# b samples, P tokens of a prompt, D width, T tasks, K clients

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedsim.core.contracts import BackboneLike, Slots
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.models.adapters import _keys, _pool, _prompts, _tasks, prefix
from fedsim.models.adapters._tasks import of_task
from fedsim.models.adapters.prefix import KEY, VALUE

MATCH = ".key"  # what queries are held against


@dataclass(frozen=True)
class Adapter(_pool.Pool):
    """Attention in a chosen block reads `softmax(Q [K_p; K]ᵀ / √e) [V_p; V]`, with a prefix K_p, V_p (P, D): in the first blocks
    one that all tasks share (the paper's G-prompt), in the next ones one of each task's own (E-prompt), with a key k_t (D,).

        training in task t:   the prefix of task t for every sample;   loss = cross-entropy − λ · mean cos(q(x), k_t)
        inference:            for each sample the prefix of the task with the largest cos(q(x), k_t)

    q(x), the sample's query, are the features that the bare backbone gives of it. A task begins with a prefix and a key of its
    own, which the server draws once for all clients; those of earlier tasks stay as they are, bit for bit. They do not travel
    again: down go the shared prefix and a task's own once they have changed, up what is trained.

    shared, own: P of the two, 0 for none; shared_blocks, own_blocks: indices (negative ones count from the end), none in both.
    pull: λ; with 0 nothing moves a key, so that keys stay as they are drawn and inference chooses at random: as in federated
    codes that pass the cross-entropy only. copies: a task's prefix starts as the last task's. bound: prefixes and keys
    start uniform in ±bound.

    Defaults: blocks and lengths as in the paper (blocks 0 and 1; 2, 3 and 4; 5 and 20 tokens; some codes have 5 and 5). λ = 1
    and the start are those of a widely used code, from memory. Rates in published codes: Adam at 1e-3 with the norm clipped at 1;
    AdamW at 5e-3. Without any prompt it is the adapter none. Raises ModelError for a backbone that is no vision transformer with
    one attention per block.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"shared_blocks": [0], "own_blocks": [1], "shared": 2, "own": 3},
        {"own_blocks": [0, 1], "shared": 0, "own": 1, "copies": True},
        {"shared_blocks": [1], "own_blocks": [0], "shared": 1, "own": 1, "pull": 0.0},
    )
    lean: ClassVar[bool] = True
    shared: int = 5
    own: int = 20
    shared_blocks: list[int] = field(default_factory=lambda: [0, 1])
    own_blocks: list[int] = field(default_factory=lambda: [2, 3, 4])
    pull: float = 1.0
    copies: bool = False
    bound: float = 1.0

    def __post_init__(self) -> None:
        _pool.require_not_negative(shared=self.shared, own=self.own, pull=self.pull, bound=self.bound)
        for option in ("shared", "own"):
            if getattr(self, option) and not getattr(self, f"{option}_blocks"):
                raise ConfigError(f"{option}_blocks is empty, but {option} is {getattr(self, option)}: set it to 0 for no prefix")

    def init(self, backbone: BackboneLike, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh `<block>.prefix_key` and `<block>.prefix_value` (P, D) of all tasks, the same with `.task0` of the first task,
        and its `<first of its blocks>.key.task0` (D,)."""
        _pool.require_vision_transformer("dualprompt", backbone.encoder)
        blocks, own = self._blocks(backbone.encoder, self.shared, self.shared_blocks), self._own_blocks(backbone.encoder)
        both = blocks.keys() & own.keys()
        if both:
            raise ConfigError(f"adapter.shared_blocks and adapter.own_blocks both name '{min(both)}': give it to one of them")
        tensors = {n + part: self._fresh(generator, self.shared, width) for n, width in blocks.items() for part in (KEY, VALUE)}
        return {**tensors, **self._of_task(backbone, 0, generator)}

    def grown(self, backbone: BackboneLike, tensors: Tensors, generator: torch.Generator) -> dict[str, Tensor]:
        """With a prefix and a key of the next task."""
        task = _tasks.current(tensors) + 1
        new = self._of_task(backbone, task, generator)
        if self.copies:
            of_last = {n: tensors[n.removesuffix(of_task("", task)) + of_task("", task - 1)] for n in new if MATCH not in n}
            new |= {n: t.clone() for n, t in of_last.items()}
        return {**tensors, **new}

    def frozen(self, tensors: Tensors) -> tuple[str, ...]:
        """What earlier tasks brought, and keys that nothing moves."""
        unmoved = () if self.pull or not self.own else (f"*{MATCH}.task*",)
        return (*_tasks.older(tensors), *unmoved)

    def prompted(
        self, backbone: BackboneLike, tensors: Tensors, query_bD: Tensor, training: bool, slots: Slots | None = None
    ) -> AbstractContextManager[None]:
        """The shared prefixes, and those of the current task, or of each sample's nearest key."""
        task = _tasks.current(tensors)
        chosen_b1 = None if training or task < 1 else self._nearest(tensors, query_bD)

        def own(name: str) -> Tensor:
            if chosen_b1 is None:
                return tensors[of_task(name, task)]
            return _keys.picked(torch.stack(_tasks.all_of(tensors, name)), chosen_b1, axes=3)[:, 0]

        prefixes = {b: (tensors[b + KEY], tensors[b + VALUE]) for b in _blocks_with(tensors, KEY)}
        prefixes |= {b: (own(b + KEY), own(b + VALUE)) for b in _blocks_with(tensors, of_task(KEY, task))}
        return prefix.attending(backbone.encoder, prefixes)

    def loss(self, tensors: Tensors, query_bD: Tensor | None) -> Tensor | None:
        """−λ · mean cos(q, k_t) of the current task's key."""
        if not (self.pull and self.own) or query_bD is None:
            return None
        (block,) = _blocks_with(tensors, of_task(MATCH, _tasks.current(tensors)))
        key_D = _tasks.all_of(tensors, block + MATCH)[-1]
        return -self.pull * _keys.cosines(query_bD, key_D[None]).mean()

    def _nearest(self, tensors: Tensors, query_bD: Tensor) -> Tensor:
        """Each sample's task, (b, 1)."""
        (block,) = _blocks_with(tensors, of_task(MATCH, 0))
        return _keys.nearest(_keys.cosines(query_bD, torch.stack(_tasks.all_of(tensors, block + MATCH))), 1)

    def _of_task(self, backbone: BackboneLike, task: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What a task brings."""
        own = self._own_blocks(backbone.encoder)
        new = {
            of_task(n + part, task): self._fresh(generator, self.own, width) for n, width in own.items() for part in (KEY, VALUE)
        }
        return new | {of_task(n + MATCH, task): self._fresh(generator, backbone.width) for n in list(own)[:1]}

    def _own_blocks(self, encoder: nn.Module) -> dict[str, int]:
        return self._blocks(encoder, self.own, self.own_blocks)

    def _blocks(self, encoder: nn.Module, length: int, which: list[int]) -> dict[str, int]:
        """The blocks that get a prefix, and the width of their keys. Raises ModelError if one takes no prefix."""
        names = _prompts.blocks("dualprompt", encoder, which)
        widths = {name: prefix.attention(encoder, name, "dualprompt")[1] for name in names}
        return widths if length else {}

    def _fresh(self, generator: torch.Generator, *shape: int) -> Tensor:
        return _pool.uniform(generator, self.bound, *shape)


def _blocks_with(tensors: Tensors, suffix: str) -> list[str]:
    """What comes before the suffix in the names that end with it."""
    return [n.removesuffix(suffix) for n in tensors if n.endswith(suffix)]
