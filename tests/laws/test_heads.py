"""Heads that are broken on purpose are caught, each by the law that it breaks."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fedsim import laws
from fedsim.core import contracts
from fedsim.core.messages import Tensors
from fedsim.models.heads.linear import Head as Linear
from tests.laws.one import against


@dataclass(frozen=True)
class Changed(Linear):
    """A linear head, but for one thing."""

    what: str = ""

    def init(self, num_classes: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        out = super().init(num_classes, width, generator)
        if self.what == "nameless":
            return {"weight": out["head.weight"]}
        if self.what == "flat":
            return out | {"head.scale": torch.ones(1)}
        if self.what == "unseeded":
            return {n: torch.rand(t.shape) for n, t in out.items()}
        return out | ({"head.idle": torch.zeros(num_classes)} if self.what == "idle" else {})

    def fixed(self, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"head.bias": torch.zeros(5)} if self.what == "both" else {}

    def inputs(self, features: Tensor, params: Tensors) -> Tensor:
        return features - features.mean(0) if self.what == "centred" else features

    def logits(self, features: Tensor, params: Tensors) -> Tensor:
        if self.what == "in place":
            features.mul_(2)
        out = super().logits(self.inputs(features, params), params)
        if self.what == "bent":
            return out.tanh()
        if self.what == "wide":
            return out.double()
        return out.half().to(out.dtype) if self.what == "coarse" and out.dtype == torch.float32 else out

    def formula(self) -> str | None:
        told = super().formula()
        return {"misspelt": "feature * 2", "halved": f"({told}) / 2"}.get(self.what, told)

    def affine(self, params: Tensors) -> tuple[Tensor, Tensor] | None:
        weight, bias = params["head.weight"], params["head.bias"]
        if self.what == "shifted":
            return weight, bias + 1  # common to all classes: not a fault
        return (weight.T, bias) if self.what == "turned" else (weight, 0 * bias) if self.what == "unbiased" else (weight, bias)

    def stacked_logits(self, features_KbD: Tensor, params: Tensors) -> Tensor:
        if self.what == "one bias":
            return features_KbD @ params["head.weight"].mT + params["head.bias"][:, None]
        return super().stacked_logits(features_KbD, params).roll(int(self.what == "rolled"), 0)


def broken(head: contracts.Head) -> dict[str, str]:
    return {r.name: r.explanation for r in laws.check("heads", head) if not r.ok}


def test_a_good_one_keeps_all() -> None:
    assert broken(Changed()) == broken(Changed("shifted")) == {}


@pytest.mark.parametrize(
    ("what", "law", "says"),
    [
        ("nameless", "init", "'head.weight' must be there"),
        ("flat", "init", "the first axis of what is trained is classes"),
        ("both", "init", "'head.bias' is both trained and fixed"),
        ("unseeded", "init", "init with the same generator"),
        ("wide", "logits", r"logits are \(7, 5\) torch.float64"),
        ("centred", "rows", "sample 0 alone"),
        ("rolled", "stacked", "stacked against one by one"),
        ("one bias", "stacked", ""),
        ("idle", "gradients", "'head.idle' is trained, but gets no finite gradient"),
        ("bent", "affine", r"logits against W inputs \+ b"),
        ("turned", "one_layer", r"affine gives \(6, 5\) and \(5,\)"),
        ("unbiased", "one_layer", "the layer of `affine` against the head's logits"),
        ("misspelt", "formula", "is no expression of features, head and torch: NameError"),
        ("halved", "formula", r"formula .* against logits"),
        ("coarse", "float64", "float32 against float64"),
        ("in place", "no_mutation", "the features that it was given changed"),
    ],
)
def test_broken_one_is_caught_by_its_law(what: str, law: str, says: str) -> None:
    told = against("heads", Changed(what), law)
    assert re.search(says, told), told
