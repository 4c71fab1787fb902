"""NAME: one line that says what happens to an update on the wire, and the paper (authors, year, "title").

Hold it against the laws of its kind, then use it:

    fedsim check ./NAME.py
    fedsim run fedavg 'server.channel=[./NAME.py]'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fedsim import Channel as Base
from fedsim import Parcel, Tensors
from fedsim.core.errors import ConfigError


@dataclass(frozen=True)
class Channel(Base):
    """Every update's delta w − w_0 is scaled down to a norm of at most `most`.

    What it knows nothing of is refused: `covers` says which statistics may travel beside the update.
    """

    most: float = 1.0

    def __post_init__(self) -> None:
        if not self.most > 0:
            raise ConfigError(f"most must be positive, got {self.most}")

    @property
    def covers(self) -> Sequence[str]:
        return ("*",)

    def send(self, start: Tensors, parcel: Parcel, memory: Tensors, draw: torch.Generator) -> tuple[Parcel, Tensors]:
        """Beside the client, before any sum: what travels, and what the client remembers of it."""
        norm = sum(float(t.double().square().sum()) for t in parcel.delta.values()) ** 0.5
        share = min(1.0, self.most / norm) if norm else 1.0
        return replace(parcel, delta={name: t * share for name, t in parcel.delta.items()}), memory
