"""What every plug-in says to those who hold it against the laws of its kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class Plugin:
    """What is found by name, and held by `fedsim check` against the laws of its kind (`fedsim/laws/<kind>.py`).

    exempt: name of a law -> why this plug-in cannot keep it. examples: options under which it is held against the laws.
    """

    exempt: ClassVar[Mapping[str, str]] = {}
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
