"""Numbers of sections and plug-ins: finite, unless a field says what infinity or NaN means there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedsim.core.errors import ConfigError

IntArray: TypeAlias = NDArray[np.int64]

# Every number of every section and plug-in must be finite, but for fields that say what infinity or NaN means there:
#     bound: float = field(default=math.inf, metadata=MAY_BE_INFINITE)
MAY_BE_INFINITE: Mapping[str, Any] = {"may_be_infinite": True}


def require_finite_numbers(part: Any, where: str = "", values: Mapping[str, Any] | None = None) -> None:
    """Raise ConfigError for a number in the fields of a dataclass, or in lists and mappings of them, that is NaN or infinite.

    part: a dataclass or an object of it; values: of the fields, those of the object by default.
    """
    for f in fields(part):
        value = getattr(part, f.name, None) if values is None else values.get(f.name)
        if not f.metadata.get("may_be_infinite"):
            for key, number in _numbers(value, f"{where}.{f.name}" if where else f.name):
                if not math.isfinite(number):
                    raise ConfigError(f"{key} must be a finite number, got {number}")


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, Mapping | list | tuple):
        for k, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _numbers(inner, f"{key}.{k}")
