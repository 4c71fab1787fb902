"""Rules of the server: how clients and tasks are merged, and how a head is repaired."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.core.contracts.clients import Learner
from fedsim.core.contracts.merging import Further
from fedsim.core.contracts.traits import REWRITES, Part, Traits
from fedsim.core.errors import AggregationError, PluginError
from fedsim.core.messages import ClientUpdate, RoundPlan, State, Tensors
from fedsim.core.numbers import IntArray
from fedsim.core.sums import Lift, summed
from fedsim.core.tensors import stack_modules, without_prefix

# Parts of a run for which updates are summed (`Reply.sums`): the aggregator, the calibrator, a pass as it is; `learner.<name>`
# for what its `end` sent in a round, `closing.<name>` for the pass at a task's end
RULE, CALIBRATOR, STATISTICS, LEARNER, CLOSING = "rule", "calibrator", "statistics", "learner", "closing"

BENEATH = "a module beneath"  # a word of `Traits`: of a rule whose rounds leave something beneath, see `Aggregator.beneath`
NEW_BASIS = "pairs in a new basis"  # a word of `Traits`: of a rule that makes new factors of a product in every round
UNIFORM_SUM = "uniform sum"  # a word of `Traits`: clients are summed with weight one each, whatever is made of the sum
UNIFORM_MEAN = "uniform mean"  # the same, and what comes out is their mean
OUTSIDE_SPAN = "outside the clients' span"  # a word of `Traits`: of a rule or channel that treats a tensor's numbers unlike
TAKES_RANKS = "takes unequal ranks"  # a word of `Traits`: of a rule for clients with `client.ranks`
BESIDE = "past modules beside"  # a word of `Traits`: who gives it starts every task with `TaskStart.trains_beside`


@dataclass(frozen=True)
class Aggregator(Part, ABC):
    """Merges clients, every round."""

    @property
    def additive(self) -> bool:
        """Whether it merges from a sum over clients, see `AdditiveAggregator`."""
        return False

    @property
    def least(self) -> int:
        """Clients with samples that it needs in every round: a run that would give it fewer is refused."""
        return 1

    @property
    def products(self) -> bool:
        """Whether LoRA pairs are to it what their products are: then laws compare products, since factors may come out as others
        of the same product."""
        return False

    def init(self, params: Tensors, task: int = 0) -> State:
        """State at the start of a task, 0-based (empty by default). `params` are the tensors this rule is in charge of."""
        return {}

    def next_task(self, state: State, params: Tensors, task: int) -> State:
        """State at the start of a task that follows another, from the state that the last one ended with. By default the rule
        begins anew; one that keeps something says "rule remembers tasks", see `Traits`."""
        return self.init(params, task)

    def plan(self, state: State, round: int) -> RoundPlan:
        """What the clients are asked to do in this round of the task (0-based). Default: train and send everything."""
        return RoundPlan()

    def further(self, state: State, params: Tensors, updates: Sequence[ClientUpdate], last: bool) -> tuple[State, Further | None]:
        """A further look at the data of a round's clients before `combine`, and the state that says how far this rule has come.
        It is asked again with what they sent until it gives None, which it gives from then on; by default, at once. Clients
        without samples are not asked; one that failed in the look comes without its statistics. last: the round is the task's
        last. A rule that looks takes updates whole: it is not additive."""
        return state, None

    @abstractmethod
    def combine(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        """New state and new parameters (all of them, same layout), from updates in client-id order.

        draw: what a rule that draws draws from, on the CPU; addressed by the run's seed, the task and the round.
        Raises AggregationError when there are no updates.
        """

    def deployed(self, state: State, params: Tensors) -> Tensors:
        """What is evaluated, and what the consolidator is handed at a task's end: the parameters themselves, unless a rule keeps
        more than they hold."""
        return params

    def beneath(self, state: State) -> Tensors:
        """What the latest merge has left beneath the parameters: LoRA pairs `adapter.*` of any rank, empty for nothing. From then
        on they are part of the model, which no client trains: clients train on top of all that rounds have left, and both
        together are deployed. It goes on for as long as the module does: a task that starts with a fresh one starts without.
        A rule that leaves something gives the word "a module beneath"."""
        return {}


@dataclass(frozen=True)
class AdditiveAggregator(Aggregator):
    """A rule whose clients' contributions are closed under `+`, so that they are summed where the clients run.

    What `lift` makes of each update is summed by `BlockSum`, and the total is handed to `finish`: the server's memory does
    not grow with the number of clients.
    """

    @property
    def additive(self) -> bool:
        """Not where a subclass has a `combine` of its own, which a sum would pass by."""
        return type(self).combine is AdditiveAggregator.combine

    @abstractmethod
    def lift(self, update: ClientUpdate) -> Tensors:
        """One client's contribution, float64; every client gives the same names and shapes. Runs next to the client."""

    @abstractmethod
    def finish(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> tuple[State, Tensors]:
        """New state and parameters from the total. draw: see `combine`."""

    def combine(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        """The same from whole updates: `finish` of the sum of their `lift`."""
        require_updates(updates)
        return self.finish(state, params, summed(map(self.lift, updates)), draw)


def is_additive(rule: Aggregator) -> TypeGuard[AdditiveAggregator]:
    """Whether a rule merges from a sum over clients. A list of rules does if all of them do."""
    return rule.additive


def lift_statistics(update: ClientUpdate) -> Tensors:
    """A client's statistics as they are summed for a consolidator: float64, and `num_samples`."""
    n = torch.tensor(float(update.num_samples), dtype=torch.float64)
    return {name: t.double() for name, t in update.statistics.items()} | {"num_samples": n}


def require_updates(updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
    """Those that are based on data: clients without samples send what they were sent. AggregationError if there are none."""
    if not updates:
        raise AggregationError("nothing to merge: no client sent an update in this round")
    if sum(u.num_samples for u in updates) <= 0:
        raise AggregationError("nothing to merge: the clients of this round hold no samples")
    return [u for u in updates if u.num_samples > 0]


def statistic(update: ClientUpdate, key: str) -> Tensor:
    """A statistic that a plan asked for. Raises AggregationError when the client did not send it."""
    if key not in update.statistics:
        raise AggregationError(f"client {update.client_id} sent no '{key}': the plan of this rule must reach the clients")
    return update.statistics[key]


def lifts_of(
    parts: Sequence[str], rule: Aggregator | None, calibrator: Calibrator | None, learners: Mapping[str, Learner]
) -> dict[str, Lift] | None:
    """What is summed of an update for each of these parts (`Reply.sums`); None if one of them is not at hand or not additive."""
    found: dict[str, Lift] = {}
    for part in parts:
        kind, _, name = part.partition(".")
        if kind == RULE and rule is not None and is_additive(rule):
            found[part] = rule.lift
        elif kind == CALIBRATOR and calibrator is not None:
            found[part] = calibrator.lift
        elif kind == STATISTICS:
            found[part] = lift_statistics
        elif kind in (LEARNER, CLOSING) and name in learners:
            found[part] = partial(_lifted, learners[name], f"{name}.", kind == LEARNER)
        else:
            return None
    return found


def _lifted(learner: Learner, prefix: str, in_round: bool, update: ClientUpdate) -> Tensors | None:
    """A learner's part of an update that is based on data: of a round its own statistics, of a closing pass all of them. In its
    review a client tells of what it remembers, whether or not it holds samples of the task."""
    own = without_prefix(update.statistics, prefix)
    if not update.num_samples and (in_round or not own):
        return None
    others = {} if in_round else {n: t for n, t in update.statistics.items() if not n.startswith(prefix)}
    return learner.lift({**others, **own}, update.num_samples)


@dataclass(frozen=True)
class Past:
    """Modules of past tasks as their tasks left them, and what they count for beside a client's own: Σ_s weights_s Δ_s + share Δ.

    In a deployment each travels once, and the client weighs and adds them up itself. Raises PluginError unless there is a weight
    for every module.
    """

    modules: Sequence[Tensors] = ()
    weights: Sequence[float] = ()
    share: float = 1.0

    def __post_init__(self) -> None:
        if len(self.modules) != len(self.weights):
            raise PluginError(f"Past has {len(self.modules)} modules and {len(self.weights)} weights: give every module one")

    @classmethod
    def mean(cls, modules: Sequence[Tensors]) -> Past:
        """Past modules and the current one count the same, 1/(t + 1) each."""
        share = 1 / (len(modules) + 1)
        return cls(modules, (share,) * len(modules), share)

    @classmethod
    def whole(cls, modules: Sequence[Tensors], share: float = 1.0) -> Past:
        """Past modules at full weight."""
        return cls(modules, (1.0,) * len(modules), share)

    def together(self) -> Tensors:
        """Σ_s weights_s Δ_s as one module; empty if there are none."""
        return stack_modules(self.modules, self.weights) if self.modules else {}


@dataclass(frozen=True)
class TaskStart:
    """What a task's clients are given, and may do with it.

    params: what training starts from. frozen: globs of tensors that no client trains, whatever the aggregator asks for; where
    nothing is left of what it asks for, its clients rest in this task, and it merges nothing.
    past: modules of past tasks, through which `blended` statistics look. trains_beside: clients train their module on top of
    these, not on the bare backbone. keeps_old_rows: the head's rows of old tasks' classes stay as they are, bit for bit (a
    consolidator that wants it refuses "old head rows rewritten", see `Traits`).
    """

    params: Tensors
    frozen: tuple[str, ...] = ()
    past: Past = Past()
    trains_beside: bool = False
    keeps_old_rows: bool = False


class Opening(NamedTuple):
    """A statistics pass before a task starts. past: modules that `blended` statistics look through, beside the parameters that
    the last task ended with."""

    plan: RoundPlan
    past: Past = Past()


@dataclass(frozen=True)
class Consolidator(Part, ABC):
    """Merges tasks at a task's end, and says what a task starts with and what is deployed for evaluation.

    Works on `adapter.*`; the head is one for all classes and goes on.
    """

    @property
    def least(self) -> int:
        """Tasks that it needs: a shorter stream is refused."""
        return 1

    def init(self) -> State:
        """State before the first task."""
        return {}

    def opening(self, state: State, params: Tensors) -> Opening | None:
        """A statistics pass at a task's start (`server.pass_participation` says over whom); None if none is needed."""
        return None

    @abstractmethod
    def start_task(self, state: State, params: Tensors, fresh: Tensors, total: Tensors) -> TaskStart:
        """What a task begins with. `fresh`: newly drawn `adapter.*` tensors, shared by all clients; `total`: the statistics of
        `opening` and `num_samples`, summed over the clients, float64 (empty if there was no such pass).

        Raises ConfigError for tensors that it does not suit; it is called with no total once before any training.
        """

    def plan(self, state: State, params: Tensors) -> RoundPlan | None:
        """A statistics pass at the task's end (`server.pass_participation` says over whom), blended ones through `TaskStart.past`
        and `params`; None if none is needed."""
        return None

    @abstractmethod
    def end_task(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> State:
        """State after the task. `total`: the statistics of `plan` and `num_samples`, summed over the clients, float64 (empty if
        the plan was None). `draw`: what a rule that draws draws from, on the CPU; addressed by the run's seed and the task."""

    @abstractmethod
    def deployed(self, state: State, params: Tensors, finished: bool) -> Tensors:
        """Tensors that evaluation uses: during a task (`finished` False) and after `end_task` (True)."""

    def modules(self, state: State) -> Sequence[Tensors]:
        """The `adapter.*` tensors of every finished task as the task left them, for `fedsim merge`; none if they are not kept."""
        return ()

    def without(self, state: State, clients: Collection[int], tasks: Collection[int]) -> State | None:
        """The state as if these clients had not taken part in these tasks, exactly; None if they cannot be told apart in it."""
        return None


@dataclass(frozen=True)
class Calibrator(Part):
    """Repairs the head from statistics of features. It works in one of two places, or in both:

    after a round, from what comes with its updates (`plan`, `calibrate`), or, if it is `additive`, from the sum of what `lift`
    makes of them where clients run (`plan`, `lift`, `finish`): training goes on from the repaired head;
    at a task's end, from a pass through the model that is then deployed (`closing`, `lift`, `end_task`): what `deployed` makes of
    it is evaluated, and training goes on from the head as it was.

    `classes`: head rows of the classes of every task so far, the current task's last.
    """

    def can_be_told(self, held_KC: IntArray) -> NDArray[np.bool_]:
        """Of which classes of a task, (C,), the clients can send what it needs, by the samples (K, C) that each of them holds.
        A stream with a class of which they cannot is refused before any training."""
        return np.ones(held_KC.shape[1], dtype=np.bool_)

    @property
    def traits(self) -> Traits:
        """By default it may change the head's rows of classes of past tasks; a calibrator that leaves them alone says so."""
        return Traits(gives={REWRITES})

    def init(self) -> State:
        return {}

    @property
    def additive(self) -> bool:
        """Whether a sum is all that it wants of a round's updates."""
        return False

    def plan(self, state: State, round: int, last: bool, classes: Sequence[Sequence[int]]) -> RoundPlan | None:
        """Statistics that are asked for on top of the aggregator's (`train` is ignored), of which those that are to see the
        features that are deployed are `blended`; None: nothing is done in this round. `last`: it is the task's last round."""
        works = type(self).calibrate is not Calibrator.calibrate or type(self).finish is not Calibrator.finish
        return RoundPlan(train=()) if works else None

    def calibrate(
        self,
        state: State,
        params: Tensors,
        updates: Sequence[ClientUpdate],
        classes: Sequence[Sequence[int]],
        draw: torch.Generator,
    ) -> tuple[State, Tensors]:
        """New state and parameters, of which only `head.*` may differ, from the updates of a round in client-id order. By default
        of an additive calibrator: `finish` of the sum of their `lift`."""
        if not self.additive:
            return state, params
        return self.finish(state, params, summed(map(self.lift, updates)), classes, draw)

    def finish(
        self, state: State, params: Tensors, total: Tensors, classes: Sequence[Sequence[int]], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        """What an additive calibrator makes of the sum of what `lift` gave of a round's updates: see `calibrate`."""
        return state, params

    def closing(self, state: State, classes: Sequence[Sequence[int]]) -> RoundPlan | None:
        """A statistics pass at the task's end (`server.pass_participation` says over whom), through the tensors that are deployed
        after the consolidator's work; None if none is needed."""
        return None

    def lift(self, update: ClientUpdate) -> Tensors:
        """One client's contribution to the sum over that pass, or over a round, float64; every client gives the same names and
        shapes. Runs next to the client."""
        return lift_statistics(update)

    def end_task(
        self,
        state: State,
        params: Tensors,
        total: Tensors,
        classes: Sequence[Sequence[int]],
        draw: torch.Generator,
    ) -> State:
        """State after the task. `params`: what is deployed, its head as it was trained; `total`: the sum of what `lift` gave."""
        return state

    def deployed(self, state: State, params: Tensors) -> Tensors:
        """Tensors that are evaluated at a task's end, of which only `head.*` may differ from the consolidator's."""
        return params

    def room(self, width: int, classes: int) -> int:
        """Bytes that its sums and its work with them take on the server at a task's end, about; 0 where that is little. width:
        numbers that the head's last map is given. A run that would need more than is free is refused before any training."""
        return 0

    def without(self, state: State, total: Tensors, classes: Sequence[Sequence[int]]) -> State:
        """The inverse of `end_task` for clients that leave, after any later task: the state as if they had not told anything at
        this task's end. total: the sum of what `lift` makes of what they sent then, by the plan that `closing` gives for these
        classes (those of every task up to this one). For calibrators whose state is a sum over clients; `subtracts` says which.
        """
        raise PluginError(f"{type(self).__module__} keeps no sums over clients that one could be taken out of")

    @property
    def subtracts(self) -> bool:
        """Whether it has `without`: clients can be removed from a finished run exactly."""
        return type(self).without is not Calibrator.without
