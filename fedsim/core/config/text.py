"""Text and plain values: YAML in and out, and interpolations. The only place that sees YAML and OmegaConf.

YAML 1.1 as OmegaConf reads it, but for what changes a value without a word: 1e-3 is a number, and 12:30, 007, 0x10, 1_000 and
2024-01-01 stay the words that they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml  # type: ignore[import-untyped]

from fedsim.core.errors import ConfigError, one_line

WHOLE_NUMBERS = range(-(2**63), 2**63)  # what arrays and tensors hold
DEEPEST = 50  # levels of lists and mappings


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Puts words in quotes that YAML 1.1 or our loader would take for something else."""

    yaml_implicit_resolvers: ClassVar = {k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()}

    def ignore_aliases(self, data: Any) -> bool:
        return True


_WORDS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", list("yYnNtTfFoO")),
    "int": (r"0|-?[1-9][0-9]*", list("-0123456789")),
    "float": (
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
for _tag, (_pattern, _first) in _WORDS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), _first)


def _mapping(loader: _Loader, node: Any) -> dict[Any, Any]:
    """A mapping in which no key is there twice: YAML itself would let the last one win."""
    seen = set()
    for key, _ in node.value:
        text = (key.tag, str(key.value))
        if text in seen and key.tag != "tag:yaml.org,2002:merge":
            raise ConfigError(f"the key '{key.value}' is there twice{_place(key.start_mark)}")
        seen.add(text)
    loader.flatten_mapping(node)
    values: dict[Any, Any] = loader.construct_mapping(node, deep=True)
    return values


def _place(mark: Any) -> str:
    return f" (line {mark.line + 1})"


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises ConfigError for one that cannot be read."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except Exception as e:  # no text, no file, and all that PyYAML finds: its constructors raise what they like
        reason = one_line(e)
        mark = getattr(e, "problem_mark", None)
        if mark is not None and "cannot start any token" in reason and _tabbed(path, mark.line):
            reason = f"a tab{_place(mark)}: use spaces"
        raise ConfigError(f"{path} is not a YAML mapping: {reason}") from e
    if not isinstance(found, dict | None):
        raise ConfigError(f"{path} is not a YAML mapping of keys")
    return {str(k): v for k, v in (found or {}).items()}


def _tabbed(path: Path, line: int) -> bool:
    """Whether a line of a file is indented by a tab."""
    text = path.read_text(encoding="utf-8").split("\n")[line]
    return "\t" in text[: len(text) - len(text.lstrip())]


def value_of(text: str, where: str) -> Any:
    """The value of an override. A word, a number or a path is taken as it stands, with the # and the line breaks in it."""
    try:
        node = yaml.compose(text, _Loader)
        if not isinstance(node, yaml.CollectionNode) and getattr(node, "style", None) not in ("'", '"'):
            return _Loader("").construct_object(_scalar(text.strip()))
        rest = text[node.end_mark.index :].strip()
        if rest:
            raise ConfigError(f"'{rest}' follows the value: put the whole value in quotes")
        return yaml.load(text, _Loader)
    except Exception as e:
        raise ConfigError(f"override {where}={text} cannot be read as YAML: {one_line(e)}") from e


def _scalar(text: str) -> Any:
    tag = "tag:yaml.org,2002:str" if text == "<<" else _Loader("").resolve(yaml.ScalarNode, text, (True, False))
    return yaml.ScalarNode(tag, text)


def write(values: Mapping[str, Any]) -> str:
    """Plain values as YAML, in their order."""
    text: str = yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**30)
    return text


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """Values as YAML holds them: mappings with words as keys, lists, words, numbers, true, false, null; with a copy of its own.

    Raises ConfigError, with the key, for anything else.
    """
    if depth > DEEPEST:
        raise ConfigError(f"{_top(where)} holds more than {DEEPEST} levels of lists and mappings, or holds itself")
    if isinstance(value, Mapping):
        out: dict[str, Any] = {}
        for key, inner in value.items():
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise ConfigError(f"a key{f' of {where}' if where else ''} must be a word, got {key!r}: put it in quotes")
            if str(key) in out:
                raise ConfigError(f"the key '{join(where, str(key))}' is there twice")
            out[str(key)] = plain(inner, join(where, str(key)), depth + 1)
        return out
    if isinstance(value, list | tuple):
        return [plain(inner, join(where, str(i)), depth + 1) for i, inner in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str):
        if "\0" in value:
            raise ConfigError(f"{where} holds a null character: {value!r}")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ConfigError(f"{where} holds half a character, which no file can: {value!r}")
        return home(str.__str__(value))
    if isinstance(value, int):
        if value not in WHOLE_NUMBERS:
            least = 0 if where.rpartition(".")[2] == "seed" else "-2**63"
            raise ConfigError(f"{where} must lie between {least} and 2**63 - 1, got a number of {value.bit_length()} bits")
        return int(value)
    if isinstance(value, float):
        return float(value)
    raise ConfigError(f"{where} must be a word, a number, a list or a mapping, got {type(value).__name__}: {value!r}")


def home(value: str) -> str:
    """A path that starts with ~/ from the user's folder; any other word as it is."""
    return os.path.expanduser(value) if value.startswith("~/") else value


def resolved(values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Plain values with interpolations such as ${seed} or ${oc.env:HOME} resolved over the whole.

    Raises ConfigError for one that cannot be resolved, and for the value ???, which says that it must be given.
    """
    found: dict[str, Any] = plain(values, "")
    if any("${" in text for _, text in _texts(found)):
        from omegaconf import OmegaConf  # few configs need it, and every start would pay for it

        try:
            found = plain(OmegaConf.to_container(OmegaConf.create(found), resolve=True), "")
        except Exception as e:  # OmegaConf's, and what its resolvers raise
            key = getattr(e, "full_key", None)
            text = str(getattr(e, "msg", None) or e).split("\n")[0].strip()
            raise ConfigError(f"{what}: {key + ': ' if key else ''}{text}") from e
    for where, text in _texts(found):
        if "${" in text:
            raise ConfigError(f"{where} holds an interpolation that is not resolved: {text!r}")
        if text == "???":
            raise ConfigError(f"{where} must be given, got ???")
    return found


def _texts(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every word in plain values, with its key."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, join(where, str(key)))


def join(where: str, key: str) -> str:
    """The dotted key of a key in a section."""
    return f"{where}.{key}" if where else key


def _top(where: str) -> str:
    return ".".join(where.split(".")[:2])
