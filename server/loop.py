"""Federated continual learning, from start to end. Read this file first.

    for every task of the stream:
        begin it: the consolidator says with which parameters (from statistics, if it needs any)
        for every round:
            draw clients; the aggregator's plan says what they train and which statistics they send; learners, what they are told
            the pool runs them; failures are raised or skipped; what an additive rule sums is summed where the clients run
            the aggregator may look at their data further, and merges; learners hear what their clients sent
            the calibrator (if any) repairs the head
            the deployed model is evaluated on every task seen
        end it: the consolidator asks for statistics (if it needs any) and merges tasks; the calibrator may look through the
            merged model and repair the head that is deployed, and so may learners; the model is evaluated again

`run` is a generator. It yields events for whoever shows progress and, after every round and every task, the whole state:
what was yielded last is all that is needed to go on from there, with what `sim.store` keeps of every client. It touches no file,
no device and no Ray.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import partial

from fedsim.core import rng
from fedsim.core.events import Event, RoundDone, Row, RunStarted, TaskDone, TensorsKept
from fedsim.core.messages import Tensors
from fedsim.core.ranks import rank_of
from fedsim.core.work import seen_classes
from server import heads, learners, planning, sampling
from server.beneath import model_of
from server.dispatch import run_clients, statistics_pass
from server.drift import measure_drift
from server.evaluation import accuracies, evaluate
from server.gather import merge
from server.isolation import isolated_clients
from server.ledger import mean_loss
from server.looks import looked_further
from server.outcomes import outcome, shown
from server.state import ServerState, Simulation


def run(sim: Simulation, state: ServerState) -> Iterator[Event | ServerState]:
    """Go on from `state` to the end of the stream."""
    rounds = sim.config.server.rounds
    yield RunStarted(len(sim.task_names), rounds, sim.num_clients)
    while state.task < len(sim.task_names):
        if state.round == 0:
            state = yield from begin_task(sim, state)
        while state.round < rounds:
            state = yield from play_round(sim, state)
            yield state
        state = yield from end_task(sim, state)
        yield state


def begin_task(sim: Simulation, state: ServerState) -> Generator[Event, None, ServerState]:
    """Parameters and rule states that a task starts with."""
    opening, state = planning.opening(sim, state)
    total, state = yield from statistics_pass(sim, state, opening, state.params)
    start = sim.consolidator.start_task(state.consolidator, state.params, sim.fresh_adapter(state.task), total)
    start = sim.grown(state.task, start)
    calibrator = sim.calibrator.init() if sim.calibrator and state.calibrator is None else state.calibrator
    rule, kept = sim.aggregator, state.aggregator
    aggregator = rule.next_task(kept, start.params, state.task) if state.task else rule.init(start.params)
    state = replace(state.beginning(start), aggregator=aggregator, calibrator=calibrator)
    state = learners.opened(sim, state)
    return (yield from isolated_clients(sim, state)) if sim.config.server.unlearning else state


def play_round(sim: Simulation, state: ServerState) -> Generator[Event, None, ServerState]:
    """One round: plan, run, combine, calibrate, evaluate."""
    start = time.perf_counter()
    repair = planning.repair_plan(sim, state)
    clients = sampling.taking_part(sim.config, state.task, state.round, sim.num_clients)
    plan = planning.round_plan(sim, state, repair)
    reply, parts = planning.reply(sim, state, repair, plan), planning.summing(sim, repair, plan)
    round, state = yield from run_clients(sim, state, clients, plan, state.params, reply, parts)
    state = yield from looked_further(sim, state, round)

    clock = time.perf_counter()
    drifts = state.drifts + measure_drift(state.task, state.round, state.params, round.watched, partial(rank_of, sim.config))
    draw = rng.torch_stream(sim.config.seed, "aggregate", state.task, state.round)
    aggregator, told, params, beneath = state.aggregator, state.learners, state.params, state.beneath
    if not planning.rests(sim, state):
        merged = partial(merge, sim.aggregator, aggregator, params, round, draw)
        aggregator, params = outcome(sim.aggregator, sim.when(state), params, merged)
        beneath = beneath.with_part(f"{state.task}.{state.round}", sim.aggregator.beneath(aggregator))
    if plan.train:
        told, params = learners.merged(sim, state, params, round)
    calibrator = state.calibrator
    if repair is not None:
        calibrator, params = heads.calibrate(sim, state, params, round)
    params = heads.old_rows_restored(sim, state, params)
    spent = state.spent("combine", time.perf_counter() - clock)
    state = replace(state, aggregator=aggregator, calibrator=calibrator, learners=told, params=params)
    state = replace(state, beneath=beneath, drifts=drifts, seconds=spent)

    rows: tuple[Row, ...] = ()
    if sim.config.server.evaluate == "round":
        module = model_of(sim.aggregator, aggregator, params, beneath)
        deployed = sim.consolidator.deployed(state.consolidator, module, finished=False)
        rows, state = measure(sim, state, shown(sim.consolidator, sim.when(state), module, deployed), "round")
    yield RoundDone(state.task, state.round, rows, mean_loss(round.updates), time.perf_counter() - start)
    return replace(state, round=state.round + 1)


def end_task(sim: Simulation, state: ServerState) -> Generator[Event, None, ServerState]:
    """Merge what was learned with what was known, and fill in the task's row of the accuracy matrix."""
    start = time.perf_counter()
    total, state = yield from statistics_pass(sim, state, planning.closing(sim, state), state.params)
    clock = time.perf_counter()
    module = model_of(sim.aggregator, state.aggregator, state.params, state.beneath)
    draw = rng.torch_stream(sim.config.seed, "consolidate", state.task)
    consolidator = sim.consolidator.end_task(state.consolidator, module, total, draw)
    deployed = shown(sim.consolidator, sim.when(state), module, sim.consolidator.deployed(consolidator, module, finished=True))
    if sim.config.server.unlearning:
        yield TensorsKept(state.task, "end", state.params)
        yield TensorsKept(state.task, "module", module)
        yield TensorsKept(state.task, "total", total)
    state = replace(state, consolidator=consolidator, seconds=state.spent("combine", time.perf_counter() - clock))
    deployed, state = yield from heads.repaired_at_end(sim, state, deployed)
    deployed, state = yield from learners.closed(sim, state, deployed)
    deployed = heads.answering(state.first_head, deployed, seen_classes(sim.task_classes, state.task))
    if sim.config.server.keep == "tasks":
        yield TensorsKept(state.task, "deployed", deployed)
    rows, state = measure(sim, state, deployed, "task_end")
    yield TaskDone(state.task, rows, accuracies(rows), time.perf_counter() - start)
    return replace(state, task=state.task + 1, round=0)


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
