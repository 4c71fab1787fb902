"""The laws that every calibrator keeps, or says in its `exempt` why it cannot.

A calibrator is played through two small tasks of two rounds each: clients hold made-up samples of the task's classes alone, and
send the statistics that it asks for, with their updates and in the pass at the task's end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.core.contracts import REWRITES, Calibrator
from fedsim.core.messages import ClientUpdate, RoundPlan, State, Tensors
from fedsim.core.rng import torch_stream
from fedsim.core.tensors import same_layout
from fedsim.laws.comparing import (
    ROUNDED,
    expect_bits,
    expect_close,
    expect_finite,
    expect_unchanged,
    layout_difference,
    same,
    sum_of_lifts,
)
from fedsim.laws.comparing import through_file as read_back
from fedsim.laws.frame import Law, LawBroken
from fedsim.laws.made_up import CLASSES, make_params, some_clients, synthesise

TASKS: tuple[tuple[int, ...], ...] = ((0, 1, 2), (3, 4))
ROUNDS, CLIENTS = 2, 6
HEAD = "head."


@dataclass(frozen=True)
class Scene:
    """One call after a round, or the end of a task (`closing`): state, parameters and updates that go in, and what comes out."""

    task: int
    round: int
    closing: bool
    state: State
    params: Tensors
    updates: Sequence[ClientUpdate]
    after: State
    out: Tensors

    def __str__(self) -> str:
        return f"task {self.task}, {'its end' if self.closing else f'round {self.round}'}"

    @property
    def classes(self) -> tuple[tuple[int, ...], ...]:
        """Of every task so far."""
        return TASKS[: self.task + 1]

    @property
    def draw(self) -> torch.Generator:
        """The generator of this call."""
        return torch_stream(0, "calibrator", self.task, self.round, int(self.closing))


def play(rule: Calibrator, dtype: torch.dtype = torch.float64) -> Iterator[Scene]:
    """Round after round and the ends of tasks, everything handed over as a copy. At an end `out` is what is deployed."""
    state, params = rule.init(), make_params(dtype)
    for task in range(len(TASKS)):
        for number in range(ROUNDS):
            plan = rule.plan(deepcopy(state), number, number == ROUNDS - 1, TASKS[: task + 1])
            if plan is None:
                continue
            scene = Scene(task, number, False, state, params, _updates(plan, params, TASKS[task]), state, params)
            after, out = again(rule, scene)
            yield Scene(task, number, False, state, params, scene.updates, after, out)
            state, params = after, dict(out)
        asked = rule.closing(deepcopy(state), TASKS[: task + 1])
        if asked is None:
            continue
        scene = Scene(task, ROUNDS, True, state, params, _updates(asked, params, TASKS[task]), state, params)
        after, out = again(rule, scene)
        yield Scene(task, ROUNDS, True, state, params, scene.updates, after, out)
        state = after


def again(
    rule: Calibrator, scene: Scene, state: State = None, updates: Sequence[ClientUpdate] | None = None
) -> tuple[State, Tensors]:
    """The new state and the parameters (or what is deployed) of a scene, with another state or other updates where given."""
    state = deepcopy(scene.state if state is None else state)
    updates = deepcopy(scene.updates if updates is None else updates)
    if not scene.closing:
        return rule.calibrate(state, deepcopy(scene.params), updates, scene.classes, scene.draw)
    state = rule.end_task(state, deepcopy(scene.params), summed(rule, [[u] for u in updates]), scene.classes, scene.draw)
    return state, rule.deployed(deepcopy(state), deepcopy(scene.params))


def summed(rule: Calibrator, bundles: Sequence[Sequence[ClientUpdate]]) -> Tensors:
    """The sum of what is lifted, bundle by bundle. Raises LawBroken where it cannot be summed."""
    return sum_of_lifts([sum_of_lifts([rule.lift(update) for update in bundle]) for bundle in bundles])


def _updates(plan: RoundPlan, params: Tensors, classes: Sequence[int]) -> list[ClientUpdate]:
    own = [client.of(classes) for client in some_clients(CLIENTS)]
    told = [{n: t for r in plan.statistics for n, t in synthesise(r, client, params).items()} for client in own]
    dtype = params["head.weight"].dtype
    sent = [{n: t.to(dtype) for n, t in statistics.items()} for statistics in told]
    return [ClientUpdate(c.client_id, len(c), {}, statistics) for c, statistics in zip(own, sent, strict=True)]


# ---------------------------------------------------------------- the laws


def _works(rule: Calibrator) -> None:
    scenes = list(play(rule))
    if not scenes:
        raise LawBroken("it asks for nothing, neither after a round nor at a task's end")
    if all(same(dict(s.out), dict(s.params)) for s in scenes):
        raise LawBroken("no head is repaired, after no round and at no task's end")


def _head_only(rule: Calibrator) -> None:
    for dtype in (torch.float32, torch.float64):
        for scene in play(rule, dtype):
            if not same_layout(scene.out, scene.params):
                raise LawBroken(f"{scene}: {layout_difference(scene.out, scene.params)}")
            others = [n for n in scene.params if not n.startswith(HEAD)]
            expect_bits({n: scene.out[n] for n in others}, {n: scene.params[n] for n in others}, f"{scene}, tensors of no head")


def _old_rows(rule: Calibrator) -> None:
    if REWRITES in rule.traits.gives:
        return
    told: dict[str, Tensor] | None = None  # of the head at the last task's end
    for scene in play(rule):
        old = [c for classes in scene.classes[:-1] for c in classes]
        kept = dict(scene.params) if told is None or not scene.closing else told
        for name in (n for n in scene.params if n.startswith(HEAD)):
            if not torch.equal(scene.out[name][old], kept[name][old]):
                raise LawBroken(f"{scene}: rows of old classes of '{name}' change, and its traits do not give '{REWRITES}'")
        told = dict(scene.out) if scene.closing else told


def _finite(rule: Calibrator) -> None:
    for dtype in (torch.float32, torch.float64):
        for scene in play(rule, dtype):
            expect_finite(scene.out, str(scene))


def _told(rule: Calibrator) -> None:
    rich, none = np.full((3, CLASSES), 1000), np.zeros((3, CLASSES), dtype=np.int64)
    for held_KC, what in ((rich, "1000 samples of every class"), (none, "no samples")):
        told = rule.can_be_told(held_KC)
        if told.shape != (CLASSES,) or told.dtype != np.bool_:
            raise LawBroken(f"can_be_told gives {told.dtype} {told.shape} for {what}, not one bool per class")
    if not rule.can_be_told(rich).all():
        raise LawBroken("can_be_told refuses classes of which every client has 1000 samples")


def _no_mutation(rule: Calibrator) -> None:
    for scene in play(rule):
        before = {"state": scene.state, "parameters": scene.params, "updates": scene.updates}
        given = deepcopy(before)
        if scene.closing:
            rule.closing(given["state"], scene.classes)
            total = summed(rule, [[u] for u in given["updates"]])
            held = deepcopy(total)
            rule.end_task(given["state"], given["parameters"], total, scene.classes, scene.draw)
            expect_unchanged({"total": total}, {"total": held}, str(scene))
            expect_unchanged(given, before, str(scene))
            given["state"] = deepcopy(scene.after)
            rule.deployed(given["state"], given["parameters"])
            expect_unchanged(given, {**before, "state": scene.after}, f"{scene}, deployed")
        else:
            rule.plan(given["state"], scene.round, False, scene.classes)
            rule.calibrate(given["state"], given["parameters"], given["updates"], scene.classes, scene.draw)
            expect_unchanged(given, before, str(scene))


def _deterministic(rule: Calibrator) -> None:
    for scene in play(rule):
        after, out = again(rule, scene)
        expect_bits(out, scene.out, f"{scene}, twice with the same generator")
        if not same(after, scene.after):
            raise LawBroken(f"{scene}, twice with the same generator: the new states differ")


def _state_file(rule: Calibrator) -> None:
    for scene in play(rule):
        _, out = again(rule, scene, read_back(scene.state, "state", str(scene)))
        expect_bits(out, scene.out, f"{scene}, with a state from a file")
        read_back(scene.after, "state", str(scene))


def _additive(rule: Calibrator) -> None:
    for scene in play(rule):
        if not (scene.closing or rule.additive):
            continue
        want = summed(rule, [[u] for u in scene.updates])
        for bundles in ([scene.updates], [scene.updates[:1], scene.updates[1:]]):
            total = summed(rule, bundles)
            expect_close(total, want, f"{scene}, summed in {len(bundles)} bundles")
            if not scene.closing:
                _, out = rule.finish(deepcopy(scene.state), deepcopy(scene.params), total, scene.classes, scene.draw)
                expect_close(out, scene.out, f"{scene}, from a sum of {len(bundles)} bundles against whole updates")


def _order(rule: Calibrator) -> None:
    for scene in play(rule):
        if scene.closing:  # after a round, updates come in the order of their clients' ids
            _, out = again(rule, scene, updates=list(reversed(scene.updates)))
            expect_close(out, scene.out, f"{scene}, updates reversed")


def _without(rule: Calibrator) -> None:
    if not rule.subtracts:
        return
    ends = [scene for scene in play(rule) if scene.closing]
    for left in ends:
        gone = summed(rule, [[u] for u in left.updates[:2]])
        whole, rest = ends[0].state, ends[0].state
        for scene in ends:
            kept = scene.updates[2:] if scene is left else scene.updates
            whole = rule.end_task(whole, scene.params, summed(rule, [scene.updates]), scene.classes, scene.draw)
            rest = rule.end_task(rest, scene.params, summed(rule, [kept]), scene.classes, scene.draw)
        before = {"state": deepcopy(whole), "total": deepcopy(gone)}
        after, params = rule.without(whole, gone, left.classes), ends[-1].params
        expect_unchanged({"state": whole, "total": gone}, before, f"{left}, without two clients")
        out, want = rule.deployed(after, params), rule.deployed(rest, params)
        expect_close(out, want, f"{left}, two clients taken out again against never in")


def _float64(rule: Calibrator) -> None:
    for narrow, wide in zip(play(rule, torch.float32), play(rule), strict=True):
        got = {n: t.double() for n, t in narrow.out.items()}
        expect_close(got, wide.out, f"{wide}, float32 against float64", ROUNDED)


LAWS: tuple[Law[Calibrator], ...] = (
    Law("works", "it asks for something that clients can send, and changes a head", _works),
    Law("head_only", "of the parameters only head.* may differ, with the names, shapes and types that went in", _head_only),
    Law("old_rows", "rows of old tasks' classes change only where its traits say so", _old_rows),
    Law("finite", "from finite statistics come finite heads", _finite),
    Law("told", "it says class by class what it can be told of, and refuses none of which there is plenty", _told),
    Law("no_mutation", "states, parameters, updates and totals that go in are not changed", _no_mutation),
    Law("deterministic", "the same updates and the same generator give the same bits", _deterministic),
    Law("state_file", "a state that was written to a file and read back goes on with the same bits", _state_file),
    Law("additive", "what it lifts adds up, however clients are bundled, and a sum does what whole updates do", _additive),
    Law("order", "the order in which clients are summed at a task's end does not matter, rounding apart", _order),
    Law("without", "where it says so, clients that are taken out of the state again leave nothing behind", _without),
    Law("float64", "float32 in gives what float64 gives, up to its rounding", _float64),
)
