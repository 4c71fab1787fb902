"""What clients are asked to do: the aggregator's wishes, the calibrator's and the consolidator's as one plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedsim.core.contracts import CALIBRATOR, LEARNER, RULE, Aggregator, Calibrator, Consolidator, Further, Learner, TaskStart
from fedsim.core.messages import BACKGROUND, BENEATH, ClientUpdate, Reply, RoundPlan, Tensors
from fedsim.core.tensors import matching
from server import learners
from server.state import ServerState, Simulation


def round_plan(sim: Simulation, state: ServerState, repair: RoundPlan | None) -> RoundPlan:
    """Of a round of training. `repair`: what the calibrator asks for in it, None if it does nothing."""
    plan = RoundPlan(train=()) if rests(sim, state) else sim.aggregator.plan(state.aggregator, state.round)
    if repair is not None:
        plan = replace(plan, statistics=plan.statistics + repair.statistics)
    return _in_context(sim, state, plan)


def rests(sim: Simulation, state: ServerState) -> bool:
    """Whether the consolidator freezes all that the aggregator would have clients train in this round: nobody trains then, and
    nothing is merged."""
    start = state.start
    if not start.frozen:
        return False
    plan = sim.aggregator.plan(state.aggregator, state.round)
    return bool(plan.train) and not trained(start.frozen, state.params, plan)


def summing(sim: Simulation, repair: RoundPlan | None, plan: RoundPlan) -> tuple[str, ...]:
    """Those for whom a round's updates are summed however they come back: the calibrator that takes a sum; where something is
    trained, learners that listen, and the aggregator where a channel changes what is summed."""
    rule = (RULE,) if sim.chain.receives and plan.train else ()
    calibrator = (CALIBRATOR,) if repair is not None and sim.calibrator is not None and sim.calibrator.additive else ()
    listening = learners.hearing(sim.learners) if plan.train else []
    return (*rule, *calibrator, *(f"{LEARNER}.{name}" for name in listening))


def reply(sim: Simulation, state: ServerState, repair: RoundPlan | None, plan: RoundPlan) -> Reply:
    """How a round's updates come back: as sums, where everybody who looks at them takes a sum."""
    beside, rule = summing(sim, repair, plan), () if rests(sim, state) else (RULE,)
    if sim.aggregator.additive and (repair is None or CALIBRATOR in beside):
        return Reply(tuple(dict.fromkeys((*rule, *beside))))
    return Reply()


def repair_plan(sim: Simulation, state: ServerState) -> RoundPlan | None:
    """What the calibrator (if any) asks for in this round; None: it does nothing."""
    if sim.calibrator is None:
        return None
    last = state.round == sim.config.server.rounds - 1
    return sim.calibrator.plan(state.calibrator, state.round, last, sim.task_classes[: state.task + 1])


def isolated_plan(sim: Simulation, state: ServerState) -> RoundPlan:
    """Train everything on one's own, for as many epochs as the task's rounds have together."""
    return _in_context(sim, state, RoundPlan(repeat=sim.config.server.rounds))


def opening(sim: Simulation, state: ServerState) -> tuple[RoundPlan | None, ServerState]:
    """The consolidator's pass at a task's start, and the state with the modules that it looks through."""
    asked = sim.consolidator.opening(state.consolidator, state.params)
    if asked is None:
        return None, state
    state = replace(state, start=TaskStart({}, past=asked.past))
    return _on_past_modules(state, asked.plan), state


def closing(sim: Simulation, state: ServerState) -> RoundPlan | None:
    """The consolidator's pass at a task's end."""
    plan = sim.consolidator.plan(state.consolidator, state.params)
    return None if plan is None else _on_past_modules(state, plan)


def further(state: ServerState, look: Further) -> RoundPlan:
    """The aggregator's further look at a round's clients before they are merged."""
    start = state.start
    plan = RoundPlan(train=(), statistics=look.statistics, beside=start.trains_beside, merged=tuple(look.merged))
    return _on_past_modules(state, plan)


def trained(frozen: Sequence[str], params: Tensors, plan: RoundPlan) -> list[str]:
    """Names of the tensors that a plan trains. frozen: globs of those that stay as they are."""
    fixed = set(matching(params, frozen))
    return [n for n in matching(params, plan.train) if n not in fixed]


def asked(
    rule: Aggregator,
    consolidator: Consolidator,
    calibrator: Calibrator | None,
    methods: Mapping[str, Learner],
    params: Tensors,
    rounds: int,
    classes: Sequence[Sequence[int]],
) -> list[str]:
    """Names of all statistics that clients are asked for in the first task: at its start, in its rounds, and at its end; of a
    rule's further looks those of the first."""
    kept = consolidator.init()
    begun = consolidator.start_task(kept, params, {}, {}).params
    state, opening = rule.init(begun), consolidator.opening(kept, begun)
    plans = [rule.plan(state, r) for r in range(rounds)] + [opening and opening.plan, consolidator.plan(kept, begun)]
    looked = rule.further(state, begun, [ClientUpdate(0, 1, begun)], True)[1]
    plans.append(looked and RoundPlan(train=(), statistics=looked.statistics))
    if calibrator is not None:
        plans += [calibrator.plan(calibrator.init(), r, r == rounds - 1, classes) for r in range(rounds)]
        plans.append(calibrator.closing(calibrator.init(), classes))
    moved = {name: tensor + 1 for name, tensor in begun.items()}  # by training: a learner may ask of such tensors only
    plans += [method.closing(method.opened(None, begun, 0), moved) for method in methods.values()]
    reviewing = [name for name, method in methods.items() if learners.reviews(method)]
    requests = [request.name for plan in plans if plan is not None for request in plan.statistics]
    return [*dict.fromkeys((*requests, *learners.hearing(methods), *reviewing))]


def _in_context(sim: Simulation, state: ServerState, plan: RoundPlan) -> RoundPlan:
    """Without what is frozen, and with what clients are told who train."""
    start = state.start
    train = tuple(trained(start.frozen, state.params, plan)) if start.frozen else plan.train
    told = learners.context(sim, state) if train else {}
    plan = replace(plan, train=train, context={**plan.context, **told}, beside=start.trains_beside)
    if plan.keeps:
        plan = replace(plan, since=state.began, hand_in=state.round == sim.config.server.rounds - 1)
    return _on_past_modules(state, plan)


def _on_past_modules(state: ServerState, plan: RoundPlan) -> RoundPlan:
    """With what lies beneath the module, and the modules of past tasks if clients train beside them or look through them."""
    if state.beneath.module:
        plan = replace(plan, context={**plan.context, BENEATH: state.beneath.module})
    if not plan.beside and not any(request.blended for request in plan.statistics):
        return plan
    past = state.start.past
    return replace(plan, context={**plan.context, BACKGROUND: past.together()}, share=past.share)
