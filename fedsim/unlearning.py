"""Removes clients from a finished run, without further rounds.

Three ways, of which the first that is possible is taken unless one is asked for:
    drop       the model is composed of what clients learned by themselves, and theirs are left out: exact;
    recompose  in a run of one round per task, in which no task starts from what the client left in the one before: the run's own
               rule merges the task vectors of those who remain: exact, up to rounding (see `FinishedRun.not_exact`);
    subtract   their task vectors are subtracted: task arithmetic, an approximation ("SATA", arXiv 2510.13606; the abstract is all
               that was at hand, so the choice of coefficients is ours).
The last two need the vectors that a run with `server.unlearning: true` keeps: what each client became by itself from a task's
start, τ_k, for as many epochs as the task's rounds have together. With τ = parameters − start, task by task,

    τ_u = τ − Σ_k α_k τ_k        α_k = p_k = n_k / Σ n over the clients that took part in the task, unless given
    τ_u = (τ − Σ_k p_k τ_k) / (1 − Σ_k p_k)        renormalised: exact where τ = Σ p_i τ_i

LoRA pairs are subtracted as products, −α B A, by stacking along the rank; every other tensor, the head's too, element by element.
Where the adapter's features are affine in its tensors (`Adapter.affine`: tangents), vectors of clients add up and subtraction
removes what the client added and nothing else, for a fixed head; elsewhere it is a first-order heuristic, and α matters.
The statistics that a consolidator or a calibrator merged at a task's end are sums over clients: they keep the forgotten client's
part, and so does a head that a calibrator made of them.
Vectors stay with the clients in a deployment, so they count in no bytes of a run; who is forgotten uploads one per task.
"""

# N samples, C classes, T tasks

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.local import batches
from clients.samples import Samples
from fedsim import simulation, suitable
from fedsim.core import config as configs
from fedsim.core.config import SimConfig
from fedsim.core.contracts import Adapter, ArraySplit, Calibrator, Consolidator, IntArray
from fedsim.core.defaults import torch_defaults
from fedsim.core.errors import ConfigError, RunDirError
from fedsim.core.messages import ClientUpdate, RoundPlan, Tensors
from fedsim.core.tensors import LORA_A, LORA_B, require_finite, stack_modules
from fedsim.models.head import predict
from fedsim.results import RunDir
from fedsim.simulation import Prepared
from server import checkpoint, planning, sampling
from server.isolation import ALONE
from server.state import ServerState

WAYS = ("drop", "recompose", "subtract")
Terms = list[tuple[Tensors, float]]  # a weighted sum of modules


@dataclass(frozen=True)
class Removed:
    """The deployed tensors without some clients. way: how they were removed; alpha: the coefficients that were given."""

    deployed: Tensors
    way: str
    alpha: float | None = None
    renormalised: bool = False

    @property
    def name(self) -> str:
        """As a table calls it."""
        if self.way != "subtract":
            return f"unlearned ({self.way})"
        alpha = "share of samples" if self.alpha is None else f"{self.alpha:g}"
        return f"unlearned (subtract{', renormalised' if self.renormalised else ''}, α = {alpha})"


@dataclass(frozen=True)
class Measured:
    """Percent right of one model on the training samples of the clients that are forgotten and of those that remain, its final
    average accuracy on test samples, and how well its loss tells the forgotten samples from unseen ones (0.5: not at all)."""

    name: str
    forgotten: float
    retained: float
    test: float
    membership_auc: float


class FinishedRun:
    """A finished run with all that it takes to evaluate it again. Raises RunDirError if it is missing, damaged or unfinished."""

    def __init__(self, path: str | Path) -> None:
        self.dir = RunDir.open(path)
        if not self.dir.finished:
            raise RunDirError(f"{self.dir.path} is not finished: finish it first with fedsim run --resume {self.dir.path}")
        if configs.is_python_object(self.dir.config.server.aggregator):
            raise RunDirError(f"{self.dir.path} was merged by a rule that was a Python object, which nobody can build again")
        self.config: SimConfig = self.dir.config
        self.parts: Prepared = simulation.prepare_again(self.dir)
        self.consolidator: Consolidator = configs.build("consolidators", self.config.server.consolidator)
        calibrator = self.config.server.calibrator
        self.calibrator: Calibrator | None = None if calibrator is None else configs.build("calibrators", calibrator)
        with torch_defaults(self.config.runtime.threads):
            self.state: ServerState = checkpoint.load(self.dir.checkpoint, self.dir.identity)
        self._samples: dict[int, Samples] = {}
        self.tasks = range(len(self.parts.manifest.task_names))

    @property
    def affine(self) -> bool:
        """Whether the adapter's features are affine in its tensors."""
        adapter: Adapter = configs.build("adapters", self.config.adapter)
        return adapter.affine

    @property
    def deployed(self) -> Tensors:
        """What the run was evaluated with at its end."""
        with torch_defaults(self.config.runtime.threads):
            module = self.parts.rule.deployed(self.state.aggregator, self.state.params)
            return self.repaired(self.consolidator.deployed(self.state.consolidator, module, finished=True))

    def repaired(self, deployed: Tensors) -> Tensors:
        """With the rows of the head that a calibrator made for the last task's end, if it made any."""
        return deployed if self.calibrator is None else self.calibrator.deployed(self.state.calibrator, deployed)

    def participants(self, task: int) -> list[int]:
        """Clients with samples that took part in a round of the task and did not fail in it."""
        return self._participants[task]

    @cached_property
    def _participants(self) -> list[list[int]]:
        return [self._took_part(task) for task in self.tasks]

    def _took_part(self, task: int) -> list[int]:
        server, manifest, found = self.config.server, self.parts.manifest, set[int]()
        failed = {(f.round, f.client_id) for f in self.state.failures if f.task == task and not f.stage.startswith(ALONE)}
        for round in range(server.rounds):
            drawn = sampling.taking_part(self.config, task, round, manifest.num_clients)
            found.update(c for c in drawn if (round, c) not in failed)
        return [c for c in sorted(found) if manifest.sizes[task][c]]

    @cached_property
    def not_exact(self) -> str | None:
        """Why merging the task vectors of those who remain is not what a run without the others would have given; None if it is.

        It is where the vectors are the very updates that the rule merged, nothing else went into the model, and what clients of a
        task start from, as far as they look at it, does not depend on who took part before.
        """
        return _not_exact(self)

    def shares(self, task: int) -> dict[int, float]:
        """p_k = n_k / Σ n over the clients that took part in the task."""
        sizes = self.parts.manifest.sizes[task]
        part = self.participants(task)
        return {c: float(sizes[c] / sizes[part].sum()) for c in part}

    def samples(self, split: ArraySplit) -> Samples:
        """A split on the model's device, put there once."""
        if id(split) not in self._samples:
            self._samples[id(split)] = Samples(split, self.parts.model.device)
        return self._samples[id(split)]

    def vectors(self, task: int, name: str) -> dict[str, Tensor]:
        """Tensors that the run kept. Raises RunDirError if it kept none, or the file is damaged."""
        from safetensors.torch import load_file

        path = self.dir.vectors(task, name)
        alone = [f for f in self.state.failures if f.task == task and f.stage.startswith(ALONE)]
        if not path.is_file() and name in {f"client-{f.client_id}" for f in alone}:
            raise RunDirError(f"{name} failed when it trained by itself in task {task}, so {self.dir.path} has no vector of it")
        if not path.is_file():
            why = "a file is missing" if self.config.server.unlearning else "it was not told to"
            raise RunDirError(
                f"{self.dir.path} kept no vectors of its clients ({why}: {path.relative_to(self.dir.path)}): "
                "run it again with server.unlearning=true"
            )
        try:
            return load_file(path)
        except Exception as e:
            raise RunDirError(f"{path} is damaged ({type(e).__name__}): run it again with server.unlearning=true") from e


def remove(
    run: FinishedRun,
    clients: Collection[int],
    tasks: Collection[int] | None = None,
    way: str | None = None,
    alpha: float | None = None,
    renormalise: bool = False,
) -> Removed:
    """The deployed model as if the clients had not taken part (in these tasks; None: in all).

    way: one of `WAYS`, None for the first that is possible; alpha: every client's coefficient in place of its share of samples.
    Raises ConfigError for clients or tasks that are not there or never took part, and for a way that is not possible; RunDirError
    if the run kept no vectors and they are needed.
    """
    chosen = list(run.tasks) if tasks is None else sorted(set(tasks))
    require_took_part(run, clients, chosen)
    if alpha is not None and not math.isfinite(alpha):
        raise ConfigError(f"--alpha must be a finite number, got {alpha}")
    given = "--alpha" if alpha is not None else "--renormalise" if renormalise else None
    way = _way(run, way, given)
    with torch_defaults(run.config.runtime.threads):
        if way == "drop":
            state = run.consolidator.without(run.state.consolidator, clients, chosen)
            if state is None:
                raise ConfigError(f"consolidator {run.config.server.consolidator['name']} cannot tell its clients apart")
            return Removed(run.consolidator.deployed(state, run.state.params, finished=True), way)
        deployed = run.repaired(_replayed(run, set(clients), set(chosen), way, alpha, renormalise))
        require_finite(deployed, "without the clients,")
        return Removed(deployed, way, alpha, renormalise)


def require_took_part(run: FinishedRun, clients: Collection[int], tasks: Sequence[int]) -> None:
    """Raise ConfigError unless every client took part in one of the tasks at least, and somebody is left in each."""
    known = run.parts.manifest.num_clients
    if not clients:
        raise ConfigError("no client to remove: name one with --client")
    for task in tasks:
        if task not in run.tasks:
            raise ConfigError(f"there is no task {task} in {run.dir.path}: it has tasks 0 to {run.tasks[-1]}")
    for client in clients:
        if not 0 <= client < known:
            raise ConfigError(f"there is no client {client} in {run.dir.path}: it has clients 0 to {known - 1}")
        if not any(client in run.participants(task) for task in tasks):
            raise ConfigError(
                f"client {client} never trained in {run.dir.path}: it was not drawn in any round, or holds nothing of what was "
                "learned; there is nothing to subtract"
            )
    for task in tasks:
        if not run.consolidator.sources and set(run.participants(task)) <= set(clients):
            raise ConfigError(f"nobody else took part in task {task}: without client {min(clients)} there is no model of it")


def measure(
    run: FinishedRun, name: str, deployed: Tensors, clients: Collection[int], tasks: Collection[int] | None = None
) -> Measured:
    """One model on what the clients held in the tasks that are forgotten (None: in all), on all else that was trained on, and on
    test samples."""
    spec, chosen = run.parts.spec, set(run.tasks if tasks is None else tasks)
    shards: dict[bool, list[IntArray]] = {True: [], False: []}
    for task in run.tasks:
        for client in run.participants(task):
            shards[client in clients and task in chosen].append(spec.shard(task, client))
    gone, kept = np.concatenate(shards[True]), np.concatenate(shards[False])
    right_gone, loss_gone = _judged(run, deployed, spec.train, gone)
    right_kept, _ = _judged(run, deployed, spec.train, kept)
    tests = [_judged(run, deployed, spec.test, spec.test_of(t)) for t in run.tasks]
    unseen = np.concatenate([spec.test_of(t) for t in run.tasks])
    auc = membership_auc(
        loss_gone, spec.train.labels[gone], np.concatenate([loss for _, loss in tests]), spec.test.labels[unseen]
    )
    test = float(np.mean([100 * right.mean() for right, _ in tests if len(right)]))
    return Measured(name, 100 * float(right_gone.mean()), 100 * float(right_kept.mean()), test, auc)


def retrained(run: FinishedRun, clients: Collection[int], path: Path) -> Tensors:
    """What a run without the clients deploys, from the same seed; it is kept in `path`, and gone on with if it was stopped."""
    simulation.once(_without(run, clients), path)
    return FinishedRun(path).deployed


def require_retrainable(run: FinishedRun, clients: Collection[int]) -> None:
    """Raise ConfigError if a run without the clients cannot be made."""
    try:
        suitable.require_clients(_without(run, clients), run.parts.manifest)
    except ConfigError as e:
        raise ConfigError(f"without the clients there is nothing to compare with, leave out --verify: {e}") from e


def _without(run: FinishedRun, clients: Collection[int]) -> SimConfig:
    without = sorted({*run.config.server.without, *clients})
    server = dataclasses.replace(run.config.server, without=without, unlearning=False, evaluate="task", drift=False)
    return dataclasses.replace(run.config, server=server, trackers=[])


def membership_auc(
    losses_of_members: NDArray[np.float64],
    classes_of_members: IntArray,
    losses_of_others: NDArray[np.float64],
    classes_of_others: IntArray,
) -> float:
    """Area under the ROC curve of the attack "a small loss means that it was trained on": P(member's loss < other's), ties half.

    Others count such that their classes come in the members' proportions, so that it does not measure which classes are easy;
    classes of which there are no others are left out. NaN if that leaves nobody.
    """
    held, counts = np.unique(classes_of_members, return_counts=True)
    share = {int(c): n for c, n in zip(held, counts, strict=True)}
    others = dict(zip(*(a.tolist() for a in np.unique(classes_of_others, return_counts=True)), strict=True))
    weight_of_others = np.array([share.get(int(c), 0) / others[int(c)] for c in classes_of_others])
    weight_of_members = np.array([float(int(c) in others) for c in classes_of_members])
    if not weight_of_members.any():
        return float("nan")
    order = np.argsort(losses_of_others, kind="stable")
    sorted_losses = losses_of_others[order]
    above = np.concatenate([np.cumsum(weight_of_others[order][::-1])[::-1], [0.0]])  # weight of others from a place on
    first = np.searchsorted(sorted_losses, losses_of_members, side="left")
    after = np.searchsorted(sorted_losses, losses_of_members, side="right")
    wins = above[after] + (above[first] - above[after]) / 2
    return float((wins * weight_of_members).sum() / (weight_of_members.sum() * weight_of_others.sum()))


# ---------------------------------------------------------------- inner workings


def _way(run: FinishedRun, asked: str | None, given: str | None) -> str:
    """What was asked for, or the best that is possible. `given`: an option that is for subtraction only."""
    if run.consolidator.sources:
        if given or asked not in (None, "drop"):
            raise ConfigError(
                f"{run.dir.path} is composed of its clients: they are left out as a whole, leave out {given or '--how'}"
            )
        return "drop"
    if asked == "drop":
        raise ConfigError(f"--how drop is not possible for {run.dir.path}: its model is merged, not composed of its clients")
    if given:
        if asked == "recompose":
            raise ConfigError(f"{given} is for --how subtract: recomposing has no coefficients")
        return "subtract"
    why = None if asked == "subtract" else run.not_exact
    if asked == "recompose" and why:
        raise ConfigError(f"--how recompose is not possible for {run.dir.path}: {why}")
    return asked or ("subtract" if why else "recompose")


def _not_exact(run: FinishedRun) -> str | None:
    server, rule, consolidator = run.config.server, run.parts.rule, run.consolidator
    if server.rounds != 1:
        return "it takes one round per task: in a second one clients start from what the others did in the first"
    start = run.vectors(0, "start")
    plan = rule.plan(rule.init(start), 0)
    if plan.statistics or server.calibrator is not None:
        return "the model was merged with statistics of the clients, of which nothing is kept"
    alone = planning.trained(consolidator, start, RoundPlan())
    if set(planning.trained(consolidator, start, plan)) != set(alone):
        return "the rule has clients train a part of the tensors only, and by themselves they train all"
    fresh = consolidator.init()
    if consolidator.opening(fresh, start) is not None or consolidator.plan(fresh, start) is not None:
        return "the consolidator merged with statistics that are sums over clients"
    return next((why for task in run.tasks if (why := _looks_back(run, task, start))), None)


def _looks_back(run: FinishedRun, task: int, first: Tensors) -> str | None:
    """Why a task's clients see something of who took part in the tasks before; None if they do not."""
    start, rows = run.vectors(task, "start"), torch.tensor(run.parts.manifest.task_classes[task])
    if task and any(_same(t, run.vectors(task - 1, "end").get(n)) for n, t in start.items() if n.startswith("adapter.")):
        return "its modules do not start anew in every task"
    heads = [n for n in start if n.startswith("head.")]
    if any(not torch.equal(start[n][rows], first[n][rows]) for n in heads):
        return "tasks share classes, so that a task starts from what the client left in the head"
    for client in run.participants(task):
        own = run.vectors(task, f"client-{client}")
        for name in heads:
            moved = (own[name] != start[name]).flatten(1).any(1) if own[name].dim() > 1 else own[name] != start[name]
            moved[rows] = False
            if bool(moved.any()):
                return "clients changed the head's rows of other tasks (by their loss, or by weight decay)"
    return None


def _replayed(run: FinishedRun, clients: set[int], tasks: set[int], way: str, alpha: float | None, renormalise: bool) -> Tensors:
    """The consolidator's work on the tasks' modules without the clients, and what it deploys at the end."""
    kept, before, module = run.consolidator.init(), dict[str, Tensor](), dict[str, Tensor]()
    removals: dict[str, Terms] = {}  # what is added to a tensor, since it began
    for task in run.tasks:
        start, end, whole = (run.vectors(task, name) for name in ("start", "end", "module"))
        gone = [c for c in run.participants(task) if c in clients] if task in tasks else []
        if way == "recompose":
            merged = _merged(run, task, start, set(gone)) if gone else whole
            module = {n: t + (module[n] - before[n] if _same(start[n], before.get(n)) else 0) for n, t in merged.items()}
        else:
            new = _removal(run, task, start, whole, gone, alpha, renormalise)
            removals = {n: [*(removals.get(n, []) if _goes_on(n, start, before) else []), *new] for n in whole}
            module = _combined({n: [(whole, 1.0), *terms] for n, terms in removals.items()})
        before = end
        kept = run.consolidator.end_task(kept, module, run.vectors(task, "total"))
    return run.consolidator.deployed(kept, module, finished=True)


def _removal(
    run: FinishedRun, task: int, start: Tensors, module: Tensors, gone: Sequence[int], alpha: float | None, renormalise: bool
) -> Terms:
    """(ρ − 1) (module − start) − Σ_k a_k (own_k − start), as a weighted sum; ρ = 1, or 1 / (1 − Σ p_k) if it is renormalised."""
    shares = run.shares(task)
    rho = 1 / (1 - sum(shares[c] for c in gone)) if renormalise else 1.0
    taken = {c: (shares[c] if alpha is None else alpha) * rho for c in gone}
    own = [({**start, **run.vectors(task, f"client-{c}")}, -a) for c, a in taken.items()]
    return [(module, rho - 1), *own, (start, sum(taken.values()) - (rho - 1))]


def _combined(terms: Mapping[str, Terms]) -> dict[str, Tensor]:
    """The weighted sums, in float64: LoRA pairs as products, all else element by element."""
    groups: dict[tuple[tuple[int, float], ...], list[str]] = {}
    found: dict[int, Tensors] = {}
    for name, parts in terms.items():
        weights: dict[int, float] = {}
        for module, weight in parts:
            found[id(module)] = module
            weights[id(module)] = weights.get(id(module), 0.0) + weight
        groups.setdefault(tuple((k, w) for k, w in weights.items() if w), []).append(name)
    out: dict[str, Tensor] = {}
    for summands, names in groups.items():
        modules = [{n: found[k][n].double() for n in names} for k, _ in summands]
        out |= {n: t.float() for n, t in stack_modules(modules, [w for _, w in summands]).items()}
    return {n: out[n] for n in terms}


def _merged(run: FinishedRun, task: int, start: Tensors, gone: set[int]) -> dict[str, Tensor]:
    """What the rule makes of the vectors of those who remain."""
    rule, sizes = run.parts.rule, run.parts.manifest.sizes[task]
    state = rule.init(start, task)
    names = planning.trained(run.consolidator, start, rule.plan(state, 0))
    updates = []
    for client in run.participants(task):
        if client not in gone:
            own = run.vectors(task, f"client-{client}")
            updates.append(ClientUpdate(client, int(sizes[client]), {n: own[n] for n in names}))
    state, params = rule.combine(state, start, updates)
    return dict(rule.deployed(state, params))


def _goes_on(name: str, start: Tensors, before: Tensors) -> bool:
    """Whether a task began with this tensor as the last one left it; of a LoRA pair, with both."""
    pair = [name]
    for factor, other in ((LORA_A, LORA_B), (LORA_B, LORA_A)):
        if name.endswith(factor) and name.removesuffix(factor) + other in start:
            pair.append(name.removesuffix(factor) + other)
    return all(_same(start[n], before.get(n)) for n in pair)


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and torch.equal(a, b)


def _judged(
    run: FinishedRun, deployed: Tensors, split: ArraySplit, positions: IntArray
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Of samples: whether the argmax over all classes is right, and the cross-entropy over all classes; (N,) each."""
    model, runtime = run.parts.model, run.config.runtime
    classes = sorted({c for task in run.parts.manifest.task_classes for c in task})
    samples, rights, losses = run.samples(split), [np.zeros(0, bool)], [np.zeros(0)]
    params = {n: t.to(model.device) for n, t in deployed.items()}
    with torch_defaults(runtime.threads), torch.inference_mode(), model.merged(params):
        for batch in batches(positions, runtime.eval_batch):
            inputs, labels = samples.batch(batch)
            logits = model.logits(model.features(inputs, lean=True), params)
            rights.append((predict(logits, classes) == labels).cpu().numpy())
            log_p = torch.log_softmax(logits[:, classes].double(), dim=1)
            place = torch.searchsorted(torch.as_tensor(classes), labels.cpu().long())
            losses.append(-log_p.cpu()[torch.arange(len(batch)), place].numpy())
    return np.concatenate(rights), np.concatenate(losses)
