"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021, arXiv:2106.09685)."""

# r rank, d inputs of a layer, m outputs, N rows (samples × tokens)

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.core import contracts
from fedsim.core.contracts import BackboneLike
from fedsim.core.errors import ConfigError, ModelError
from fedsim.core.messages import Tensors
from fedsim.core.tensors import LORA_A, LORA_B, lora_layers
from fedsim.models import inject


@dataclass(frozen=True)
class Adapter(contracts.Adapter):
    """`y = W x + b + s B A x` in chosen linear layers, with A (r, d) and B (m, r).

    A starts uniform in ±1/√d and B at zero, so a fresh module changes nothing. `W + s B A` is never formed in training:
    the frozen weights need no gradient, which saves a third of the work. The tensors may have any rank, so modules that are
    stacked along it act as their sum; s does not depend on it.

    targets: globs over the names of linear layers ("q_proj", "mlp.fc*", "layers.0.*"), or "all-linear".
    rank: r, at most the smaller side of every layer; alpha: s = alpha / rank, null: s = 1.
    dropout: share of the inputs of A that is zeroed in training, the rest being scaled by 1 / (1 − dropout).
    """

    targets: Any = field(default_factory=lambda: ["q_proj", "v_proj"])
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        names = [self.targets] if isinstance(self.targets, str) else self.targets
        if not isinstance(names, (list, tuple)) or not names or not all(isinstance(n, str) and n for n in names):
            raise ConfigError(f"targets must be a list such as [q_proj, v_proj], or 'all-linear', got {self.targets!r}")
        if self.rank < 1:
            raise ConfigError(f"rank must be at least 1, got {self.rank}")
        if self.alpha is not None and not self.alpha > 0:
            raise ConfigError(f"alpha must be positive, or null for a scale of 1, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def scale(self) -> float:
        """s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def init(self, backbone: BackboneLike, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh `<layer>.lora_A` (r, d) and `<layer>.lora_B` (m, r). Raises ModelError if a layer is too small for the rank."""
        tensors: dict[str, Tensor] = {}
        for name, layer in inject.match_linear(backbone.encoder, self.targets).items():
            m, d = layer.weight.shape
            if self.rank > min(d, m):
                raise ModelError(
                    f"adapter.rank {self.rank} is larger than layer '{name}' ({d} inputs, {m} outputs): use at most {min(d, m)}"
                )
            bound = 1 / math.sqrt(d)
            tensors[name + LORA_A] = torch.empty(self.rank, d).uniform_(-bound, bound, generator=generator)
            tensors[name + LORA_B] = torch.zeros(m, self.rank)
        return tensors

    def applied(
        self, backbone: BackboneLike, tensors: Tensors, dropout: torch.Generator | None = None
    ) -> AbstractContextManager[None]:
        """Add `s B A x` to the outputs of the layers that the tensors name, while open."""
        hooks: list[Callable[..., Any]] = []
        for name in lora_layers(tensors):
            layer, a_rd, b_mr = inject.linear(backbone.encoder, name), tensors[name + LORA_A], tensors[name + LORA_B]
            drop = dropout if self.dropout else None
            hooks.append(partial(layer.register_forward_hook, _adding(a_rd, b_mr, self.scale, self.dropout, drop)))
        return inject.installed(hooks)

    @contextmanager
    def merged(self, backbone: BackboneLike, tensors: Tensors) -> Iterator[None]:
        """`W + s B A` in place of W while open, for inference: no gradient flows to the tensors."""
        kept: list[tuple[nn.Linear, Tensor]] = []
        try:
            for name in lora_layers(tensors):
                layer = inject.linear(backbone.encoder, name)
                with torch.no_grad():
                    weight = torch.addmm(layer.weight, tensors[name + LORA_B], tensors[name + LORA_A], alpha=self.scale)
                kept.append((layer, layer.weight))
                layer.weight = nn.Parameter(weight, requires_grad=False)
            yield
        finally:
            for layer, base in kept:
                layer.weight = base


def _adding(a_rd: Tensor, b_mr: Tensor, scale: float, rate: float, dropout: torch.Generator | None) -> Callable[..., Tensor]:
    """A forward hook that adds the low-rank path to a linear layer's output."""

    def hook(layer: nn.Module, args: tuple[Tensor, ...], output_Nm: Tensor) -> Tensor:
        x_Nd = args[0] if dropout is None else _dropped(args[0], rate, dropout)
        return torch.add(output_Nm, F.linear(F.linear(x_Nd, a_rd), b_mr), alpha=scale)

    return hook


def _dropped(x: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Inverted dropout with a generator of its own: torch's draws from the global one."""
    mask = torch.empty(x.shape, dtype=x.dtype, device=generator.device).bernoulli_(1 - rate, generator=generator)
    return x * mask.div_(1 - rate).to(x.device)
