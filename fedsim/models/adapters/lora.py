"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021, arXiv:2106.09685)."""

# r rank, d inputs of a layer, m outputs, N rows (samples × tokens), K clients

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.core import contracts
from fedsim.core.contracts import BackboneLike, Slots, Traits
from fedsim.core.errors import ConfigError, ModelError
from fedsim.core.messages import Tensors
from fedsim.core.tensors import LORA_A, LORA_B, lora_layers
from fedsim.models import inject
from fedsim.models.inject import Removable
from fedsim.models.kernels import FrozenLinear, mergeable


@dataclass(frozen=True)
class Adapter(contracts.Adapter):
    """`y = W x + b + s B A x` in chosen linear layers, with A (r, d) and B (m, r).

    A starts uniform in ±1/√d and B at zero, so a fresh module changes nothing. `W + s B A` is never formed in training:
    the frozen weights need no gradient, which saves a third of the work. The tensors may have any rank, so modules that are
    stacked along it act as their sum; s does not depend on it.

    targets: globs over the names of linear layers ("q_proj", "mlp.fc*", "layers.0.*"), or "all-linear", which leaves out layers
    that are too small for the rank. Convolutions of 1 × 1 are linear layers over the channels ("convolution.linear").
    rank: r, at most the smaller side of every layer; alpha: s = alpha / rank, null: s = 1.
    dropout: share of the inputs of A that is zeroed in training, the rest being scaled by 1 / (1 − dropout).
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"rank": 2, "targets": "all-linear"},
        {"rank": 2, "targets": ["q_proj", "v_proj"], "alpha": 4.0, "dropout": 0.5},
    )
    lean: ClassVar[bool] = True
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
    def traits(self) -> Traits:
        return Traits(gives={"linear maps", "changes of weights"})

    @property
    def scale(self) -> float:
        """s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def init(self, backbone: BackboneLike, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh `<layer>.lora_A` (r, d) and `<layer>.lora_B` (m, r). Raises ModelError if a layer is too small for the rank."""
        tensors: dict[str, Tensor] = {}
        layers, small = self._layers(backbone)
        if small and (not layers or inject.ALL_LINEAR not in self.targets):
            name, (m, d) = next((n, layer.weight.shape) for n, layer in small.items())
            raise ModelError(
                f"adapter.rank {self.rank} is larger than layer '{name}' ({d} inputs, {m} outputs): use at most {min(d, m)}"
            )
        for name, layer in layers.items():
            m, d = layer.weight.shape
            bound = 1 / math.sqrt(d)
            tensors[name + LORA_A] = torch.empty(self.rank, d).uniform_(-bound, bound, generator=generator)
            tensors[name + LORA_B] = torch.zeros(m, self.rank)
        return tensors

    def notes(self, backbone: BackboneLike) -> tuple[str, ...]:
        """What "all-linear" leaves out."""
        _, small = self._layers(backbone)
        if not small:
            return ()
        return (f"adapter.targets all-linear leaves out layers that are too small for rank {self.rank}: {inject.summary(small)}",)

    def _layers(self, backbone: BackboneLike) -> tuple[dict[str, nn.Linear], dict[str, nn.Linear]]:
        """The layers that are meant, and those of them that are too small for the rank."""
        meant = inject.match_linear(backbone.encoder, self.targets)
        small = {n: layer for n, layer in meant.items() if self.rank > min(layer.weight.shape)}
        return {n: layer for n, layer in meant.items() if n not in small}, small

    def applied(
        self, backbone: BackboneLike, tensors: Tensors, dropout: torch.Generator | None = None
    ) -> AbstractContextManager[None]:
        """Add `s B A x` to the outputs of the layers that the tensors name, while open."""
        drop = dropout if self.dropout else None
        found = {n: inject.linear(backbone.encoder, n) for n in lora_layers(tensors)}
        return inject.installed([self._adding(layer, n, tensors, drop) for n, layer in found.items()])

    def changes(self, backbone: BackboneLike, tensors: Tensors) -> dict[str, tuple[Tensor, ...]]:
        """s B and A of every layer."""
        return {n: (self.scale * tensors[n + LORA_B], tensors[n + LORA_A]) for n in lora_layers(tensors)}

    def weights(self, backbone: BackboneLike, tensors: Tensors) -> dict[str, Tensor]:
        """`W + s B A` of every layer."""
        return {f"{n}.weight": self._sum(inject.linear(backbone.encoder, n), n, tensors) for n in lora_layers(tensors)}

    @torch.no_grad()
    def _sum(self, layer: nn.Linear, name: str, tensors: Tensors) -> Tensor:
        return torch.addmm(layer.weight, tensors[name + LORA_B], tensors[name + LORA_A], alpha=self.scale)

    def _adding(
        self, layer: nn.Linear, name: str, tensors: Tensors, dropout: torch.Generator | None = None
    ) -> Callable[[], Removable]:
        """What puts the low-rank path of these tensors beside a layer: into its own product, or by a hook."""
        a_rd, b_mr = tensors[name + LORA_A], tensors[name + LORA_B]
        if isinstance(layer, FrozenLinear) and layer.low_rank is None and dropout is None:
            return partial(layer.beside, a_rd, b_mr, self.scale)
        return partial(layer.register_forward_hook, _adding(a_rd, b_mr, self.scale, self.dropout, dropout))

    def stacked(self, backbone: BackboneLike, tensors: Tensors, slots: Slots) -> AbstractContextManager[None]:
        """Add `s B_k A_k x` to the outputs of client k's samples, from A (K, r, d) and B (K, m, r), while open. One of the two
        may be common to all clients: (r, d) or (m, r)."""
        hooks: list[Callable[..., Any]] = []
        for name in lora_layers(tensors):
            layer, a, b = inject.linear(backbone.encoder, name), tensors[name + LORA_A], tensors[name + LORA_B]
            hooks.append(partial(layer.register_forward_hook, _adding_stacked(a, b, self.scale, self.dropout, slots)))
        return inject.installed(hooks)

    @contextmanager
    def merged(self, backbone: BackboneLike, tensors: Tensors) -> Iterator[None]:
        """`W + s B A` in place of W while open, for inference: no gradient flows to the tensors.

        Where the sum would be rounded so that small changes are lost, it is not made: `s B A x` is added, as in `applied`.
        """
        with ExitStack() as stack:
            for name in lora_layers(tensors):
                layer = inject.linear(backbone.encoder, name)
                if not mergeable(layer):
                    stack.callback(self._adding(layer, name, tensors)().remove)
                    continue
                stack.callback(setattr, layer, "weight", layer.weight)
                layer.weight = nn.Parameter(self._sum(layer, name, tensors), requires_grad=False)
            yield


def _adding(a_rd: Tensor, b_mr: Tensor, scale: float, rate: float, dropout: torch.Generator | None) -> Callable[..., Tensor]:
    """A forward hook that adds the low-rank path to a linear layer's output."""

    def hook(layer: nn.Module, args: tuple[Tensor, ...], output_Nm: Tensor) -> Tensor:
        x_Nd = args[0] if dropout is None else _dropped(args[0], rate, dropout)
        path_Nm = F.linear(F.linear(x_Nd, a_rd.to(x_Nd.dtype)), b_mr.to(x_Nd.dtype))
        return torch.add(output_Nm, path_Nm, alpha=scale)

    return hook


def _adding_stacked(a: Tensor, b: Tensor, scale: float, rate: float, slots: Slots) -> Callable[..., Tensor]:
    """A forward hook that adds every client's own low-rank path to its part of a linear layer's output."""

    def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, clients = args[0], len(slots.rows)
        slots.axis(len(x))
        if rate and slots.dropout is not None:
            x = x * _masks(x, rate, slots, slots.dropout)
        x_KNd = x.reshape(clients, -1, x.shape[-1])
        path_KNr = x_KNd @ a.to(x.dtype).mT
        if b.dim() == 2:
            return torch.add(output, (path_KNr @ b.to(x.dtype).mT).view_as(output), alpha=scale)
        output_KNm = output.reshape(clients, -1, output.shape[-1])
        return torch.baddbmm(output_KNm, path_KNr, b.to(x.dtype).mT, alpha=scale).view_as(output)

    return hook


def _masks(x: Tensor, rate: float, slots: Slots, generators: Sequence[torch.Generator]) -> Tensor:
    """The inverted dropout masks that the clients draw one by one, for as many samples and tokens as are their own."""
    slot = slots.axis(len(x))
    masks, per_sample = torch.ones_like(x), slot // slots.width
    for k, generator in enumerate(generators[: len(slots.rows)]):
        own = masks[k * slot : k * slot + slots.rows[k] * per_sample]
        if slots.tokens is not None and x.dim() > 2:
            own = own[:, : slots.tokens[k]]
        own.copy_(_dropped(torch.ones_like(own), rate, generator))
    return masks


def _dropped(x: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Inverted dropout with a generator of its own: torch's draws from the global one."""
    mask = torch.empty(x.shape, dtype=x.dtype, device=generator.device).bernoulli_(1 - rate, generator=generator)
    return x * mask.div_(1 - rate).to(x.device)
