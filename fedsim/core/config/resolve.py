"""Layers become a checked config with every default filled in, and its plug-in sections become objects."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from fedsim.core import hardware, plugins, presets
from fedsim.core.config import splits
from fedsim.core.config.layers import merge, nested, on_a_stream, parse_overrides, read_layers
from fedsim.core.config.schema import ONE_BY_ONE, PLUGIN_KEYS, SECTIONS, Section, SimConfig, name_key
from fedsim.core.config.text import resolved
from fedsim.core.config.typed import typed
from fedsim.core.errors import ConfigError, PluginError, did_you_mean


def load(path: str | Path | Sequence[str | Path], overrides: str | Sequence[str] = (), begun: bool = False) -> SimConfig:
    """Read a YAML file with its `extends`, apply overrides (or one) such as "partition.alpha=0.1", and check it.

    A word such as "lorm" is the preset of that name; of several files or presets, such as a stream and a method, the later one
    wins. Several of which none says what the data are stand on the quickstart's stream, as a method by itself does.
    Strings that start with ./ or ../ are paths beside the YAML that holds them (beside the working directory in an override).
    begun: it is the config of a run that was begun, maybe on another machine. Raises ConfigError or PluginError, one line each.
    """
    paths = presets.located([path] if isinstance(path, str | Path) else path, Path.cwd())
    overrides = [overrides] if isinstance(overrides, str) else overrides
    name = "-".join(Path(p).stem for p in paths)
    layers = [layer for p in paths for layer in read_layers(p)]
    if not any(layers):
        raise ConfigError(f"{paths[0]} is empty: name a preset beside it, or let it extend one (extends: lorm)")
    return compose([{"name": name}, *(on_a_stream(layers) if len(paths) > 1 else layers), parse_overrides(overrides)], begun)


def compose(layers: Iterable[Mapping[str, Any]], begun: bool = False) -> SimConfig:
    """Merge plain mappings, the later one winning, and check the whole. The layer that names a manifest says with it which stream
    and partition made the file. What this machine cannot do is replaced, with a warning, unless a run was `begun` with it."""
    plain, merged = [nested(layer) for layer in layers], dict[str, Any]()
    naming = max((number for number, layer in enumerate(plain) if "manifest" in layer), default=None)
    for number, layer in enumerate(plain):
        if number == naming and not begun:
            stream = merged.get("stream")
            name = stream.get("name") if isinstance(stream, dict) else None
            merged = merge(merged, nested(splits.asked(layer["manifest"], name)))
        merged = merge(merged, layer)
    config = from_dict(merged)
    if begun:
        return config
    runtime = config.runtime
    if runtime.precision == "bf16" and not hardware.has_bf16(runtime.device):
        text = f"runtime.precision is bf16, which this machine's {runtime.device} does not speed up: fp32 is used instead"
        warnings.warn(text, stacklevel=2)
        runtime = dataclasses.replace(runtime, precision="fp32")
    return dataclasses.replace(config, runtime=runtime)


def from_dict(values: Mapping[str, Any]) -> SimConfig:
    """Check a plain mapping and fill in every default, those of the plug-ins too."""
    values = resolved(nested(values), "config")
    for name, cls in SECTIONS.items():
        section = values.get(name)
        values[name] = typed(cls, {} if section is None else section, name)
    config: SimConfig = typed(SimConfig, values, "")
    plugged: dict[str, Any] = {key: expand(kind, getattr(config, key), key) for key, kind in PLUGIN_KEYS.items()}
    server = config.server
    if isinstance(server.aggregator, list):
        aggregator: Any = [_expand_group(g, f"server.aggregator.{i}") for i, g in enumerate(server.aggregator)]
        if not aggregator:
            raise ConfigError("server.aggregator is an empty list: name at least one rule")
    else:
        aggregator = expand("aggregators", server.aggregator, "server.aggregator")
    server = dataclasses.replace(
        server,
        aggregator=aggregator,
        consolidator=expand("consolidators", server.consolidator, "server.consolidator"),
        calibrator=None if server.calibrator is None else expand("calibrators", server.calibrator, "server.calibrator"),
        channel=_expand_each("channels", server.channel, "server.channel"),
    )
    client = dataclasses.replace(config.client, learners=_expand_each("learners", config.client.learners, "client.learners"))
    trackers = _expand_each("trackers", config.trackers, "trackers")
    pool = _known_pool(config.runtime.pool)
    device = resolve_device(config.runtime.device)
    runtime = dataclasses.replace(
        config.runtime,
        pool=pool,
        device=device,
        kernels=resolve_kernels(config.runtime.kernels, device),
        fused=resolve_fused(config.runtime.fused, device, pool),
    )
    return dataclasses.replace(config, **plugged, server=server, client=client, runtime=runtime, trackers=trackers)


def _known_pool(name: str) -> str:
    """The pool by its name, a user's file by its whole path. Ours are not loaded: a config is read without Ray."""
    if not plugins.is_own("pools", name):
        return name
    if "." not in name:
        raise ConfigError(f"runtime.pool '{name}' is unknown.{did_you_mean(name, plugins.names('pools'))}")
    try:
        plugins.load("pools", name)
    except PluginError as e:
        raise PluginError(f"runtime.pool: {e}") from e
    return str(Path(name).resolve()) if plugins.is_path(name) else name


def resolve_device(name: str) -> str:
    """The device that "auto" stands for: the GPU if there is one here. Resolved with the config, since it moves bits."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else hardware.known_device(name)


def resolve_kernels(name: str, device: str) -> str:
    """The kernels that "auto" stands for, on this machine. Raises ConfigError for the CPU's kernels on another device."""
    if name == "onednn" and device != "cpu":
        raise ConfigError(f"runtime.kernels onednn is for the CPU, but runtime.device is {device}: set it to torch or auto")
    return hardware.best_kernels(device) if name == "auto" else name


def resolve_fused(fused: Any, device: str, pool: str) -> bool:
    """Whether clients train together: "auto" stands for yes where one client cannot fill the device, and the pool has several."""
    return device.startswith("cuda") and pool not in ONE_BY_ONE if fused == "auto" else bool(fused)


def expand(kind: str, section: Any, where: str) -> dict[str, Any]:
    """A plug-in section with every option filled in: {"name": ..., **options}. Checks name, options and ranges."""
    key = name_key(kind)
    if isinstance(section, str):
        section = {key: section}
    if not isinstance(section, Mapping) or not isinstance(section.get(key), str):
        raise ConfigError(f"{where} must be the name of one of the {kind}, or a mapping with the key '{key}', got {section!r}")
    if section[key].startswith("python:"):
        raise ConfigError(f"{where}: '{section[key]}' was a Python object: resume from Python with aggregator=the same object")
    if section[key].startswith("_"):  # modules that plug-ins share
        raise PluginError(
            f"{where}: unknown {plugins.singular(kind)} '{section[key]}'.{did_you_mean(section[key], plugins.names(kind))}"
        )
    options = {k: v for k, v in section.items() if k != key}
    instance = _build(kind, section[key], options, where)
    name = str(Path(section[key]).resolve()) if plugins.is_path(section[key]) else section[key]
    return {key: name, **_told(instance)}


def _expand_each(kind: str, sections: Sequence[Any], where: str) -> list[dict[str, Any]]:
    """Plug-ins of one kind, each of which may be there once."""
    found: list[dict[str, Any]] = []
    for i, section in enumerate(sections):
        found.append(expand(kind, section, f"{where}.{i}"))
        name = plugins.short_name(found[i]["name"])
        if name in [plugins.short_name(f["name"]) for f in found[:i]]:
            raise ConfigError(f"{where}.{i}: '{name}' is there already: name a {plugins.singular(kind)} once")
    return found


def build(kind: str, section: Section) -> Any:
    """A new plug-in object of a section."""
    key = name_key(kind)
    return _build(kind, section[key], {k: v for k, v in section.items() if k != key}, plugins.singular(kind))


def build_aggregator(section: Any) -> Any:
    """The rule of `server.aggregator`: one for all tensors, or for a list of `{match: glob, name: …}` one per group of them."""
    if not isinstance(section, list):
        return build("aggregators", section)
    rules = [(str(s["match"]), build("aggregators", {k: v for k, v in s.items() if k != "match"})) for s in section]
    return plugins.load("aggregators", "_grouped")(tuple(rules))


def build_learners(sections: Sequence[Section]) -> dict[str, Any]:
    """The learners of `client.learners` by the names that their statistics, memory and context go by."""
    return {plugins.short_name(s["name"]): build("learners", s) for s in sections}


def is_python_object(section: Any) -> bool:
    """Whether a rule came from Python: its section describes it, and nobody can build it again."""
    return isinstance(section, Mapping) and str(section.get("name", "")).startswith("python:")


def _build(kind: str, name: str, options: Mapping[str, Any], where: str) -> Any:
    try:
        cls = plugins.load(kind, name)
    except PluginError as e:
        raise PluginError(f"{where}: {e}") from e
    return typed(cls, options, where)


def _expand_group(group: Any, where: str) -> dict[str, Any]:
    if not isinstance(group, Mapping) or not isinstance(group.get("match"), str):
        raise ConfigError(f"{where} must hold 'match' (a glob such as \"head.*\") beside the rule, got {group!r}")
    rest = {k: v for k, v in group.items() if k != "match"}
    return {"match": group["match"]} | expand("aggregators", rest, where)


def _told(value: Any) -> Any:
    """A plug-in's options as YAML holds them."""
    if dataclasses.is_dataclass(value):
        return {f.name: _told(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, Mapping):
        return {k: _told(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_told(v) for v in value]
    return value.name if isinstance(value, Enum) else str(value) if isinstance(value, Path) else value
