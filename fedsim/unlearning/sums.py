"""Clients taken out of the sums that a run's calibrator made its head of: exact, and without a vector that the run kept.

Every client that leaves sends its statistics of a task's end once more: the same samples through the same frozen model, so the
same numbers to the last bit where they are measured on the same kind of machine. They are subtracted from the calibrator's
state, which is in float64, and the head is solved again. What differs from a run that never had the client is the order in which
the others were summed: about 1e-16 of the sums. What travels is rounded to float32 by each client before it is summed, and so
is the head that is deployed, in which about 1e-7 is the last digit.

It is exact for as long as the client had no hand in anything but the sums: in what features are made of, in the tasks that are
forgotten, and in nothing that has moved since it was measured.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from clients.pools.serial import Pool
from fedsim import simulation
from fedsim.core import config as configs
from fedsim.core import rng
from fedsim.core.contracts import CALIBRATOR
from fedsim.core.errors import ClientFailed, ConfigError
from fedsim.core.messages import ClientJob, ClientUpdate, Reply, State, Tensors
from fedsim.core.names import HEAD
from fedsim.core.sums import summed
from fedsim.core.wire import Chain
from fedsim.unlearning.finished import FinishedRun, same
from server import planning
from server.learners import changes_model


def why_not(run: FinishedRun, clients: Collection[int], tasks: Sequence[int]) -> str | None:
    """Why taking these clients out of the sums of these tasks would not be exact; None if it is."""
    if run.calibrator is None or not run.calibrator.subtracts:
        return "it has no calibrator that makes its head of sums over clients"
    if Chain.of(run.config).receives:
        return "a channel changes the sums on their way, so that they are no longer those of what clients sent"
    if any(map(changes_model, configs.build_learners(run.config.client.learners).values())):
        return "the server half of its learners changes the model too"
    fresh = run.consolidator.init()
    if run.consolidator.opening(fresh, run.state.params) or run.consolidator.plan(fresh, run.state.params):
        return "the consolidator merged with statistics that are sums over clients"
    played = tuple(_played(run))
    for task in tasks:
        features = sorted(played[task].features)
        helped = sorted(set(run.participants(task)) & set(clients))
        if features and helped:
            return (
                f"client {helped[0]} helped to train in task {task} what features are made of ({features[0]}, …), and only what "
                "it told of features can be taken out: leave that task out with --task"
            )
        if set(run.told(task)) & set(clients) and not played[task].lasts(played[task + 1 :]):
            return f"the features of task {task} are not those of the end, so that what was told of them cannot be told again"
    failed = [f for f in run.state.failures if f.client_id in clients and f.round >= run.config.server.rounds]
    if failed:
        one = failed[0]
        return f"client {one.client_id} failed in a pass at the end of task {one.task}: what of it is in the sums is not known"
    return None


def deployed_without(run: FinishedRun, clients: Collection[int], tasks: Sequence[int]) -> Tensors:
    """What the run would deploy, had these clients not taken part in these tasks. Raises ConfigError where it is not exact."""
    why, calibrator = why_not(run, clients, tasks), run.calibrator
    if why or calibrator is None:
        raise ConfigError(f"--how sums is not possible for {run.dir.path}: {why}")
    state, params = state_without(run, clients, tasks), run.before_repair
    if any(played.trained - played.features for played in _played(run)):
        nowhere = {n: torch.full_like(t, torch.nan) if n.startswith(HEAD) else t for n, t in params.items()}
        left = [n for n, t in calibrator.deployed(state, nowhere).items() if t.isnan().any()]
        if left:
            why = f"'{left[0]}' was trained with their help, and the calibrator does not make all of it from what others told"
            raise ConfigError(f"--how sums is not possible for {run.dir.path}: {why}")
    return run.answering(calibrator.deployed(state, params))


def state_without(run: FinishedRun, clients: Collection[int], tasks: Sequence[int]) -> State:
    """The calibrator's state at the end of the run, without what these clients told at the ends of these tasks."""
    assert run.calibrator is not None
    state = run.state.calibrator
    for task, updates in heard_again(run, clients, tasks):
        state = run.calibrator.without(state, summed(map(run.calibrator.lift, updates)), run.classes(task))
    return state


def heard_again(run: FinishedRun, clients: Collection[int], tasks: Sequence[int]) -> Iterator[tuple[int, Sequence[ClientUpdate]]]:
    """What clients told at the ends of tasks, measured again: the task, and their updates as the server sees them."""
    assert run.calibrator is not None
    params, rounds = run.before_repair, run.config.server.rounds
    with Pool(run.parts.spec) as pool:
        for task in tasks:
            chosen = [c for c in run.told(task) if c in clients]
            plan = run.calibrator.closing(run.state.calibrator, run.classes(task))
            if plan is None or not chosen:
                continue
            plan, reply = replace(plan, train=()), Reply((CALIBRATOR,))
            jobs = [ClientJob(c, task, rounds, params, plan, reply=reply) for c in chosen]
            answers = [result for job in jobs for bundle in pool.train([job]) for result in bundle.results]
            failed = next((a for a in answers if isinstance(a, ClientFailed)), None)
            if failed is not None:
                raise ConfigError(f"client {failed.client_id} could not be asked again, in task {task}: {failed.reason}")
            yield task, [a for a in answers if isinstance(a, ClientUpdate)]


# ---------------------------------------------------------------- inner workings


@dataclass(frozen=True)
class _Played:
    """What clients trained in a task, and what of the features it began otherwise than the run ended, by name."""

    trained: frozenset[str]
    other: frozenset[str]

    @property
    def features(self) -> frozenset[str]:
        """What is trained, but for the head."""
        return frozenset(n for n in self.trained if not n.startswith(HEAD))

    def lasts(self, later: Sequence[_Played]) -> bool:
        """Whether features at the task's end are those of the run's end."""
        still = not any(played.features or played.other for played in later)
        return still and not (self.other and not self.features)


def _played(run: FinishedRun) -> Iterator[_Played]:
    """Task by task, from the consolidator, which is played again on the parameters that the run ended with."""
    config, rule, params = run.config, run.parts.rule, run.state.params
    kept = run.consolidator.init()
    for task in run.tasks:
        fresh = simulation.fresh_adapter(config, run.parts.model, task)
        start = simulation.grown(config, run.parts.model, task, run.consolidator.start_task(kept, params, fresh, {}))
        state = rule.init(start.params, task)
        plans = [rule.plan(state, r) for r in range(config.server.rounds)]
        trained = frozenset(n for plan in plans for n in planning.trained(start.frozen, start.params, plan))
        yield _Played(
            trained, frozenset(n for n in params if not n.startswith(HEAD) and not same(params[n], start.params.get(n)))
        )
        kept = run.consolidator.end_task(kept, params, {}, rng.torch_stream(config.seed, "consolidate", task))
