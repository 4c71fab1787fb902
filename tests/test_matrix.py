"""Adapters, heads, learners, channels and rules with each other: a mix runs, or is refused in one clear line.

By default every pair of parts meets in some mix; `make matrix` plays every adapter with every aggregator, consolidator and
calibrator. Which mixes run lies in `mixes.txt`, as far as it was known when `make tables` was last run; what is new is found out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, fields, replace
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from fedsim import matrix, simulation, suitable
from fedsim.core import config as configs
from fedsim.core import contracts, plugins
from fedsim.core import presets as by_name
from fedsim.core.errors import ConfigError, FedsimError, ModelError
from fedsim.matrix import NONE, Mix
from fedsim.suitable import Chosen
from tests import pairs
from tests.pairs import Choice, Cover, Options, Part
from tests.tiny import plain_vit

MIXES = Path(__file__).parent / "mixes.txt"
PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
LEARNERS = plugins.names("learners")
PLACES = ("learner", "learner two", "learner three")  # as many learners has a mix


def placed() -> dict[str, list[str]]:
    """Every learner in one of the places of a mix. Those that take the same of a run never meet, and share a place; the first
    is for those with a buffer alone, which some others need beside them."""
    places: dict[str, list[str]] = {place: [] for place in PLACES}
    takes = {name: plugins.load("learners", name).usual_traits().takes for name in LEARNERS}
    for name in LEARNERS:
        other = PLACES[2 - crc32(name.encode()) % 2]  # by its name alone: a new learner moves no other
        places[PLACES[0] if contracts.BUFFER in takes[name] else PLACES[1] if takes[name] else other].append(name)
    return places


OPTIONS: Options = {
    f.name: ([NONE] if f.default == NONE else []) + plugins.names(f"{f.name}s") for f in fields(Mix) if f.name != "beside"
} | {place: [NONE, *names] for place, names in placed().items()}  # a field of `Mix` is called like its kind
PLACE = {name: place for place in PLACES for name in OPTIONS[place] if name != NONE}
RUN = suitable.run_words(Mix("none", "fedavg", "none").config())
NOT_MIXED = {"data", "partition"}  # sections of a config that hold a plug-in, but are no part of a method


@pytest.fixture(autouse=True, scope="module")
def one_backbone() -> Iterator[None]:
    with backbone_in_a_folder():
        yield


@contextmanager
def backbone_in_a_folder() -> Iterator[None]:
    """As transformers would take half of what a mix takes to build it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix, "SCENE", configs.merge(matrix.SCENE, {"model": plain_vit()}))
        yield


def presets() -> list[Choice]:
    """The parts of every method that is one of the mixes."""
    found = list[Choice]()
    for name in by_name.names(by_name.METHODS):
        config = configs.load(["omniglot", name])
        places: dict[str, list[Any]] = {place: [] for place in PLACES}
        for one in config.client.learners:
            places[PLACE[one["name"]]].append(one)
        sections = {**vars(config), **vars(config.server), **places}
        chosen = {kind: sections[kind] if isinstance(sections[kind], list) else [sections[kind]] for kind in OPTIONS}
        if all(len(some) <= 1 for some in chosen.values()):
            found.append({kind: some[0]["name"] if some and some[0] else NONE for kind, some in chosen.items()})
    return found


def mixed(choice: Choice) -> Mix:
    beside = tuple(choice[place] for place in PLACES[1:] if choice[place] != NONE)
    return Mix(beside=beside, **{kind: name for kind, name in choice.items() if kind not in PLACES[1:]})  # type: ignore[arg-type]


@cache
def obstacle(mix: Mix) -> str | None:
    return mix.obstacle()


@cache
def part(kind: str, name: str) -> Chosen:
    """A part with what it says of others."""
    kind = kind.split()[0]
    built: contracts.Part = configs.build(f"{kind}s", matrix.section(f"{kind}s", name))
    return Chosen(kind, name, built.traits)


@cache
def givers(word: str) -> frozenset[str]:
    """The kinds of which some part gives a word."""
    return frozenset(kind for kind in OPTIONS for name in OPTIONS[kind] if name != NONE and word in part(kind, name).words)


def fits(choice: Choice) -> bool:
    """Whether parts, of some kinds only it may be, refuse no other by what they say; a need may be met by a kind that is open."""
    parts = [part(kind, name) for kind, name in choice.items() if name != NONE]
    once = any("several rounds" in one.traits.refuses for one in parts if one.kind == "aggregator")
    run = RUN.keys() - ({"several rounds"} if once else set())
    for number, one in enumerate(parts):
        words = set().union(run, *(other.words for other in parts if other is not one))
        if words & one.traits.refuses.keys() or any(set(one.traits.takes) & set(b.traits.takes) for b in parts[:number]):
            return False
        if any(givers(word) <= {*choice} for word in one.traits.needs.keys() - words):
            return False
    return True


@cache
def covered() -> Cover:
    """Beginning with what is known, if nothing that parts say is against it. That it is so still is seen when it is played."""
    running, refused = pairs.read(MIXES, OPTIONS)
    running = [choice for choice in running if fits(choice)]
    met = set().union(*map(pairs.met, running))
    new = [choice for choice in presets() if not pairs.met(choice) <= met and obstacle(mixed(choice)) is None]
    return pairs.cover(OPTIONS, named, [*running, *new], fits, refused)


def write_mixes() -> None:
    with backbone_in_a_folder():
        found = covered()
        pairs.write(MIXES, OPTIONS, pairs.rebuilt(OPTIONS, found, named, fits))


def named(choice: Choice) -> list[Part] | None:
    """Which parts a refusal names, by kind and name or else by name; None of a mix that runs."""
    told = obstacle(mixed(choice))
    if told is None:
        return None
    parts = [*choice.items()]
    by_kind = [(kind, name) for kind, name in parts if f"{kind.split()[0]} {name}" in told]
    return by_kind or [(kind, name) for kind, name in parts if re.search(rf"\b{re.escape(name)}\b", told)] or parts


def plays(mix: Mix) -> None:
    """Whatever passes the checks before training ends with numbers: nothing is found out on the way."""
    results = simulation.rehearse(mix.config())
    assert results.accuracy.shape == (2, 2), mix
    assert np.isfinite(results.accuracy[1]).all(), mix
    assert np.isfinite(results.costs["bytes"]["up"].get("head", 0)), mix


def is_refused_clearly(mix: Mix) -> None:
    with pytest.raises((ConfigError, ModelError)) as refused:
        simulation.prepare(mix.config())
    told = str(refused.value)
    assert "\n" not in told, mix
    assert any(name in told for name in (*astuple(replace(mix, beside=())), *mix.beside) if name), (mix, told)


@pytest.mark.parametrize("aggregator", OPTIONS["aggregator"])
def test_every_pair_meets_in_a_mix_that_runs(aggregator: str) -> None:
    for choice in covered().running:
        if choice["aggregator"] == aggregator:
            plays(mixed(choice))


def test_a_pair_that_never_runs_is_refused_in_one_line_that_names_a_part() -> None:
    for mix in {mixed(choice) for choice in covered().refused.values()}:
        is_refused_clearly(mix)


def test_all_pairs_are_covered() -> None:
    """Each runs or was refused, never both; and every part runs with some part of every other kind."""
    met = set().union(*map(pairs.met, covered().running))
    assert met | set(covered().refused) == set(pairs.pairs(OPTIONS))
    assert not met & set(covered().refused)
    every = [(kind, part) for kind, some in OPTIONS.items() for part in some]
    for (kind, part), other in itertools.product(every, OPTIONS):
        assert kind.split()[0] == other.split()[0] or any(
            frozenset({(kind, part), (other, name)}) in met for name in OPTIONS[other]
        ), (part, other)


def test_the_page_describes_the_plugins_as_they_are() -> None:
    assert PAGE.read_text(encoding="utf-8").startswith(matrix.descriptions()), "run `make tables`"


def test_what_the_page_says_of_two_parts_is_so() -> None:
    met = set().union(*map(pairs.met, covered().running))
    for (rows, columns), cells in tables(PAGE.read_text(encoding="utf-8")).items():
        for (row, column), cell in cells.items():
            assert (cell == "✓") == (frozenset({(rows, row), (columns, column)}) in met), (row, column, "run `make tables`")


def tables(page: str) -> dict[tuple[str, str], Mapping[tuple[str, str], str]]:
    """The tables of what goes with what: (kind of rows, kind of columns) -> (row, column) -> cell."""
    found: dict[tuple[str, str], Mapping[tuple[str, str], str]] = {}
    for table in re.findall(r"^\| \w+ \\\\ \w+ \|.*\n(?:\|.*\n)+", page, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        kinds: tuple[str, ...] = tuple(head[0].split(" \\\\ "))
        found[kinds[0], kinds[1]] = {(row[0], name): cell for row in rows for name, cell in zip(head[1:], row[1:], strict=True)}
    assert len(found) >= 5
    return found


def test_every_kind_of_part_is_mixed() -> None:
    """A section of a config that holds a plug-in is a field of `Mix`, and so meets all others."""
    sections = {*configs.PLUGIN_KEYS, *configs.SERVER_PLUGIN_KEYS} - NOT_MIXED
    assert {kind.split()[0] for kind in OPTIONS} == sections | {"learner"}


def test_a_cover_finds_what_goes_together_in_a_group_only() -> None:
    """Of parts a0..a3, b0..b3, …: 0 goes with 0 only; of the others each with each, but for a1 with b1."""
    options = {kind: [f"{kind}{i}" for i in range(4)] for kind in "abcd"}
    calls = []

    def runs(choice: Choice) -> bool:
        digits = {name[-1] for name in choice.values()}
        return digits == {"0"} or ("0" not in digits and not {"a1", "b1"} <= {*choice.values()})

    def refusal(choice: Choice) -> Sequence[pairs.Part] | None:
        calls.append(choice)
        return None if runs(choice) else [*choice.items()]

    found = pairs.cover(options, refusal, [{kind: f"{kind}0" for kind in options}])
    everywhere = [dict(zip(options, names, strict=True)) for names in itertools.product(*options.values())]
    possible = set().union(*(pairs.met(choice) for choice in everywhere if runs(choice)))
    assert set().union(*map(pairs.met, found.running)) == possible
    assert set(found.refused) == set(pairs.pairs(options)) - possible
    assert len(found.running) <= 20 < sum(map(runs, everywhere)), "16 pairs of two kinds take 10 mixes at least"


def test_most_parts_are_free_to_meet() -> None:
    """Merging rules, adapters and consolidators that merge go together, but for what needs LoRA pairs or sources."""
    for adapter, aggregator in itertools.product(("lora", "prefix", "vpt", "none"), ("fedavg", "fairavg", "variance_weighted")):
        assert obstacle(Mix(adapter, aggregator, "mean")) is None
    with pytest.raises(FedsimError, match="LoRA"):
        simulation.prepare(Mix("prefix", "fedavg", "regmean").config())


# ---------------------------------------------------------------- the whole product


@pytest.mark.matrix
@pytest.mark.parametrize("aggregator", OPTIONS["aggregator"])
@pytest.mark.parametrize("adapter", OPTIONS["adapter"])
def test_every_mix_runs_or_is_refused_clearly(adapter: str, aggregator: str) -> None:
    for mix in matrix.mixes():
        if (mix.adapter, mix.aggregator) == (adapter, aggregator):
            if obstacle(mix) is None:
                plays(mix)
            else:
                is_refused_clearly(mix)


@pytest.mark.matrix
def test_no_pair_that_runs_was_missed() -> None:
    """Among the kinds that the product goes through: a pair that runs in any of its mixes is one that was found to."""
    met = set().union(*map(pairs.met, covered().running))
    for mix in matrix.mixes():
        if obstacle(mix) is None:
            place = PLACE.get(mix.learner, PLACES[0])
            chosen = {place if kind == "learner" else kind: part for kind, part in vars(mix).items() if part and kind != "beside"}
            assert pairs.met(chosen) <= met, mix


def test_learners_take_turns_so_that_each_meets_every_part() -> None:
    for kind in ("adapter", "aggregator", "consolidator", "calibrator"):
        met = {(getattr(m, kind), m.learner) for m in matrix.mixes()}
        assert met == set(itertools.product(OPTIONS[kind], [NONE, *LEARNERS])), kind


@pytest.mark.matrix
def test_the_page_is_what_the_plugins_say() -> None:
    page = matrix.page()
    assert PAGE.read_text(encoding="utf-8") == page, "run `make tables`"
    counts = re.search(r"Of (\d+) mixes .* (\d+) run;", page)
    assert counts is not None
    guide = (PAGE.parent / "guide" / "methods.md").read_text(encoding="utf-8")
    assert f"({counts[2]} of {counts[1]} mixes run," in guide


if __name__ == "__main__":
    write_mixes()
