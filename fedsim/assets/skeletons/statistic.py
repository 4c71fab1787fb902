"""NAME: one line that says what is measured of a client's data under its model, and the paper (authors, year, "title").

Hold it against the laws of its kind, then use it:

    fedsim check ./NAME.py

A rule asks for it: `StatisticRequest("./NAME.py", ("head.weight",))` in its `plan`.
"""

# b samples of a batch, D inputs of the head's last map

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsim import Statistic as Base
from fedsim import Tensors
from fedsim.core.contracts import Accumulator, ModelLike, Seen
from fedsim.core.errors import ConfigError
from fedsim.core.names import HEAD_WEIGHT


@dataclass(frozen=True)
class Statistic(Base):
    """Σ f² over the client's samples, (D,), of the inputs of the head."""

    additive: ClassVar[bool] = True  # what two clients send adds up

    @contextmanager
    def collect(self, model: ModelLike, params: Tensors, subjects: Sequence[str]) -> Iterator[Accumulator]:
        """Open for one pass over the client's samples."""
        _require_head(subjects)
        yield _Sum(params[HEAD_WEIGHT].shape[-1])

    def synthetic(self, seen: Seen, params: Tensors, subjects: Sequence[str]) -> dict[str, Tensor]:
        """The same by its formula, in float64: what the laws hold it against."""
        _require_head(subjects)
        return {f"squares/{HEAD_WEIGHT}": seen.features.double().square().sum(0)}


class _Sum:
    def __init__(self, width: int) -> None:
        self.squares_D = torch.zeros(width, dtype=torch.float64)

    def update(self, features: Tensor, labels: Tensor) -> None:
        self.squares_D += features.detach().cpu().double().square().sum(0)

    def result(self) -> dict[str, Tensor]:
        return {f"squares/{HEAD_WEIGHT}": self.squares_D.float()}


def _require_head(subjects: Sequence[str]) -> None:
    wrong = [subject for subject in subjects if subject != HEAD_WEIGHT]
    if wrong:
        raise ConfigError(f"it looks at the inputs of '{HEAD_WEIGHT}', not of '{wrong[0]}': ask for it with that match")
