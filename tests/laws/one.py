"""One law by itself: what it says against a plug-in."""

from __future__ import annotations

from typing import Any

from fedsim import laws


def against(kind: str, plugin: Any, law: str) -> str:
    """Why a plug-in breaks the law of this name. Raises AssertionError if it keeps it."""
    (result,) = laws.hold(plugin, [one for one in laws.laws_of(kind) if one.name == law])
    assert not result.ok, f"{law} is kept by {plugin}"
    return result.explanation
