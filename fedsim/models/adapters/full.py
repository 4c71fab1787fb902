"""Full fine-tuning: the backbone's own tensors are trained, all of them or those that match. What published baselines of
federated continual learning (FedAvg, EWC, LwF, Fisher averaging, RegMean) do with a vision transformer."""

# D features, m outputs, d inputs of a layer

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedsim.core import contracts
from fedsim.core.contracts import BackboneLike, Traits
from fedsim.core.errors import ConfigError, ModelError
from fedsim.core.messages import Tensors
from fedsim.models.kernels import FrozenLinear

ALL = "all"


@dataclass(frozen=True)
class Adapter(contracts.Adapter):
    """`<tensor>`: the backbone's tensor of that name, trained. A fresh one is the pretrained tensor, so that it changes nothing.

    The tensors are weights, not differences: `FedAvg` of them is plain federated fine-tuning, their mean over tasks (consolidator
    `mean`) is the pretrained model plus the mean task vector, and with `none` one model goes on. Rules for LoRA pairs refuse
    them. `regmean` takes the Grams of every linear layer. A rate of its own for the backbone: `client.groups`, e.g.
    `[{match: "adapter.*", lr: ...}]`.
    What it means: the module is the model. Every client of every round is sent and sends all trained tensors (ViT-B/16: 86 M
    numbers, 343 MB each way, which the ledger counts), a worker holds their gradients and the optimizer's state (AdamW: four
    times their size), the server a sum in float64 (twice), and a checkpoint the model of every task that the consolidator
    keeps. Clients train one by one, and nothing below is cached unless the first blocks are left out of `targets`.
    Buffers (running statistics of a normalisation) stay as they are, and so do tensors on which no feature depends (a mask
    token, a pooler): they are no part of it.

    targets: "all", or globs over names of tensors or their ends ("layers.11.*", "*.bias", "layernorm.*").
    Raises ModelError for a glob that matches nothing, and with runtime.precision bf16: rounded weights lose small steps.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"targets": ["*.bias"]})
    lean: ClassVar[bool] = True
    targets: Any = ALL

    def __post_init__(self) -> None:
        globs = [self.targets] if isinstance(self.targets, str) else self.targets
        if not isinstance(globs, list | tuple) or not globs or not all(isinstance(g, str) and g for g in globs):
            raise ConfigError(f"targets must be 'all' or a list of globs such as [layers.11.*], got {self.targets!r}")

    @property
    def traits(self) -> Traits:
        return Traits(gives={"linear maps"})

    def init(self, backbone: BackboneLike, generator: torch.Generator) -> dict[str, Tensor]:
        """The pretrained tensors, copied."""
        own = dict(backbone.encoder.named_parameters())
        halved = any(p.dtype in (torch.bfloat16, torch.float16) for p in own.values())
        if halved or any(isinstance(m, FrozenLinear) and m.bf16 for m in backbone.encoder.modules()):
            raise ModelError("adapter full trains the backbone's weights, which bf16 would round: set runtime.precision to fp32")
        used = _used(backbone, own)
        chosen: set[str] = set()
        for glob in [self.targets] if isinstance(self.targets, str) else self.targets:
            hits = [n for n in used if glob == ALL or fnmatchcase(n, glob) or fnmatchcase(n, f"*.{glob}")]
            if not hits:
                raise ModelError(
                    f"adapter target '{glob}' matches no tensor of the backbone on which features depend; there are {len(used)}, "
                    f"'{used[0]}' to '{used[-1]}'"
                )
            chosen.update(hits)
        return {n: own[n].detach().to("cpu", copy=True).contiguous() for n in used if n in chosen}

    def weights(self, backbone: BackboneLike, tensors: Tensors) -> dict[str, Tensor]:
        """The tensors are weights."""
        return dict(tensors)

    @contextmanager
    def applied(self, backbone: BackboneLike, tensors: Tensors, dropout: torch.Generator | None = None) -> Iterator[None]:
        """These tensors in place of the backbone's, while open: wherever a tensor is used, tied ones in all their places."""
        places = _places(backbone.encoder)
        with ExitStack() as stack:
            for name, tensor in tensors.items():
                for module, key in places[name]:
                    stack.callback(module._parameters.__setitem__, key, module._parameters[key])
                    module._parameters[key] = tensor  # type: ignore[assignment]  # a plain tensor, so that gradients flow to it
            yield


def _places(encoder: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Every module and key that holds a tensor, by the tensor's first name."""
    first: dict[int, str] = {}
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for prefix, module in encoder.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                name = first.setdefault(id(parameter), f"{prefix}.{key}" if prefix else key)
                places.setdefault(name, []).append((module, key))
    return places


def _used(backbone: Any, own: Tensors) -> Sequence[str]:
    """Names of the tensors that the features of a made-up sample depend on."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = {n: p.detach().requires_grad_() for n, p in own.items()}
        some = next(iter(own.values()))
        with Adapter().applied(backbone, leaves):
            if backbone.kind == "image":
                features = backbone.image_features(some.new_zeros(1, backbone.num_channels, *backbone.image_size))
            else:
                features = backbone.text_features({"input_ids": torch.ones(1, 2, dtype=torch.int64, device=some.device)})
            found = torch.autograd.grad(features.sum(), list(leaves.values()), allow_unused=True)
    return [n for n, g in zip(own, found, strict=True) if g is not None]
