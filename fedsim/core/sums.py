"""Sums of clients' contributions whose bits do not depend on where they were made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from torch import Tensor

from fedsim.core.errors import AggregationError
from fedsim.core.messages import ClientUpdate, Tensors

Lift: TypeAlias = Callable[[ClientUpdate], Tensors | None]  # one client's term of a sum; None for none

BLOCK = 10  # places that are summed together first: part of the bits, so a constant


class BlockSum:
    """Σ over places 0, 1, 2, …: blocks of `BLOCK` places from left to right, then the blocks from left to right.

    A block may be summed elsewhere and added as one, and terms may come in any order: the bits are the same. An empty place
    counts for nothing. What comes early waits; when terms come in order, two partial sums are all that is held.
    """

    def __init__(self) -> None:
        self._next = 0
        self._waiting: dict[int, tuple[int, Tensors | None]] = {}
        self._block, self._total = _Partial(), _Partial()

    def add(self, start: int, size: int, tensors: Tensors | None) -> None:
        """Add the term of a place (size 1), or the sum of a block that starts there (the last block may be shorter); None for
        empty places. What is added is not written into. Raises AggregationError when it has other names than what is there.
        """
        assert size == 1 or (start % BLOCK == 0 and size <= BLOCK), f"{size} places from {start} are no block"
        self._waiting[start] = size, tensors
        while self._next in self._waiting:
            size, tensors = self._waiting.pop(self._next)
            self._block.add(tensors)
            self._next += size
            if self._next % BLOCK == 0:
                self._close_block()

    def result(self) -> dict[str, Tensor] | None:
        """The sum of all that was added, in memory of its own; None of nothing."""
        assert not self._waiting, f"place {self._next} is missing"
        self._close_block()
        return self._total.own()

    def _close_block(self) -> None:
        self._total.add(self._block.tensors, self._block.owned)
        self._block = _Partial()


class _Partial:
    """A sum so far; one that is `owned` was made here and is added to in place."""

    def __init__(self) -> None:
        self.tensors: Tensors | None = None
        self.owned = False

    def add(self, tensors: Tensors | None, owned: bool = False) -> None:
        if tensors is None:
            return
        if self.tensors is None:
            self.tensors, self.owned = tensors, owned
            return
        if self.tensors.keys() != tensors.keys():
            odd = sorted(self.tensors.keys() ^ tensors.keys())
            raise AggregationError(f"clients cannot be summed: only some of them have '{odd[0]}' (lift must give all the same)")
        if self.owned:
            for name, tensor in self.tensors.items():
                tensor.add_(tensors[name])
        else:
            self.tensors, self.owned = {name: tensor + tensors[name] for name, tensor in self.tensors.items()}, True

    def own(self) -> dict[str, Tensor] | None:
        if self.tensors is None:
            return None
        return dict(self.tensors) if self.owned else {name: tensor.clone() for name, tensor in self.tensors.items()}


def summed(terms: Iterable[Tensors]) -> dict[str, Tensor]:
    """The sum of terms at the places 0, 1, 2, …; empty of nothing."""
    total = BlockSum()
    for place, term in enumerate(terms):
        total.add(place, 1, term)
    return total.result() or {}


class PartSums:
    """The sums that several parts of a run (the aggregator, learners) want of the same updates: a `BlockSum` each."""

    def __init__(self, lifts: Mapping[str, Lift]) -> None:
        self._lifts = lifts
        self._sums = {part: BlockSum() for part in lifts}

    def add(self, place: int, update: ClientUpdate | None) -> None:
        """The update of a place; None for a client that failed."""
        for part, lift in self._lifts.items():
            self._sums[part].add(place, 1, None if update is None else lift(update))

    def add_block(self, start: int, size: int, totals: Mapping[str, Tensors]) -> None:
        """What was summed elsewhere, over a block."""
        for part, total in self._sums.items():
            total.add(start, size, totals.get(part))

    def result(self) -> dict[str, Tensors]:
        """The sums by part; a part of which nobody gave a term is left out."""
        found = {part: total.result() for part, total in self._sums.items()}
        return {part: total for part, total in found.items() if total is not None}
