"""What the frozen blocks below an adapter make of a client's samples: computed once at a job's start, kept for later rounds.

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
from fedsim.models.model import Model


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

    def features(self, model: Model, inputs: Tensors, positions: IntArray, lean: bool = False) -> Tensor:
        """`model.features` of the batch at these positions of the split. What is not of the shard (replayed samples, synthetic
        ones at −1) goes through the lower blocks anew."""
        place = np.searchsorted(self.positions, positions, sorter=self.order).clip(max=len(self.order) - 1)
        rows, device = self.order[place], self.states.device
        states = self.states[torch.from_numpy(rows).to(device)]
        foreign = np.flatnonzero(self.positions[rows] != positions)
        if len(foreign):
            index = torch.from_numpy(foreign).to(device)
            new = model.lower_states({n: t[index] for n, t in inputs.items()}, self.count)
            states = _as_long(states, new).index_copy(0, index, _as_long(new, states))
        return model.upper_features(inputs, states, self.count, lean)

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
