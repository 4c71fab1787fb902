"""What a docstring says of every option, as lists and the documentation read it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from fedsim.core import options, plugins
from fedsim.core.config import schema

PLUGINS = [(kind, name) for kind in plugins.KINDS for name in plugins.names(kind)]
SECTIONS = [schema.SimConfig, schema.NoiseConfig, schema.ParameterGroup, *schema.SECTIONS.values()]


@dataclass(frozen=True)
class Base:
    """What both have.

    size: of the base.
    shared: told here; hidden: told
    twice.
    """

    size: int
    shared: int = 3
    hidden: list[int] = field(default_factory=lambda: [1])


@dataclass(frozen=True)
class Derived(Base):
    """An equation with size: no. `rate: x` in words is none either, and (rate) neither.

    rate, other: η of the two (0: none); hidden: here
    on two lines. Raises ValueError for others.

    Behind an empty line nothing is part of it.
    """

    rate: float = 0.5
    other: str | None = None
    silent: bool = False


def test_the_form() -> None:
    assert options.of(Derived) == (
        options.Option("size", "int", options.MUST, "of the base."),
        options.Option("shared", "int", "3", "told here"),
        options.Option("hidden", "list[int]", "[1]", "here on two lines."),
        options.Option("rate", "float", "0.5", "η of the two (0: none)"),
        options.Option("other", "str | None", "null", "η of the two (0: none)"),
        options.Option("silent", "bool", "false", ""),
    )
    assert options.of(int) == ()


@pytest.mark.parametrize(("kind", "name"), PLUGINS)
def test_every_option_of_a_plugin_is_described(kind: str, name: str) -> None:
    cls = plugins.load(kind, name)
    assert [o.name for o in options.of(cls) if not o.meaning] == [], f"{cls.__module__}: say `name: what it means`"


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_of_a_config_is_described_with_its_choices(section: type[Any]) -> None:
    told = {o.name: o.meaning for o in options.of(section)}
    assert [name for name, meaning in told.items() if not meaning] == []
    for key, choices in choices_of(section):
        assert all(choice in told[key] for choice in choices), (key, choices)


def choices_of(section: type[Any]) -> Iterator[tuple[str, list[str]]]:
    """What `__post_init__` says by require_choice("key", self.key, (…))."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(section)))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require_choice":
            key, _, choices = node.args
            yield ast.literal_eval(key), ["null" if choice is None else choice for choice in ast.literal_eval(choices)]
