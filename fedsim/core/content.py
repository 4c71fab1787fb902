"""Files and folders that are named by what they hold: what came from Python, as arrays or a model, and must be found again.

A run knows them by that name, wherever they lie.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

NAMED = re.compile(r"(arrays|texts|model)-[0-9a-f]{32}(\.[a-z]+)?")


def name(kind: str, parts: Iterable[bytes | memoryview], suffix: str = "") -> str:
    """The name of what consists of these parts. kind: one of those in `NAMED`."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return f"{kind}-{digest.hexdigest()[:32]}{suffix}"


def known_by(value: Any) -> Any:
    """A section of a config with the names of such files in the place of their paths; all else as it is."""
    if isinstance(value, Mapping):
        return {key: known_by(inner) for key, inner in value.items()}
    return Path(value).name if isinstance(value, str) and NAMED.fullmatch(Path(value).name) else value
