"""Further looks at the data of a round's clients, between training and merge, for rules that merge part after part."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from fedsim.core.events import Event
from fedsim.core.messages import Reply
from server import planning
from server.dispatch import run_clients
from server.gather import Round
from server.state import ServerState, Simulation


def looked_further(sim: Simulation, state: ServerState, round: Round) -> Generator[Event, None, ServerState]:
    """The looks at clients' data that the aggregator asks for between their training and its merge; its state knows what came of
    them. Every client knows what it sent, so that only what is merged by now travels: it looks through its
    tensors as the server has them, after what channels did to them, since these are what is merged."""
    if planning.rests(sim, state):
        return state
    updates, last = round.updates, state.round == sim.config.server.rounds - 1
    own = {u.client_id: u.params for u in updates if u.num_samples}
    while True:
        aggregator, further = sim.aggregator.further(state.aggregator, state.params, updates, last)
        state = replace(state, aggregator=aggregator)
        if further is None:
            return state
        plan, params = planning.further(state, further), {**state.params, **further.merged}
        seen, state = yield from run_clients(sim, state, list(own), plan, params, Reply(), own=own)
        sent = {u.client_id: u.statistics for u in seen.updates}
        updates = [replace(u, statistics={**u.statistics, **sent.get(u.client_id, {})}) for u in round.updates]
