"""A plan put to clients: in a round to those that are drawn, and in a pass for statistics between two tasks."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import replace

from fedsim.core.contracts import lift_of
from fedsim.core.errors import ClientFailed
from fedsim.core.events import ClientDone, ClientSkipped, Event
from fedsim.core.messages import ClientJob, RoundPlan, Tensors
from server import gather, sampling
from server.gather import Gathering, Round, say
from server.ledger import charged
from server.state import ServerState, Simulation


def statistics_pass(
    sim: Simulation, state: ServerState, plan: RoundPlan | None, params: Tensors, lift: str = "statistics"
) -> Generator[Event, None, tuple[Tensors, ServerState]]:
    """What a plan asks for at a task's start or end, summed over the clients of `server.pass_participation`; nothing for no plan.

    params: what the clients look through. lift: what is summed of what they send, see `RoundPlan`.
    """
    if plan is None:
        return {}, state
    clients = sampling.taking_part(sim.config, state.task, state.round, sim.num_clients, in_pass=True)
    round, state = yield from run_clients(sim, state, clients, replace(plan, train=(), lift=lift), params)
    return round.total or {}, state


def run_clients(
    sim: Simulation, state: ServerState, clients: Sequence[int], plan: RoundPlan, params: Tensors
) -> Generator[Event, None, tuple[Round, ServerState]]:
    """Run a plan on clients, from these parameters; what came back, and the state with memories and traffic."""
    clock = time.perf_counter()
    server = sim.config.server
    if server.drift:
        plan = replace(plan, observed=gather.observed(clients, params, plan))
    order = sampling.longest_first(clients, sim.shard_sizes[state.task])
    jobs = [ClientJob(c, state.task, state.round, params, plan, state.memories.get(c, {})) for c in order]
    gathering = Gathering(jobs, plan, lift_of(plan, sim.aggregator, sim.calibrator), server.on_client_failure == "skip")
    for bundle in sim.pool.train(jobs):
        state = yield from say(state, bundle.notes)
        for result in gathering.add(bundle):
            if isinstance(result, ClientFailed) and server.on_client_failure == "skip":
                yield ClientSkipped(result)
            yield ClientDone(state.task, state.round, gathering.count, len(jobs), result.client_id)
    round = gathering.result()
    if round.total is not None:
        round = replace(round, total=sim.chain.received(params, round.total, round.updates, state.task, state.round, plan))
    memories = {u.client_id: u.memory for u in round.updates if u.memory}
    state = charged(sim, state, jobs, round.updates)
    spent = state.spent("train" if plan.train else "statistics", time.perf_counter() - clock)
    state = replace(state, memories={**state.memories, **memories} if memories else state.memories)
    failures = (*state.failures, *sorted(gathering.failures, key=lambda f: f.client_id))
    return round, replace(state, failures=failures, seconds=spent, client_rounds=state.client_rounds + len(jobs))
