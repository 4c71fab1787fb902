"""What a config says of a split that it reads from a manifest: the stream and the partition that the file was made with."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.core import plugins
from fedsim.core.config.schema import SimConfig, StreamConfig
from fedsim.core.errors import ConfigError

# keys of `stream` that decide the split, beside its noise and whether tasks are domains; the others say how it is played
OF_THE_SPLIT = ("tasks", "classes_per_task", "order", "group", "joint", "validation")
FIRST = '{"asked":'  # keys of a manifest are sorted: who holds what need not be read


def asked(manifest: Any, stream: Any) -> dict[str, Any]:
    """Dotted keys of `stream` and `partition` that decide the split, with the values that a manifest's file was made with.

    stream: the name of one; one with the same splits is not named. Nothing where there is no such file, or it does not say: a
    file that is wrong is refused where its split is read.
    """
    try:
        text = Path(os.path.expanduser(manifest)).read_text(encoding="utf-8")
        said = json.JSONDecoder().raw_decode(text, len(FIRST))[0] if text.startswith(FIRST) else json.loads(text)["asked"]
        return dict(_told({**dataclasses.asdict(StreamConfig()), **said["stream"]}, said["partition"], stream))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def require(config: SimConfig) -> None:
    """Raise ConfigError where the stream or the partition of a config is not what its manifest was made with."""
    plain = config.to_dict()
    for dotted, wanted in asked(config.manifest, config.stream.name).items():
        said: Any = plain
        for key in dotted.split("."):
            said = said.get(key) if isinstance(said, Mapping) else None
        if _by_name(said) != _by_name(wanted):
            raise ConfigError(
                f"{dotted} is {json.dumps(said)}, but the manifest {config.manifest} was made with {json.dumps(wanted)}: leave "
                "the key out, or set it as the manifest has it"
            )


def _told(stream: Mapping[str, Any], partition: Mapping[str, Any], name: Any) -> dict[str, Any]:
    domains = "domain_incremental"
    found = {} if (stream["name"] == domains) == (name == domains) else {"stream.name": stream["name"]}
    found |= {f"stream.{key}": stream[key] for key in OF_THE_SPLIT}
    noise = stream["noise"] if stream["noise"]["share"] else {"share": 0.0}
    found |= {f"stream.noise.{key}": value for key, value in noise.items()}
    return found | {f"partition.{key}": partition[key] for key in ("name", *sorted(partition.keys() - {"name"}))}


def _by_name(value: Any) -> Any:
    """A partition of the user's own is known by its name, wherever its file lies: a run directory holds a copy."""
    return plugins.short_name(value) if isinstance(value, str) and plugins.is_path(value) else value
