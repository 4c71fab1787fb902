"""A few mixes of parts in which all pairs meet: a covering array of strength two, where some parts refuse each other.

Greedy and deterministic, nothing is drawn. Of every pair one knows that it ran in a mix (safe), that it was in refused mixes only
(suspect), or nothing (fresh). A refused mix does not say which of its pairs is to blame, so a pair is first tried in the mix with
fewest suspects and most fresh pairs, and if that is refused in mixes whose other pairs are safe.
"""

# n mixes, k kinds, p parts of all kinds together

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Options = Mapping[str, Sequence[str]]  # kind -> its parts
Choice = Mapping[str, str]  # kind -> one of its parts
Pair = frozenset[tuple[str, str]]  # two parts of different kinds, each with its kind

TRIES = 4  # mixes, before a pair is taken for one that never runs


@dataclass(frozen=True)
class Cover:
    """running: mixes that run, in which all pairs meet that run anywhere; refused: every other pair, in a refused mix."""

    running: list[Choice] = field(default_factory=list)
    refused: dict[Pair, Choice] = field(default_factory=dict)


def pairs(options: Options) -> list[Pair]:
    """Every two parts of different kinds."""
    kinds = itertools.combinations(options.items(), 2)
    return [frozenset({(k, a), (m, b)}) for (k, some), (m, others) in kinds for a in some for b in others]


def met(choice: Choice) -> set[Pair]:
    """The pairs that meet in a mix."""
    return {frozenset(two) for two in itertools.combinations(choice.items(), 2)}


def cover(options: Options, runs: Callable[[Choice], bool], known_to_run: Sequence[Choice]) -> Cover:
    """Mixes in which all pairs meet, beginning with those that are known to run. Parts that go together in a group only are found
    in such a beginning: a pair is taken for one that never runs when `TRIES` mixes with it were refused.

    Pairs that were refused at first wait until all have had a turn: their company is then chosen from what was found to run."""
    known, found = _Known(options), Cover([*known_to_run])
    for choice in known_to_run:
        known.ran(choice)
    for tries in (2, TRIES, TRIES):
        for pair in pairs(options):
            if known.safe(pair):
                continue
            for choice in itertools.islice(known.companies(pair), tries):
                if runs(choice):
                    found.running.append(choice)
                    known.ran(choice)
                    break
                known.refused(choice)
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


class _Known:
    """What is known of every pair: safe_pp, and refusals_pp, in how many refused mixes it was before it was safe."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._places = {part: i for i, part in enumerate((kind, name) for kind in options for name in options[kind])}
        self._safe_pp = np.zeros((len(self._places), len(self._places)), dtype=bool)
        self._refusals_pp = np.zeros_like(self._safe_pp, dtype=np.int64)

    def safe(self, pair: Pair) -> bool:
        a, b = (self._places[part] for part in pair)
        return bool(self._safe_pp[a, b])

    def ran(self, choice: Choice) -> None:
        self._safe_pp[self._among(choice)] = True

    def refused(self, choice: Choice) -> None:
        self._refusals_pp[self._among(choice)] += 1

    def companies(self, pair: Pair) -> Iterator[Choice]:
        """Mixes with this pair: that with fewest suspects and most to find out, then those with most safe pairs."""
        mixes_nk = self._mixes(dict(pair))
        columns = np.array([*itertools.combinations(range(mixes_nk.shape[1]), 2)]).T
        one, other = (mixes_nk[:, c] for c in columns)
        safe, refusals = self._safe_pp[one, other], self._refusals_pp[one, other]
        suspects_n, fresh_n = (~safe & (refusals > 0)).sum(1), (~safe & (refusals == 0)).sum(1)
        bold = np.lexsort((-fresh_n, suspects_n))[:1]
        careful = np.lexsort(((~safe * refusals).sum(1), suspects_n + fresh_n))[:TRIES]
        parts = [*self._places]
        for n in dict.fromkeys([*bold, *careful]):
            yield dict(parts[place] for place in mixes_nk[n])

    def _mixes(self, fixed: Choice) -> NDArray[np.int64]:
        """(n, k) All mixes with these parts, as places in the list of all parts."""
        free = [[fixed[kind]] if kind in fixed else names for kind, names in self._options.items()]
        places = [[self._places[kind, name] for name in names] for kind, names in zip(self._options, free, strict=True)]
        return np.stack([grid.ravel() for grid in np.meshgrid(*places, indexing="ij")], axis=1)

    def _among(self, choice: Choice) -> tuple[NDArray[np.int64], ...]:
        places = [self._places[part] for part in choice.items()]
        return np.ix_(places, places)
