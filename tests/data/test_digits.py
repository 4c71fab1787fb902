"""Numbers as JSON text beside the standard library's."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.data import digits

LISTS = st.lists(st.lists(st.one_of(st.integers(0, 12), st.integers(0, 2**63 - 1)), max_size=5), min_size=1, max_size=12)


def written(lists: list[list[int]]) -> str:
    numbers = np.array([n for part in lists for n in part], dtype=np.int64)
    sizes = np.array([len(part) for part in lists], dtype=np.int64)
    return b"".join(digits.json_of_lists(numbers, sizes)).decode()


@given(LISTS)
def test_lists_are_written_as_json_writes_them(lists: list[list[int]]) -> None:
    assert written(lists) == json.dumps(lists, separators=(",", ":"))


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_parts_join_to_the_same_text(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(digits, "LISTS", at_once)
    lists = [[1, 23], [456], [7890, 0, 10**18], [], [99], [100, 9]]
    assert written(lists) == json.dumps(lists, separators=(",", ":"))


def test_every_power_of_ten_has_its_digits() -> None:
    lists = [[10**k - 1, 10**k] for k in range(19)]
    assert written(lists) == json.dumps(lists, separators=(",", ":"))
