"""The server's half of the clients' learners, and what it tells clients: the context of a round."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from dataclasses import replace
from functools import partial

from fedsim.core.contracts import CLOSING, LEARNER, TEACHER, Learner
from fedsim.core.events import Event
from fedsim.core.messages import RoundPlan, ServerJob, State, Tensors
from server.dispatch import statistics_pass
from server.gather import Round
from server.outcomes import outcome, shown
from server.state import ServerState, Simulation


def opened(sim: Simulation, state: ServerState) -> ServerState:
    """The learners' states at a task's start."""
    states = {name: rule.opened(state.learners.get(name), state.params, state.task) for name, rule in sim.learners.items()}
    return replace(state, learners=states)


def context(sim: Simulation, state: ServerState) -> Mapping[str, Tensors]:
    """What the clients of a round are told, by who tells it: `learner.<name>`, and the teacher."""
    told = {f"{LEARNER}.{name}": rule.context(state.learners[name]) for name, rule in sim.learners.items()}
    return {name: tensors for name, tensors in {**told, TEACHER: state.teacher}.items() if tensors}


def merged(sim: Simulation, state: ServerState, params: Tensors, round: Round) -> tuple[State, Tensors]:
    """The learners' states after a round, from the sums of what clients sent, and the merged parameters as they leave them."""
    states, taken = dict(state.learners), sum(u.num_samples > 0 for u in round.updates)
    clients = sim.num_clients - len(set(sim.config.server.without))  # those that never take part are not there
    for name, rule in sim.learners.items():
        total = round.totals.get(f"{LEARNER}.{name}")
        if total is not None:
            states[name] = rule.heard(states[name], total, clients)
        merged = partial(rule.merged, states[name], state.params, params, taken, clients)
        states[name], params = outcome(rule, sim.when(state), params, merged)
    return states, params


def closed(sim: Simulation, state: ServerState, deployed: Tensors) -> Generator[Event, None, tuple[Tensors, ServerState]]:
    """What is evaluated after a task, and the learners' states, each with the pass over clients that it asks for; `deployed`
    itself is the teacher of the next task."""
    for name, rule in sim.learners.items():
        plan = closing(name, rule, state.learners[name], deployed)
        if plan is not None:
            plan = replace(plan, context={**plan.context, **context(sim, state)})
        total, state = yield from statistics_pass(sim, state, plan, deployed, f"{CLOSING}.{name}")
        state = replace(state, learners={**state.learners, name: rule.closed(state.learners[name], deployed, total)})
    state = made(sim, state, deployed)
    if wants_teacher(sim.learners):
        state = replace(state, teacher=deployed)
    for name, rule in sim.learners.items():
        deployed = shown(rule, sim.when(state), deployed, rule.deployed(state.learners[name], deployed))
    return deployed, state


def closing(name: str, rule: Learner, state: State, deployed: Tensors) -> RoundPlan | None:
    """The pass at a task's end: what the server half asks for, and the client half's review if it has one."""
    plan = rule.closing(state, deployed)
    if not reviews(rule):
        return plan
    return replace(plan or RoundPlan(train=()), review=name)


def reviews(rule: Learner) -> bool:
    """Whether its clients look through the model that a task's end deploys."""
    return rule.does("review")


def changes_model(rule: Learner) -> bool:
    """Whether its server half changes parameters that were merged, or what is deployed."""
    return rule.does("merged", "deployed")


def makes(rule: Learner) -> bool:
    """Whether the server trains something for it by itself."""
    return rule.does("made")


def made(sim: Simulation, state: ServerState, deployed: Tensors) -> ServerState:
    """The learners' states after what the server trains by itself for the tasks that follow."""
    names = [name for name, rule in sim.learners.items() if makes(rule)]
    if not names or state.task + 1 == len(sim.task_names):
        return state
    clock = time.perf_counter()
    made = {name: sim.pool.make(ServerJob(name, state.task, deployed, state.learners[name])) for name in names}
    return replace(state, learners={**state.learners, **made}, seconds=state.spent("server", time.perf_counter() - clock))


def hearing(learners: Mapping[str, Learner]) -> list[str]:
    """Names of those whose server half looks at what clients sent in a round."""
    return [name for name, rule in learners.items() if rule.does("heard")]


def wants_teacher(learners: Mapping[str, Learner]) -> bool:
    """Whether the last task's model is sent."""
    return any(f"context {TEACHER}" in rule.traits.needs for rule in learners.values())


def of_others(learners: Mapping[str, Learner]) -> list[str]:
    """Names of those by which clients get to know something of other clients: from what the server tells them or changes in the
    model, and from the model that a task's end deploys."""
    return [
        name
        for name, rule in learners.items()
        if rule.does("context") or reviews(rule) or changes_model(rule) or wants_teacher({name: rule})
    ]
