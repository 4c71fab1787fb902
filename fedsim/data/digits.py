"""Very many small numbers as text, without a Python object for each: a million clients' positions in seconds.

Shapes: N numbers, K lists.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedsim.core.contracts import IntArray

LISTS = 1 << 18  # written at once
COMMA, OPEN, CLOSE = b",[]"


def json_of_lists(numbers_N: IntArray, sizes_K: IntArray) -> Iterator[bytes]:
    """`[[1,2],[3]]` without spaces, in parts, as `json.dumps` writes it.

    List k holds the next `sizes_K[k]` of the numbers, none of which is below 0.
    """
    yield b"["
    offsets = np.concatenate([[0], np.cumsum(sizes_K)])
    for first in range(0, len(sizes_K), LISTS):
        sizes = sizes_K[first : first + LISTS]
        numbers = numbers_N[offsets[first] : offsets[first + len(sizes)]]
        yield b"," if first else b""
        yield _lists(numbers, sizes) if sizes.min() > 0 else _lists_with_empty_ones(numbers, sizes)
    yield b"]"


def _lists(numbers_N: IntArray, sizes_K: IntArray) -> bytes:
    """`[1,2],[3]`: every list holds something."""
    digits_N = _count_digits(numbers_N)
    last_K = np.cumsum(sizes_K) - 1
    behind_N = np.ones(len(numbers_N), dtype=np.int64)  # a comma behind a number, or `],[` behind the last of a list
    behind_N[last_K] = 3
    end_N = 1 + np.cumsum(digits_N + behind_N) - behind_N  # where the text behind a number begins
    text: NDArray[np.uint8] = np.full(int(end_N[-1]) + 1, COMMA, dtype=np.uint8)
    text[0] = OPEN
    text[end_N[last_K]] = CLOSE
    text[end_N[last_K[:-1]] + 2] = OPEN
    place, rest, longer = 1, numbers_N, np.arange(len(numbers_N))
    while len(longer):
        text[end_N[longer] - place] = ord("0") + rest % 10
        longer = longer[rest >= 10]
        rest = rest[rest >= 10] // 10
        place += 1
    return text.tobytes()


def _count_digits(numbers_N: IntArray) -> IntArray:
    powers = 10 ** np.arange(1, 19, dtype=np.int64)
    counted: IntArray = 1 + np.searchsorted(powers, numbers_N, side="right")
    return counted


def _lists_with_empty_ones(numbers_N: IntArray, sizes_K: IntArray) -> bytes:
    numbers, ends = numbers_N.tolist(), np.cumsum(sizes_K).tolist()
    lists = [numbers[end - size : end] for size, end in zip(sizes_K.tolist(), ends, strict=True)]
    return json.dumps(lists, separators=(",", ":"))[1:-1].encode()
