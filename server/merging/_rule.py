"""The merging rule that a role is given by its option `rule`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsim.core import config as configs
from fedsim.core.contracts import Merging


def described(rule: str | Mapping[str, Any] | Merging) -> Any:
    """The rule with every option written out, as YAML holds it; an object as it is."""
    return rule if isinstance(rule, Merging) else configs.expand("merging", rule, "rule")


def built(rule: Any) -> Merging:
    """The rule itself."""
    found: Any = rule if isinstance(rule, Merging) else configs.build("merging", rule)
    assert isinstance(found, Merging)
    return found
