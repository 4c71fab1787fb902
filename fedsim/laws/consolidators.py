"""The laws that every consolidator keeps, or says in its `exempt` why it cannot.

A consolidator is played through three small made-up tasks: each starts from what it gives, trains what it does not freeze, and
ends with the statistics that it asks for, summed over made-up clients. One that takes a module per client is handed two.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from clients.learning import statistic_of
from fedsim.core.contracts import BESIDE, REWRITES, Consolidator, TaskStart, lift_statistics
from fedsim.core.messages import ClientUpdate, RoundPlan, State, Tensors
from fedsim.core.rng import torch_stream
from fedsim.core.sums import summed
from fedsim.core.tensors import LORA_A, LORA_B, lora_layers, matching, with_prefix
from fedsim.laws.comparing import (
    EXACT,
    ROUNDED,
    expect_bits,
    expect_close,
    expect_finite,
    expect_unchanged,
    same,
    through_file,
)
from fedsim.laws.frame import Law, LawBroken
from fedsim.laws.made_up import make_params, some_clients, stepped, synthesise

TASKS, CLIENTS = 3, 3
ADAPTER, CLIENT = "adapter.", "source.client"
APART = "a module per client"  # the word of those that take no merged module


@dataclass(frozen=True)
class Scene:
    """One task: what the consolidator was handed, and what it gave. asked: the pass at the start and the one at the end.

    before: state and parameters before the task; trained: what training made of `start`; handed: the same, or a module per
    client; total: of the pass at the end.
    """

    task: int
    before: State
    params: Tensors
    fresh: Tensors
    opening: Tensors
    start: TaskStart
    trained: Tensors
    handed: Tensors
    asked: tuple[RoundPlan, ...]
    total: Tensors
    after: State

    def __str__(self) -> str:
        return f"task {self.task}"


def play(rule: Consolidator, dtype: torch.dtype = torch.float64, tasks: int = TASKS) -> Iterator[Scene]:
    """Task after task, everything handed over as a copy."""
    state = rule.init()
    params: Tensors = with_prefix(make_params(dtype), "head.")
    for task in range(tasks):
        fresh = _fresh(dtype, task)
        asked = []
        opened = rule.opening(deepcopy(state), deepcopy(params)) if task else None
        if opened is not None:
            asked.append(opened.plan)
        opening = _total(opened.plan, params, task) if opened is not None else {}
        start = rule.start_task(deepcopy(state), deepcopy(params), deepcopy(fresh), deepcopy(opening))
        frozen = matching(start.params, start.frozen)
        trained = {**start.params, **stepped(start.params, [n for n in start.params if n not in frozen], task)}
        handed = _handed(rule, trained)
        plan = rule.plan(deepcopy(state), deepcopy(handed))
        if plan is not None:
            asked.append(plan)
        total = {} if plan is None else _total(plan, trained, task)
        after = rule.end_task(deepcopy(state), deepcopy(handed), deepcopy(total), _draw(task))
        yield Scene(task, state, params, fresh, opening, start, trained, handed, tuple(asked), total, after)
        state, params = after, trained


def _fresh(dtype: torch.dtype, task: int) -> dict[str, Tensor]:
    """A module that does nothing yet: B is zero."""
    drawn = with_prefix(make_params(dtype, f"fresh {task}"), ADAPTER)
    return {n: torch.zeros_like(t) if n.endswith(LORA_B) else t for n, t in drawn.items()}


def _draw(task: int) -> torch.Generator:
    """What the merge at a task's end draws from: the same at every call."""
    return torch_stream(0, "consolidate", task)


def _handed(rule: Consolidator, params: Tensors) -> Tensors:
    if APART not in rule.traits.needs:
        return params
    return {n: torch.stack([t, 2 * t]) for n, t in params.items()} | {CLIENT: torch.tensor([0, 3])}


def _total(plan: RoundPlan, params: Tensors, task: int) -> Tensors:
    """What the clients answer, summed; other clients in every task. Raises LawBroken for what cannot be summed."""
    for request in plan.statistics:
        if not statistic_of(request).additive:
            raise LawBroken(f"task {task}: the statistic '{request.name}' is not additive, and clients are summed for it")
    terms = []
    for client in some_clients(CLIENTS * TASKS)[task * CLIENTS : (task + 1) * CLIENTS]:
        statistics = {n: t for request in plan.statistics for n, t in synthesise(request, client, params).items()}
        terms.append(lift_statistics(ClientUpdate(client.client_id, len(client), {}, statistics)))
    return summed(terms)


def deployed(rule: Consolidator, scene: Scene, finished: bool = True) -> Tensors:
    """What is evaluated in a task and at its end, from copies."""
    state = scene.after if finished else scene.before
    return rule.deployed(deepcopy(state), deepcopy(scene.handed), finished)


def acting(tensors: Tensors) -> dict[str, Tensor]:
    """What the tensors do: products of LoRA pairs, whatever their rank, and the others as they are."""
    layers = [p for p in lora_layers(tensors) if p + LORA_B in tensors]
    products = {p: tensors[p + LORA_B] @ tensors[p + LORA_A] for p in layers}
    factors = {p + factor for p in layers for factor in (LORA_A, LORA_B)}
    return products | {n: t for n, t in tensors.items() if n not in factors}


# ---------------------------------------------------------------- the laws


def _start(rule: Consolidator) -> None:
    for scene in play(rule):
        began, expected = scene.start.params, {**scene.params, **scene.fresh}
        if began.keys() != expected.keys() or any(began[n].shape != expected[n].shape for n in expected):
            raise LawBroken(f"{scene} starts with {', '.join(began)}, not with the head and the tensors of a fresh module")
        expect_bits(with_prefix(began, "head."), with_prefix(scene.params, "head."), f"{scene}, the head that it starts with")
        if not scene.task and len(matching(began, scene.start.frozen)) == len(began):
            raise LawBroken(f"{scene}: '{', '.join(scene.start.frozen)}' freezes all tensors, so that nothing is ever trained")
        if scene.start.trains_beside != (BESIDE in rule.traits.gives):
            raise LawBroken(f"{scene}: trains_beside is {scene.start.trains_beside}, and its traits say otherwise ('{BESIDE}')")
        if scene.start.keeps_old_rows and REWRITES not in rule.traits.refuses:
            raise LawBroken(f"{scene} keeps the head's rows of old classes, and the rule's traits do not refuse '{REWRITES}'")
        together = scene.start.past.together()
        if odd := [n for n in together if not n.startswith(ADAPTER)]:
            raise LawBroken(f"{scene}: '{odd[0]}' is among the modules of past tasks: they are made of {ADAPTER}* alone")


def _first_task(rule: Consolidator) -> None:
    (scene,) = play(rule, tasks=1)
    for finished, when in ((False, "during the first task"), (True, "after the first task")):
        got = deployed(rule, scene, finished)
        ours = {n: got[n] for n in scene.handed if n in got}
        expect_close(acting(ours), acting(scene.handed), f"{when}, what is deployed against what was trained")


def _layout(rule: Consolidator) -> None:
    for dtype in (torch.float32, torch.float64):
        for scene in play(rule, dtype):
            for finished in (False, True):
                when = f"{scene}, {'after' if finished else 'during'} it"
                got = deployed(rule, scene, finished)
                if lost := [n for n in scene.handed if n not in got]:
                    raise LawBroken(f"{when}: '{lost[0]}' is not deployed")
                narrow = [n for n, t in got.items() if t.is_floating_point() and t.dtype != dtype]
                if narrow:
                    raise LawBroken(f"{when}: '{narrow[0]}' is {got[narrow[0]].dtype} and should be {dtype}")
                _require_products(got, scene.handed, when)
                if APART not in rule.traits.needs:
                    expect_bits(with_prefix(got, "head."), with_prefix(scene.handed, "head."), f"{when}, the head")


def _require_products(got: Tensors, like: Tensors, when: str) -> None:
    for p in lora_layers(like):
        a, b, inputs, outputs = got[p + LORA_A], got[p + LORA_B], like[p + LORA_A].shape[-1], like[p + LORA_B].shape[-2]
        if a.shape[-2] != b.shape[-1] or (a.shape[-1], b.shape[-2]) != (inputs, outputs):
            raise LawBroken(f"{when}: the pair of '{p}' is {tuple(b.shape)} by {tuple(a.shape)}: no module of this layer")


def _finite(rule: Consolidator) -> None:
    for dtype in (torch.float32, torch.float64):
        for scene in play(rule, dtype):
            expect_finite(scene.start.params, f"{scene}, its start")
            for finished in (False, True):
                expect_finite(deployed(rule, scene, finished), f"{scene}, what is deployed")


def _deterministic(rule: Consolidator) -> None:
    for first, again in zip(play(rule), play(rule), strict=True):
        expect_bits(again.start.params, first.start.params, f"{first}, started twice")
        if not same(first.after, again.after):
            raise LawBroken(f"{first}, ended twice: the new states differ")
        expect_bits(deployed(rule, again), deployed(rule, first), f"{first}, deployed twice")


def _no_mutation(rule: Consolidator) -> None:
    for scene in play(rule):
        before = {"state": scene.before, "parameters": scene.params, "fresh": scene.fresh, "total": scene.opening}
        given = deepcopy(before)
        rule.opening(given["state"], given["parameters"])
        rule.start_task(given["state"], given["parameters"], given["fresh"], given["total"])
        expect_unchanged(given, before, f"{scene}, at its start")
        before = {"state": scene.before, "parameters": scene.handed, "total": scene.total}
        given = deepcopy(before)
        rule.plan(given["state"], given["parameters"])
        rule.deployed(given["state"], given["parameters"], False)
        rule.end_task(given["state"], given["parameters"], given["total"], _draw(scene.task))
        expect_unchanged(given, before, f"{scene}, at its end")
        before = {"state": scene.after, "parameters": scene.handed}
        given = deepcopy(before)
        rule.deployed(given["state"], given["parameters"], True)
        expect_unchanged(given, before, f"{scene}, after its end")


def _state_file(rule: Consolidator) -> None:
    for scene in play(rule):
        before, after = (through_file(state, "state", str(scene)) for state in (scene.before, scene.after))
        start = rule.start_task(before, deepcopy(scene.params), deepcopy(scene.fresh), deepcopy(scene.opening))
        expect_bits(start.params, scene.start.params, f"{scene}, started with a state from a file")
        if not same(rule.end_task(before, deepcopy(scene.handed), deepcopy(scene.total), _draw(scene.task)), scene.after):
            raise LawBroken(f"{scene}, ended with a state from a file: the new state is another one")
        expect_bits(rule.deployed(after, deepcopy(scene.handed), True), deployed(rule, scene), f"{scene}, a state from a file")


def _sums(rule: Consolidator) -> None:
    for scene in play(rule):
        for plan in scene.asked:
            if plan.train:
                raise LawBroken(f"{scene}: its plan trains {', '.join(plan.train)}: it is a pass for statistics, with train=()")


def _float64(rule: Consolidator) -> None:
    for narrow, wide in zip(play(rule, torch.float32), play(rule), strict=True):
        got = {n: t.double() for n, t in deployed(rule, narrow).items()}
        expect_close(acting(got), acting(deployed(rule, wide)), f"{wide}, float32 against float64", ROUNDED)


def _modules(rule: Consolidator) -> None:
    for scene in play(rule):
        kept = rule.modules(deepcopy(scene.after))
        if kept and len(kept) != scene.task + 1:
            raise LawBroken(
                f"{scene}: it keeps {len(kept)} modules after {scene.task + 1} tasks: give one for every task, or none"
            )
        if kept:
            expect_bits(kept[-1], with_prefix(scene.handed, ADAPTER), f"{scene}, the module that it keeps")


def _without(rule: Consolidator) -> None:
    (*_, last) = play(rule)
    nobody = rule.without(deepcopy(last.after), [], [])
    if nobody is None:
        return
    if not same(nobody, last.after):
        raise LawBroken("without nobody, the state is another one")
    if APART not in rule.traits.needs:
        return
    gone = rule.without(deepcopy(last.after), [3], range(TASKS))
    state = rule.init()
    for scene in play(rule):
        state = rule.end_task(state, _first_only(scene.handed), {}, _draw(scene.task))
    want = rule.deployed(state, _first_only(last.handed), True)
    expect_close(
        rule.deployed(gone, deepcopy(last.handed), True), want, "without client 3, against tasks that it had no part in", EXACT
    )


def _first_only(handed: Tensors) -> dict[str, Tensor]:
    return {n: t[:1] for n, t in handed.items()}


LAWS: tuple[Law[Consolidator], ...] = (
    Law(
        "start",
        "a task starts with the head as it is and a whole module, the first one trains something, and traits say what is kept",
        _start,
    ),
    Law("first_task", "in the first task and after it, what is deployed does what was trained", _first_task),
    Law("layout", "what is deployed has the tensors of a model, of their types; the head is as it was trained", _layout),
    Law("finite", "from finite modules and statistics come finite ones", _finite),
    Law("sums", "the statistics that it asks for add up over clients", _sums),
    Law("no_mutation", "states, parameters and totals that go in are not changed", _no_mutation),
    Law("deterministic", "the same tasks give the same bits", _deterministic),
    Law("state_file", "a state that was written to a file and read back goes on with the same bits", _state_file),
    Law("float64", "float32 in gives what float64 gives, up to its rounding", _float64),
    Law("modules", "modules that it keeps are one for every task, as the task left it", _modules),
    Law("without", "clients that it can take out are gone as if they had had no part", _without),
)
