"""Sums of clients' contributions whose bits do not depend on where they were made."""

from __future__ import annotations

from fedsim.core.errors import AggregationError
from fedsim.core.messages import Tensors


class PairwiseSum:
    """Σ over places 0, 1, 2, … by a binary tree over the places: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)), and so on.

    An empty place counts for nothing. A block of places that starts at a multiple of its size (a power of two; the last block
    may be shorter) may be summed elsewhere and added as one, and blocks may come in any order: the bits are the same. Holds
    no more than log₂ N terms when they come in order. The error grows with log N, not with N.
    """

    def __init__(self) -> None:
        self._nodes: dict[
            tuple[int, int], _Node
        ] = {}  # level, index: the sum over places index·2^level … (index + 1)·2^level − 1

    def add(self, start: int, size: int, tensors: Tensors) -> None:
        """Add the sum over the places start … start + size − 1. What is added is not written into.

        Raises AggregationError when it does not have the same names as what is there.
        """
        level = (size - 1).bit_length()
        self._put(level, start >> level, _Node(tensors, owned=False))

    def result(self, own: bool = False) -> Tensors | None:
        """The sum of all that was added; None of nothing. `own`: in memory of its own, even if only one block was added."""
        while len(self._nodes) > 1:  # a node without a neighbour goes up as it is
            level, index = min(self._nodes)
            self._put(level + 1, index >> 1, self._nodes.pop((level, index)))
        for node in self._nodes.values():
            return {n: t.clone() for n, t in node.tensors.items()} if own and not node.owned else node.tensors
        return None

    def _put(self, level: int, index: int, node: _Node) -> None:
        while (neighbour := self._nodes.pop((level, index ^ 1), None)) is not None:
            node = neighbour.plus(node) if index % 2 else node.plus(neighbour)
            level, index = level + 1, index >> 1
        self._nodes[level, index] = node


class _Node:
    """A partial sum; one that is `owned` was made here and may be added to in place."""

    def __init__(self, tensors: Tensors, owned: bool) -> None:
        self.tensors, self.owned = tensors, owned

    def plus(self, right: _Node) -> _Node:
        if self.tensors.keys() != right.tensors.keys():
            odd = sorted(self.tensors.keys() ^ right.tensors.keys())
            raise AggregationError(
                f"clients cannot be summed: only some of them have '{odd[0]}' (a rule's lift gives all the same)"
            )
        if self.owned:
            for name, tensor in self.tensors.items():
                tensor.add_(right.tensors[name])
            return self
        if right.owned:  # a + b = b + a, bit for bit
            for name, tensor in right.tensors.items():
                tensor.add_(self.tensors[name])
            return right
        return _Node({name: tensor + right.tensors[name] for name, tensor in self.tensors.items()}, owned=True)
