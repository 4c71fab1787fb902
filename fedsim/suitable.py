"""Which parts of a run suit each other, by what they say of themselves; the others are refused before any training.

Parts know nothing of each other: what is compared are the words of their `Traits`, and of the run (`run_words`). What a rule
cannot do with an adapter's tensors it says itself, when it is shown them (`Aggregator.init`, `Consolidator.start_task`).
"""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim.core import config as configs
from fedsim.core import contracts, hardware, plugins
from fedsim.core.config import SimConfig
from fedsim.core.contracts import Aggregator, Part, TaskStart, Traits
from fedsim.core.errors import ConfigError, PluginError, one_line
from fedsim.core.messages import RoundPlan, Tensors
from fedsim.core.names import HEAD_WEIGHT
from fedsim.core.tensors import LORA_A, lora_layers, matching
from fedsim.core.work import WorkSpec, seen_classes
from fedsim.data.manifest import Manifest
from server import sampling
from server.aggregators._grouped import Aggregator as Grouped

FIELD = re.compile(r"\{([a-z_]+(?:\.[a-z_]+)*)\}")  # of what traits say: {other}, {adapter}, {server.rounds}


@dataclass(frozen=True)
class Chosen:
    """A part that the config names, e.g. kind "adapter", name "lora"."""

    kind: str
    name: str
    traits: Traits

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

    @property
    def words(self) -> set[str]:
        return {self.kind, str(self), *self.traits.gives, *self.traits.takes}


def require(config: SimConfig, rule: Aggregator, spec: WorkSpec | None = None) -> None:
    """Raise ConfigError for parts that cannot work together, in one line. spec: data and tasks, once they are known."""
    line = obstacle(chosen_parts(config, rule), run_words(config, spec), config)
    if line is not None:
        raise ConfigError(line)


def obstacle(parts: Sequence[Chosen], run: Mapping[str, str], config: Any) -> str | None:
    """Why these parts do not go together, None if they do: the first refused word that another part or the run gives, need
    that nobody gives, or place that two parts take, or one that the run is without. `run`: word of the run -> how the config says
    it."""
    for number, part in enumerate(parts):
        others = [other for place, other in enumerate(parts) if place != number]
        for word, told in part.traits.refuses.items():
            given = _giver(word, others, run)
            if given is not None:
                return _line(part, told, word, parts, config, given)
        for word, told in part.traits.needs.items():
            if word not in run and not any(word in other.words for other in parts):
                return _line(part, told, word, parts, config)
        for place in sorted(part.traits.takes):
            if (given := run.get(f"without {place}")) is not None:
                return f"{part} needs {place}, which {given} forbids: choose another method, or allow it"
            taken = next((other for other in parts[:number] if place in other.traits.takes), None)
            if taken is not None:
                return f"{taken} and {part} both take the place of {place}, which only one part of a run can have: choose one"
    return None


def minded(parts: Sequence[Chosen], run: Mapping[str, str], config: Any) -> tuple[str, ...]:
    """What parts say of words that they mind and that another part, or the run, gives."""
    found = []
    for part in parts:
        for word, told in part.traits.minds.items():
            given = _giver(word, [other for other in parts if other is not part], run)
            found += [] if given is None else [_line(part, told, word, parts, config, given)]
    return tuple(found)


def _giver(word: str, others: Sequence[Chosen], run: Mapping[str, str]) -> str | None:
    """The first of other parts that gives a word, or how the config says it of the run; None for nobody."""
    return next((str(other) for other in others if word in other.words), run.get(word))


def chosen_parts(config: SimConfig, rule: Aggregator) -> list[Chosen]:
    """All parts that the config names, with their traits; `rule` is the aggregator where there is one for all tensors."""
    found = []
    for kind, _, section in configs.plugin_sections(config):
        if kind == "trackers":
            continue
        name, is_rule = section[configs.name_key(kind)], kind == "aggregators" and not isinstance(config.server.aggregator, list)
        part: Part = rule if is_rule else configs.build(kind, {k: v for k, v in section.items() if k != "match"})
        found.append(Chosen(plugins.singular(kind), name, _traits(f"{plugins.singular(kind)} {name}", part)))
    return found


def run_words(config: SimConfig, spec: WorkSpec | None = None) -> dict[str, str]:
    """Words that the run itself gives -> the key and value that give them. spec: data and tasks, once they are known."""
    stream, server = config.stream, config.server
    several_tasks = stream.tasks != 1 and not stream.joint if spec is None else len(spec.task_classes) > 1
    found = [
        ("texts", "data.source", spec is not None and "input_ids" in spec.train.inputs),
        ("several tasks", "stream.tasks", several_tasks),
        (f"context {contracts.TEACHER}", "stream.tasks", several_tasks),  # the last task's model
        ("online", "stream.online", stream.online),
        (f"without {contracts.BUFFER}", "stream.keep", not stream.keep),
        ("augmentation", "transform.augment", config.transform.augment != "none"),
        (f"optimizer {config.client.optimizer.lower()}", "client.optimizer", True),
        ("clipped gradients", "client.clip_norm", config.client.clip_norm is not None),
        ("several rounds", "server.rounds", server.rounds > 1),
        ("several rules", "server.aggregator", isinstance(server.aggregator, list)),
        ("drawn clients", "server.participation", server.participation < 1),
        ("drawn passes", "server.pass_participation", server.pass_participation == "drawn"),
        ("unequal ranks", "client.ranks", config.client.ranks is not None),
        ("clients may fail", "server.on_client_failure", server.on_client_failure == "skip"),
        ("unlearning", "server.unlearning", server.unlearning),
        ("half precision", "runtime.precision", config.runtime.precision == "bf16"),
        ("fused", "runtime.fused", bool(config.runtime.fused)),
        (f"pool {config.runtime.pool}", "runtime.pool", True),
    ]
    return {word: f"{key}: {_told(_value(config, key))}" for word, key, given in found if given}


def require_trained(config: SimConfig, rule: Aggregator, start: TaskStart, plans: Sequence[RoundPlan]) -> None:
    """Raise ConfigError if a round's plan trains nothing of the adapter but what the consolidator freezes, or asks how much
    frozen tensors matter, or looks at pairs of which one factor is frozen as products."""
    frozen = set(matching(start.params, start.frozen))
    for request in (r for plan in plans if plan.train and frozen for r in plan.statistics):
        asked = [n for n in matching(start.params, request.match) if n in frozen]
        consolidator = config.server.consolidator["name"]
        if asked and getattr(rule, "products", False):
            raise ConfigError(
                f"aggregator {rule_name(config)} asks for the statistic {request.name} of whole LoRA pairs, but consolidator "
                f"{consolidator} freezes '{asked[0]}': set pairs: factors, or use another rule"
            )
        if asked and plugins.load("statistics", request.name).of_trained:
            raise ConfigError(
                f"aggregator {rule_name(config)} asks for the statistic {request.name} of '{asked[0]}', which consolidator "
                f"{consolidator} freezes: nobody trains it, so use another rule or another consolidator"
            )
    for number, plan in enumerate(plans):
        wanted = [n for n in matching(start.params, plan.train) if n.startswith("adapter.")]
        if wanted and frozen.issuperset(wanted):
            raise ConfigError(
                f"aggregator {rule_name(config)} trains {', '.join(plan.train)} in round {number} of a task, but consolidator "
                f"{config.server.consolidator['name']} with adapter {config.adapter['name']} freezes {', '.join(start.frozen)}: "
                "nothing of the adapter is left"
            )


def require_ranks(config: SimConfig, rule: Aggregator, params: Tensors, clients: int) -> None:
    """Raise ConfigError for `client.ranks` that clients or pairs do not have, and for a rule that cannot merge such pairs."""
    ranks, layers = config.client.ranks, lora_layers(params)
    if ranks is None:
        return
    if not layers:
        raise ConfigError(f"client.ranks is of LoRA pairs, and adapter {config.adapter['name']} has none: use adapter: lora")
    if isinstance(ranks, list) and len(ranks) != clients:
        raise ConfigError(
            f"client.ranks is a list of {len(ranks)} for {clients} clients: give one for each, or {{law: turns, of: {ranks[:3]}}}"
        )
    most, asked = len(params[layers[0] + LORA_A]), max(ranks if isinstance(ranks, list) else ranks["of"])
    if asked > most:
        raise ConfigError(
            f"client.ranks has {asked}, but adapter.rank, of the server's pairs, is {most}: raise that, or lower this"
        )
    if config.server.channel:
        raise ConfigError("client.ranks and server.channel exclude each other: channels encode whole tensors")
    for glob, one in rule.groups if isinstance(rule, Grouped) else [("*", rule)]:
        if matching([layers[0] + LORA_A], [glob]):
            if contracts.TAKES_RANKS not in one.traits.gives:
                raise ConfigError(
                    f"client.ranks gives clients pairs of unequal ranks, which aggregator {rule_name(config)} cannot merge: use "
                    f"flora, merged with {{rule: mean, pairs: products}}, or fedavg, which pads them by zeros"
                )
            return


def require_linear_map(config: SimConfig, params: Tensors, plan: RoundPlan) -> None:
    """Raise ConfigError if a rule merges the head by Grams, which is right for a linear map alone."""
    head: contracts.Head = configs.build("heads", config.head)
    by_gram = any(r.name == "gram" and matching([HEAD_WEIGHT], r.match) for r in plan.statistics if HEAD_WEIGHT in params)
    if by_gram and "an affine head" not in head.traits.gives:
        raise ConfigError(
            f"aggregator {rule_name(config)} merges {HEAD_WEIGHT} by Grams, but head {config.head['name']} is no linear map of "
            'its inputs: use head: linear, or a list of rules that begins with {match: "head.*", name: fedavg}'
        )


def require_room(config: SimConfig, params: Tensors) -> None:
    """Raise ConfigError for a calibrator whose sums do not fit into memory, with the width of the head's inputs that does."""
    free = hardware.free_memory()
    if config.server.calibrator is None or not free or HEAD_WEIGHT not in params:
        return
    calibrator: contracts.Calibrator = configs.build("calibrators", config.server.calibrator)
    classes, width = params[HEAD_WEIGHT].shape[:2]
    needed = calibrator.room(width, classes)
    if needed > free:
        most = bisect.bisect_right(range(width), free, key=lambda m: calibrator.room(m, classes)) - 1
        raise ConfigError(
            f"server.calibrator {config.server.calibrator['name']} keeps sums over pairs of the {width} numbers that the head's "
            f"last map is given: about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: {most} numbers fit (head.size)"
        )


def require_clients(config: SimConfig, manifest: Manifest) -> None:
    """Raise ConfigError if clients are left out that there are not, and if nobody holds what the calibrator needs of a class."""
    wrong = [c for c in config.server.without if not 0 <= c < manifest.num_clients]
    if wrong:
        raise ConfigError(f"server.without names client {wrong[0]}, but there are clients 0 to {manifest.num_clients - 1}")
    if len(set(config.server.without)) == manifest.num_clients:
        raise ConfigError("server.without names all clients: nobody is left to train")
    require_somebody(config, manifest)
    if config.server.calibrator is None:
        return
    calibrator: contracts.Calibrator = configs.build("calibrators", config.server.calibrator)
    part = np.setdiff1d(np.arange(manifest.num_clients), config.server.without)
    told = np.zeros(len(manifest.class_order), dtype=np.bool_)
    for classes, held_KC in zip(manifest.task_classes, manifest.histograms, strict=True):
        told[list(classes)] |= calibrator.can_be_told(held_KC[part])
    lacking = np.flatnonzero(~told)
    if len(lacking):
        raise ConfigError(
            f"server.calibrator {config.server.calibrator['name']} makes the head's rows of what clients tell of classes, "
            f"but of {len(lacking)} of {len(told)} classes (head row {lacking[0]} first) nobody holds enough samples: use fewer "
            "partition.clients, a larger partition.alpha or more data"
        )


def require_members(config: SimConfig, rule: Aggregator, manifest: Manifest) -> None:
    """Raise ConfigError if a round's clients, or the stream's tasks, are fewer than what merges them needs. Clients that fail are
    not known yet."""
    consolidator: contracts.Consolidator = configs.build("consolidators", config.server.consolidator)
    if manifest.num_tasks < consolidator.least:
        raise ConfigError(
            f"server.consolidator {config.server.consolidator['name']} needs at least {consolidator.least} tasks, but the stream "
            f"has {manifest.num_tasks}: raise stream.tasks, or use another rule"
        )
    if rule.least == 1:
        return  # a round in which nobody holds samples says so itself
    for task, round in itertools.product(range(manifest.num_tasks), range(config.server.rounds)):
        clients = sampling.taking_part(config, task, round, manifest.num_clients)
        holders = int(np.count_nonzero(manifest.sizes[task][clients]))
        if holders < rule.least:
            raise ConfigError(
                f"server.aggregator {rule_name(config)} needs at least {rule.least} clients with samples in a round, but task "
                f"{task}, round {round} has {holders} ({len(clients)} take part): raise partition.clients or "
                "server.participation, or use options (or a rule) with which fewer are enough"
            )


def notes(config: SimConfig, rule: Aggregator, manifest: Manifest) -> tuple[str, ...]:
    """What is allowed, but hardly what anybody wants: what parts mind of each other, classes that are tested before a calibrator
    is told of them, and tasks of a single class, of which nothing is learned."""
    told = minded(chosen_parts(config, rule), run_words(config), config)
    return (*told, *_untold(config, manifest), *_of_single_classes(config, manifest))


def _untold(config: SimConfig, manifest: Manifest) -> Iterator[str]:
    """Of a calibrator that works at tasks' ends: of how many of the classes seen nobody has told it, after the task that is
    worst."""
    if config.server.calibrator is None:
        return
    calibrator: contracts.Calibrator = configs.build("calibrators", config.server.calibrator)
    told, worst = np.zeros(len(manifest.class_order), dtype=np.bool_), (0, 0, 0)  # classes untold, seen; the task
    for task, (classes, held_KC) in enumerate(zip(manifest.task_classes, manifest.histograms, strict=True)):
        if calibrator.closing(calibrator.init(), manifest.task_classes[: task + 1]) is None:
            return
        part = sampling.taking_part(config, task, config.server.rounds, manifest.num_clients, in_pass=True)
        told[list(classes)] |= calibrator.can_be_told(held_KC[part])
        seen = seen_classes(manifest.task_classes, task)
        worst = max(worst, (len(seen) - int(told[seen].sum()), len(seen), task))
    if worst[0]:
        yield (
            f"after task {worst[2]} nobody has told calibrator {config.server.calibrator['name']} of {worst[0]} of {worst[1]} "
            f"classes (server.pass_participation: {config.server.pass_participation}): their rows of the head stay as they were "
            "trained, beside rows of another scale, and are no answer where nobody trained them"
        )


def _of_single_classes(config: SimConfig, manifest: Manifest) -> tuple[str, ...]:
    """That tasks have a single class, of which nothing is learned."""
    alone = [name for name, classes in zip(manifest.task_names, manifest.task_classes, strict=True) if len(classes) == 1]
    learners = configs.build_learners(config.client.learners).values()
    learned = any(contracts.ONE_CLASS in learner.traits.gives for learner in learners)
    if not alone or learned or config.server.calibrator is not None:
        return ()
    return (
        f"{len(alone)} of {manifest.num_tasks} tasks have a single class ('{alone[0]}' first): the cross-entropy over a task's "
        "own classes is 0 there and trains nothing. Use more classes per task, client.learners: [square], or a calibrator",
    )


def require_somebody(config: SimConfig, manifest: Manifest) -> None:
    """Raise ConfigError if there is a round in which nobody is left of the clients that are drawn, the passes at a task's end
    among them where they are drawn too."""
    server = config.server
    if not server.without:
        return
    for task in range(len(manifest.task_names)):
        for round in range(server.rounds + (server.pass_participation == "drawn")):
            sampling.taking_part(config, task, round, manifest.num_clients)


def rule_name(config: SimConfig) -> str:
    """The aggregator as the config names it."""
    section = config.server.aggregator
    return " + ".join(g["name"] for g in section) if isinstance(section, list) else str(section["name"])


def _traits(part: str, found: Part) -> Traits:
    """Of a part; whatever goes wrong in a plug-in of the user's own is one line."""
    try:
        traits: Any = found.traits
    except Exception as e:
        raise PluginError(f"{part} cannot say what goes with it: {one_line(e)}") from e
    if not isinstance(traits, Traits):
        raise PluginError(f"{part}: traits must be a fedsim.core.contracts.Traits, got {type(traits).__name__}")
    return traits


def _line(part: Chosen, told: str, word: str, parts: Sequence[Chosen], config: Any, given: str = "") -> str:
    """What a part says of a word that it needs, or refuses and is `given`, with all names filled in."""

    def filled(field: re.Match[str]) -> str:
        if field[1] == "other" and given:
            return given
        named = [str(other) for other in parts if other.kind == field[1]]
        try:
            return " and ".join(named) or _told(_value(config, field[1]))
        except (LookupError, AttributeError) as e:
            what = f"'{field[0]}', which is no part of this run and no key of its config"
            raise PluginError(f"{part}: its traits speak of {what}") from e

    line = f"{part} {FIELD.sub(filled, told)}"
    if given and given.partition(": ")[0] not in line:
        return f"{line} ('{word}' comes with {given})"
    return line if given or FIELD.search(told) or word in line else f"{line} (it needs '{word}', which no part of this run gives)"


def _value(config: Any, key: str) -> Any:
    """What the config holds under a dotted key. Raises LookupError or AttributeError where there is none."""
    for step in key.split("."):
        config = config[step] if isinstance(config, Mapping) else getattr(config, step)
    return config


def _told(value: Any) -> str:
    return value if isinstance(value, str) else "a list" if isinstance(value, list) else json.dumps(value, default=str)
