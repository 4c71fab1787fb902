"""Federated continual learning, from start to end. Read this file first.

    for every task of the stream:
        begin it: the consolidator says with which parameters
        for every round:
            draw clients; the aggregator's plan says what they train and which statistics they send
            the pool runs them; failures are raised or skipped; what an additive rule sums is summed where the clients run
            the aggregator merges; the calibrator (if any) repairs the head
            the deployed model is evaluated on every task seen
        end it: the consolidator asks for statistics (if it needs any), merges tasks, and the model is evaluated again

`run` is a generator. It yields events for whoever shows progress and, after every round and every task, the whole state:
what was yielded last is all that is needed to go on from there. It touches no file, no device and no Ray.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import replace

from fedsim.core import rng
from fedsim.core.errors import ClientFailed
from fedsim.core.events import ClientDone, ClientSkipped, Event, RoundDone, Row, RunStarted, TaskDone
from fedsim.core.messages import ClientJob, RoundPlan, Tensors
from fedsim.core.tensors import require_finite
from server import gather, sampling
from server.drift import measure_drift
from server.evaluation import accuracies, evaluate, seen_classes
from server.gather import Gathering, Round, merge
from server.ledger import add_traffic, mean_loss
from server.state import ServerState, Simulation


def run(sim: Simulation, state: ServerState) -> Iterator[Event | ServerState]:
    """Go on from `state` to the end of the stream."""
    rounds = sim.config.server.rounds
    yield RunStarted(len(sim.task_names), rounds, sim.num_clients)
    while state.task < len(sim.task_names):
        if state.round == 0:
            state = begin_task(sim, state)
        while state.round < rounds:
            state = yield from play_round(sim, state)
            yield state
        state = yield from end_task(sim, state)
        yield state


def begin_task(sim: Simulation, state: ServerState) -> ServerState:
    """Parameters and rule states that a task starts with."""
    params = sim.consolidator.start_task(state.consolidator, state.params, sim.fresh_adapter(state.task))
    calibrator = sim.calibrator.init() if sim.calibrator and state.calibrator is None else state.calibrator
    return replace(state, params=params, aggregator=sim.aggregator.init(params), calibrator=calibrator, holders=())


def play_round(sim: Simulation, state: ServerState) -> Generator[Event, None, ServerState]:
    """One round: plan, run, combine, calibrate, evaluate."""
    start = time.perf_counter()
    plan = sim.aggregator.plan(state.aggregator, state.round)
    if sim.calibrator is not None:
        plan = replace(plan, statistics=plan.statistics + sim.calibrator.plan(state.calibrator, state.round).statistics)
    if any(request.blended for request in plan.statistics):
        background, share = sim.consolidator.background(state.consolidator)
        plan = replace(plan, background=background, share=share)
    summed = sim.aggregator.additive and sim.calibrator is None  # a calibrator looks at every client's statistics
    round, state = yield from run_clients(sim, state, replace(plan, lift="rule" if summed else ""))

    clock = time.perf_counter()
    drifts = state.drifts + measure_drift(state.task, state.round, state.params, round.watched)
    aggregator, params = merge(sim.aggregator, state.aggregator, state.params, round)
    calibrator = state.calibrator
    if sim.calibrator is not None:
        seen = seen_classes(sim.task_classes, state.task)
        draw = rng.torch_stream(sim.config.seed, "calibrate", state.task, state.round)
        calibrator, params = sim.calibrator.calibrate(calibrator, params, round.updates, state.task, seen, draw)
    require_finite(params, f"task {state.task}, round {state.round}: after the merge,")
    state = replace(
        state,
        aggregator=aggregator,
        calibrator=calibrator,
        params=params,
        drifts=drifts,
        seconds=state.spent("combine", time.perf_counter() - clock),
    )

    rows: tuple[Row, ...] = ()
    if sim.config.server.evaluate == "round":
        rows, state = measure(sim, state, sim.consolidator.deployed(state.consolidator, params, finished=False), "round")
    yield RoundDone(state.task, state.round, rows, mean_loss(round.updates), time.perf_counter() - start)
    return replace(state, round=state.round + 1)


def end_task(sim: Simulation, state: ServerState) -> Generator[Event, None, ServerState]:
    """Merge what was learned with what was known, and fill in the task's row of the accuracy matrix."""
    start = time.perf_counter()
    total: Tensors = {}
    plan = sim.consolidator.plan(state.consolidator, state.params)
    if plan is not None:
        round, state = yield from run_clients(sim, state, replace(plan, lift="statistics"))
        total = round.total or {}
    clock = time.perf_counter()
    consolidator = sim.consolidator.end_task(state.consolidator, state.params, total)
    deployed = sim.consolidator.deployed(consolidator, state.params, finished=True)
    require_finite(deployed, f"task {state.task}: after the consolidation,")
    state = replace(state, consolidator=consolidator, seconds=state.spent("combine", time.perf_counter() - clock))
    rows, state = measure(sim, state, deployed, "task_end")
    yield TaskDone(state.task, rows, accuracies(rows), time.perf_counter() - start)
    return replace(state, task=state.task + 1, round=0)


def run_clients(sim: Simulation, state: ServerState, plan: RoundPlan) -> Generator[Event, None, tuple[Round, ServerState]]:
    """Run a plan on the clients that are drawn; what came back, and the state with memories and traffic."""
    clock = time.perf_counter()
    clients = sampling.draw(sim.config.seed, state.task, state.round, sim.num_clients, sim.config.server.participation)
    if sim.config.server.drift:
        plan = replace(plan, observed=gather.observed(clients, state.params, plan))
    order = sampling.longest_first(clients, sim.shard_sizes[state.task])
    jobs = [ClientJob(c, state.task, state.round, state.params, plan, state.memories.get(c, {})) for c in order]
    gathering = Gathering(jobs, plan, sim.aggregator)
    for bundle in sim.pool.train(jobs):
        for result in gathering.add(bundle):
            if isinstance(result, ClientFailed):
                if sim.config.server.on_client_failure == "fail":
                    raise result
                yield ClientSkipped(result)
            yield ClientDone(state.task, state.round, gathering.count, len(jobs), result.client_id)
    round = gathering.result()
    memories = {u.client_id: u.memory for u in round.updates if u.memory}
    traffic, holders = add_traffic(state.bytes, jobs, round.updates, state.holders)
    spent = state.spent("train" if plan.train else "statistics", time.perf_counter() - clock)
    state = replace(state, memories={**state.memories, **memories} if memories else state.memories, holders=holders)
    failures = (*state.failures, *sorted(gathering.failures, key=lambda f: f.client_id))
    return round, replace(state, failures=failures, bytes=traffic, seconds=spent, client_rounds=state.client_rounds + len(jobs))


def measure(sim: Simulation, state: ServerState, deployed: Tensors, stage: str) -> tuple[tuple[Row, ...], ServerState]:
    """Evaluate on every task seen. What was just measured, with the same tensors, is not measured again."""
    clock = time.perf_counter()
    last = tuple(r for r in state.rows if (r.task, r.round) == (state.task, state.round - 1))
    kept = tuple(c for c in state.classes if c.stage == "task_end")  # by class, only what a task's end gave is kept
    if stage == "task_end" and deployed is state.params and last:
        rows = tuple(replace(r, round=state.round, stage=stage) for r in last)
        classes = tuple(replace(c, round=state.round, stage=stage) for c in state.classes[len(kept) :])
    else:
        batch = sim.config.runtime.eval_batch
        rows, classes = evaluate(sim.pool, deployed, state.task, state.round, stage, sim.task_classes, sim.test_sizes, batch)
    spent = state.spent("evaluate", time.perf_counter() - clock)
    return rows, replace(state, rows=state.rows + rows, classes=kept + classes, seconds=spent)
