"""Every key of a config, its default and its range, as frozen dataclasses; plug-in sections are plain mappings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fedsim.core import content, plugins
from fedsim.core.config import text
from fedsim.core.errors import ConfigError, require_choice

Section = Mapping[str, Any]  # {"name": plug-in, **options}


MOVES_BITS = ("threads", "device", "kernels", "precision", "fused", "eval_batch")  # of `runtime`; the rest never does
ONE_BY_ONE = ("flower", "deployment")  # pools in which every client travels by itself


@dataclass(frozen=True)
class NoiseConfig:
    """Wrong labels among the training samples, within their own task; test labels stay right.

    kind: symmetric (any other class of the task, with equal chances) | asymmetric (the next class of the task, of the last the
        first).
    share: of the samples of every class that get a wrong label, in [0, 1).
    """

    kind: str = "symmetric"
    share: float = 0.0

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, ("symmetric", "asymmetric"))
        _require(0 <= self.share < 1, "share", "must be in [0, 1)", self.share)


@dataclass(frozen=True)
class StreamConfig:
    """The stream of tasks.

    name: class_incremental (every task brings new classes) | task_incremental (the same, but the task is told at test
        time) | domain_incremental (every task brings a new domain of the same classes).
    tasks: number of tasks; null: all that the grouping or the domains give.
    classes_per_task: null: all classes are divided evenly; else the first tasks × classes_per_task in order are used.
    order: "given" | "shuffle" (by seed) | a list of class names or ids (domain names or ids for domain_incremental); where all
        names are numbers, a number is the name.
    group: tasks by a grouping of the source (alphabet, superclass, domain of intents), instead of by number.
    online: single pass: the shard of a task is divided over its rounds, so that every sample is seen once.
    keep: whether clients may keep samples of former tasks (online: of former rounds); false refuses methods with a buffer.
    joint: all these tasks at once, as one task: with the partition `joint` the upper bound of the stream.
    noise: wrong training labels, {kind: symmetric, share: 0.4}; samples are dealt to clients by their true classes.
    validation: to tune without a look at the test samples: this share of every class's training samples, in [0, 1), is held out
        and tested on in their place; the same samples whatever the seed. 0: the test samples.
    """

    name: str = "class_incremental"
    tasks: int | None = 5
    classes_per_task: int | None = None
    order: Any = "given"
    group: str | None = None
    online: bool = False
    keep: bool = True
    joint: bool = False
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    validation: float = 0.0

    def __post_init__(self) -> None:
        require_choice("name", self.name, ("class_incremental", "task_incremental", "domain_incremental"))
        _require(self.tasks is None or self.tasks >= 1, "tasks", "must be at least 1", self.tasks)
        per_task = self.classes_per_task
        _require(per_task is None or per_task >= 1, "classes_per_task", "must be at least 1", per_task)
        if isinstance(self.order, str):
            require_choice("order", self.order, ("given", "shuffle"))
        elif not isinstance(self.order, list):
            raise ConfigError(f"order must be 'given', 'shuffle' or a list of classes, got {self.order!r}")
        _require(0 <= self.validation < 1, "validation", "must be in [0, 1)", self.validation)


@dataclass(frozen=True)
class TransformConfig:
    """Batched tensor operations on images: resize to the backbone's size, normalise, augment (training only).

    augment: none | flip | crop (random resized crop) | crop_flip | affine (small rotations, shifts, scales).
    interpolation: bicubic | bilinear | nearest, of resizing.
    mean, std: per channel in 0..1; null: what the backbone was trained with, as its preprocessor_config.json says it (without one
        0.5). A .safetensors file does not say it: null is then ImageNet's, as for DeiT; timm's augreg ViTs have 0.5.
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
    pooling: cls (the class token, or the first) | mean (over the patches, or the tokens in the mask) | last (the last token in
        the mask) | auto: what the family publishes, which is the class token of images where there is one, the mean of text,
        the last token of a causal language model, or a pooling that is trained with the encoder (SigLIP, ConvNeXt).
    config: of the backbone "random" only: model_type and what transformers' config of it takes.
    image_size: side of images in pixels, null: the checkpoint's own; learned positions are interpolated once, bicubically.
    """

    backbone: str = "omniglot-vit"
    pooling: str = "auto"
    image_size: int | None = None
    config: dict[str, Any] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_choice("pooling", self.pooling, ("auto", "cls", "mean", "last"))
        _require(self.image_size is None or self.image_size >= 1, "image_size", "must be at least 1", self.image_size)
        if self.backbone == "random" and "model_type" not in (self.config or {}):
            raise ConfigError("config must name a model_type (e.g. vit, bert) when backbone is 'random'")
        if self.backbone != "random" and self.config:
            raise ConfigError(f"config is for backbone 'random' only: leave it out, or set that, got {self.backbone!r}")


@dataclass(frozen=True)
class ParameterGroup:
    """Trained tensors with options of their own: the first group whose glob matches a tensor's name decides for it.

    match: a glob over names of tensors ("head.*", "*.lora_B"). lr, weight_decay: null: those of `client`. Schedules multiply
    every group's own rate. A rate of 0 is refused: what is not trained would still be sent and merged.
    """

    match: str
    lr: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        _require(bool(self.match), "match", 'must be a glob such as "head.*"', self.match)
        what = "must be positive (what is not to be trained is left out of adapter.targets)"
        _require(self.lr is None or self.lr > 0, "lr", what, self.lr)
        _require(self.weight_decay is None or self.weight_decay >= 0, "weight_decay", "must not be negative", self.weight_decay)
        if self.lr is None and self.weight_decay is None:
            raise ConfigError(f"lr or weight_decay must be given, or the group of '{self.match}' is none")


@dataclass(frozen=True)
class ClientConfig:
    """Local training: cross-entropy on the task's classes, a new optimizer every round.

    epochs: passes over the client's samples in a round. batch_size: of its steps; the last batch of an epoch may be smaller.
    optimizer: any class of torch.optim, in any case; lr, weight_decay: its options, for all tensors that no group names.
    schedule: any class of torch.optim.lr_scheduler, stepped per batch; null: none.
    optimizer_options, schedule_options: their further options, {name: value}; the number of steps of this client's round may be
        written as the word "steps". lr and weight_decay have keys of their own, and are refused here.
    groups: tensors with a learning rate or weight decay of their own: a list of {match: "head.*", lr: ..., weight_decay: ...}.
    ranks: of every client's LoRA pairs, at most adapter.rank. null: that of all; a list: one for each client;
        {law: turns, of: [2, 4, 8]}: dealt to the clients in turn; {law: drawn, of: [2, 4, 8]}: drawn, all with equal chances.
    clip_norm: maximum gradient norm; learners: what a client does beyond that (extra loss terms, replay, control variates, …),
    added up in this order.
    """

    epochs: int = 1
    batch_size: int = 16
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    groups: list[ParameterGroup] = field(default_factory=list)
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    schedule: str | None = None
    schedule_options: dict[str, Any] = field(default_factory=dict)
    ranks: Any = None
    clip_norm: float | None = None
    learners: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "epochs", "must be at least 1", self.epochs)
        _require(self.batch_size >= 1, "batch_size", "must be at least 1", self.batch_size)
        _require(self.lr > 0, "lr", "must be positive", self.lr)
        _require(self.weight_decay >= 0, "weight_decay", "must not be negative", self.weight_decay)
        _require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "must be positive", self.clip_norm)
        for name in ("lr", "weight_decay"):
            if name in self.optimizer_options:
                raise ConfigError(f"optimizer_options.{name} would take the place of client.{name}: set client.{name}")
        _require_ranks(self.ranks)


@dataclass(frozen=True)
class ServerConfig:
    """Rounds per task and the rules.

    rounds: of every task.
    participation: share of the clients that is drawn afresh in every round, in (0, 1].
    pass_participation: who takes part in a pass at a task's start or end, for consolidators, calibrators and learners that ask
        for one: all clients | drawn (as many as in a round, drawn afresh). With drawn, who is not drawn at a task's end stores no
        exemplars of that task where learners pick them then (icarl, glfc, xder).
    aggregator: a rule, or a list of {match: "head.*", name: ..., ...}: the first match decides for a tensor.
    consolidator: how tasks' modules become the model that is deployed. calibrator: what repairs the head; null: nothing.
    channel: what happens to updates on the wire, a list in the order in which it happens on the way up.
    on_client_failure: fail | skip (a round in which nobody is left is an error either way).
    evaluate: round (every task seen, after every round) | task (only at the end of a task).
    drift: measure how far clients drift apart; some of their updates then travel beside the sums (at most 64 MB a round).
    without: ids of clients that never take part, e.g. what unlearning is compared with.
    unlearning: keep, for every client and task, what the client becomes by itself, so that `fedsim unlearn` can remove it later.
        Every client then trains once more per task, for as many epochs as the task's rounds have together; a file each.
    keep: null | tasks: keep the module and head that are deployed after every task, so that `fedsim export --after-task` finds
        them; a file each. It moves no number.
    """

    rounds: int = 3
    participation: float = 1.0
    pass_participation: str = "all"
    aggregator: Any = "fedavg"
    consolidator: Any = "none"
    calibrator: Any = None
    channel: list[Any] = field(default_factory=list)
    on_client_failure: str = "fail"
    evaluate: str = "round"
    drift: bool = True
    without: list[int] = field(default_factory=list)
    unlearning: bool = False
    keep: str | None = None

    def __post_init__(self) -> None:
        _require(self.rounds >= 1, "rounds", "must be at least 1", self.rounds)
        _require(0 < self.participation <= 1, "participation", "must be in (0, 1]", self.participation)
        require_choice("pass_participation", self.pass_participation, ("all", "drawn"))
        require_choice("on_client_failure", self.on_client_failure, ("fail", "skip"))
        require_choice("evaluate", self.evaluate, ("round", "task"))
        require_choice("keep", self.keep, (None, "tasks"))


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how it runs. Only threads, device, kernels, precision, fused, eval_batch and a pool of your own may move bits.

    pool: serial | ray | flower | deployment (clients on machines of their own: `fedsim serve`), or one of your own, which is part
        of what a run is.
    workers: processes, "auto": CPU cores / threads (at most one per client, and as many as memory holds).
    threads: of one worker, the same in every pool; gpus_per_worker: may be a fraction.
    device: cpu | cuda | cuda:1 | auto (a GPU where there is one). eval_batch: test samples in one forward.
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
        if self.fused is True and self.pool in ONE_BY_ONE:
            raise ConfigError(
                f"fused cannot be true with the pool {self.pool}, which sends every client by itself: use false or auto"
            )

    def moves_bits(self) -> dict[str, Any]:
        """What may move bits, and so is part of what a run is. fedsim's own pools give the same bits, a user's may not."""
        own = {"pool": self.pool} if plugins.is_own("pools", self.pool) else {}
        return {key: getattr(self, key) for key in MOVES_BITS} | own


@dataclass(frozen=True)
class SimConfig:
    """A whole run. See the classes of its sections for every key.

    name: of the run, the first part of its directory's name. seed: of every draw, 0 or more.
    manifest: a file that holds the split (of another run, say); null: it is drawn. With it, stream and partition are those that
        made the file: keys of the split are left out, or say the same; others, such as stream.online or the seed, are free.
    data: {source: omniglot, ...}: where samples come from. partition, adapter, head: a plug-in each, by its name or as
        {name: ..., option: ...}.
    transform, stream, model, client, server, runtime: sections, below.
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
    head: Any = field(default_factory=lambda: {"name": "linear"})
    client: ClientConfig = field(default_factory=ClientConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    trackers: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        plain = self.name.strip(".") and not set(self.name) & set("/\\")
        _require(bool(plain), "name", "must be a plain word, of which the run directory's name is made", self.name)
        _require(self.seed >= 0, "seed", "must not be negative", self.seed)
        if self.stream.online and self.server.unlearning:
            raise ConfigError("server.unlearning and stream.online exclude each other: clients train once more by themselves")
        if self.server.channel and self.server.unlearning:
            raise ConfigError("server.unlearning and server.channel exclude each other: it subtracts what clients became")
        if self.stream.online and self.client.epochs != 1:
            raise ConfigError(f"client.epochs must be 1 with stream.online (every sample is seen once), got {self.client.epochs}")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts and lists: what YAML and JSON can hold, and `from_dict` reads."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def to_yaml(self) -> str:
        """The resolved config as YAML."""
        return text.write(self.to_dict())

    def identity(self) -> str:
        """sha256 of all that decides the numbers: the config without its name, where it runs, who is told, and what is kept.

        Plug-in files and the manifest count by their content. The data and the backbone's weights count by the names that the
        config gives them: hashes of their own lie in the run directory (`RunDir`)."""
        return self._hashed(self.fingerprints())

    def known_as(self) -> set[str]:
        """The identity, and that of runs which began before names of the user's files counted."""
        return {self.identity(), self._hashed({path: plugins.fingerprint(path) for path in self.user_files()})}

    def fingerprints(self) -> dict[str, str]:
        """Path of a plug-in file of the user's own -> what it adds to the identity: the hash of its content, after its name
        where memory and draws go by that."""
        named = {s[name_key(kind)] for kind, _, s in plugin_sections(self) if kind in plugins.BY_NAME}
        found = {path: plugins.fingerprint(path) for path in self.user_files()}
        return {path: f"{plugins.short_name(path)}:{known}" if path in named else known for path, known in found.items()}

    def _hashed(self, files: Mapping[str, str]) -> str:
        plain = self.to_dict()
        plain |= {key: content.known_by(plain[key]) for key in ("data", "model")}
        del plain["name"], plain["trackers"], plain["server"]["keep"]
        if self.stream.noise.share == 0:
            del plain["stream"]["noise"]
        if self.stream.validation == 0:
            del plain["stream"]["validation"]
        if self.client.ranks is None:
            del plain["client"]["ranks"]
        plain["runtime"] = self.runtime.moves_bits()
        if self.manifest is not None and Path(self.manifest).is_file():
            plain["manifest"] = hashlib.sha256(Path(self.manifest).read_bytes()).hexdigest()  # the split, wherever it lies
        said = json.dumps(plain, sort_keys=True)
        for path, known in files.items():
            said = said.replace(json.dumps(path), json.dumps(known))
        return hashlib.sha256(said.encode()).hexdigest()

    def user_files(self) -> list[str]:
        """Paths of plug-ins that are files of the user's own."""
        names = {s[name_key(k)] for k, _, s in plugin_sections(self)} | {self.runtime.pool}
        return sorted(filter(plugins.is_path, names))


SECTIONS = {f.name: f.default_factory for f in fields(SimConfig) if dataclasses.is_dataclass(f.default_factory)}
# key of a plug-in section -> kind; the same key under `server`
PLUGIN_KEYS = {"data": "sources", "partition": "partitions", "adapter": "adapters", "head": "heads"}
SERVER_PLUGIN_KEYS = {
    "aggregator": "aggregators", "consolidator": "consolidators", "calibrator": "calibrators", "channel": "channels"
}  # fmt: skip


def plugin_sections(config: SimConfig) -> list[tuple[str, str, Section]]:
    """(kind, where, section) of every plug-in section of a resolved config."""
    found = [(kind, key, getattr(config, key)) for key, kind in PLUGIN_KEYS.items()]
    for key, kind in SERVER_PLUGIN_KEYS.items():
        value = getattr(config.server, key)
        many = value if isinstance(value, list) else [] if value is None else [value]
        found += [(kind, f"server.{key}", v) for v in many]
    rules = [(f"{where}.rule", s["rule"]) for _, where, s in found if s.get("name") == "merged"]
    for where, rule in rules:  # which may hold a rule itself
        found.append(("merging", where, rule))
        if isinstance(rule.get("then"), dict):
            rules.append((f"{where}.then", rule["then"]))
    found += [("learners", "client.learners", o) for o in config.client.learners]
    return found + [("trackers", "trackers", t) for t in config.trackers]


def name_key(kind: str) -> str:
    """The key under which a section of this kind of plug-in holds its name."""
    return "source" if kind == "sources" else "name"


def _require_ranks(ranks: Any) -> None:
    """Raise ConfigError unless it is null, a list of ranks, or a law and what it deals out."""
    of = ranks
    if isinstance(ranks, Mapping):
        _require(set(ranks) == {"law", "of"}, "ranks", "must be a list, or a mapping with the keys law and of", dict(ranks))
        require_choice("ranks.law", ranks["law"], ("turns", "drawn"))
        of = ranks["of"]
    fine = isinstance(of, list) and of and all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in of)
    _require(ranks is None or bool(fine), "ranks", "must hold ranks of 1 or more, such as [2, 4, 8]", ranks)


def _require(ok: bool, key: str, what: str, got: object) -> None:
    if not ok:
        raise ConfigError(f"{key} {what}, got {got!r}")
