"""Tangent modules: a backbone linearised at its pretrained weights. TMC (Liu & Soatto 2023, "Tangent Model Composition for
Ensembling and Continual Fine-tuning", arXiv:2307.08114) and TAFT (Liu, Golatkar & Soatto 2023, "Tangent Transformers for
Composition, Privacy and Removal", arXiv:2307.08122)."""

# r rank, d inputs of a layer, m outputs, D width, K clients

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedsim.core import contracts, rng
from fedsim.core.contracts import BackboneLike, Slots, Traits
from fedsim.core.errors import ConfigError, ModelError
from fedsim.core.messages import Tensors
from fedsim.models import inject, tangent
from fedsim.models.tangent import BIAS, FINAL, IN_BLOCK, LOW_RANK, WEIGHT

NO_BIAS = ".k_proj"  # a bias of keys shifts all scores of a query alike: its gradient is nothing but rounding


@dataclass(frozen=True)
class Adapter(contracts.Adapter):
    """`h(x; w) = h₀(x) + ∂h₀/∂θ · w`: features of the first order in w, which alone is trained; all zeros at the start.

    Features are linear in w, so that modules of clients and tasks add up exactly, element by element: the mean of modules is the
    module of mean features, and one that is taken out leaves no trace. Two kinds of directions, mixed freely:
    linearised LoRA (ours): LoRA at B = 0 is `ẇ_W = s Ḃ A₀` with A₀ fixed, so that only `<layer>.tangent_B` (m, r) is trained and
    travels. A₀ (r, d), uniform in ±1/√d, is drawn from `projection_seed`, the layer's name and r: the same for all clients, tasks
    and runs. With a new A₀ modules could not be added.
    linearised blocks (TAFT-n): `tangent_weight` and `tangent_bias` of every linear layer and norm of the last n blocks, and of
    the final norm; but no bias of keys, on which nothing depends. A layer in them gets no Ḃ beside its whole weight.

    The head stays an ordinary linear layer on these features: for a fixed head the logits are affine in w, but head and w
    together are a product. TAFT's own head is a tangent too; from a head of zeros that would give w no gradient.
    One pass carries value and derivative (`fedsim.models.tangent`): about two forwards, and one way back. For plain ViTs with
    GELU; nothing is dropped out. Half precision makes derivatives coarse: use float32. The published start of 1e-12 is not
    copied: it is there for no effect.

    targets: globs over names of linear layers, "all-linear", or [] for none; rank: r, at most d; alpha: s = alpha / rank, null:
    s = 1; full_blocks: n; projection_seed: of A₀, not to be changed between modules that shall be added.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"rank": 2},
        {"rank": 2, "targets": "all-linear", "alpha": 4.0},
        {"targets": [], "full_blocks": 1},
    )
    lean: ClassVar[bool] = True
    targets: Any = field(default_factory=lambda: ["q_proj", "v_proj"])
    rank: int = 8
    alpha: float | None = None
    full_blocks: int = 0
    projection_seed: int = 0

    def __post_init__(self) -> None:
        names = [self.targets] if isinstance(self.targets, str) else self.targets
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) and n for n in names):
            raise ConfigError(f"targets must be a list such as [q_proj, v_proj], 'all-linear' or [], got {self.targets!r}")
        if self.rank < 1:
            raise ConfigError(f"rank must be at least 1, got {self.rank}")
        if self.alpha is not None and not self.alpha > 0:
            raise ConfigError(f"alpha must be positive, or null for a scale of 1, got {self.alpha}")
        if self.full_blocks < 0:
            raise ConfigError(f"full_blocks must not be negative, got {self.full_blocks}")
        if not names and not self.full_blocks:
            raise ConfigError(
                "targets is empty and full_blocks is 0: there is nothing to train (the adapter 'none' trains the head alone)"
            )
        if self.projection_seed < 0:
            raise ConfigError(f"projection_seed must not be negative, got {self.projection_seed}")

    @property
    def scale(self) -> float:
        """s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def traits(self) -> Traits:
        return Traits(gives={"affine features", "changes of weights"})

    def init(self, backbone: BackboneLike, generator: torch.Generator) -> dict[str, Tensor]:
        """Zeros, in the encoder's order. Raises ModelError for a backbone that is no plain ViT, for more blocks than it has and
        for a rank that a layer is too small for."""
        whole = self._whole(backbone.encoder)
        targets = inject.match_linear(backbone.encoder, self.targets) if self.targets else {}
        tensors: dict[str, Tensor] = {}
        for name, _ in backbone.encoder.named_modules():
            if name in whole:
                tensors[name + WEIGHT] = torch.zeros(whole[name].weight.shape)
                if whole[name].bias is not None and not name.endswith(NO_BIAS):
                    tensors[name + BIAS] = torch.zeros(whole[name].bias.shape)
            elif name in targets:
                m, d = targets[name].weight.shape
                if self.rank > d:
                    raise ModelError(f"adapter.rank {self.rank} is larger than layer '{name}' ({d} inputs): use at most {d}")
                tensors[name + LOW_RANK] = torch.zeros(m, self.rank)
        return tensors

    def applied(
        self, backbone: BackboneLike, tensors: Tensors, dropout: torch.Generator | None = None
    ) -> AbstractContextManager[None]:
        """Features `h₀ + ḣ` of the direction that the tensors are, while open; opened twice, the directions add up."""
        return self._linearised(backbone, tensors, None)

    def stacked(self, backbone: BackboneLike, tensors: Tensors, slots: Slots) -> AbstractContextManager[None]:
        """The same with a direction for every client's samples: a tensor has a leading axis of clients, or is common to all."""
        return self._linearised(backbone, tensors, slots)

    def changes(self, backbone: BackboneLike, tensors: Tensors) -> dict[str, tuple[Tensor, ...]]:
        """Ẇ of linear layers, or Ḃ and s A₀."""
        found: dict[str, tuple[Tensor, ...]] = {}
        for name, tensor in tensors.items():
            layer, _, _ = name.rpartition(".")
            if name.endswith(LOW_RANK):
                place = inject.linear(backbone.encoder, layer)
                found[layer] = tensor, self._projection(layer, place, tensor.shape[1])
            elif name.endswith(WEIGHT) and tensor.dim() == 2:
                found[layer] = (tensor,)
        return found

    def _linearised(self, backbone: BackboneLike, tensors: Tensors, slots: Slots | None) -> AbstractContextManager[None]:
        own = {n: t for n, t in tensors.items() if n.endswith((LOW_RANK, WEIGHT, BIAS))}
        return tangent.linearised(backbone.encoder, own, self._projection, slots) if own else nullcontext()

    def _projection(self, name: str, layer: nn.Linear, rank: int) -> Tensor:
        """s A₀ (r, d)."""
        return _projection(self.projection_seed, name, rank, layer.in_features, self.scale, layer.weight.device)

    def _whole(self, encoder: nn.Module) -> Mapping[str, Any]:
        """Linear layers and norms of the last blocks by name."""
        names = list(tangent.blocks(encoder))
        if self.full_blocks > len(names):
            raise ModelError(f"adapter.full_blocks is {self.full_blocks}, but the backbone has {len(names)} blocks")
        modules = [f"{block}.{part}" for block in names[len(names) - self.full_blocks :] for part in IN_BLOCK]
        return {n: inject.submodule(encoder, n) for n in ([*modules, FINAL] if self.full_blocks else [])}


@lru_cache(maxsize=1024)
def _projection(seed: int, name: str, rank: int, inputs: int, scale: float, device: torch.device) -> Tensor:
    """Drawn once per process: the draw depends on its address alone."""
    bound = 1 / math.sqrt(inputs)
    with torch.inference_mode(False):  # evaluation may be the first to ask, training keeps it
        drawn_rd = torch.empty(rank, inputs).uniform_(-bound, bound, generator=rng.torch_stream(seed, "tangent", name))
        return (scale * drawn_rd).to(device)
