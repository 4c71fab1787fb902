"""Which parts of a run suit each other, by what they say of themselves; the others are refused before any training.

Parts know nothing of each other: what is compared are the class variables of their contracts and the names of tensors. What
a rule cannot do with an adapter's tensors it says itself, when it is shown them (`Aggregator.init`, `Consolidator.start_task`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedsim.core import config as configs
from fedsim.core import contracts
from fedsim.core.config import SimConfig
from fedsim.core.contracts import Aggregator, Consolidator
from fedsim.core.errors import ConfigError
from fedsim.core.messages import RoundPlan, Tensors
from fedsim.core.tensors import matching
from fedsim.data.manifest import Manifest
from server import sampling


def require(config: SimConfig, rule: Aggregator) -> None:
    """Raise ConfigError for parts that cannot work together; nothing is loaded for it."""
    server = config.server
    consolidator: Consolidator = configs.build("consolidators", server.consolidator)
    name = server.consolidator["name"]
    _require_sources(config, rule, consolidator)
    if rule.one_round and server.rounds != 1:
        raise ConfigError(
            f"server.rounds is {server.rounds}, but aggregator {rule_name(config)} takes one round per task: "
            "set it to 1 and raise client.epochs instead"
        )
    if server.calibrator is not None:
        calibrator: contracts.Calibrator = configs.build("calibrators", server.calibrator)
        if consolidator.freezes_heads and calibrator.rewrites_old_rows:
            raise ConfigError(
                f"server.calibrator {server.calibrator['name']} trains the head's rows of old tasks, which consolidator {name} "
                "keeps as they are: let it train the current task's classes only, or use another consolidator"
            )
    objectives = [(o["name"], configs.build("objectives", o)) for o in config.client.objectives]
    in_place = [n for n, o in objectives if o.replaces_cross_entropy]
    if len(in_place) > 1:
        raise ConfigError(f"client.objectives {' and '.join(in_place)} both stand in the place of the cross-entropy: choose one")


def require_trained(config: SimConfig, consolidator: Consolidator, params: Tensors, plans: Sequence[RoundPlan]) -> None:
    """Raise ConfigError if a round's plan trains nothing of the adapter but what the consolidator freezes."""
    frozen = set(matching(params, consolidator.frozen))
    for number, plan in enumerate(plans):
        wanted = [n for n in matching(params, plan.train) if n.startswith("adapter.")]
        if wanted and frozen.issuperset(wanted):
            raise ConfigError(
                f"aggregator {rule_name(config)} trains {', '.join(plan.train)} in round {number} of a task, but consolidator "
                f"{config.server.consolidator['name']} freezes {', '.join(consolidator.frozen)}: nothing of the adapter is left"
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


def notes(config: SimConfig, manifest: Manifest) -> tuple[str, ...]:
    """What is allowed, but hardly what anybody wants: tasks of a single class, of which nothing is learned."""
    alone = [name for name, classes in zip(manifest.task_names, manifest.task_classes, strict=True) if len(classes) == 1]
    learned = any(configs.build("objectives", o).learns_one_class for o in config.client.objectives)
    if not alone or learned or config.server.calibrator is not None:
        return ()
    return (
        f"{len(alone)} of {manifest.num_tasks} tasks have a single class ('{alone[0]}' first): the cross-entropy over a task's "
        "own classes is 0 there and trains nothing. Use more classes per task, client.objectives: [square], or a calibrator",
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


def _require_sources(config: SimConfig, rule: Aggregator, consolidator: Consolidator) -> None:
    """Models that are composed of sources, one per client, need parts that take them."""
    section, name = config.server.aggregator, config.server.consolidator["name"]
    if isinstance(section, list):
        apart = [g["name"] for g in section if configs.build_aggregator({k: v for k, v in g.items() if k != "match"}).sources]
        if apart:
            raise ConfigError(
                f"server.aggregator: {apart[0]} keeps every client's tensors by themselves, so it cannot be one of a list"
            )
    if not rule.sources:
        if consolidator.sources:
            raise ConfigError(
                f"consolidator {name} composes what every client learned by itself, but aggregator {rule_name(config)} merges "
                "it: use aggregator: collect, or another consolidator"
            )
        return
    adapter: contracts.Adapter = configs.build("adapters", config.adapter)
    if not adapter.sources:
        raise ConfigError(
            f"aggregator {rule_name(config)} composes clients at inference, which adapter {config.adapter['name']} cannot: "
            "use adapter: apt, or a rule that merges"
        )
    if not consolidator.sources:
        raise ConfigError(
            f"aggregator {rule_name(config)} hands on one module per client, which consolidator {name} cannot keep: "
            "use consolidator: compose"
        )
    if config.server.unlearning:
        raise ConfigError(
            f"server.unlearning keeps what clients become by themselves, which aggregator {rule_name(config)} does anyway: leave "
            "it out, fedsim unlearn needs nothing else"
        )
    if config.server.calibrator is not None:
        raise ConfigError(
            f"aggregator {rule_name(config)} keeps a head per client: there is no common one for calibrator "
            f"{config.server.calibrator['name']} to repair"
        )
