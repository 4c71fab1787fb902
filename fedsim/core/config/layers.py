"""Where values come from: YAML files with what they extend, dotted keys, overrides; and how layers are merged."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fedsim.core import plugins, presets
from fedsim.core.config import text
from fedsim.core.config.schema import PLUGIN_KEYS, SECTIONS, SERVER_PLUGIN_KEYS, name_key
from fedsim.core.errors import ConfigError


def read_layers(path: str | Path, seen: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """The files that a YAML extends, outermost base first, then the file itself."""
    path = Path(os.path.expanduser(path)).resolve()
    if path in seen:
        raise ConfigError(f"extends goes in a circle: {' -> '.join(p.name for p in (*seen, path))}")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a config file in it")
    if not path.is_file():
        hint = f", which {seen[-1].name} extends" if seen else ""
        if not seen and path.suffix not in (".yaml", ".yml"):
            hint = " (an override must look like key.sub=value, e.g. partition.alpha=0.1)"
        raise ConfigError(f"no config file {path}{hint}")
    layer = read_yaml(path)
    bases = layer.pop("extends", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"extends in {path} must name a config file, or a list of them, got {bases!r}")
    layers: list[dict[str, Any]] = []
    for base in presets.located(bases, path.parent):
        layers += read_layers(base, (*seen, path))
    return [*layers, nested(layer)]


def on_a_stream(layers: Sequence[Mapping[str, Any]], others: Iterable[Mapping[str, Any]] = ()) -> list[Mapping[str, Any]]:
    """Layers of several files; on the stream of the quickstart, as a method by itself is, where none says what the data are.

    others: layers that come on top of them."""
    if any(layer.get("data") for layer in (*layers, *others)):
        return [*layers]
    return [*read_layers(presets.located([presets.STREAM], Path(), whole=False)[0]), *layers]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, its keys as they stand there; its paths (./, ../ and ~/) are anchored beside it."""
    found: dict[str, Any] = anchored(text.read(path), path.parent)
    return found


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Overrides such as "partition.alpha=0.1" as a nested mapping."""
    pairs = []
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"override '{item}' must look like key.sub=value, e.g. partition.alpha=0.1")
        key = key.strip()
        pairs.append((key, text.plain(anchored(text.value_of(value, key), Path.cwd()), key)))
    return _together(pairs, "")


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """One layer of a config, with dotted keys as nested mappings: {"partition.alpha": 0.1} is {"partition": {"alpha": 0.1}}.

    All keys of a layer are set at once, so their order says nothing: the name of a plug-in and its options belong together.
    Raises ConfigError for a key that is given twice with different values.
    """
    return _together(text.plain(values, "").items(), "")


def _together(pairs: Iterable[tuple[str, Any]], where: str) -> dict[str, Any]:
    layer: dict[str, Any] = {}
    for dotted, value in pairs:
        inner = _nested(value, text.join(where, dotted))
        first, *rest = dotted.split(".")
        if not all((first, *rest)):
            raise ConfigError(f"the key '{text.join(where, dotted)}' has an empty part: it must look like section.key")
        for part in reversed(rest):
            inner = {part: inner}
        layer[first] = _joined(layer[first], inner, text.join(where, first)) if first in layer else inner
    return layer


def _nested(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return _together(value.items(), where)
    return [_nested(v, text.join(where, str(i))) for i, v in enumerate(value)] if isinstance(value, list) else value


def _joined(old: Any, new: Any, where: str) -> Any:
    """What two keys of one layer say of the same place."""
    if isinstance(old, dict) != isinstance(new, dict) and (key := _plugin_name_key(where)):
        old, new = ({key: value} if isinstance(value, str) else value for value in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {k: _joined(old[k], v, f"{where}.{k}") if k in old else v for k, v in new.items()}
    if repr(old) != repr(new):  # 1, 1.0 and true are equal, but not the same
        raise ConfigError(f"{where} is given twice, as {old!r} and as {new!r}: leave one out")
    return old


def _plugin_kind(where: str) -> str | None:
    """The kind of plug-in whose section lies under a dotted key."""
    return PLUGIN_KEYS.get(where) or SERVER_PLUGIN_KEYS.get(where.removeprefix("server."))


def _plugin_name_key(where: str) -> str | None:
    kind = _plugin_kind(where)
    return None if kind is None else name_key(kind)


def anchored(value: Any, folder: Path) -> Any:
    """A value as it is meant in a folder: strings that start with ./ or ../ become paths from there, with ~/ from the user's."""
    if isinstance(value, dict):
        return {k: anchored(v, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [anchored(v, folder) for v in value]
    if isinstance(value, str) and value.startswith(("./", "../")):
        return os.path.normpath(folder / value)
    return text.home(value) if isinstance(value, str) else value


def merge(base: Mapping[str, Any], layer: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Deep merge of two nested layers, the later one winning. A section that names another plug-in keeps only what its contract
    declares (e.g. partition.clients); a section with nothing in it (`client:`) changes nothing."""
    out = dict(base)
    for key, new in layer.items():
        where = f"{path}{key}"
        old = out.get(key)
        kind = _plugin_kind(where)
        if kind is not None:
            out[key] = _merge_plugin(kind, old, new)
        elif isinstance(old, dict) and isinstance(new, Mapping):
            out[key] = merge(old, new, f"{where}.")
        elif new is not None or where not in SECTIONS:
            out[key] = new
    return out


def _merge_plugin(kind: str, old: Any, new: Any) -> Any:
    key = name_key(kind)
    old = {key: old} if isinstance(old, str) else old
    new = {key: new} if isinstance(new, str) else new
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    if new.get(key, old.get(key)) != old.get(key):
        common = {f.name for f in fields(plugins.KINDS[kind].contract)}
        old = {k: v for k, v in old.items() if k in common}
    return {**old, **new}
