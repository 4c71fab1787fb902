"""Plain values become dataclasses: unknown keys, wrong types and numbers that are none are errors that name the key.

A value is taken only if nothing of it is lost. A whole number may stand for a float or a word, and words that write a number
out, as ${oc.env:...} gives them, for a number; 1.0 is no whole number, true neither a number nor a word, 2**53 + 1 no float.
"""

from __future__ import annotations

import re
import types
import typing
from collections import abc
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Union

from fedsim.core.config.text import join, plain
from fedsim.core.errors import ConfigError, PluginError, did_you_mean, one_line, require_choice
from fedsim.core.numbers import require_finite_numbers

_WHOLE = re.compile(r"[-+]?\d[\d_]*")
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.?(inf|infinity)|\.?nan", re.IGNORECASE)
_SEQUENCES = (list, tuple, abc.Sequence)
_MAPPINGS = (dict, abc.Mapping)


def typed(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    """A new object of a dataclass from plain values. Raises ConfigError with the key, also for numbers that are not finite."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a mapping of options, got {values!r}")
    hints = _hints(cls)
    for key in values:
        if key not in hints:
            known = did_you_mean(str(key), hints) or f" There are no options{f' of {where}' if where else ''}."
            raise ConfigError(f"unknown key '{join(where, str(key))}'.{known}")
    arguments = {}
    for f in fields(cls):
        if f.name in values:
            arguments[f.name] = _of(hints[f.name], values[f.name], join(where, f.name))
        elif f.init and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{join(where, f.name)} must be given")
    require_finite_numbers(cls, where, arguments)  # before the class computes with them
    try:
        made = cls(**arguments)
    except (ConfigError, PluginError) as e:
        raise type(e)(_below(where, str(e))) from e
    except Exception as e:  # a class of the user's own may check its options with what it likes
        raise ConfigError(f"{where}: {one_line(e)}") from e
    require_finite_numbers(made, where)  # its defaults too
    return made


def _below(where: str, told: str) -> str:
    """What a class said of its own options, with the key that they lie under."""
    unknown = "unknown key '"  # of a section within it
    return unknown + join(where, told.removeprefix(unknown)) if told.startswith(unknown) else join(where, told)


@lru_cache(maxsize=512)
def _hints(cls: Any) -> dict[str, Any]:
    """Field -> type of the options of a dataclass."""
    try:
        hints = typing.get_type_hints(cls)
    except Exception as e:  # a name that only a type checker sees
        raise PluginError(f"the types of {cls.__module__}.{cls.__qualname__}'s fields cannot be read: {one_line(e)}") from e
    return {f.name: hints[f.name] for f in fields(cls) if f.init}


def _of(hint: Any, value: Any, where: str) -> Any:
    """The value as its type says. Containers are new ones: no two objects share them."""
    origin: Any = typing.get_origin(hint) or hint
    parts = typing.get_args(hint)
    if origin in (Any, object):
        return plain(value, where)
    if origin in (Union, types.UnionType):
        return _of_one(parts, value, where)
    if origin is Literal:
        if value not in parts or type(value) not in {type(p) for p in parts}:
            require_choice(where, value, parts)
        return value
    if origin in _SEQUENCES and isinstance(value, list | tuple):
        if origin is tuple and parts and parts[-1] is not ...:
            if len(parts) != len(value):
                raise ConfigError(f"{where} must hold {len(parts)} values, got {value!r}")
            return tuple(_of(p, v, join(where, str(i))) for i, (p, v) in enumerate(zip(parts, value, strict=True)))
        items = (_of(parts[0] if parts else Any, v, join(where, str(i))) for i, v in enumerate(value))
        return tuple(items) if origin is tuple else list(items)
    if origin in _MAPPINGS and isinstance(value, Mapping):
        keyed, of = parts or (str, Any)
        return {_of(keyed, k, where): _of(of, v, join(where, str(k))) for k, v in value.items()}
    if isinstance(origin, type) and is_dataclass(origin):
        return value if isinstance(value, origin) else typed(origin, value, where)
    if origin in _SCALARS:
        what, convert = _SCALARS[origin]
        found = convert(value)
        if found is not None:
            return found
        raise ConfigError(f"{where} must be {what}, got {value!r}")
    if isinstance(origin, type) and issubclass(origin, Enum):
        require_choice(where, value, [e.name for e in origin])
        return origin[value]
    if origin in _SEQUENCES + _MAPPINGS:
        raise ConfigError(f"{where} must be a {'list' if origin in _SEQUENCES else 'mapping'}, got {value!r}")
    raise PluginError(f"{where}: options are numbers, words, lists, mappings and dataclasses of them, not {hint}")


def _of_one(parts: tuple[Any, ...], value: Any, where: str) -> Any:
    """The value as the first of several types that takes it as it is, else as the first that takes it at all."""
    if value is None and type(None) in parts:
        return None
    parts = tuple(p for p in parts if p is not type(None))
    errors = []
    for part in sorted(parts, key=lambda p: type(value) not in (p, typing.get_origin(p))):
        try:
            return _of(part, value, where)
        except ConfigError as e:
            errors.append(e)
    raise errors[0]


def _bool(value: Any) -> bool | None:
    words = {"true": True, "false": False}
    return value if isinstance(value, bool) else words.get(value.lower()) if isinstance(value, str) else None


def _int(value: Any) -> int | None:
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        value = plain(int(value), "")
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _float(value: Any) -> float | None:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value.replace(".inf", "inf").replace(".nan", "nan"))
    fits = isinstance(value, int | float) and not isinstance(value, bool) and (value != value or float(value) == value)
    return float(value) if fits else None  # a whole number beyond 2**53 may be none


def _str(value: Any) -> str | None:
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def _path(value: Any) -> Path | None:
    return Path(value) if isinstance(value, str) else None


_SCALARS: dict[Any, tuple[str, Any]] = {
    bool: ("true or false", _bool),
    int: ("a whole number", _int),
    float: ("a number", _float),
    str: ("a word (in quotes, if it looks like something else)", _str),
    Path: ("a path", _path),
}
