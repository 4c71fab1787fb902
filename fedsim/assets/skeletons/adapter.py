"""NAME: one line that says what is trained on the frozen backbone, and the paper (authors, year, "title").

Hold it against the laws of its kind, then use it:

    fedsim check ./NAME.py
    fedsim run fedavg adapter=./NAME.py
"""

# m outputs of a layer

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedsim import Adapter as Base
from fedsim import Tensors
from fedsim.core.contracts import BackboneLike
from fedsim.models import inject

SHIFT = ".shift"


@dataclass(frozen=True)
class Adapter(Base):
    """`y = W x + b + s`: a trained shift s (m,) of the outputs of chosen linear layers, which starts at zero.

    targets: globs over the names of linear layers, or "all-linear".
    """

    targets: Any = field(default_factory=lambda: "all-linear")

    def init(self, backbone: BackboneLike, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh tensors, by names of your own; with them the backbone should compute what it computes without."""
        layers = inject.match_linear(backbone.encoder, self.targets)
        return {name + SHIFT: torch.zeros(layer.weight.shape[0]) for name, layer in layers.items()}

    @contextmanager
    def applied(self, backbone: BackboneLike, tensors: Tensors, dropout: torch.Generator | None = None) -> Iterator[None]:
        """While open, the encoder runs with these tensors, and gradients flow to them. Afterwards it is as it was."""
        hooks: list[Callable[..., Any]] = []
        for name, shift_m in tensors.items():
            layer = inject.linear(backbone.encoder, name.removesuffix(SHIFT))
            hooks.append(partial(layer.register_forward_hook, _adding(shift_m)))
        with inject.installed(hooks):
            yield


def _adding(shift_m: Tensor) -> Callable[..., Tensor]:
    def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + shift_m.to(output.dtype)

    return hook
