"""What comes back from the clients of a round, and how it is merged."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fedsim.core.contracts import RULE, Aggregator, is_additive, require_updates
from fedsim.core.errors import AggregationError, ClientFailed
from fedsim.core.events import Note
from fedsim.core.messages import Bundle, ClientUpdate, Reply, RoundPlan, State, Tensors, num_bytes
from fedsim.core.sums import Lift, PartSums
from fedsim.core.tensors import matching
from server.state import ServerState

OBSERVED_BYTES = 64 * 2**20  # of updates that come back whole for whoever watches, however many clients there are
MOST_OBSERVED = 64  # clients: their pairs grow with the square


@dataclass(frozen=True)
class Round:
    """A round's updates in client-id order, those of the clients that are watched, and the sums of all by part of the run (where
    all parts take sums, the updates hold little else)."""

    updates: Sequence[ClientUpdate]
    watched: Sequence[ClientUpdate]
    totals: Mapping[str, Tensors] = field(default_factory=dict)


def say(state: ServerState, notes: Iterable[str]) -> Generator[Note, None, ServerState]:
    """Say the notes that were not said before; the state that remembers them."""
    known = state.noting(notes)
    yield from map(Note, known.notes[len(state.notes) :])
    return known


class Gathering:
    """Takes bundles in, in any order, and gives the round out. Bundles that nobody summed yet are summed here.

    lifts: what is summed of an update, by part (`contracts.lifts_of`). Updates are kept whole unless the reply says that sums are
    all that is wanted. skip: a round goes on without clients that fail, as long as there are others; else the first failure is
    raised.
    """

    def __init__(self, reply: Reply, lifts: Mapping[str, Lift], skip: bool = True) -> None:
        self.failures: list[ClientFailed] = []
        self._skip, self._reply = skip, reply
        self._updates: list[ClientUpdate] = []
        self._sums = PartSums(lifts)

    def add(self, bundle: Bundle) -> Iterator[ClientUpdate | ClientFailed]:
        """The results of a bundle, one by one, as they are taken in. Raises a client's failure where none is skipped, but only
        once another client has not failed: what is wrong for all of them is told as that by `result`."""
        if bundle.totals is not None:
            self._sums.add_block(bundle.start, len(bundle.results), bundle.totals)
        for place, result in enumerate(bundle.results, bundle.start):
            if bundle.totals is None:
                self._sums.add(place, None if isinstance(result, ClientFailed) else result)
            if isinstance(result, ClientFailed):
                self.failures.append(result)
            elif self._reply.sums and bundle.totals is None:
                self._updates.append(result.summed(result.client_id in self._reply.observed))
            else:
                self._updates.append(result)
            if self.failures and self._updates and not self._skip:
                raise self.failures[0]
            yield result

    @property
    def count(self) -> int:
        """How many clients have answered or failed."""
        return len(self._updates) + len(self.failures)

    def result(self) -> Round:
        """Raises AggregationError when nobody is left, and when nobody of those who are summed holds samples."""
        if not self._updates:
            raise all_failed(self.failures)
        updates = sorted(self._updates, key=lambda u: u.client_id)
        chosen = set(self._reply.observed)
        watched = [u for u in updates if u.client_id in chosen]
        if self._reply.sums:
            require_updates(updates)
        return Round(updates, watched, self._sums.result())


def all_failed(failures: Sequence[ClientFailed]) -> AggregationError:
    """What is said where no client came to its end: one reason, if it is the same for all but for its numbers."""
    first = min(failures, key=lambda f: f.client_id)
    alike = {(f.stage, re.sub(r"[\d.]+", "0", f.reason)) for f in failures}
    whose = "for the same reason" if len(alike) == 1 else f"client {first.client_id}"
    return AggregationError(
        f"task {first.task}, round {first.round}: nobody is left, all {len(failures)} clients failed, {whose} in stage "
        f"{first.stage}: {first.reason}"
    )


def merge(rule: Aggregator, state: State, params: Tensors, round: Round, draw: torch.Generator) -> tuple[State, Tensors]:
    """The rule's new state and parameters."""
    if RULE in round.totals and is_additive(rule):
        return rule.finish(state, params, round.totals[RULE], draw)
    return rule.combine(state, params, round.updates, draw)


def observed(clients: Sequence[int], params: Tensors, plan: RoundPlan) -> tuple[int, ...]:
    """Clients to watch: all of them, or as many, evenly spaced, as `MOST_OBSERVED` and `OBSERVED_BYTES` allow (two at least)."""
    size = num_bytes({n: params[n] for n in matching(params, plan.train)})
    most = max(2, min(MOST_OBSERVED, OBSERVED_BYTES // max(1, size)))
    count = min(most, len(clients))
    return tuple(clients[i * len(clients) // count] for i in range(count))
