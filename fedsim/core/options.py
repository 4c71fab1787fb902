"""The options of a plug-in, or the keys of a config's section, with what their class says of them.

The form in a docstring is `name: what it means`, at the start of a line or behind a sentence, a semicolon or a bracket; several
names may share a meaning (`lr, momentum: of SGD`). It ends with the paragraph, or where the next option begins. What a class does
not say, a class that it derives from may say.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any

MUST = "must be given"
OTHER = re.compile(r"(?<=[.;)]) (?=(?:Raises|Asks for|State,|State:) )")  # what stands behind options and is of none


@dataclass(frozen=True)
class Option:
    """One option. default: as JSON, or `MUST`; meaning: one line, empty where no docstring tells it."""

    name: str
    type: str
    default: str
    meaning: str


def of(cls: type[Any]) -> tuple[Option, ...]:
    """All options of a frozen dataclass, in the order of its fields; none of what is no dataclass."""
    if not is_dataclass(cls):
        return ()
    names = [f.name for f in fields(cls)]
    told: dict[str, str] = {}
    for base in cls.__mro__:
        told = {**meanings(vars(base).get("__doc__"), names), **told}
    return tuple(Option(f.name, _type(f), _default(f), told.get(f.name, "")) for f in fields(cls))


def meanings(text: str | None, names: list[str]) -> Mapping[str, str]:
    """What a docstring says of each of these names, as far as it does."""
    found: dict[str, str] = {}
    for paragraph in re.split(r"\n[ \t]*\n", inspect.cleandoc(text or "")):
        starts = _starts(paragraph, names)
        ends = [*(m.start() for m in starts), len(paragraph)][1:]
        for start, end in zip(starts, ends, strict=True):
            meaning = OTHER.split(" ".join(paragraph[start.end() : end].split()))[0].rstrip(" ;")
            found |= {name: meaning for name in re.split(r",\s+", start[1]) if name not in found}
    return found


def around(paragraph: str, names: list[str]) -> tuple[str, str]:
    """What a paragraph says before its options, and behind them; all of it and nothing where there are none."""
    starts = _starts(paragraph, names)
    if not starts:
        return paragraph, ""
    behind = OTHER.split(" ".join(paragraph[starts[-1].end() :].split()), maxsplit=1)[1:]
    return paragraph[: starts[0].start()].rstrip(), "".join(behind)


def _starts(paragraph: str, names: list[str]) -> list[re.Match[str]]:
    """Where options begin; group 1: the names."""
    if not names:
        return []
    word = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    begins = re.compile(rf"(?:^[ \t]*|(?<=[.;:)] ))((?:{word})(?:,\s+(?:{word}))*):\s", re.MULTILINE)
    return [*begins.finditer(paragraph)]


def _type(field: Field[Any]) -> str:
    return field.type if isinstance(field.type, str) else field.type.__name__


def _default(field: Field[Any]) -> str:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return MUST if default is MISSING else json.dumps(default, ensure_ascii=False, default=repr)
