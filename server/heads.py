"""What becomes of the head between a merge and the evaluation that follows."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial

import torch

from fedsim.core import rng
from fedsim.core.contracts import CALIBRATOR
from fedsim.core.events import Event
from fedsim.core.messages import State, Tensors
from fedsim.core.names import HEAD, HEAD_UNKNOWN, HEAD_WEIGHT
from fedsim.core.tensors import with_prefix
from fedsim.core.work import seen_classes
from server.dispatch import statistics_pass
from server.gather import Round
from server.outcomes import outcome, shown
from server.state import ServerState, Simulation


def calibrate(sim: Simulation, state: ServerState, params: Tensors, round: Round) -> tuple[State, Tensors]:
    """The calibrator's new state, and the merged parameters with the head that it repaired."""
    rule, classes, draw = sim.calibrator, sim.task_classes[: state.task + 1], _draw(sim, state)
    assert rule is not None
    if CALIBRATOR in round.totals:
        repaired = partial(rule.finish, state.calibrator, params, round.totals[CALIBRATOR], classes, draw)
    else:
        repaired = partial(rule.calibrate, state.calibrator, params, round.updates, classes, draw)
    return outcome(rule, sim.when(state), params, repaired)


def repaired_at_end(
    sim: Simulation, state: ServerState, deployed: Tensors
) -> Generator[Event, None, tuple[Tensors, ServerState]]:
    """What is deployed at a task's end, with the head that the calibrator (if any) makes for it. The parameters that training
    goes on from keep theirs."""
    rule, classes = sim.calibrator, sim.task_classes[: state.task + 1]
    if rule is None:
        return deployed, state
    plan = rule.closing(state.calibrator, classes)
    total, state = yield from statistics_pass(sim, state, plan, deployed, CALIBRATOR)
    clock = time.perf_counter()
    kept = rule.end_task(state.calibrator, deployed, total, classes, _draw(sim, state))
    deployed = shown(rule, sim.when(state), deployed, rule.deployed(kept, deployed))
    return deployed, replace(state, calibrator=kept, seconds=state.spent("combine", time.perf_counter() - clock))


def answering(first: Tensors, deployed: Tensors, seen: Sequence[int]) -> Tensors:
    """What is deployed, with `head.unknown` (C,) where the head has rows of classes seen that are as the run began: nobody
    trained them, and of their classes a calibrator was told nothing. They are no answer: beside rows in closed form, whose logits
    may all be negative, a row of zeros would win samples of every class. As it is where there is no such row, or no other.

    first: the head that the run began with, empty where no calibrator makes rows.
    """
    deployed = {n: t for n, t in deployed.items() if n != HEAD_UNKNOWN} if HEAD_UNKNOWN in deployed else deployed
    rows_S = torch.tensor(seen)
    began = [(deployed[n][rows_S] == t[rows_S]).view(len(seen), -1).all(dim=1) for n, t in first.items()]
    began_S = torch.stack(began).all(dim=0) if began else torch.zeros(len(seen), dtype=torch.bool)
    if not bool(began_S.any()) or bool(began_S.all()):
        return deployed
    unknown_C = torch.zeros(len(deployed[HEAD_WEIGHT]), dtype=torch.bool)
    unknown_C[rows_S[began_S]] = True
    return {**deployed, HEAD_UNKNOWN: unknown_C}


def _draw(sim: Simulation, state: ServerState) -> torch.Generator:
    """Of a round's repair, and of the one at a task's end (whose round is the number of rounds)."""
    return rng.torch_stream(sim.config.seed, "calibrate", state.task, state.round)


def old_rows_restored(sim: Simulation, state: ServerState, params: Tensors) -> Tensors:
    """The parameters with the head's rows of old tasks' classes as they were before the round, bit for bit: weight decay and
    rounding move them, even if nobody trains them. As they are, unless the task's start says so."""
    current = set(sim.task_classes[state.task])
    rows = [c for c in seen_classes(sim.task_classes, state.task) if c not in current]
    if not state.start.keeps_old_rows or not rows:
        return params
    place = torch.tensor(rows)
    old = with_prefix(state.params, HEAD)
    return {n: t.index_copy(0, place, old[n][place]) if n in old else t for n, t in params.items()}
