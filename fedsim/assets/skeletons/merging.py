"""NAME: one line that says what it computes, and the paper (authors, year, "title").

Hold it against the laws of its kind, then use it:

    fedsim check ./NAME.py
    fedsim run quickstart 'server.aggregator={name: merged, rule: ./NAME.py}'        over the clients of a round
    fedsim run quickstart 'server.consolidator={name: merged, rule: ./NAME.py}'      over the tasks of the stream
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedsim import Merging as Base
from fedsim import Tensors
from fedsim.core.contracts import Member


@dataclass(frozen=True)
class Merging(Base):
    """θ⁺ = θ_0 + scale · Σ w_i (θ_i − θ_0) / Σ w_i. It knows no clients, no files and no device.

    scale: of the mean task vector.
    """

    scale: float = 1.0

    def merge(self, members: Sequence[Member], base: Tensors, draw: torch.Generator) -> Tensors:
        total = sum(member.weight for member in members)
        merged: dict[str, torch.Tensor] = {}
        for name, start in base.items():
            vectors = [member.weight / total * (member.params[name].double() - start.double()) for member in members]
            merged[name] = start.double() + self.scale * torch.stack(vectors).sum(0)
        return merged
