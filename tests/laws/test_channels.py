"""Channels that are broken on purpose are caught, each by the law that it breaks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from fedsim import laws
from fedsim.core import contracts
from fedsim.core.contracts import Code, Parcel
from fedsim.core.messages import Tensors
from tests.laws.one import against


@dataclass(frozen=True)
class Changed(contracts.Channel):
    """Rounds every number to a multiple of 1/4 at random, and remembers how much it was off; but for one thing."""

    unbiased: ClassVar[bool] = True
    what: str = ""

    @property
    def covers(self) -> Sequence[str]:
        return ("gram",)

    @property
    def receives(self) -> bool:
        return self.what in ("squaring", "loud", "sum in place")

    def send(self, start: Tensors, parcel: Parcel, memory: Tensors, draw: torch.Generator) -> tuple[Parcel, Tensors]:
        step = 0.25
        u = {n: torch.rand(t.shape, generator=draw) if self.what != "nearest" else 0.5 for n, t in parcel.delta.items()}
        delta = {n: torch.floor(t / step + u[n]) * step for n, t in parcel.delta.items()}
        new = {n: t - delta[n] for n, t in parcel.delta.items()}
        codes = {n: Code(t.numel(), 2 if self.what == "narrow" else 16) for n, t in delta.items()}
        if self.what == "half":
            codes = {n: Code(t.numel() // 2, 32) for n, t in delta.items()}
        if self.what == "lost":
            delta = {n: t for n, t in delta.items() if n != "head.bias"}
        if self.what == "shifted":
            delta = {n: t + step for n, t in delta.items()}
        if self.what == "noisy":
            delta = {n: t + 1e-6 * torch.rand_like(t) for n, t in delta.items()}
        if self.what == "in place":
            next(iter(parcel.statistics.values())).zero_()
        if self.what == "endless":
            new = {n: t / 0 for n, t in new.items()}
        return replace(parcel, delta=delta, codes=codes), new

    def receive(self, start: Tensors, total: Tensors, clients: int, draw: torch.Generator) -> Tensors:
        if self.what == "sum in place":
            next(iter(total.values())).add_(1)
        if self.what == "loud":
            return {n: t + torch.rand(t.shape, dtype=t.dtype) for n, t in total.items()}
        return {n: t.square() for n, t in total.items()} if self.what == "squaring" else total

    def bound(self, delta: Tensors) -> float:
        step = 0.1 if self.what == "proud" else 0.2501
        return float(step * sum(t.numel() for t in delta.values()) ** 0.5)

    def suits(self, trained: Sequence[str], rounds: int, clients: int) -> tuple[str, ...]:
        return ("two\nlines",) if self.what == "wordy" else ()


def broken(channel: contracts.Channel) -> dict[str, str]:
    return {r.name: r.explanation for r in laws.check("channels", channel) if not r.ok}


def test_a_good_one_keeps_all() -> None:
    assert broken(Changed()) == {}


@pytest.mark.parametrize(
    ("what", "law", "says"),
    [
        ("lost", "layout", r"lost \['head.bias'\]"),
        ("shifted", "identity", "an update that changes nothing: 'adapter"),
        ("proud", "bound", "beyond its bound of"),
        ("nearest", "unbiased", "it says that it is unbiased, but the mean of 1000 draws is"),
        ("narrow", "bytes", r"of 2 bits, but holds \d+ different numbers"),
        ("half", "bytes", r"is written as \d+ numbers of 32 bits, but \d+ of its numbers are not zero"),
        ("squaring", "sums", "two sums received together against each by itself"),
        ("noisy", "deterministic", "sent twice"),
        ("loud", "deterministic", "a sum received twice"),
        ("in place", "no_mutation", "the parcel that it was given changed"),
        ("sum in place", "no_mutation", "a sum: the total that it was given changed"),
        ("endless", "memory_file", "round 0, memory: .* are NaN or infinite"),
        ("wordy", "suits", "its note is not one line"),
    ],
)
def test_broken_one_is_caught_by_its_law(what: str, law: str, says: str) -> None:
    told = against("channels", Changed(what), law)
    assert re.search(says, told), told


def test_statistics_that_it_covers_but_cannot_take() -> None:
    @dataclass(frozen=True)
    class Strict(Changed):
        def send(self, start: Tensors, parcel: Parcel, memory: Tensors, draw: torch.Generator) -> tuple[Parcel, Tensors]:
            if parcel.statistics and parcel.delta:
                raise ValueError("no statistics, please")
            return super().send(start, parcel, memory, draw)

    assert "'gram' is covered, but fails: ValueError: no statistics, please" in broken(Strict())["covers"]
