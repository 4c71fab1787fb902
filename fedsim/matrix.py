"""Which parts go with which, found out by trying them on a stream that trains in a moment; and the page of all methods.

`fedsim list --markdown` prints the page, which is `docs/methods.md`.
"""

from __future__ import annotations

import inspect
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from fedsim import simulation
from fedsim.core import config as configs
from fedsim.core import plugins, presets
from fedsim.core.config import SimConfig
from fedsim.core.contracts import CENTRES, WORDS, Aggregator, Part
from fedsim.core.errors import FedsimError

KINDS = ("adapters", "learners", "aggregators", "consolidators", "calibrators")  # what is mixed
SHOWN = ("adapters", "heads", "learners", "statistics", "channels", *KINDS[2:4], "merging", *KINDS[4:])  # what the page describes
NONE = "–"  # no learner beside the cross-entropy, no calibrator
SCENE: Mapping[str, Any] = {
    "name": "matrix",
    "data": {"source": "synthetic", "classes": 4, "train_per_class": 8, "test_per_class": 2, "image_size": 8},
    "stream": {"tasks": 2},
    "partition": {"name": "iid", "clients": 2},
    "model": {
        "backbone": "random",
        "config": {
            "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
            "image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_act": "gelu", "qkv_bias": True, "layer_norm_eps": 1e-6,
        },
    },
    "client": {"batch_size": 8, "lr": 1e-2},
    "server": {"evaluate": "task", "drift": False},
    "runtime": {"pool": "serial", "device": "cpu", "kernels": "torch"},
}  # fmt: skip
SMALL: Mapping[tuple[str, str], Mapping[str, Any]] = {  # options that suit so small a model
    ("adapters", "codaprompt"): {"length": 2, "blocks": [1], "components": 2},
    ("adapters", "dualprompt"): {"shared_blocks": [0], "own_blocks": [1], "shared": 2, "own": 2},
    ("adapters", "l2p"): {"size": 4, "top": 2, "length": 2},
    ("adapters", "lora"): {"rank": 2, "targets": "all-linear"},
    ("adapters", "prefix"): {"length": 2},
    ("adapters", "vpt"): {"length": 2},
    ("heads", "random_features"): {"size": 12},
    **{("learners", name): {"size": 4} for name in ("abs", "aer", "derpp", "er", "glfc", "icarl", "xder")},
    ("learners", "target"): {"images": 8, "batch": 4, "steps": 2, "warmup": 0, "latent": 4, "width": 2},
    ("learners", "mfcl"): {"steps": 2, "batch": 4, "latent": 4, "width": 2},
    ("aggregators", "flower"): {"strategy": "FedMedian"},
    ("aggregators", "merged"): {"rule": "ties"},
    ("consolidators", "merged"): {"rule": "ties"},
}
BESIDE: Mapping[str, Sequence[str]] = {"lider": ["er"]}  # learners that one needs beside it
HEADS: Mapping[str, str] = {"composes heads": "mixture", CENTRES: "centres", "a quadratic head": "quadratic"}  # by needed word


@dataclass(frozen=True)
class Mix:
    """One choice of every part that can be mixed freely. `NONE`: no calibrator, learner or channel; no head: one that suits.
    beside: further learners."""

    adapter: str
    aggregator: str
    consolidator: str
    calibrator: str = NONE
    learner: str = NONE
    head: str = ""
    channel: str = NONE
    beside: tuple[str, ...] = ()

    def config(self) -> SimConfig:
        """The run of this mix on the small stream: one round, for rules that take one round only, else two."""
        rule: Aggregator = configs.build("aggregators", section("aggregators", self.aggregator))
        server = {
            "rounds": 1 if "several rounds" in rule.traits.refuses else 2,
            "aggregator": section("aggregators", self.aggregator),
            "consolidator": section("consolidators", self.consolidator),
            "calibrator": None if self.calibrator == NONE else section("calibrators", self.calibrator),
            "channel": [] if self.channel == NONE else [section("channels", self.channel)],
        }
        named = [name for name in (self.learner, *self.beside) if name != NONE]
        lacking = [other for name in named for other in BESIDE.get(name, ())] if len(named) == 1 else []
        learners = [section("learners", name) for name in (*lacking, *named)]
        parts: list[Part] = [rule, *configs.build_learners(learners).values()]
        if self.calibrator != NONE:
            parts.append(configs.build("calibrators", section("calibrators", self.calibrator)))
        needed = {word for part in parts for word in part.traits.needs}
        suits = next((head for word, head in HEADS.items() if word in needed), "linear")
        layer = {
            "adapter": section("adapters", self.adapter),
            "head": section("heads", self.head or suits),
            "client": {"learners": learners},
            "server": server,
        }
        return configs.from_dict(configs.merge(SCENE, layer))

    def obstacle(self) -> str | None:
        """Why it is refused before any training, in one line; None if it runs."""
        try:
            simulation.prepare(self.config())
        except FedsimError as e:
            return str(e)
        return None


def mixes() -> list[Mix]:
    """Every adapter with every aggregator, consolidator and calibrator; learners take turns, along every one of the four."""
    adapters, learners, aggregators, consolidators, calibrators = (plugins.names(kind) for kind in KINDS)
    turns, parts = [NONE, *learners], (adapters, aggregators, consolidators, [NONE, *calibrators])
    found, wide = itertools.product(*(enumerate(names) for names in parts)), min(len(adapters), len(aggregators))
    return [Mix(a, g, s, r, turns[(i + j + wide * (k + n)) % len(turns)]) for (i, a), (j, g), (k, s), (n, r) in found]


def page() -> str:
    """All methods as Markdown: presets, plug-ins with their sources, and what goes with what."""
    return "\n".join([descriptions(), *_tables()]) + "\n"


def descriptions() -> str:
    """The page up to what goes with what, for which all mixes are tried."""
    lines = ["# Methods", "", "Generated by `make tables` from the plug-ins themselves; a test keeps it true.", ""]
    return "\n".join([*lines, *_presets(), *_parts()])


def section(kind: str, name: str) -> dict[str, Any]:
    """Of a config, for a part of a mix."""
    return {"name": name, **SMALL.get((kind, name), {})}


# ---------------------------------------------------------------- the page


def _presets() -> Iterator[str]:
    """What the configs are made of."""
    streams, methods = (presets.described(part) for part in (presets.STREAMS, presets.METHODS))
    if not methods:
        return
    yield from (
        "## Presets", "",
        "Any method on any stream: `fedsim run <stream> <method>`; `fedsim run <method>` is the method on `omniglot`.", "",
        "| stream | what it is |", "|---|---|", *(f"| {name} | {_cell(line)} |" for name, line in streams.items()), "",
    )  # fmt: skip
    yield "| method | adapter | head | aggregator | consolidator | calibrator | learners | what it is |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, line in methods.items():
        config = configs.load(["omniglot", name])
        section, server = config.server.aggregator, config.server
        rule = ", ".join(f"{g['match']}: {g['name']}" for g in section) if isinstance(section, list) else section["name"]
        repair = NONE if server.calibrator is None else server.calibrator["name"]
        terms = ", ".join(o["name"] for o in config.client.learners) or NONE
        parts = (
            name,
            config.adapter["name"],
            config.head["name"],
            rule,
            server.consolidator["name"],
            repair,
            terms,
            _cell(line),
        )
        yield f"| {' | '.join(parts)} |"
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _parts() -> Iterator[str]:
    """Every plug-in, where it lies, and where it comes from: a table for each kind."""
    for kind in SHOWN:
        yield from (f"## {kind.capitalize()}", "", "| name | what it is | with others |", "|---|---|---|")
        for name in plugins.names(kind):
            cls = plugins.load(kind, name)
            file = f"../{plugins.KINDS[kind].package.replace('.', '/')}/{name}.py"
            told = (f"[{name}]({file})", _cell(_source(sys.modules[cls.__module__].__doc__)), _cell(_traits(cls)))
            yield f"| {' | '.join(told)} |"
        yield ""


def _traits(cls: type[Any]) -> str:
    """What a part says of others, with the options that it has by default."""
    return "; ".join(cls.usual_traits().lines()) if issubclass(cls, Part) else ""


def _source(text: str | None) -> str:
    """The first paragraph of a module's docstring: title and paper."""
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


def _tables() -> Iterator[str]:
    """For every pair of parts: whether there are others with which it runs, and why not."""
    verdicts = {mix: mix.obstacle() for mix in mixes()}
    running = sum(v is None for v in verdicts.values())
    yield from (
        "## What goes with what", "",
        f"Of {len(verdicts)} mixes of adapter, aggregator, consolidator and calibrator, {running} run, as `make matrix` shows",
        "on a small stream, with every learner in turn; the tests play every pair of parts. The others are refused before",
        "any training, with the reason. A pair is marked ✓ if there are other parts with which it runs, else with a number:",
        "the reason that is given.", "",
    )  # fmt: skip
    yield from ("Parts know nothing of each other, they meet in words; of those above:", "")
    yield from (*(f"- {word}: {meaning};" for word, meaning in WORDS.items()), "")
    reasons: dict[str, int] = {}
    for rows, columns in (
        ("adapter", "aggregator"), ("adapter", "consolidator"), ("aggregator", "consolidator"), ("aggregator", "calibrator"),
        ("consolidator", "calibrator"),
    ):  # fmt: skip
        yield from _table(verdicts, rows, columns, reasons)
    yield from (f"{number}. {reason}" for reason, number in reasons.items())


@cache
def _alone(mix: Mix) -> str | None:
    """Why a mix without learner does not run: it is part of several tables."""
    return mix.obstacle()


def _table(verdicts: Mapping[Mix, str | None], rows: str, columns: str, reasons: dict[str, int]) -> Iterator[str]:
    names = [list(dict.fromkeys(getattr(m, what) for m in verdicts)) for what in (rows, columns)]
    yield f"| {rows} \\\\ {columns} | {' | '.join(names[1])} |"
    yield "|---" * (1 + len(names[1])) + "|"
    for row in names[0]:
        cells = []
        for column in names[1]:
            mixed = [m for m in verdicts if getattr(m, rows) == row and getattr(m, columns) == column]
            told = [verdicts[m] for m in mixed]
            if None not in told:  # the turns that learners took may be to blame
                told = [_alone(replace(m, learner=NONE)) for m in mixed]
            why = _reason([v for v in told if v is not None], row, column)
            cells.append("✓" if None in told else str(reasons.setdefault(why, len(reasons) + 1)))
        yield f"| {row} | {' | '.join(cells)} |"
    yield ""


def _reason(told: Sequence[str], *names: str) -> str:
    """Of what was said, that which names most of these parts, and of that what was said most often."""
    counts = Counter(re.sub(r"adapter\.layers[\w.]*", "adapter.…", reason) for reason in told)
    return max(counts, key=lambda reason: (sum(_names(reason, name) for name in names), counts[reason]), default="")


def _names(reason: str, name: str) -> bool:
    """Whether a reason speaks of this part, and not of one whose name holds this one's ("mean" in "nearest_mean")."""
    return re.search(rf"\b{re.escape(name)}\b", reason) is not None
