"""What is known of a method before it is run: its parts with their equations, its recipe, and what its server gets to see."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedsim.core import config as configs
from fedsim.core import plugins, presets
from fedsim.core.config import SimConfig
from fedsim.core.contracts import Calibrator
from fedsim.core.errors import FedsimError
from server import planning

if TYPE_CHECKING:
    from fedsim.report.ledger.study import Study

OWN = "own"  # the family of a method that nobody has named one for
EACH, SUMS, CLASSES, STATISTICS, MADE = (
    "every update",
    "sums of updates",
    "class statistics",
    "other statistics",
    "synthetic data",
)
SEES: Mapping[str, str] = {
    EACH: "the server reads every client's update by itself",
    SUMS: "of updates, the server needs no more than their sum over clients, as secure aggregation gives it",
    CLASSES: "per class: counts, means (prototypes), covariances, or sums of features",
    STATISTICS: "of data or training: Gram matrices, Fisher information, sketches of inputs, control variates, losses",
    MADE: "images, or a generator of them, that the server makes from the model alone",
}
OF_CLASSES = ("class_moments", "fedproto", "icarl", "pip")  # statistics, and learners whose clients send them
PLAIN: Mapping[str, str] = {"adapters": "lora", "heads": "linear", "aggregators": "fedavg", "consolidators": "none"}
WORDS: Mapping[str, str] = {"aggregators": "rule over clients", "consolidators": "rule over tasks", "merging": "merging rule"}


@dataclass(frozen=True)
class PartText:
    """A part of a method that plain FedAvg has not: kind, name, where it comes from, and what it computes."""

    kind: str
    name: str
    source: str
    text: str


@dataclass(frozen=True)
class Method:
    """What a ledger says of a method. sees: keys of `SEES`, empty where its config is not known; recipes: title -> YAML."""

    name: str
    family: str
    comment: str = ""
    remark: str = ""
    sees: Sequence[str] = ()
    parts: Sequence[PartText] = ()
    recipes: Mapping[str, str] = field(default_factory=dict)
    command: str = ""


def known(name: str, study: Study) -> Method:
    """A method by the name that the tables give it: a preset's, or one whose config was at hand with the runs."""
    own = next((stream.configs[name] for stream in study.streams if name in stream.configs), None)
    preset = presets.folder() / presets.METHODS / f"{name}{presets.SUFFIX}"
    own_files = dict(_run_from(name, study))
    files = {f"{stream}, as it was run": path for stream, path in own_files.items()}
    files |= {"the preset": preset} if preset.is_file() else {}
    recipes = {title: path.read_text(encoding="utf-8") for title, path in files.items()}
    if not recipes and own is not None:
        recipes["one of its runs"] = own.to_yaml()
    config = own or _config(next(iter(files.values()), None))
    return Method(
        name,
        study.families.get(name, OWN),
        _comment(preset),
        study.remarks.get(name, ""),
        () if config is None else sees(config),
        () if config is None else tuple(parts(config)),
        recipes,
        "\n".join(_commands(name, study, own_files, preset.is_file())),
    )


def _commands(name: str, study: Study, own_files: Mapping[str, Path], is_preset: bool) -> Iterator[str]:
    """On every stream that it was run on: of the config that was run there, else of its preset, if the stream is one too."""
    ran = [stream.name for stream in study.streams if (stream.frame["method"] == name).any()]
    streams = presets.names(presets.STREAMS)
    for stream in [s for s in ran if s in streams or s in own_files] or [""]:
        word = os.path.relpath(own_files[stream]) if stream in own_files else name if is_preset else ""
        if word:
            yield " ".join(filter(None, ("fedsim run", stream if stream in streams else "", word)))


def _run_from(name: str, study: Study) -> Iterator[tuple[str, Path]]:
    """Streams with the config that the method was run from there, where it was not the preset."""
    for stream in study.streams if study.recipes else ():
        path = Path(study.recipes.format(stream=stream.name, method=name))
        if path.is_file():
            yield stream.name, path


def _config(path: Path | None) -> SimConfig | None:
    if path is None:
        return None
    try:
        return configs.load(["omniglot", path])
    except FedsimError:  # of another version: the page goes without
        return None


def _comment(path: Path) -> str:
    """All of the comment on top of a preset."""
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ").rstrip() for line in lines if line.startswith("#"))


# ---------------------------------------------------------------- parts


def parts(config: SimConfig) -> Iterator[PartText]:
    """The parts that are not those of plain FedAvg; of FedAvg itself, its rule."""
    found = [(kind, name) for kind, name in _named(config) if PLAIN.get(kind) != name]
    for kind, name in dict.fromkeys(found or [("aggregators", "fedavg")]):
        cls = plugins.load(kind, name)
        word = WORDS.get(kind, plugins.singular(kind))
        text = inspect.cleandoc(cls.__doc__ or "")
        yield PartText(word, plugins.short_name(name), _first(sys.modules[cls.__module__].__doc__), text)


def _named(config: SimConfig) -> Iterator[tuple[str, str]]:
    server = config.server
    yield "adapters", config.adapter["name"]
    yield "heads", config.head["name"]
    yield from (("learners", section["name"]) for section in config.client.learners)
    rules = server.aggregator if isinstance(server.aggregator, list) else [server.aggregator]
    for section in rules:
        yield from _rule("aggregators", section)
    yield from _rule("consolidators", server.consolidator)
    if server.calibrator is not None:
        yield "calibrators", server.calibrator["name"]
    yield from (("channels", section["name"]) for section in server.channel)


def _rule(kind: str, section: Any) -> Iterator[tuple[str, str]]:
    """A rule, or in the place of `merged` the merging rules that it holds."""
    inner = section.get("rule") if section["name"] == "merged" else None
    if inner is None:
        yield kind, section["name"]
    while inner is not None:
        inner = {"name": inner} if isinstance(inner, str) else inner
        yield "merging", inner["name"]
        inner = inner.get("then")


def _first(doc: str | None) -> str:
    """The first paragraph of a module's docstring: title and paper."""
    return " ".join(inspect.cleandoc(doc or "").split("\n\n")[0].split())


# ---------------------------------------------------------------- what the server sees


def sees(config: SimConfig) -> tuple[str, ...]:
    """Keys of `SEES`, from what the parts ask clients for: no table that could be forgotten.

    A method of which nothing is trained shows no updates; statistics count however they come, as sums too. A joint run has no
    server that could see anything.
    """
    if config.stream.joint:
        return ()
    server = config.server
    rule = configs.build_aggregator(server.aggregator)
    consolidator = configs.build("consolidators", server.consolidator)
    calibrator = None if server.calibrator is None else configs.build("calibrators", server.calibrator)
    learners = configs.build_learners(config.client.learners)
    params = _tensors()
    asked = planning.asked(rule, consolidator, calibrator, learners, params, server.rounds, [[0, 1]])
    trains = any(rule.plan(rule.init(params), r).train for r in range(server.rounds))
    whole = not rule.additive or (calibrator is not None and _reads_updates(calibrator, server.rounds))
    found = [EACH if whole else SUMS] if trains else []
    found += [CLASSES] if any(name in OF_CLASSES for name in asked) else []
    found += [STATISTICS] if any(name not in OF_CLASSES for name in asked) else []
    found += [MADE] if any(learner.does("made") for learner in learners.values()) else []
    return tuple(found)


def _reads_updates(calibrator: Calibrator, rounds: int) -> bool:
    """Whether it works in a round, and not on a sum."""
    plans = (calibrator.plan(calibrator.init(), r, r == rounds - 1, [[0, 1]]) for r in range(rounds))
    return not calibrator.additive and any(plan is not None for plan in plans)


def _tensors() -> dict[str, torch.Tensor]:
    """A module and a head of no importance: rules are asked what they want of such tensors."""
    pair = {"adapter.layers.0.self_attn.q_proj.lora_A": (2, 16), "adapter.layers.0.self_attn.q_proj.lora_B": (16, 2)}
    return {name: torch.zeros(shape) for name, shape in {**pair, "head.weight": (4, 16), "head.bias": (4,)}.items()}
