"""The typed configuration, and the only place that sees OmegaConf.

`load(path, overrides)` reads a YAML, follows `extends`, applies `key.sub=value` overrides, and checks everything that can
be known without data: keys, types, ranges, plug-ins and their options. The result is plain frozen dataclasses; plug-in
sections are plain mappings that hold every option, so that a resolved config says all that decides a number.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsim.core import contracts, hardware, plugins
from fedsim.core.errors import ConfigError, PluginError, did_you_mean, require_choice

Section = Mapping[str, Any]  # {"name": plug-in, **options}


MOVES_BITS = ("threads", "device", "kernels", "precision", "fused", "eval_batch")  # of `runtime`; the rest never does


@dataclass(frozen=True)
class StreamConfig:
    """The stream of tasks.

    name: class_incremental (every task brings new classes) | task_incremental (the same, but the task is told at test
        time) | domain_incremental (every task brings a new domain of the same classes).
    tasks: number of tasks; null: all that the grouping or the domains give.
    classes_per_task: null: all classes are divided evenly; else the first tasks × classes_per_task in order are used.
    order: "given" | "shuffle" (by seed) | a list of class names or ids (domain names or ids for domain_incremental).
    group: tasks by a grouping of the source (alphabet, superclass, domain of intents), instead of by number.
    online: single pass: the shard of a task is divided over its rounds, so that every sample is seen once.
    """

    name: str = "class_incremental"
    tasks: int | None = 5
    classes_per_task: int | None = None
    order: Any = "given"
    group: str | None = None
    online: bool = False

    def __post_init__(self) -> None:
        require_choice("name", self.name, ("class_incremental", "task_incremental", "domain_incremental"))
        _require(self.tasks is None or self.tasks >= 1, "tasks", "must be at least 1", self.tasks)
        per_task = self.classes_per_task
        _require(per_task is None or per_task >= 1, "classes_per_task", "must be at least 1", per_task)
        if isinstance(self.order, str):
            require_choice("order", self.order, ("given", "shuffle"))
        elif not isinstance(self.order, list):
            raise ConfigError(f"order must be 'given', 'shuffle' or a list of classes, got {self.order!r}")


@dataclass(frozen=True)
class TransformConfig:
    """Batched tensor operations on images: resize to the backbone's size, normalise, augment (training only).

    augment: none | flip | crop (random resized crop) | crop_flip | affine (small rotations, shifts, scales).
    mean, std: per channel in 0..1; null: what the backbone was trained with.
    """

    augment: str = "none"
    interpolation: str = "bicubic"
    mean: list[float] | None = None
    std: list[float] | None = None

    def __post_init__(self) -> None:
        require_choice("augment", self.augment, ("none", "flip", "crop", "crop_flip", "affine"))
        require_choice("interpolation", self.interpolation, ("bicubic", "bilinear", "nearest"))
        _require(self.std is None or all(s > 0 for s in self.std), "std", "must be positive", self.std)


@dataclass(frozen=True)
class ModelConfig:
    """The frozen backbone.

    backbone: "omniglot-vit" (embedded) | a Hugging Face hub id | a local folder | a .safetensors file with timm names |
        "random" (random weights of the architecture in `config`, for tests).
    pooling: cls | mean (over the attention mask) | auto (cls for images, mean for text).
    """

    backbone: str = "omniglot-vit"
    pooling: str = "auto"
    config: dict[str, Any] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_choice("pooling", self.pooling, ("auto", "cls", "mean"))
        if self.backbone == "random" and "model_type" not in (self.config or {}):
            raise ConfigError("config must name a model_type (e.g. vit, bert) when backbone is 'random'")
        if self.backbone != "random" and self.config:
            raise ConfigError(f"config is for backbone 'random' only: leave it out, or set that, got {self.backbone!r}")


@dataclass(frozen=True)
class ClientConfig:
    """Local training: cross-entropy on the task's classes, a new optimizer every round.

    optimizer: any class of torch.optim, in any case; schedule: any class of torch.optim.lr_scheduler, stepped per batch.
    In their options, the number of steps of this client's round may be written as the word "steps".
    clip_norm: maximum gradient norm; objectives: extra loss terms.
    """

    epochs: int = 1
    batch_size: int = 16
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    schedule: str | None = None
    schedule_options: dict[str, Any] = field(default_factory=dict)
    clip_norm: float | None = None
    objectives: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "epochs", "must be at least 1", self.epochs)
        _require(self.batch_size >= 1, "batch_size", "must be at least 1", self.batch_size)
        _require(self.lr > 0, "lr", "must be positive", self.lr)
        _require(self.weight_decay >= 0, "weight_decay", "must not be negative", self.weight_decay)
        _require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "must be positive", self.clip_norm)


@dataclass(frozen=True)
class ServerConfig:
    """Rounds per task and the rules.

    participation: share of the clients that is drawn afresh in every round, in (0, 1].
    aggregator: a rule, or a list of {match: "head.*", name: ..., ...}: the first match decides for a tensor.
    on_client_failure: fail | skip (a round in which nobody is left is an error either way).
    evaluate: round (every task seen, after every round) | task (only at the end of a task).
    drift: measure how far clients drift apart; some of their updates then travel beside the sums (at most 64 MB a round).
    without: ids of clients that never take part, e.g. what unlearning is compared with.
    unlearning: keep, for every client and task, what the client becomes by itself, so that `fedsim unlearn` can remove it later.
        Every client then trains once more per task, for as many epochs as the task's rounds have together; a file each.
    """

    rounds: int = 3
    participation: float = 1.0
    aggregator: Any = "fedavg"
    consolidator: Any = "none"
    calibrator: Any = None
    on_client_failure: str = "fail"
    evaluate: str = "round"
    drift: bool = True
    without: list[int] = field(default_factory=list)
    unlearning: bool = False

    def __post_init__(self) -> None:
        _require(self.rounds >= 1, "rounds", "must be at least 1", self.rounds)
        _require(0 < self.participation <= 1, "participation", "must be in (0, 1]", self.participation)
        require_choice("on_client_failure", self.on_client_failure, ("fail", "skip"))
        require_choice("evaluate", self.evaluate, ("round", "task"))


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how it runs. Only threads, device, kernels, precision, fused and eval_batch may move bits; the rest never does.

    pool: serial | ray | flower; workers: processes, "auto": CPU cores / threads (at most one per client).
    threads: of one worker, the same in every pool; gpus_per_worker: may be a fraction.
    kernels: of the CPU's products in float32: torch | onednn | auto (onednn where it makes use of AVX-512, else torch).
    precision: fp32 | bf16 (the frozen backbone in half precision, all that is trained in float32). A machine that was not made
        for bf16 takes fp32, says so, and the resolved config says it too.
    address: of a Ray cluster to join, "auto" for one on this machine (if it wants a token: RAY_AUTH_MODE=token).
    fused: auto (on a GPU, where it pays) | true | false: train several clients in one forward. It rounds in another order, and
        so does a bundle that had to be made smaller for want of memory.
    cache: keep what frozen blocks below the adapter make of a client's samples from round to round (up to 512 MB per worker);
        without augmentation. False computes it anew in every round, to the same bits.
    output: folder of run directories; max_restarts: of a Ray worker that dies, per job.
    """

    pool: str = "ray"
    workers: Any = "auto"
    threads: int = 1
    device: str = "auto"
    kernels: str = "auto"
    precision: str = "fp32"
    fused: Any = "auto"
    cache: bool = True
    address: str | None = None
    gpus_per_worker: float = 0.0
    eval_batch: int = 256
    max_restarts: int = 2
    output: str = "runs"

    def __post_init__(self) -> None:
        counted = isinstance(self.workers, int) and not isinstance(self.workers, bool) and self.workers >= 1
        _require(self.workers == "auto" or counted, "workers", "must be 'auto' or at least 1", self.workers)
        _require(self.threads >= 1, "threads", "must be at least 1", self.threads)
        _require(self.eval_batch >= 1, "eval_batch", "must be at least 1", self.eval_batch)
        _require(self.gpus_per_worker >= 0, "gpus_per_worker", "must not be negative", self.gpus_per_worker)
        _require(self.max_restarts >= 0, "max_restarts", "must not be negative", self.max_restarts)
        require_choice("kernels", self.kernels, ("auto", "torch", "onednn"))
        require_choice("precision", self.precision, ("fp32", "bf16"))
        _require(self.fused == "auto" or isinstance(self.fused, bool), "fused", "must be auto, true or false", self.fused)
        if self.fused is True and self.pool == "flower":
            raise ConfigError("fused cannot be true with the pool flower, which sends every client by itself: use false or auto")


@dataclass(frozen=True)
class SimConfig:
    """A whole run. See the classes of its sections for every key.

    trackers: copies of what the run tells about itself, for tools such as TensorBoard: names, or {name: ..., option: ...}.
    """

    name: str = "run"
    seed: int = 0
    manifest: str | None = None
    data: Any = field(default_factory=lambda: {"source": "omniglot"})
    transform: TransformConfig = field(default_factory=TransformConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    partition: Any = "dirichlet"
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: Any = "lora"
    client: ClientConfig = field(default_factory=ClientConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    trackers: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        _require(self.seed >= 0, "seed", "must not be negative", self.seed)
        if self.stream.online and self.server.unlearning:
            raise ConfigError("server.unlearning and stream.online exclude each other: clients train once more by themselves")
        if self.stream.online and self.client.epochs != 1:
            raise ConfigError(f"client.epochs must be 1 with stream.online (every sample is seen once), got {self.client.epochs}")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts and lists: what YAML and JSON can hold, and `from_dict` reads."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def to_yaml(self) -> str:
        """The resolved config as YAML."""
        return OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))

    def identity(self) -> str:
        """sha256 of all that decides the numbers: the config without its name, where it runs, and who is told."""
        plain = self.to_dict()
        del plain["name"], plain["trackers"]
        plain["runtime"] = {k: plain["runtime"][k] for k in MOVES_BITS}
        if self.manifest is not None and Path(self.manifest).is_file():
            plain["manifest"] = hashlib.sha256(Path(self.manifest).read_bytes()).hexdigest()  # the split, wherever it lies
        text = json.dumps(plain, sort_keys=True)
        for path in self.user_files():
            text = text.replace(json.dumps(path), json.dumps(plugins.fingerprint(path)))
        return hashlib.sha256(text.encode()).hexdigest()

    def user_files(self) -> list[str]:
        """Paths of plug-ins that are files of the user's own."""
        return sorted({s[_name_key(k)] for k, _, s in _plugin_sections(self) if plugins.is_path(s[_name_key(k)])})


SECTIONS = {f.name: f.default_factory for f in fields(SimConfig) if dataclasses.is_dataclass(f.default_factory)}
# key of a plug-in section -> kind; the same key under `server`
PLUGIN_KEYS = {"data": "sources", "partition": "partitions", "adapter": "adapters"}
SERVER_PLUGIN_KEYS = {"aggregator": "aggregators", "consolidator": "consolidators", "calibrator": "calibrators"}


def load(path: str | Path, overrides: Sequence[str] = (), begun: bool = False) -> SimConfig:
    """Read a YAML file with its `extends`, apply overrides such as "partition.alpha=0.1", and check it.

    Strings that start with ./ or ../ are paths beside the YAML that holds them (beside the working directory in an override).
    begun: it is the config of a run that was begun, maybe on another machine. Raises ConfigError or PluginError, one line each.
    """
    return compose([{"name": Path(path).stem}, *read_layers(path), parse_overrides(overrides)], begun)


def compose(layers: Iterable[Mapping[str, Any]], begun: bool = False) -> SimConfig:
    """Merge plain mappings, the later one winning, and check the whole. What this machine cannot do is replaced, with a warning,
    unless a run was `begun` with it."""
    merged: dict[str, Any] = {}
    for layer in layers:
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
    values = dict(plain(values, "config"))
    for name, cls in SECTIONS.items():
        values[name] = typed(cls, values.get(name) or {}, name)
    config: SimConfig = typed(SimConfig, values, "")
    data, partition, adapter = (expand(kind, getattr(config, key), key) for key, kind in PLUGIN_KEYS.items())
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
    )
    objectives = [expand("objectives", o, f"client.objectives.{i}") for i, o in enumerate(config.client.objectives)]
    client = dataclasses.replace(config.client, objectives=objectives)
    trackers = [expand("trackers", t, f"trackers.{i}") for i, t in enumerate(config.trackers)]
    for i, tracker in enumerate(trackers):
        if tracker["name"] in [t["name"] for t in trackers[:i]]:
            raise ConfigError(f"trackers.{i}: '{tracker['name']}' is there already: name a tracker once")
    pool, pools = config.runtime.pool, plugins.names("pools")
    if pool not in pools and "." not in pool:
        raise ConfigError(f"runtime.pool '{pool}' is unknown.{did_you_mean(pool, pools)}")
    device = resolve_device(config.runtime.device)
    runtime = dataclasses.replace(
        config.runtime,
        device=device,
        kernels=resolve_kernels(config.runtime.kernels, device),
        fused=resolve_fused(config.runtime.fused, device, pool),
    )
    sections: dict[str, Any] = {"data": data, "partition": partition, "adapter": adapter, "server": server, "client": client}
    return dataclasses.replace(config, **sections, runtime=runtime, trackers=trackers)


def resolve_device(name: str) -> str:
    """The device that "auto" stands for: the GPU if there is one here. Resolved with the config, since it moves bits."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def resolve_kernels(name: str, device: str) -> str:
    """The kernels that "auto" stands for, on this machine. Raises ConfigError for the CPU's kernels on another device."""
    if name == "onednn" and device != "cpu":
        raise ConfigError(f"runtime.kernels onednn is for the CPU, but runtime.device is {device}: set it to torch or auto")
    return hardware.best_kernels(device) if name == "auto" else name


def resolve_fused(fused: Any, device: str, pool: str) -> bool:
    """Whether clients train together: "auto" stands for yes where one client cannot fill the device, and the pool has several."""
    return device.startswith("cuda") and pool != "flower" if fused == "auto" else bool(fused)


def expand(kind: str, section: Any, where: str) -> dict[str, Any]:
    """A plug-in section with every option filled in: {"name": ..., **options}. Checks name, options and ranges."""
    key = _name_key(kind)
    if isinstance(section, str):
        section = {key: section}
    if not isinstance(section, Mapping) or not isinstance(section.get(key), str):
        raise ConfigError(f"{where} must be the name of one of the {kind}, or a mapping with the key '{key}', got {section!r}")
    if section[key].startswith("python:"):
        raise ConfigError(f"{where}: '{section[key]}' was a Python object: resume from Python with aggregator=the same object")
    options = {k: v for k, v in section.items() if k != key}
    instance = _build(kind, section[key], options, where)
    name = str(Path(section[key]).resolve()) if plugins.is_path(section[key]) else section[key]
    return {key: name} | {f.name: _plain_value(getattr(instance, f.name)) for f in fields(instance) if f.init}


def build(kind: str, section: Section) -> Any:
    """A new plug-in object of a section."""
    key = _name_key(kind)
    return _build(kind, section[key], {k: v for k, v in section.items() if k != key}, kind[:-1], _typed_anew)


def build_aggregator(section: Any) -> contracts.Aggregator:
    """The rule of `server.aggregator`: one for all tensors, or for a list of `{match: glob, name: …}` one per group of them."""
    if not isinstance(section, list):
        rule: contracts.Aggregator = build("aggregators", section)
        return rule
    rules = [(str(s["match"]), build("aggregators", {k: v for k, v in s.items() if k != "match"})) for s in section]
    grouped: contracts.Aggregator = plugins.load("aggregators", "_grouped")(tuple(rules))
    return grouped


def is_python_object(section: Any) -> bool:
    """Whether a rule came from Python: its section describes it, and nobody can build it again."""
    return isinstance(section, Mapping) and str(section.get("name", "")).startswith("python:")


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


def _typed_anew(cls: Any, values: Mapping[str, Any], where: str) -> Any:
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


def _build(kind: str, name: str, options: Mapping[str, Any], where: str, make: Callable[..., Any] | None = None) -> Any:
    try:
        cls = plugins.load(kind, name)
    except PluginError as e:
        raise PluginError(f"{where}: {e}") from e
    return (make or typed)(cls, options, where)


def _expand_group(group: Any, where: str) -> dict[str, Any]:
    if not isinstance(group, Mapping) or "match" not in group:
        raise ConfigError(f"{where} must hold 'match' (a glob such as \"head.*\") beside the rule, got {group!r}")
    rest = {k: v for k, v in group.items() if k != "match"}
    return {"match": str(group["match"])} | expand("aggregators", rest, where)


def _plugin_sections(config: SimConfig) -> list[tuple[str, str, Section]]:
    """(kind, where, section) of every plug-in section of a resolved config."""
    found = [(kind, key, getattr(config, key)) for key, kind in PLUGIN_KEYS.items()]
    for key, kind in SERVER_PLUGIN_KEYS.items():
        value = getattr(config.server, key)
        many = value if isinstance(value, list) else [] if value is None else [value]
        found += [(kind, f"server.{key}", v) for v in many]
    found += [("objectives", "client.objectives", o) for o in config.client.objectives]
    return found + [("trackers", "trackers", t) for t in config.trackers]


def _name_key(kind: str) -> str:
    return "source" if kind == "sources" else "name"


def read_layers(path: str | Path, seen: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """The files that a YAML extends, outermost base first, then the file itself."""
    path = Path(path).resolve()
    if path in seen:
        raise ConfigError(f"extends goes in a circle: {' -> '.join(p.name for p in (*seen, path))}")
    if not path.is_file():
        hint = f", which {seen[-1].name} extends" if seen else ""
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
    key = _name_key(kind)
    old = {key: old} if isinstance(old, str) else old
    new = {key: new} if isinstance(new, str) else new
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    if new.get(key, old.get(key)) != old.get(key):
        common = {f.name for f in fields(plugins.KINDS[kind].contract)}
        old = {k: v for k, v in old.items() if k in common}
    return {**old, **new}


def plain(values: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """Interpolations such as ${seed} or ${oc.env:HOME} resolved over the whole config."""
    try:
        plain = OmegaConf.to_container(OmegaConf.create(dict(values)), resolve=True)
    except OmegaConfBaseException as e:
        raise ConfigError(f"{what}: {_one_line(e, '')}") from e
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}


def _plain_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _one_line(error: OmegaConfBaseException, dot: str) -> str:
    first = str(error.msg if error.msg else error).splitlines()[0].strip()
    return f"{dot}{error.full_key}: {first}" if error.full_key else first


def _require(ok: bool, key: str, what: str, got: object) -> None:
    if not ok:
        raise ConfigError(f"{key} {what}, got {got!r}")
