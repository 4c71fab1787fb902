"""The server's half of the clients' learners, and what it tells clients: the context of a round."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace

from fedsim.core.contracts import CLOSING, LEARNER, TEACHER, Learner
from fedsim.core.events import Event
from fedsim.core.messages import State, Tensors
from server.dispatch import statistics_pass
from server.state import ServerState, Simulation


def opened(sim: Simulation, state: ServerState) -> ServerState:
    """The learners' states at a task's start."""
    states = {name: rule.opened(state.learners.get(name), state.params, state.task) for name, rule in sim.learners.items()}
    return replace(state, learners=states)


def context(sim: Simulation, state: ServerState) -> Mapping[str, Tensors]:
    """What the clients of a round are told, by who tells it: `learner.<name>`, and the teacher."""
    told = {f"{LEARNER}.{name}": rule.context(state.learners[name]) for name, rule in sim.learners.items()}
    return {name: tensors for name, tensors in {**told, TEACHER: state.teacher}.items() if tensors}


def heard(sim: Simulation, state: ServerState, totals: Mapping[str, Tensors]) -> State:
    """The learners' states after a round, from the sums of what clients sent them."""
    heard = {name: totals[f"{LEARNER}.{name}"] for name in hearing(sim.learners) if f"{LEARNER}.{name}" in totals}
    return state.learners | {
        name: sim.learners[name].heard(state.learners[name], t, sim.num_clients) for name, t in heard.items()
    }


def closed(sim: Simulation, state: ServerState, deployed: Tensors) -> Generator[Event, None, ServerState]:
    """The learners' states after a task, each with the statistics pass that it asks for, and the teacher of the next one."""
    for name, rule in sim.learners.items():
        plan = rule.closing(state.learners[name], deployed)
        part = f"{CLOSING}.{name}"
        total, state = yield from statistics_pass(sim, state, plan, deployed, part)
        state = replace(state, learners={**state.learners, name: rule.closed(state.learners[name], deployed, total)})
    return replace(state, teacher=deployed) if wants_teacher(sim.learners) else state


def hearing(learners: Mapping[str, Learner]) -> list[str]:
    """Names of those whose server half looks at what clients sent in a round."""
    return [name for name, rule in learners.items() if type(rule).heard is not Learner.heard]


def wants_teacher(learners: Mapping[str, Learner]) -> bool:
    """Whether the last task's model is sent."""
    return any(f"context {TEACHER}" in rule.traits.needs for rule in learners.values())
