"""A few mixes of parts in which all pairs meet: a covering array of strength two, where some parts refuse each other.

Greedy and deterministic: a mix is built around a pair that has not met yet, kind by kind, always with the part
that brings most new pairs. Of every pair one knows that it ran in a mix (safe), that it was in refused mixes only (suspect), or
nothing (fresh). A refused mix names a part and not a pair, so a pair is first tried in mixes with fewest suspects and most fresh
pairs, and if these are refused in mixes whose other pairs are safe.

What is found out lies in a file, `mixes.txt`, so that the tests only look for what is new; `make tables` writes it anew, with
fewer mixes, since by then all is known.
"""

# p parts of all kinds together

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Options = Mapping[str, Sequence[str]]  # kind -> its parts; "learner two" is a second place for parts of the kind "learner"
Choice = Mapping[str, str]  # kind -> one of its parts
Part = tuple[str, str]  # its kind and its name
Pair = frozenset[Part]  # two parts of different kinds
Refusal = Callable[[Choice], Sequence[Part] | None]  # None: the mix runs; else which of its parts are named, all if none is
Fits = Callable[[Choice], bool]  # whether parts, of some kinds only it may be, do not refuse each other by what they say

BOLD = 2  # mixes with most fresh pairs, before safe ones are looked for
TRIES = 4  # mixes, before a pair is taken for one that never runs
SUSPECT = 1000  # new pairs that a suspect one must bring
DRAWS = 30  # mixes, of which the best is taken


@dataclass(frozen=True)
class Cover:
    """running: mixes that run, in which all pairs meet that run anywhere; refused: every other pair, in a refused mix."""

    running: list[Choice] = field(default_factory=list)
    refused: dict[Pair, Choice] = field(default_factory=dict)


def pairs(options: Options) -> list[Pair]:
    """Every two parts of different kinds."""
    kinds = ((one, other) for one, other in itertools.combinations(options, 2) if _differ(one, other))
    return [frozenset({(one, a), (other, b)}) for one, other in kinds for a in options[one] for b in options[other]]


def met(choice: Choice) -> set[Pair]:
    """The pairs that meet in a mix."""
    return {frozenset((a, b)) for a, b in itertools.combinations(choice.items(), 2) if _differ(a[0], b[0])}


def _differ(one: str, other: str) -> bool:
    """Parts in two places of one kind need not meet."""
    return one.split()[0] != other.split()[0]


def cover(
    options: Options,
    refusal: Refusal,
    known_to_run: Sequence[Choice],
    fits: Fits = lambda choice: True,
    known_to_be_refused: Sequence[Choice] = (),
) -> Cover:
    """Mixes in which all pairs meet, beginning with those that are known to run. Parts that go together in a group only are found
    in such a beginning: a pair is taken for one that never runs when `TRIES` mixes with it were refused, or one that is known.

    fits: what parts say without being tried; a pair for which no parts fit is tried in one mix. Pairs that were refused at first
    wait until all have had a turn: their company is then chosen from what was found to run."""
    known, found = _Known(options, fits), Cover([*known_to_run])
    for choice in known_to_run:
        known.ran(choice)
    for choice in reversed(known_to_be_refused):
        found.refused.update({pair: choice for pair in met(choice) if not known.safe(pair)})
    settled = {*found.refused}
    for tries in (1, BOLD, TRIES, TRIES):
        for pair in sorted(pairs(options), key=known.rarity):
            if known.safe(pair) or pair in settled:
                continue
            for choice in itertools.islice(known.companies(pair), tries):
                if (named := refusal(choice)) is None:
                    found.running.append(choice)
                    known.ran(choice)
                    break
                known.refused(choice, named)
                found.refused[pair] = choice
    refused = {pair: choice for pair, choice in found.refused.items() if not known.safe(pair)}
    return Cover(fewer(found.running), refused)


def fewer(choices: Sequence[Choice]) -> list[Choice]:
    """Some of these mixes in which all of their pairs meet still: always that with most pairs that are left."""
    left, kept = {i: met(choice) for i, choice in enumerate(choices)}, list[Choice]()
    while left := {i: new for i, new in left.items() if new}:
        best = max(left, key=lambda i: len(left[i]))
        kept.append(choices[best])
        left = {i: new - left[best] for i, new in left.items()}
    return kept


def rebuilt(options: Options, found: Cover, refusal: Refusal, fits: Fits) -> Cover:
    """The same pairs in fewer mixes, all of parts that have met: of some that are drawn, always that with most pairs left."""
    meet = set().union(*map(met, found.running))
    draw, left, running = random.Random(0), sorted(meet, key=sorted), list[Choice]()
    for _ in range(len(found.running)):
        drawn = [
            mix for _ in range(DRAWS) if left and (mix := _grown(options, draw.choice(left), meet, {*left}, draw)) and fits(mix)
        ]
        best = max(drawn, key=lambda mix: len(met(mix).intersection(left)), default=None)
        if best is not None and refusal(best) is None:
            running.append(best)
            left = [pair for pair in left if pair not in met(best)]
    return Cover(fewer([*running, *found.running]), found.refused)


def _grown(options: Options, pair: Pair, meet: Collection[Pair], left: Collection[Pair], draw: random.Random) -> Choice | None:
    """A mix around a pair, kind by kind in a drawn order a part that has met all before, of these that with most pairs left."""
    mix = dict(pair)
    for kind in draw.sample([*options], len(options)):
        if kind not in mix:
            beside = [
                {frozenset({(kind, name), part}) for part in mix.items() if _differ(kind, part[0])} for name in options[kind]
            ]
            worth = {
                name: len(new & left) + draw.random() for name, new in zip(options[kind], beside, strict=True) if new <= meet
            }
            if not worth:
                return None
            mix[kind] = max(worth, key=lambda name: worth[name])
    return {kind: mix[kind] for kind in options}


def write(path: Path, options: Options, found: Cover) -> None:
    """One line per mix, its parts in the order of their kinds."""
    refused = sorted({tuple(choice[kind] for kind in options) for choice in found.refused.values()})
    running = sorted(tuple(choice[kind] for kind in options) for choice in found.running)
    lines = [f"{word}: {', '.join(mix)}" for word, mixes in (("runs", running), ("refused", refused)) for mix in mixes]
    path.write_text("\n".join([f"kinds: {', '.join(options)}", *lines]) + "\n", encoding="utf-8")


def read(path: Path, options: Options) -> tuple[list[Choice], list[Choice]]:
    """Mixes that run, and refused ones, as far as all of their parts are still there."""
    found: dict[str, list[Choice]] = {"runs": [], "refused": []}
    head, *lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else [""]
    for line in lines:
        word, names = line.split(": ")
        choice = dict(zip(head.removeprefix("kinds: ").split(", "), names.split(", "), strict=True))
        if [*choice] == [*options] and all(name in options[kind] for kind, name in choice.items()):
            found[word].append(choice)
    return found["runs"], found["refused"]


class _Known:
    """What is known of every pair: safe_pp, and refusals_pp, in how many refused mixes it was before it was safe."""

    def __init__(self, options: Options, fits: Fits) -> None:
        self._options, self._fits = options, fits
        self._places = {part: i for i, part in enumerate((kind, name) for kind in options for name in options[kind])}
        self._safe_pp = np.zeros((len(self._places), len(self._places)), dtype=bool)
        self._refusals_pp = np.zeros_like(self._safe_pp, dtype=np.int64)
        self._of = {kind: np.array([self._places[kind, name] for name in names]) for kind, names in options.items()}
        self._fits_pp = np.ones_like(self._safe_pp)
        for pair in pairs(options):
            self._fits_pp[self._among(dict(pair))] = fits(dict(pair))
        np.fill_diagonal(self._fits_pp, True)

    def safe(self, pair: Pair) -> bool:
        a, b = (self._places[part] for part in pair)
        return bool(self._safe_pp[a, b])

    def rarity(self, pair: Pair) -> int:
        """Pairs of the largest kinds first: they need a mix each, the others find room beside them."""
        return -int(np.prod([len(self._options[kind]) for kind, _ in pair]))

    def ran(self, choice: Choice) -> None:
        self._safe_pp[self._among(choice)] = True

    def refused(self, choice: Choice, named: Sequence[Part]) -> None:
        """Pairs of a named part with any other are suspect from now on."""
        places, blamed = ([self._places[part] for part in parts] for parts in (choice.items(), named))
        self._refusals_pp[np.ix_(blamed, places)] += 1
        self._refusals_pp[np.ix_(places, blamed)] += 1

    def companies(self, pair: Pair) -> Iterator[Choice]:
        """Mixes with this pair: those with fewest suspects and most to find out, then those with most safe pairs, each by what
        became of the last one. Where no parts fit, one mix."""
        tried = list[Choice]()
        while True:
            fresh_pp = ~self._safe_pp & (self._refusals_pp == 0)
            worth_pp = np.where(fresh_pp, 1 if len(tried) < BOLD else -1, -SUSPECT * self._refusals_pp * ~self._safe_pp)
            kinds = [kind for kind in self._options if kind not in dict(pair)]
            orders = [kinds[n:] + kinds[:n] for n in range(len(kinds))]
            built = [mix for order in orders if (mix := self._grown(dict(pair), order, worth_pp, fresh_pp.sum(1))) is not None]
            built = [mix for mix in built if mix not in tried]
            if not built and not tried:
                yield dict(pair) | {kind: self._options[kind][0] for kind in kinds}
            if not built:
                return
            tried.append(max(built, key=lambda mix: int(worth_pp[self._among(mix)].sum())))
            yield tried[-1]

    def _grown(self, mix: Choice, kinds: Sequence[str], worth_pp: NDArray[np.int64], left_p: NDArray[np.int64]) -> Choice | None:
        """A mix that fits, kind by kind the part of most worth beside those before, and of these that with most pairs left."""
        beside = [self._places[part] for part in mix.items()]
        fits_p = self._fits_pp[beside].all(0)
        if not self._fits(mix) or not all(fits_p[self._of[kind]].any() for kind in kinds):
            return None
        if not kinds:
            return mix
        places, worth_p = self._of[kinds[0]], worth_pp[beside].sum(0)
        for place in places[np.lexsort((-left_p[places], -worth_p[places]))]:
            name = self._options[kinds[0]][place - places[0]]
            if fits_p[place] and (whole := self._grown({**mix, kinds[0]: name}, kinds[1:], worth_pp, left_p)) is not None:
                return whole
        return None

    def _among(self, choice: Choice) -> tuple[NDArray[np.int64], ...]:
        places = [self._places[part] for part in choice.items()]
        return np.ix_(places, places)
