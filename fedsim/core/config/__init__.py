"""The typed configuration, and the only place that sees OmegaConf.

`load(path, overrides)` reads a YAML, follows `extends`, applies `key.sub=value` overrides, and checks everything that can
be known without data: keys, types, ranges, plug-ins and their options. The result is plain frozen dataclasses; plug-in
sections are plain mappings that hold every option, so that a resolved config says all that decides a number.
"""

from fedsim.core.config.layers import anchored, merge, nested, on_a_stream, parse_overrides, read_layers, read_yaml
from fedsim.core.config.resolve import (
    build,
    build_aggregator,
    build_learners,
    compose,
    expand,
    from_dict,
    is_python_object,
    load,
    resolve_device,
    resolve_fused,
    resolve_kernels,
)
from fedsim.core.config.schema import (
    PLUGIN_KEYS,
    SECTIONS,
    SERVER_PLUGIN_KEYS,
    ClientConfig,
    ModelConfig,
    NoiseConfig,
    ParameterGroup,
    RuntimeConfig,
    Section,
    ServerConfig,
    SimConfig,
    StreamConfig,
    TransformConfig,
    name_key,
    plugin_sections,
)
from fedsim.core.config.text import resolved
from fedsim.core.config.typed import typed

__all__ = [
    "PLUGIN_KEYS",
    "SECTIONS",
    "SERVER_PLUGIN_KEYS",
    "ClientConfig",
    "ModelConfig",
    "NoiseConfig",
    "ParameterGroup",
    "RuntimeConfig",
    "Section",
    "ServerConfig",
    "SimConfig",
    "StreamConfig",
    "TransformConfig",
    "anchored",
    "build",
    "build_aggregator",
    "build_learners",
    "compose",
    "expand",
    "from_dict",
    "is_python_object",
    "load",
    "merge",
    "name_key",
    "nested",
    "on_a_stream",
    "parse_overrides",
    "plugin_sections",
    "read_layers",
    "read_yaml",
    "resolve_device",
    "resolve_fused",
    "resolve_kernels",
    "resolved",
    "typed",
]
