"""Adapters that are broken on purpose are caught, each by the law that it breaks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim import laws
from fedsim.core import contracts
from fedsim.core.contracts import BackboneLike, Slots, Traits
from fedsim.core.errors import ModelError
from fedsim.core.messages import Tensors
from tests.laws.one import against

Hooked = Any


@dataclass(frozen=True)
class Shift(contracts.Adapter):
    """Keeps all laws: h + w added to what the last linear layer of the encoder gives."""

    what: str = ""

    @property
    def traits(self) -> Traits:
        return Traits(gives={"affine features"}) if self.what == "bent" else Traits()

    def init(self, backbone: BackboneLike, generator: torch.Generator) -> dict[str, Tensor]:
        if self.what == "refusing":
            raise ModelError("not this one")
        if self.what == "wide":
            return {"w": torch.zeros(16, dtype=torch.float64)}
        if self.what == "unseeded":
            return {"w": torch.rand(16) * 1e-12}
        out = {"w": torch.arange(16.0) if self.what == "loud" else torch.zeros(16)}
        return out | ({"idle": torch.zeros(2)} if self.what == "idle" else {})

    @contextmanager
    def applied(self, backbone: BackboneLike, tensors: Tensors, dropout: torch.Generator | None = None) -> Iterator[None]:
        w = tensors["w"]
        if self.what == "in place":
            w = w.add_(0.1)
        if self.what == "noisy":
            w = w + 1e-12 * torch.rand(16)
        if self.what == "bent":
            w = w.square()
        yield from self._with(backbone, w, self.what == "untidy")

    @contextmanager
    def merged(self, backbone: BackboneLike, tensors: Tensors) -> Iterator[None]:
        w = 2 * tensors["w"] if self.what == "merging" else tensors["w"]
        if self.what == "bent":
            w = w.square()
        if self.what == "scar":
            _layer(backbone).weight.data.add_(1e-9)
        yield from self._with(backbone, w, False)

    def stacked(self, backbone: BackboneLike, tensors: Tensors, slots: Slots) -> Any:
        return (
            _stacked(backbone, tensors, swapped=self.what == "swapped")
            if self.what != "bent"
            else super().stacked(backbone, tensors, slots)
        )

    def weights(self, backbone: BackboneLike, tensors: Tensors) -> dict[str, Tensor]:
        """In the layer's bias."""
        layer = _layer(backbone)
        name = next(n for n, module in backbone.encoder.named_modules() if module is layer)
        w = 2 * tensors["w"] if self.what == "doubled" else tensors["w"]
        return {f"{name}.scale" if self.what == "unknown" else f"{name}.bias": layer.bias.detach() + w}

    def changes(self, backbone: BackboneLike, tensors: Tensors) -> dict[str, tuple[Tensor, ...]]:
        return {"layers.0.mlp.fc1": (torch.ones(24, 16),)} if self.what == "changing" else {}

    def _with(self, backbone: BackboneLike, w: Tensor, left_in: bool) -> Iterator[None]:
        handle = _layer(backbone).register_forward_hook(lambda module, args, out: out + w)
        try:
            yield
        finally:
            if not left_in:
                handle.remove()


@contextmanager
def _stacked(backbone: BackboneLike, tensors: Tensors, swapped: bool) -> Iterator[None]:
    w = tensors["w"].flip(0) if swapped else tensors["w"]

    def add(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return (out.view(len(w), -1, *out.shape[1:]) + w.view(len(w), 1, *[1] * (out.dim() - 2), -1)).view_as(out)

    handle = _layer(backbone).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _layer(backbone: BackboneLike) -> nn.Linear:
    return [m for m in backbone.encoder.modules() if isinstance(m, nn.Linear) and m.out_features == 16][-1]


def broken(adapter: contracts.Adapter) -> dict[str, str]:
    return {r.name: r.explanation for r in laws.check("adapters", adapter) if not r.ok}


def test_a_good_one_keeps_all() -> None:
    assert broken(Shift()) == {}


@pytest.mark.parametrize(
    ("what", "law", "says"),
    [
        ("wide", "init", "fresh 'w' is torch.float64 on cpu"),
        ("unseeded", "init", "fresh tensors of the same generator"),
        ("refusing", "init", "it takes no backbone; vit: not this one; bert: not this one"),
        ("loud", "fresh", "vit, with a fresh adapter against none: 'features'"),
        ("idle", "gradients", "vit: 'adapter.idle' gets no gradient"),
        ("merging", "merged", "vit, merged against applied"),
        ("doubled", "weights", "vit, the backbone with other weights against merged"),
        ("unknown", "weights", "scale', which is no tensor of the backbone"),
        ("changing", "weights", "weights gives no 'layers.0.mlp.fc1.weight', which changes"),
        ("swapped", "stacked", "two clients in one batch against one by one"),
        ("untidy", "untouched", "hooks' of the encoder is another one after a pass through 'applied'"),
        ("scar", "untouched", "weight' of the encoder is another one after a pass through 'merged'"),
        ("noisy", "deterministic", "vit, applied twice"),
        ("in place", "no_mutation", "vit, applied: the tensors that it was given changed under its hands"),
        ("bent", "affine", "2a − b against twice a's features minus b's"),
    ],
)
def test_broken_one_is_caught_by_its_law(what: str, law: str, says: str) -> None:
    told = against("adapters", Shift(what), law)
    assert re.search(says, told), told
