"""Where values come from: YAML files with what they extend, dotted keys, overrides; and how layers are merged."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedsim.core import plugins
from fedsim.core.config.schema import PLUGIN_KEYS, SERVER_PLUGIN_KEYS, name_key
from fedsim.core.errors import ConfigError


def read_layers(path: str | Path, seen: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """The files that a YAML extends, outermost base first, then the file itself."""
    path = Path(path).resolve()
    if path in seen:
        raise ConfigError(f"extends goes in a circle: {' -> '.join(p.name for p in (*seen, path))}")
    if not path.is_file():
        hint = f", which {seen[-1].name} extends" if seen else ""
        if not seen and path.suffix not in (".yaml", ".yml"):
            hint = " (an override must look like key.sub=value, e.g. partition.alpha=0.1)"
        raise ConfigError(f"no config file {path}{hint}")
    layer = read_yaml(path)
    bases = layer.pop("extends", None) or []
    layers: list[dict[str, Any]] = []
    for base in [bases] if isinstance(bases, str) else bases:
        layers += read_layers(path.parent / str(base), (*seen, path))
    return [*layers, layer]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, as plain values; its paths (./ and ../) are anchored beside it."""
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as e:  # PyYAML's errors, a list at the top, bytes that are no text
        raise ConfigError(f"{path} is not a YAML mapping: {' '.join(str(e).split())}") from e
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a YAML mapping of keys")
    anchored: dict[str, Any] = _anchored({str(k): v for k, v in raw.items()}, path.parent)
    return anchored


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings: {"partition.alpha": 0.1} is {"partition": {"alpha": 0.1}}."""
    layer: dict[str, Any] = {}
    for key, value in values.items():
        inner = nested(value) if isinstance(value, Mapping) else value
        for part in reversed(str(key).split(".")):
            inner = {part: inner}
        layer = merge(layer, inner)
    return layer


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Overrides such as "partition.alpha=0.1" as a nested mapping."""
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"override '{item}' must look like key.sub=value, e.g. partition.alpha=0.1")
    try:
        layer = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)), resolve=False)
    except Exception as e:
        raise ConfigError(f"overrides {' '.join(overrides)} cannot be read: {' '.join(str(e).split())}") from e
    assert isinstance(layer, dict)
    anchored: dict[str, Any] = _anchored(layer, Path.cwd())
    return anchored


def _anchored(value: Any, folder: Path) -> Any:
    """Strings that start with ./ or ../ become paths from that folder."""
    if isinstance(value, dict):
        return {k: _anchored(v, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [_anchored(v, folder) for v in value]
    if isinstance(value, str) and value.startswith(("./", "../")):
        return os.path.normpath(folder / value)
    return value


def merge(base: Mapping[str, Any], layer: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Deep merge. A section that names another plug-in keeps only what its contract declares (e.g. partition.clients)."""
    out = dict(base)
    for key, new in layer.items():
        where = f"{path}{key}"
        old = out.get(key)
        kind = PLUGIN_KEYS.get(where) or SERVER_PLUGIN_KEYS.get(where.removeprefix("server."))
        if kind is not None:
            out[key] = _merge_plugin(kind, old, new)
        elif isinstance(old, dict) and isinstance(new, Mapping):
            out[key] = merge(old, new, f"{where}.")
        else:
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
