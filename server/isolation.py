"""What every client would have become alone: the task vectors that unlearning subtracts (see `fedsim.unlearning`).

At a task's start each client also trains by itself, from where the task starts, for as many epochs as the task's rounds have
together. What it becomes is never merged into anything; the run keeps it on the client's behalf. It begins with the client's
memory as that is then, and leaves it as it is.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import replace

from fedsim.core.errors import ClientFailed
from fedsim.core.events import ClientSkipped, Event, TensorsKept
from fedsim.core.messages import ClientJob
from server import sampling
from server.gather import all_failed, say
from server.planning import isolated_plan
from server.state import ServerState, Simulation

ALONE = "isolated "  # before the stage of a failure: the client's rounds are another matter


def isolated_clients(sim: Simulation, state: ServerState) -> Generator[Event, None, ServerState]:
    """One event per client with samples of this task, and the state with the time that it took."""
    clock = time.perf_counter()
    plan, sizes = isolated_plan(sim, state), sim.shard_sizes[state.task]
    excluded = set(sim.config.server.without)
    clients = [c for c in range(sim.num_clients) if sizes[c] and c not in excluded]
    yield TensorsKept(state.task, "start", state.params)
    order = sampling.longest_first(clients, sizes)
    jobs = [ClientJob(c, state.task, 0, state.params, plan, sim.store.memory(c)) for c in order]
    failures: list[ClientFailed] = []
    done, skip = 0, sim.config.server.on_client_failure == "skip"
    for bundle in sim.pool.train(jobs):
        state = yield from say(state, bundle.notes)
        for result in bundle.results:
            if isinstance(result, ClientFailed):
                failed = ClientFailed(result.client_id, result.task, result.round, f"{ALONE}{result.stage}", result.reason)
                failures.append(failed)
            else:
                done += 1
            if failures and done and not skip:
                raise failures[0]
            if isinstance(result, ClientFailed):
                if skip:
                    yield ClientSkipped(failures[-1])
            else:
                yield TensorsKept(state.task, f"client-{result.client_id}", result.params)
    if failures and not done and not skip:
        raise all_failed(failures)
    told = (*state.failures, *sorted(failures, key=lambda f: f.client_id))
    return replace(state, failures=told, seconds=state.spent("isolated", time.perf_counter() - clock))
