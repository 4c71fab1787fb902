"""Statistics that are broken on purpose are caught, each by the law that it breaks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from fedsim import laws
from fedsim.core import contracts
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from tests.laws.one import against


class Sum:
    """Σ x over features, and the number of samples."""

    def __init__(self) -> None:
        self.total = torch.zeros(4, dtype=torch.float64)
        self.batches = 0

    def update(self, features: Tensor, labels: Tensor) -> None:
        self.total = self.total + features.double().sum(0)
        self.batches += 1

    def result(self) -> dict[str, Tensor]:
        return {"sum/head.weight": self.total.float()}


@dataclass(frozen=True)
class Sums(contracts.Statistic):
    """Keeps all laws."""

    additive: ClassVar[bool] = True
    accumulator: type[Sum] = Sum

    @contextmanager
    def collect(self, model: contracts.ModelLike, params: Tensors, subjects: Sequence[str]) -> Iterator[contracts.Accumulator]:
        _require_head(subjects)
        yield self.accumulator()

    def synthetic(self, seen: contracts.Seen, params: Tensors, subjects: Sequence[str]) -> dict[str, Tensor]:
        _require_head(subjects)
        return {"sum/head.weight": seen.features.sum(0)}


def _require_head(subjects: Sequence[str]) -> None:
    if list(subjects) != ["head.weight"]:
        raise ConfigError("the head's only")


class ByBatch(Sum):
    """Counts batches."""

    def result(self) -> dict[str, Tensor]:
        return {"sum/head.weight": self.total.float() * self.batches}


class Wide(Sum):
    def result(self) -> dict[str, Tensor]:
        return {"sum/head.weight": self.total}


class Unnamed(Sum):
    def result(self) -> dict[str, Tensor]:
        return {"sum": self.total.float()}


class Silent(Sum):
    def result(self) -> dict[str, Tensor]:
        return super().result() if self.batches else {}


class Largest(Sum):
    """No sum at all."""

    def update(self, features: Tensor, labels: Tensor) -> None:
        self.total, self.batches = torch.maximum(self.total, features.double().amax(0)), 1


class Noisy(Sum):
    def result(self) -> dict[str, Tensor]:
        return {"sum/head.weight": self.total.float() + 1e-4 * torch.rand(4)}


class InPlace(Sum):
    def update(self, features: Tensor, labels: Tensor) -> None:
        super().update(features, labels)
        features.zero_()


@dataclass(frozen=True)
class Untidy(Sums):
    """Leaves its hook in the model."""

    @contextmanager
    def collect(self, model: contracts.ModelLike, params: Tensors, subjects: Sequence[str]) -> Iterator[contracts.Accumulator]:
        _require_head(subjects)
        model.layer("adapter.block.0.lora_A").register_forward_hook(lambda *_: None)
        yield Sum()


@dataclass(frozen=True)
class Greedy(Sums):
    """Collects what it has no formula for."""

    @contextmanager
    def collect(self, model: contracts.ModelLike, params: Tensors, subjects: Sequence[str]) -> Iterator[contracts.Accumulator]:
        yield Sum()


@dataclass(frozen=True)
class Formless(contracts.Statistic):
    """Has no synthetic form."""

    nothing: list[int] = field(default_factory=list)

    @contextmanager
    def collect(self, model: contracts.ModelLike, params: Tensors, subjects: Sequence[str]) -> Iterator[contracts.Accumulator]:
        yield Sum()


def broken(statistic: contracts.Statistic) -> dict[str, str]:
    return {r.name: r.explanation for r in laws.check("statistics", statistic) if not r.ok}


def test_a_good_one_keeps_all() -> None:
    assert broken(Sums()) == {}


@pytest.mark.parametrize(
    ("statistic", "law", "says"),
    [
        (Greedy(), "subjects", "collect takes 'adapter.block.0.lora_A', synthetic does not"),
        (Sums(Largest), "synthetic", r"client 0, collect against synthetic: 'sum/head.weight'.* should be"),
        (Sums(Wide), "wire", "is torch.float64 on cpu: float32 or bfloat16 on the CPU travels"),
        (Sums(Unnamed), "wire", "'sum' is not named '<form>/<subject>'"),
        (Sums(ByBatch), "batches", "in batches of 1 against all at once"),
        (Sums(Silent), "nobody", "without samples it sends nothing, with some sum"),
        (Sums(Largest), "additive", "two parts summed against the whole"),
        (Sums(Noisy), "deterministic", "the same pass twice: 'sum"),
        (Sums(InPlace), "no_mutation", "the batches that it was given changed under its hands"),
        (Untidy(), "no_mutation", "the pass leaves hooks in the model"),
        (Formless(), "synthetic", "has no synthetic form: write its method 'synthetic'"),
    ],
)
def test_broken_one_is_caught_by_its_law(statistic: contracts.Statistic, law: str, says: str) -> None:
    told = against("statistics", statistic, law)
    assert re.search(says, told), told
