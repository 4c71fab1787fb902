"""Removes clients from a finished run, without further rounds.

Three ways, of which the first that is possible is taken unless one is asked for:
    drop       the model is composed of what clients learned by themselves, and theirs are left out: exact;
    recompose  a run of one round per task, whose module starts anew in every task: the run's own rule merges the task vectors of
               those who remain: exact, as long as clients leave the head's rows of old tasks alone (as the cross-entropy does);
    subtract   their task vectors are subtracted: task arithmetic, an approximation ("SATA", arXiv 2510.13606; the abstract is all
               that was at hand, so the choice of coefficients is ours).
The last two need the vectors that a run with `server.unlearning: true` keeps: what each client became by itself from a task's
start, τ_k, for as many epochs as the task's rounds have together. With τ = parameters − start, task by task,

    τ_u = τ − Σ_k α_k τ_k        α_k = p_k = n_k / Σ n over the clients that took part in the task, unless given
    τ_u = (τ − Σ_k p_k τ_k) / (1 − Σ_k p_k)        renormalised: exact where τ = Σ p_i τ_i

LoRA pairs are subtracted as products, −α B A, by stacking along the rank; every other tensor, the head's too, element by element.
Where the adapter's features are affine in its tensors (`Adapter.affine`: tangents), vectors of clients add up and subtraction
removes what the client added and nothing else, for a fixed head; elsewhere it is a first-order heuristic, and α matters.
The statistics that a consolidator merged at a task's end are sums over clients: they keep the forgotten client's part.
"""

# N samples, C classes, T tasks

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.local import batches
from clients.samples import Samples
from clients.worker import torch_threads
from fedsim import simulation
from fedsim.core import config as configs
from fedsim.core.config import SimConfig
from fedsim.core.contracts import Adapter, ArraySplit, Consolidator, IntArray
from fedsim.core.errors import ConfigError, RunDirError
from fedsim.core.messages import ClientUpdate, Tensors
from fedsim.core.tensors import LORA_A, LORA_B, stack_modules
from fedsim.models.head import predict
from fedsim.results import RunDir
from fedsim.simulation import Prepared
from server import checkpoint, planning, sampling
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
        return f"unlearned (subtract{', renormalised' if self.renormalised else ''}, α = {self.alpha or 'share of samples'})"


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
        self.parts: Prepared = simulation.prepare(self.config)
        self.consolidator: Consolidator = configs.build("consolidators", self.config.server.consolidator)
        self.state: ServerState = checkpoint.load(self.dir.checkpoint, self.dir.identity)
        self.tasks = range(len(self.parts.manifest.task_names))

    @property
    def affine(self) -> bool:
        """Whether the adapter's features are affine in its tensors."""
        adapter: Adapter = configs.build("adapters", self.config.adapter)
        return adapter.affine

    @property
    def deployed(self) -> Tensors:
        """What the run was evaluated with at its end."""
        module = self.parts.rule.deployed(self.state.aggregator, self.state.params)
        return self.consolidator.deployed(self.state.consolidator, module, finished=True)

    def participants(self, task: int, rounds: int | None = None) -> list[int]:
        """Clients with samples that were drawn in a task (in its first `rounds`)."""
        server, sizes = self.config.server, self.parts.manifest.sizes[task]
        drawn: set[int] = set()
        for round in range(server.rounds if rounds is None else rounds):
            draw = sampling.draw(
                self.config.seed, task, round, self.parts.manifest.num_clients, server.participation, server.without
            )
            drawn.update(draw)
        return [c for c in sorted(drawn) if sizes[c]]

    def shares(self, task: int) -> dict[int, float]:
        """p_k = n_k / Σ n over the clients that took part in the task."""
        sizes = self.parts.manifest.sizes[task]
        part = self.participants(task)
        return {c: float(sizes[c] / sizes[part].sum()) for c in part}

    def vectors(self, task: int, name: str) -> dict[str, Tensor]:
        """Tensors that the run kept. Raises RunDirError if it kept none, or the file is damaged."""
        from safetensors.torch import load_file

        path = self.dir.vectors(task, name)
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
    possible = _possible(run, alpha, renormalise)
    if possible == ["drop"] and (alpha is not None or renormalise):
        raise ConfigError(f"{run.dir.path} is composed of its clients: they are left out as a whole, without a coefficient")
    if way is not None and way not in possible:
        raise ConfigError(f"--how {way} is not possible for {run.dir.path}: {_why_not(run, way, possible)}")
    way = way or possible[0]
    with torch_threads(run.config.runtime.threads):
        if way == "drop":
            state = run.consolidator.without(run.state.consolidator, clients, chosen)
            assert state is not None
            return Removed(run.consolidator.deployed(state, run.state.params, finished=True), way)
        deployed = _replayed(run, set(clients), set(chosen), way, alpha, renormalise)
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
                f"client {client} never took part in {run.dir.path}: it was not drawn in any round, or holds nothing of what was "
                "learned; there is nothing to remove"
            )
    for task in tasks:
        if set(run.participants(task)) <= set(clients):
            raise ConfigError(f"nobody else took part in task {task}: without client {min(clients)} there is no model of it")


def measure(run: FinishedRun, name: str, deployed: Tensors, clients: Collection[int]) -> Measured:
    """One model on the data of those who are forgotten, of those who remain, and on test samples."""
    spec, manifest = run.parts.spec, run.parts.manifest
    everyone = range(manifest.num_clients)
    shards = {c: np.concatenate([spec.shard(t, c) for t in run.tasks]) for c in everyone if c not in run.config.server.without}
    gone = np.concatenate([shards[c] for c in sorted(clients)])
    kept = np.concatenate([s for c, s in shards.items() if c not in clients])
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
    server = dataclasses.replace(
        run.config.server, without=sorted({*run.config.server.without, *clients}), unlearning=False, evaluate="task", drift=False
    )
    config = dataclasses.replace(run.config, server=server, trackers=[])
    simulation.once(config, path)
    return FinishedRun(path).deployed


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


def _possible(run: FinishedRun, alpha: float | None, renormalise: bool) -> list[str]:
    """The ways that are possible, the best first. Coefficients are for subtraction only."""
    if run.consolidator.sources:
        return ["drop"]
    if alpha is not None or renormalise:
        return ["subtract"]
    return ["recompose", "subtract"] if _recomposable(run) else ["subtract"]


def _recomposable(run: FinishedRun) -> bool:
    """Whether the task vectors are the updates that the rule merged, and merged nothing else than they."""
    server, rule = run.config.server, run.parts.rule
    params = run.parts.state.params
    plan = rule.plan(rule.init(params), 0)
    goes_on = run.consolidator.start_task(run.consolidator.init(), params, {}, {})
    anew = len(run.tasks) == 1 or not _carries(run.consolidator, params, goes_on)
    return server.rounds == 1 and not plan.statistics and server.calibrator is None and anew


def _carries(consolidator: Consolidator, params: Tensors, begun: Tensors) -> bool:
    """Whether a task's module starts from where the last one ended."""
    other = {n: t + 1 for n, t in params.items()}
    again = consolidator.start_task(consolidator.init(), begun, other, {})
    return any(torch.equal(again[n], begun[n]) for n in begun if n.startswith("adapter."))


def _why_not(run: FinishedRun, way: str, possible: Sequence[str]) -> str:
    if way == "drop":
        return f"its model is merged, not composed of its clients; possible: {', '.join(possible)}"
    if way == "recompose":
        return (
            "it takes one round per task, a rule that asks for no statistics, no calibrator, and modules that start anew in "
            f"every task; possible: {', '.join(possible)}"
        )
    return f"it is composed of its clients, so they can be left out; possible: {', '.join(possible)}"


def _replayed(run: FinishedRun, clients: set[int], tasks: set[int], way: str, alpha: float | None, renormalise: bool) -> Tensors:
    """The consolidator's work on the tasks' modules without the clients, and what it deploys at the end."""
    kept, before, module, terms = run.consolidator.init(), dict[str, Tensor](), dict[str, Tensor](), dict[str, Terms]()
    for task in run.tasks:
        start, end = run.vectors(task, "start"), run.vectors(task, "end")
        gone = [c for c in run.participants(task) if c in clients] if task in tasks else []
        if way == "recompose":
            whole = _merged(run, task, start, set(gone)) if gone else end
            module = {n: t + (module[n] - before[n] if _same(start[n], before.get(n)) else 0) for n, t in whole.items()}
        else:
            delta = _delta(run, task, start, end, gone, alpha, renormalise)
            terms = {n: [*(terms[n] if _goes_on(n, start, before) else [(start, 1.0)]), *delta] for n in end}
            module = _combined(terms)
        before = end
        kept = run.consolidator.end_task(kept, module, run.vectors(task, "total"))
    return run.consolidator.deployed(kept, module, finished=True)


def _delta(
    run: FinishedRun, task: int, start: Tensors, end: Tensors, gone: Sequence[int], alpha: float | None, renormalise: bool
) -> Terms:
    """ρ (end − start) − Σ_k a_k (own_k − start), as a weighted sum."""
    shares = run.shares(task)
    rho = 1 / (1 - sum(shares[c] for c in gone)) if renormalise else 1.0
    taken = {c: (shares[c] if alpha is None else alpha) * rho for c in gone}
    own = [({**start, **run.vectors(task, f"client-{c}")}, -a) for c, a in taken.items()]
    return [(end, rho), *own, (start, sum(taken.values()) - rho)]


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
    state = rule.init(start)
    names = planning.trained(run.consolidator, start, rule.plan(state, 0))
    updates = []
    for client in run.participants(task, rounds=1):
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


@torch.inference_mode()
def _judged(
    run: FinishedRun, deployed: Tensors, split: ArraySplit, positions: IntArray
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Of samples: whether the argmax over all classes is right, and the cross-entropy over all classes; (N,) each."""
    model, runtime = run.parts.model, run.config.runtime
    classes = sorted({c for task in run.parts.manifest.task_classes for c in task})
    samples, rights, losses = Samples(split, model.device), [np.zeros(0, bool)], [np.zeros(0)]
    params = {n: t.to(model.device) for n, t in deployed.items()}
    with torch_threads(runtime.threads), model.merged(params):
        for batch in batches(positions, runtime.eval_batch):
            inputs, labels = samples.batch(batch)
            logits = model.logits(model.features(inputs, lean=True), params)
            rights.append((predict(logits, classes) == labels).cpu().numpy())
            log_p = torch.log_softmax(logits[:, classes].double(), dim=1)
            place = torch.as_tensor([classes.index(int(c)) for c in labels])
            losses.append(-log_p.cpu()[torch.arange(len(batch)), place].numpy())
    return np.concatenate(rights), np.concatenate(losses)
