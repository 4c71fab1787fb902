"""The merging rule that a role, or another rule, is given by an option."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedsim.core import config as configs
from fedsim.core import contracts
from fedsim.core.contracts import Merging, Traits
from fedsim.core.errors import ConfigError
from fedsim.core.messages import StatisticRequest


def described(rule: str | Mapping[str, Any] | Merging, key: str = "rule") -> Any:
    """The rule with every option written out, as YAML holds it; an object as it is. key: of the option."""
    return rule if isinstance(rule, Merging) else configs.expand("merging", rule, key)


def built(rule: Any) -> Merging:
    """The rule itself."""
    found: Any = rule if isinstance(rule, Merging) else configs.build("merging", rule)
    assert isinstance(found, Merging)
    return found


def require_scale(scale: float) -> None:
    """Raise ConfigError for a λ of nothing. A negative one takes away what the task vectors bring (forgetting)."""
    if scale == 0:
        raise ConfigError("scale must not be 0: nothing would be merged")


@dataclass(frozen=True)
class Around(contracts.Merging):
    """A rule that does something to the members, or to what comes out, and leaves the merge itself to another.

    then: the other rule, as a role's `rule`: a name, {name: …, its options}, or a file."""

    then: str | dict[str, Any] | contracts.Merging = "mean"

    def __post_init__(self) -> None:
        object.__setattr__(self, "then", described(self.then, "then"))
        object.__setattr__(self, "exempt", {**self.inner.exempt, **self.breaks()})  # of this object: it depends on the options

    @cached_property
    def inner(self) -> contracts.Merging:
        """The other rule itself."""
        return built(self.then)

    def breaks(self) -> Mapping[str, str]:
        """Laws that it cannot keep, whatever the other rule does, with the reasons."""
        return {}

    @property
    def traits(self) -> Traits:
        return self.inner.traits

    @property
    def least(self) -> int:
        return self.inner.least

    def asks(self, products: bool = False) -> tuple[StatisticRequest, ...]:
        return self.inner.asks(products)
