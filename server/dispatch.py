"""A plan put to clients: in a round to those that are drawn, and in a pass for statistics between two tasks."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace

from fedsim.core.contracts import STATISTICS, lifts_of
from fedsim.core.errors import ClientFailed
from fedsim.core.events import ClientDone, ClientSkipped, Event
from fedsim.core.messages import Bundle, ClientJob, ClientUpdate, Reply, RoundPlan, Tensors
from server import gather, sampling
from server.gather import Gathering, Round, say
from server.ledger import charged, device_bytes
from server.state import ServerState, Simulation


def statistics_pass(
    sim: Simulation, state: ServerState, plan: RoundPlan | None, params: Tensors, part: str = STATISTICS
) -> Generator[Event, None, tuple[Tensors, ServerState]]:
    """What a plan asks for at a task's start or end, summed over the clients of `server.pass_participation`; nothing for no plan.

    params: what the clients look through. part: whose sum it is, see `Reply`.
    """
    if plan is None:
        return {}, state
    clients = sampling.taking_part(sim.config, state.task, state.round, sim.num_clients, in_pass=True)
    round, state = yield from run_clients(sim, state, clients, replace(plan, train=()), params, Reply((part,)))
    return round.totals.get(part, {}), state


def run_clients(
    sim: Simulation,
    state: ServerState,
    clients: Sequence[int],
    plan: RoundPlan,
    params: Tensors,
    reply: Reply,
    parts: Sequence[str] = (),
    own: Mapping[int, Tensors] | None = None,
) -> Generator[Event, None, tuple[Round, ServerState]]:
    """Run a plan on clients, from these parameters; what came back, and the state with its traffic.

    parts: whose sums are made of updates that come back whole, where the reply names none. own: in a further look, what each
    client has trained in the round, in the place of its memory."""
    clock = time.perf_counter()
    server = sim.config.server
    if server.drift:
        reply = replace(reply, observed=gather.observed(clients, params, plan))
    sizes = sim.shard_sizes[state.task]
    order = sampling.longest_first(clients, sizes)
    memories = [own[c] if own else sim.store.memory(c) if plan.review or (plan.train and sizes[c]) else {} for c in order]
    jobs = [ClientJob(c, state.task, state.round, params, plan, m, reply) for c, m in zip(order, memories, strict=True)]
    lifts = lifts_of(reply.sums or parts, sim.aggregator, sim.calibrator, sim.learners)
    assert lifts is not None, "the server has all parts at hand"
    gathering = Gathering(reply, lifts, server.on_client_failure == "skip")
    for bundle in sim.pool.train(jobs):
        if bundle.notes:
            state = yield from say(state, bundle.notes)
        for result in gathering.add(remembered(sim, bundle, plan)):
            if isinstance(result, ClientFailed) and server.on_client_failure == "skip":
                yield ClientSkipped(result)
            yield ClientDone(state.task, state.round, gathering.count, len(jobs), result.client_id)
    round = gathering.result()
    round = replace(round, totals=sim.chain.received(params, round.totals, round.updates, state.task, state.round))
    state = charged(sim, state, jobs, round.updates)
    spent = state.spent("train" if plan.train else "statistics", time.perf_counter() - clock)
    failures = (*state.failures, *sorted(gathering.failures, key=lambda f: f.client_id))
    return round, replace(state, failures=failures, seconds=spent, client_rounds=state.client_rounds + len(jobs))


def remembered(sim: Simulation, bundle: Bundle, plan: RoundPlan) -> Bundle:
    """The bundle without what its clients remember, which goes into the store. Training reads and writes memory, and so does a
    learner's review, of clients without samples too: who fails, or trains on no samples, remembers what it did before."""
    changed: dict[int, ClientUpdate] = {}
    for place, result in enumerate(bundle.results):
        if isinstance(result, ClientUpdate) and result.memory is not None:
            if plan.review or (plan.train and result.num_samples):
                sim.store.remember(result.client_id, result.memory, device_bytes(sim, result.memory))
            changed[place] = replace(result, memory=None)
    return replace(bundle, results=tuple(changed.get(k, r) for k, r in enumerate(bundle.results))) if changed else bundle
