"""What the frozen blocks below an adapter make of a client's samples: computed once at a job's start, kept for later rounds. So
are the queries of an adapter that has them, which are what all blocks make of a sample without it.

Always in chunks of `runtime.eval_batch`, in the shard's order: found or computed again, the bits are the same, so that any worker
may run any client.
"""

# n samples, L tokens, D width

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clients.samples import LIMIT, Samples
from fedsim.core.config import RuntimeConfig
from fedsim.core.contracts import IntArray
from fedsim.core.messages import Tensors
from fedsim.models.model import Asked, Model


@dataclass(frozen=True, eq=False)
class LowerStates:
    """What comes out of the first `count` blocks, (n, L, D), or the features (n, D) if no block is left above."""

    count: int
    states: Tensor
    positions: IntArray
    order: IntArray

    @property
    def nbytes(self) -> int:
        """Of all that it holds, its key in the cache included."""
        return self.states.nbytes + 2 * self.positions.nbytes + self.order.nbytes

    def asked(self, model: Model, inputs: Tensors, positions: IntArray, lean: bool = False, query: Tensor | None = None) -> Asked:
        """`model.asked` of the batch at these positions of the split."""
        return model.upper_asked(inputs, self.of(model, inputs, positions), self.count, lean, query)

    def of(self, model: Model, inputs: Tensors, positions: IntArray) -> Tensor:
        """The states of the batch at these positions. What is not of the shard (replayed samples, synthetic ones at −1) goes
        through the blocks anew."""
        place = np.searchsorted(self.positions, positions, sorter=self.order).clip(max=len(self.order) - 1)
        rows, device = self.order[place], self.states.device
        states = self.states[torch.from_numpy(rows).to(device)]
        foreign = np.flatnonzero(self.positions[rows] != positions)
        if len(foreign):
            index = torch.from_numpy(foreign).to(device)
            new = model.lower_states({n: t[index] for n, t in inputs.items()}, self.count)
            states = _as_long(states, new).index_copy(0, index, _as_long(new, states))
        return states

    def serves(self, model: Model, params: Tensors) -> bool:
        """Whether these parameters leave the blocks alone that this came out of."""
        return model.untouched_blocks(params) >= self.count


def lower_states(model: Model, samples: Samples, shard: IntArray, params: Tensors, runtime: RuntimeConfig) -> LowerStates | None:
    """A shard's states below the modules that `params` holds; None where there is nothing to gain, or no room."""
    if not len(shard):
        return None
    count = model.untouched_blocks(params)
    if not count or not model.enterable(samples.batch(shard[:1])[0]):
        return None
    return _found(model, samples, shard, count, runtime)


def queries_of(model: Model, samples: Samples, shard: IntArray, runtime: RuntimeConfig) -> LowerStates | None:
    """A shard's queries (n, D), of its samples as they are; None where the adapter has none, or there is no room."""
    if not model.adapter.queries or not len(shard):
        return None
    return _found(model, samples, shard, model.depth, runtime)


@dataclass(frozen=True)
class Kept:
    """What is at hand of a shard's samples as they are: what the frozen blocks below the adapter make of them, and queries."""

    below: LowerStates | None = None
    queries: LowerStates | None = None

    @classmethod
    def of(cls, model: Model, samples: Samples, shard: IntArray, params: Tensors, runtime: RuntimeConfig) -> Kept:
        """Of a client's round; nothing with augmentation, which shows other images every time."""
        if model.augments:
            return cls()
        return cls(lower_states(model, samples, shard, params, runtime), queries_of(model, samples, shard, runtime))

    def query(self, model: Model, inputs: Tensors, positions: IntArray) -> Tensor | None:
        """Of a batch, if it is at hand."""
        return None if self.queries is None else self.queries.of(model, inputs, positions)

    def asked(
        self, model: Model, inputs: Tensors, positions: IntArray, augment: torch.Generator | None = None, lean: bool = False
    ) -> Asked:
        """`model.asked` of the batch at these positions of the split."""
        query = self.query(model, inputs, positions)
        if self.below is None:
            return model.asked(inputs, augment, lean, query)
        return self.below.asked(model, inputs, positions, lean, query)

    def serving(self, model: Model, params: Tensors) -> Kept:
        """What holds with these parameters too."""
        return self if self.below is None or self.below.serves(model, params) else Kept(queries=self.queries)


NOTHING = Kept()


def _found(model: Model, samples: Samples, shard: IntArray, count: int, runtime: RuntimeConfig) -> LowerStates | None:
    """As they were found the last time, or computed."""
    key = count, shard.tobytes()
    found: LowerStates | None = samples.cache.get(key)
    if found is None:
        states = _computed(model, samples, shard, count, runtime.eval_batch)
        if states is None:
            return None
        found = LowerStates(count, states, shard, np.argsort(shard, kind="stable"))
        if runtime.cache:
            samples.cache.put(key, found)
    return found


def _computed(model: Model, samples: Samples, shard: IntArray, count: int, chunk: int) -> Tensor | None:
    """The states of all chunks, None if they would take too much memory."""
    parts: list[Tensor] = []
    for start in range(0, len(shard), chunk):
        inputs, _ = samples.batch(shard[start : start + chunk])
        parts.append(model.lower_states(inputs, count))
        if parts[0].nbytes // len(parts[0]) * len(shard) > LIMIT:
            return None
    if parts[0].dim() == 3:  # texts of a chunk are as long as its longest
        tokens = max(p.shape[1] for p in parts)
        parts = [F.pad(p, (0, 0, 0, tokens - p.shape[1])) for p in parts]
    return torch.cat(parts)


def _as_long(states: Tensor, others: Tensor) -> Tensor:
    """States of texts (n, L, D) with at least as many tokens as the others have; features (n, D) as they are."""
    missing = others.shape[1] - states.shape[1] if states.dim() == 3 else 0
    return F.pad(states, (0, 0, 0, missing)) if missing > 0 else states
