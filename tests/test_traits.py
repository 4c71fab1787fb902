"""What parts say of themselves: needs, refusals and places, against brute force; and plug-ins of the user's own that say some."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import suitable
from fedsim.core import config as configs
from fedsim.core import plugins
from fedsim.core.contracts import WORDS, Part, Traits
from fedsim.core.errors import ConfigError, FedsimError, PluginError
from fedsim.simulation import prepare, rehearse
from fedsim.suitable import Chosen, obstacle
from tests.tiny import tiny

KINDS = ("adapter", "aggregator", "calibrator", "learner")
FREE = ("red", "green", "blue")  # words that parts and the run may give
PLACES = ("the loss", "the buffer")
REASONS = ("cannot do it", "does not suit {adapter}", "cannot go with {other}")

RUN_WORDS = [  # an override, and the word that it makes the run give
    ("server.rounds=4", "several rounds", "server.rounds: 4"),
    ("stream.tasks=3", "several tasks", "stream.tasks: 3"),
    ("stream.tasks=null", "several tasks", "stream.tasks: null"),
    ("stream.tasks=2", "context teacher", "stream.tasks: 2"),
    ("server.participation=0.5", "drawn clients", "server.participation: 0.5"),
    ("server.pass_participation=drawn", "drawn passes", "server.pass_participation: drawn"),
    ("server.on_client_failure=skip", "clients may fail", "server.on_client_failure: skip"),
    ("server.unlearning=true", "unlearning", "server.unlearning: true"),
    ("stream.online=true", "online", "stream.online: true"),
    ("stream.keep=false", "without the buffer", "stream.keep: false"),
    ("transform.augment=flip", "augmentation", "transform.augment: flip"),
    ("client.ranks=[1, 2, 2]", "unequal ranks", "client.ranks: a list"),
    ("client.clip_norm=1.0", "clipped gradients", "client.clip_norm: 1.0"),
    ("client.optimizer=SGD", "optimizer sgd", "client.optimizer: SGD"),
    ("runtime.precision=bf16", "half precision", "runtime.precision: bf16"),
    ("runtime.fused=true", "fused", "runtime.fused: true"),
    ("server.aggregator=[{match: '*', name: fedavg}]", "several rules", "server.aggregator: a list"),
]

words = st.frozensets(st.sampled_from(FREE), max_size=2)
needs, refuses = (
    st.dictionaries(st.sampled_from((*FREE, *KINDS)), st.sampled_from(r), max_size=2) for r in (REASONS[:2], REASONS)
)
traits = st.builds(Traits, words, st.frozensets(st.sampled_from(PLACES), max_size=1), needs, refuses)


def parts_of(every: list[Traits]) -> list[Chosen]:
    """An adapter first, so that all reasons can be said, and names that no other part's name holds."""
    return [Chosen(KINDS[place % len(KINDS)], f"part{place}x", t) for place, t in enumerate(every)]


def clashes(parts: list[Chosen], run: Collection[str]) -> list[set[str]]:
    """All that is wrong: what each line that is said of it has to name."""
    found: list[set[str]] = []
    for part in parts:
        found += [
            {str(part), word if told == REASONS[0] else "adapter part0x"}
            for word, told in part.traits.needs.items()
            if word not in run and not any(word == p.kind or word in p.traits.gives for p in parts)
        ]
        for word in part.traits.refuses:
            givers = [str(p) for p in parts if p is not part and (word == p.kind or word in p.traits.gives)]
            found += [{str(part), giver} for giver in [*givers, *([f"key.{word}"] if word in run else [])]]
    for a, b in itertools.combinations(parts, 2):
        found += [{str(a), str(b), place} for place in set(a.traits.takes) & set(b.traits.takes)]
    return found


@settings(max_examples=200)
@given(st.lists(traits, min_size=1, max_size=6), words)
def test_refused_is_exactly_what_brute_force_refuses(every: list[Traits], run: frozenset[str]) -> None:
    parts = parts_of(every)
    line = obstacle(parts, {word: f"key.{word}: 3" for word in sorted(run)}, {})
    wrong = clashes(parts, run)
    assert (line is not None) == bool(wrong)
    if line is not None:
        assert any(all(name in line for name in names) for names in wrong), (line, wrong)
        assert "{" not in line


def test_what_is_said_is_filled_in() -> None:
    told = "goes by {server.rounds} rounds and {client.lr}, not with {other}, {adapter}, {learner} or {calibrator}: {name: x}"
    parts = [
        Chosen("aggregator", "mine", Traits(refuses={"red": told})),
        Chosen("adapter", "lora", Traits()),
        Chosen("learner", "a", Traits(gives={"red"})),
        Chosen("learner", "b", Traits()),
    ]
    config = {"server": {"rounds": 3}, "client": {"lr": 0.5}, "calibrator": None}
    assert obstacle(parts, {}, config) == (
        "aggregator mine goes by 3 rounds and 0.5, not with learner a, adapter lora, learner a and learner b or null: {name: x}"
    )
    alone = Chosen("learner", "c", Traits(needs={"context control": "reads what nobody sends"}))
    assert obstacle([alone], {}, {}) == (
        "learner c reads what nobody sends (it needs 'context control', which no part of this run gives)"
    )
    assert obstacle([alone, Chosen("aggregator", "d", Traits(gives={"context control"}))], {}, {}) is None
    assert obstacle([alone], {"context control": "client.control: true"}, {}) is None


def test_what_a_part_minds_is_noted_and_nothing_more() -> None:
    picky = Traits(minds={"red": "is slower with {other}", "blue": "is never asked", "green": "needs more rounds"})
    parts = [Chosen("learner", "a", picky), Chosen("adapter", "lora", Traits(gives={"red"})), Chosen("learner", "b", picky)]
    run = {"green": "server.rounds: 1"}
    assert obstacle(parts, run, {}) is None
    each = ("learner {} is slower with adapter lora", "learner {} needs more rounds ('green' comes with server.rounds: 1)")
    assert suitable.minded(parts, run, {}) == tuple(line.format(name) for name in "ab" for line in each)


def test_a_part_may_need_or_refuse_a_kind_or_a_plugin_and_give_what_it_refuses() -> None:
    only = Traits(needs={"head cosine": "reads prototypes, which {head} has not: use head: cosine"})
    assert obstacle([Chosen("learner", "a", only), Chosen("head", "cosine", Traits())], {}, {}) is None
    line = obstacle([Chosen("learner", "a", only), Chosen("head", "linear", Traits())], {}, {})
    assert line == "learner a reads prototypes, which head linear has not: use head: cosine"
    once = Traits(gives={"red"}, refuses={"red": "is there already as {other}: name it once"})
    assert obstacle([Chosen("learner", "a", once)], {}, {}) is None
    line = obstacle([Chosen("learner", "a", once), Chosen("learner", "b", once)], {}, {})
    assert line == "learner a is there already as learner b: name it once"


@pytest.mark.parametrize(("overrides", "word", "said"), RUN_WORDS)
def test_the_run_gives_words_of_its_own(overrides: str, word: str, said: str) -> None:
    plain = ("stream.tasks=1", "server.rounds=1", "server.aggregator=fedavg")
    assert word not in suitable.run_words(tiny(*plain))
    assert suitable.run_words(tiny(*plain, overrides))[word] == said


TEXTS: Any = SimpleNamespace(task_classes=((0,),), train=SimpleNamespace(inputs={"input_ids": None}))  # of a run's WorkSpec


def test_data_that_are_known_give_words_too() -> None:
    """A stream whose number of tasks the config leaves open turns out to have one."""
    config = tiny("stream.tasks=null")
    assert {"texts", "several tasks"} & set(suitable.run_words(config)) == {"several tasks"}
    assert {"texts", "several tasks"} & set(suitable.run_words(config, TEXTS)) == {"texts"}


def test_words_of_our_own_parts_are_explained_and_can_be_met() -> None:
    """A word that is misspelt would be refused by nobody, or never be given."""
    kinds = [kind for kind, what in plugins.KINDS.items() if issubclass(what.contract, Part)]
    assert {"aggregators", "consolidators", "calibrators", "adapters"} <= set(kinds)
    every = {
        f"{plugins.singular(kind)} {name}": t for kind in kinds for name in plugins.names(kind) for t in traits_of(kind, name)
    }
    given_, asked = set[str](), set[str]()
    for found in every.values():
        given_ |= {*found.gives, *found.takes}
        asked |= {*found.needs, *found.refuses, *found.minds}
    run = words_of_runs()
    assert given_ <= set(WORDS)
    assert asked <= {*WORDS, *run, *map(plugins.singular, kinds), *every}
    assert {word for found in every.values() for word in found.needs} <= {*given_, *run, *map(plugins.singular, kinds), *every}


def traits_of(kind: str, name: str) -> list[Traits]:
    """With the options of every example; nothing for a plug-in that has to be told something."""
    found = []
    for options in plugins.load(kind, name).examples:
        try:
            part = configs.build(kind, {configs.name_key(kind): name, **options})
        except FedsimError:
            continue
        found.append(part.traits)
    return found


def words_of_runs() -> set[str]:
    """All words that a run may give, those of other optimizers and pools left out."""
    return {w for overrides, _, _ in RUN_WORDS for known in (None, TEXTS) for w in suitable.run_words(tiny(overrides), known)}


MINE = """
from dataclasses import dataclass
from fedsim.core import contracts
from fedsim.core.contracts import Traits

@dataclass(frozen=True)
class Calibrator(contracts.Calibrator):
    wants: str = "affine features"

    @property
    def traits(self):
        return {traits}
"""


@pytest.mark.parametrize(
    ("traits", "told"),
    [
        ("Traits()", None),
        ("Traits(needs={self.wants: 'adds heads up, which {{adapter}} does not allow: use adapter: tangent'})",
         r"calibrator \S+mine\.py adds heads up, which adapter lora does not allow: use adapter: tangent"),
        ("Traits(refuses={'several rounds': 'looks once'})", r"looks once \('several rounds' comes with server\.rounds: 2\)"),
        ("Traits(refuses={'aggregator fedavg': 'knows no plain mean'})", r"no plain mean \(.* comes with aggregator fedavg\)"),
        ("Traits(needs={'cool heads': 'is hot'})", r"is hot \(it needs 'cool heads', which no part of this run gives\)"),
        ("Traits(needs={'cool heads': 'is hot with {{server.warmth}}'})", r"speak of '\{server\.warmth\}', which is no part"),
        ("Traits(gives='affine features')", "gives of a part's traits must be a set of words"),
        ("Traits(refuses=['unlearning'])", "refuses of a part's traits must map words to what is said"),
        ("None", "traits must be a fedsim.core.contracts.Traits, got NoneType"),
        ("self.missing", "cannot say what goes with it: AttributeError"),
    ],
)  # fmt: skip
def test_a_plugin_of_the_users_own_is_taken_or_refused_by_what_it_says(traits: str, told: str | None, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE.replace("{traits}", traits.replace("{{", "{").replace("}}", "}")))
    mine = tiny("server.aggregator=fedavg", "server.consolidator=none", f"server.calibrator.name={tmp_path / 'mine.py'}")
    if told is None:
        prepare(mine)
        return
    with pytest.raises((ConfigError, PluginError), match=told) as refused:
        prepare(mine)
    assert "\n" not in str(refused.value)


def test_a_plugin_of_the_users_own_gives_what_ours_need(tmp_path: Path) -> None:
    """A consolidator that keeps what every client learned goes with `collect`; one that does not say so is refused."""
    own: dict[str, Any] = {"keeper": "Traits(gives={'keeps every module'})", "other": "Traits()"}
    for name, text in own.items():
        (tmp_path / f"{name}.py").write_text(
            "from dataclasses import dataclass\n"
            "from fedsim.core.contracts import Traits\n"
            "from server.consolidators import compose\n"
            "@dataclass(frozen=True)\n"
            "class Consolidator(compose.Consolidator):\n"
            f"    @property\n    def traits(self): return {text}\n"
        )
    collect = ("adapter=apt", "head=mixture", "server.rounds=1", "server.aggregator=collect")
    prepare(tiny(*collect, f"server.consolidator={tmp_path / 'keeper.py'}"))
    with pytest.raises(ConfigError, match=r"collect hands on .* which consolidator \S+other\.py cannot keep"):
        prepare(tiny(*collect, f"server.consolidator={tmp_path / 'other.py'}"))


READER = """
from dataclasses import dataclass
from fedsim.core import contracts

@dataclass(frozen=True)
class Learner(contracts.Learner):
    reads: str = "control"

    @property
    def traits(self):
        return contracts.Traits(needs={f"context {self.reads}": "reads what {aggregator} does not tell clients"})

    def begin(self, work, memory, context, draw):
        if self.reads == "control":
            assert context["control"]["head.weight"].shape == work.params["head.weight"].shape
        return {}
"""
SENDER = """
from dataclasses import dataclass, replace
from fedsim.core.contracts import Traits
from server.aggregators import fedavg

@dataclass(frozen=True)
class Aggregator(fedavg.Aggregator):
    @property
    def traits(self):
        return Traits(gives={"context control"})

    def init(self, params, task=0):
        return {"control": {"head.weight": params["head.weight"]}}

    def plan(self, state, round):
        return replace(super().plan(state, round), context=state)
"""


def test_context_that_nobody_sends_is_refused_before_training(tmp_path: Path) -> None:
    for name, text in (("reader", READER), ("sender", SENDER)):
        (tmp_path / f"{name}.py").write_text(text)
    reader = ("server.consolidator=none", "server.rounds=1", f"client.learners=[{tmp_path / 'reader.py'}]")
    with pytest.raises(ConfigError, match=r"learner \S+reader\.py reads what aggregator fedavg does not tell clients"):
        prepare(tiny(*reader, "server.aggregator=fedavg"))
    rehearse(tiny(*reader, f"server.aggregator={tmp_path / 'sender.py'}"), rounds=1)


def test_a_teacher_needs_a_task_before(tmp_path: Path) -> None:
    (tmp_path / "reader.py").write_text(READER)
    reader = f"client.learners=[{{name: {tmp_path / 'reader.py'}, reads: teacher}}]"
    pupil = ("server.consolidator=none", "server.aggregator=fedavg", reader)
    prepare(tiny(*pupil))
    for one in ("stream.tasks=1", "stream.joint=true"):
        with pytest.raises(ConfigError, match=r"reader\.py reads what aggregator fedavg does not tell clients"):
            prepare(tiny(*pupil, one))
