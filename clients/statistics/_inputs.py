"""What Grams and sketches need of a layer's inputs, computed once however many layers and requests see the same tensor.

Shapes: N rows (all tokens of a batch), I inputs of a layer (x_NI, gram_II = Σ x xᵀ).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedsim.core.contracts import ModelLike
from fedsim.core.names import HEAD_WEIGHT
from fedsim.core.tensors import wide

WEIGHT = ".weight"

ROWS = 256  # widened at a time: torch sums 16 × 16 rows at a time itself, so that up to 4,096 rows give the bits of one sum
AT_ONCE = 1 << 17  # numbers that stay in the cache when they are widened: 1 MB
KEPT = "_fedsim_inputs"  # attribute of a tensor that has been looked at; it goes when the tensor goes


class Inputs:
    """One tensor (…, I) of inputs as rows. Products are taken in float64, in which squares of float32 are exact."""

    def __init__(self, x: Tensor) -> None:
        self._x_NI = x.detach().flatten(0, -2)

    @cached_property
    def energies(self) -> Tensor:
        """diag(gram), (I,)."""
        x_NI = self._x_NI
        if x_NI.device.type != "cpu" or x_NI.numel() <= AT_ONCE:
            return wide(x_NI, copy=True).square_().sum(0)
        buffer_nI = x_NI.new_empty((min(ROWS, len(x_NI)), x_NI.shape[1]), dtype=torch.float64)
        total_I: Tensor | None = None
        for rows_nI in torch.split(x_NI, ROWS):
            sum_I = buffer_nI[: len(rows_nI)].copy_(rows_nI).square_().sum(0)
            total_I = sum_I if total_I is None else total_I.add_(sum_I)
        assert total_I is not None
        return total_I

    @cached_property
    def wide(self) -> Tensor:
        """x_NI in float64."""
        return wide(self._x_NI)

    @cached_property
    def gram(self) -> Tensor:
        """gram_II."""
        return self.wide.T @ self.wide


def of(x: Tensor) -> Inputs:
    """The inputs of a tensor that several hooks are shown, such as those of queries, keys and values."""
    version = None if x.is_inference() else x._version
    kept = x.__dict__.get(KEPT)
    if kept is None or kept[0] != version:
        kept = version, Inputs(x)
        setattr(x, KEPT, kept)
    inputs: Inputs = kept[1]
    return inputs


class Fed(Protocol):
    def add(self, inputs: Inputs) -> None: ...


def feeding(one: Fed) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook that shows the inputs of a layer to a sum."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        one.add(of(args[0]))

    return hook


def layer_of(subject: str) -> str:
    """The layer that a tensor belongs to."""
    return subject.rpartition(".")[0]


def has_inputs(model: ModelLike, subject: str) -> bool:
    """Whether it is the weight of a linear map: those of norms and embeddings are passed over."""
    return subject == HEAD_WEIGHT or not subject.endswith(WEIGHT) or isinstance(model.layer(subject), nn.Linear)
