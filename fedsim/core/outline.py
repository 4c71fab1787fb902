"""The keys of a config, read off the source: a shell that completes a word cannot wait until torch is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fedsim.core import plugins
from fedsim.core.home import ROOT

CORE = Path(ROOT) / "fedsim" / "core"
SCHEMA = CORE / "config" / "schema.py"


@dataclass(frozen=True)
class Class:
    """A class as it is written: field -> its type, what it derives from, and the words that a field may be."""

    fields: Mapping[str, str]
    bases: tuple[str, ...] = ()
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def keys() -> dict[str, tuple[str, ...]]:
    """Dotted key -> the words that it may be, none where that is no word; those of `plugin_keys` stand for whole sections."""
    found: dict[str, tuple[str, ...]] = {}
    kinds = plugin_keys()
    for key, kind, words in _written("SimConfig", ""):
        found[key] = tuple(plugins.names(kinds[key])) if key in kinds else ("true", "false") if kind == "bool" else words
    return found


def _written(owner: str, before: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Every key below a class of the schema, with its type and the words that it may be."""
    classes = _classes(SCHEMA)
    for name, kind in classes[owner].fields.items():
        if kind in classes:
            yield from _written(kind, f"{before}{name}.")
        else:
            yield f"{before}{name}", kind, classes[owner].choices.get(name, ())


@cache
def options(kind: str) -> tuple[str, ...]:
    """The options of all plug-ins of a kind."""
    contracts: dict[str, Class] = {}
    for path in sorted((CORE / "contracts").glob("*.py")):
        contracts |= _classes(path)
    what = plugins.KINDS[kind]
    folder = Path(ROOT).joinpath(*what.package.split("."))
    files = {path: _classes(path) for path in sorted(folder.glob("*.py"))}
    shared = {n: one for path, classes in files.items() if path.stem.startswith("_") for n, one in classes.items()}
    known = contracts | {name: one for name, one in shared.items() if name != what.class_name}
    told: dict[str, None] = {}
    for name in plugins.names(kind):
        path = _place_of(folder / f"{name}.py", what.class_name)
        classes = _classes(path)
        beside = {n: one for n, one in classes.items() if n != what.class_name}
        told |= dict.fromkeys(_inherited(classes[what.class_name], known | beside))
    return tuple(told)


def _place_of(path: Path, name: str) -> Path:
    """The file that defines a class: this one, or the one that it imports it from."""
    for node in _lines(path):
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            return Path(ROOT).joinpath(*node.module.split(".")).with_suffix(".py")
    return path


def _inherited(one: Class, known: Mapping[str, Class]) -> Iterator[str]:
    for base in one.bases:
        if base in known:
            yield from _inherited(known[base], {name: c for name, c in known.items() if name != base})
    yield from one.fields


def plugin_keys() -> dict[str, str]:
    """Key -> the kind of plug-in whose section, or whose name, stands there."""
    told = _constants(SCHEMA)
    server = {f"server.{key}": kind for key, kind in told["SERVER_PLUGIN_KEYS"].items()}
    return {**told["PLUGIN_KEYS"], **server, "runtime.pool": "pools"}


@cache
def _lines(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text(encoding="utf-8")).body


@cache
def _classes(path: Path) -> dict[str, Class]:
    return {node.name: _read(node) for node in _lines(path) if isinstance(node, ast.ClassDef)}


def _constants(path: Path) -> dict[str, Any]:
    """Names in capitals that stand for plain dictionaries."""
    found = {}
    for node in _lines(path):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def _read(node: ast.ClassDef) -> Class:
    fields = {
        line.target.id: ast.unparse(line.annotation)
        for line in node.body
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and "ClassVar" not in ast.unparse(line.annotation)
    }
    choices: dict[str, tuple[str, ...]] = {}
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "require_choice":
            key, _, words = call.args
            if isinstance(key, ast.Constant) and isinstance(words, ast.Tuple):
                choices[str(key.value)] = tuple(
                    "null" if w.value is None else str(w.value) for w in words.elts if isinstance(w, ast.Constant)
                )
    return Class(fields, tuple(ast.unparse(base).rpartition(".")[2] for base in node.bases), choices)
