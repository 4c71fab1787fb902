"""Plain values become dataclasses: unknown keys, wrong types and unresolved interpolations are errors that name the key."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsim.core.errors import ConfigError, PluginError, did_you_mean


def typed(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    """An instance of a dataclass from plain values; unknown keys and wrong types are ConfigErrors that name the key."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a mapping of options, got {values!r}")
    text = _plain_text(values)
    return _typed(cls, values, where) if text is None else _typed_once(cls, text, where)


@lru_cache(maxsize=4096)
def _typed_once(cls: Any, text: str, where: str) -> Any:
    """The configs of a sweep have most of their sections in common, and OmegaConf takes milliseconds for each. For values that
    are looked at only: what is built to be used is an object of its own."""
    return _typed(cls, json.loads(text), where)


def typed_anew(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    """An object of its own; a client builds the same statistics in every job, so OmegaConf looks at the options once."""
    text = _plain_text(values)
    return _typed(cls, values, where) if text is None else _made(cls, copy.deepcopy(_checked_once(cls, text, where)), where)


@lru_cache(maxsize=4096)
def _checked_once(cls: Any, text: str, where: str) -> dict[str, Any]:
    return _checked(cls, json.loads(text), where)


def _plain_text(values: Mapping[str, Any]) -> str | None:
    """Values as JSON; None for those that JSON does not hold as they are, such as sections that are typed already."""
    try:
        text = json.dumps(values)
        return text if json.loads(text) == values else None
    except (TypeError, ValueError):
        return None


def _typed(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    return _made(cls, _checked(cls, values, where), where)


def _made(cls: Any, kwargs: Mapping[str, Any], where: str) -> Any:
    try:
        return cls(**kwargs)
    except (ConfigError, PluginError) as e:
        raise type(e)(f"{where}.{e}" if where else str(e)) from e


def _checked(cls: Any, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments of a dataclass: every option, of the right type."""
    dot = f"{where}." if where else ""
    known = {f.name for f in fields(cls) if f.init}
    for key in values:
        if key not in known:
            owner = f" of {where}" if where else ""
            raise ConfigError(f"unknown key '{dot}{key}'.{did_you_mean(str(key), known) or f' There are no options{owner}.'}")
    nested = {k: v for k, v in values.items() if dataclasses.is_dataclass(v)}
    try:
        schema = OmegaConf.structured(cls)
        merged = OmegaConf.merge(schema, {k: v for k, v in values.items() if k not in nested})
        assert isinstance(merged, DictConfig)
        missing = sorted(str(k) for k in OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{dot}{missing[0]} must be given")
        plain = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as e:
        raise ConfigError(_one_line(e, dot)) from e
    assert isinstance(plain, dict)
    kwargs: dict[str, Any] = {str(k): v for k, v in plain.items() if k in known} | nested
    for f in fields(cls):
        if str(f.type).startswith("tuple") and isinstance(kwargs.get(f.name), list):
            kwargs[f.name] = tuple(kwargs[f.name])
    return kwargs


def plain(values: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """Interpolations such as ${seed} or ${oc.env:HOME} resolved over the whole config."""
    try:
        plain = OmegaConf.to_container(OmegaConf.create(dict(values)), resolve=True)
    except OmegaConfBaseException as e:
        raise ConfigError(f"{what}: {_one_line(e, '')}") from e
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}


def _one_line(error: OmegaConfBaseException, dot: str) -> str:
    first = str(error.msg if error.msg else error).splitlines()[0].strip()
    return f"{dot}{error.full_key}: {first}" if error.full_key else first
