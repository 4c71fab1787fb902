"""What a worker keeps of past work, within a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """What says how many bytes it takes."""

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class Cache(Generic[T]):
    """What was used last, as much of it as fits into `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self._size = limit, 0
        self._found: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable) -> T | None:
        """What is kept under a key, and counts as used now."""
        if key in self._found:
            self._found.move_to_end(key)
        return self._found.get(key)

    def put(self, key: Hashable, value: T) -> None:
        """Keep it; what was not used for the longest time makes room."""
        self._found[key] = value
        self._size += value.nbytes
        while self._size > self.limit:
            self._size -= self._found.popitem(last=False)[1].nbytes
