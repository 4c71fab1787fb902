"""Removes clients from a finished run, without further rounds.

Four ways, of which the first that is possible is taken unless one is asked for:
    drop       the model is composed of what clients learned by themselves, and theirs are left out: exact, unless learners tell
               clients of each other;
    sums       the head is a closed form of sums over clients, which those who leave helped to no features for: they are asked
               for their part once more, it is subtracted, and the head is solved again: exact, up to rounding (see `sums`);
    recompose  in a run of one round per task, in which no task starts from what the client left in the one before: the run's own
               rule merges the task vectors of those who remain: exact, up to rounding (see `FinishedRun.not_exact`);
    subtract   their task vectors are subtracted: task arithmetic, an approximation ("SATA", arXiv 2510.13606; the abstract is all
               that was at hand, so the choice of coefficients is ours).
The last two need the vectors that a run with `server.unlearning: true` keeps: what each client became by itself from a task's
start, τ_k, for as many epochs as the task's rounds have together. With τ = parameters − start, task by task,

    τ_u = τ − Σ_k α_k τ_k        α_k = p_k = n_k / Σ n over the clients that took part in the task, unless given
    τ_u = (τ − Σ_k p_k τ_k) / (1 − Σ_k p_k)        renormalised: exact where τ = Σ p_i τ_i

LoRA pairs are subtracted as products, −α B A, by stacking along the rank; every other tensor, the head's too, element by element.
Where the features are affine in the tensors (tangents), vectors of clients add up and subtraction
removes what the client added and nothing else, for a fixed head; elsewhere it is a first-order heuristic, and α matters.
The statistics that a consolidator or a calibrator merged at a task's end are sums over clients: they keep the forgotten client's
part, and so does a head that a calibrator made of them.
Vectors stay with the clients in a deployment, so they count in no bytes of a run; who is forgotten uploads one per task.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedsim.core import rng
from fedsim.core.defaults import torch_defaults
from fedsim.core.errors import ConfigError
from fedsim.core.messages import ClientUpdate, Tensors
from fedsim.core.tensors import LORA_A, LORA_B, matching, require_finite, stack_modules
from fedsim.unlearning import sums
from fedsim.unlearning.finished import FinishedRun, same

WAYS = ("drop", "sums", "recompose", "subtract")
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
    way = _way(run, clients, chosen, way, given)
    with torch_defaults(run.config.runtime.threads):
        if way == "drop":
            state = run.consolidator.without(run.state.consolidator, clients, chosen)
            if state is None:
                raise ConfigError(f"consolidator {run.config.server.consolidator['name']} cannot tell its clients apart")
            return Removed(run.consolidator.deployed(state, run.state.params, finished=True), way)
        if way == "sums":
            deployed = sums.deployed_without(run, clients, chosen)
            require_finite(deployed, "without the clients,")
            return Removed(deployed, way)
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
        if not any(client in run.contributors(task) for task in tasks):
            raise ConfigError(
                f"client {client} never trained in {run.dir.path}: it was not drawn in any round, or holds nothing of what was "
                "learned; there is nothing to subtract"
            )
    for task in tasks:
        if not run.composed and set(run.contributors(task)) <= set(clients):
            raise ConfigError(f"nobody else took part in task {task}: without client {min(clients)} there is no model of it")


# ---------------------------------------------------------------- inner workings


def _way(run: FinishedRun, clients: Collection[int], tasks: Sequence[int], asked: str | None, given: str | None) -> str:
    """What was asked for, or the best that is possible. `given`: an option that is for subtraction only."""
    if run.composed:
        if given or asked not in (None, "drop"):
            raise ConfigError(
                f"{run.dir.path} is composed of its clients: they are left out as a whole, leave out {given or '--how'}"
            )
        return "drop"
    if asked == "drop":
        raise ConfigError(f"--how drop is not possible for {run.dir.path}: its model is merged, not composed of its clients")
    if given:
        if asked in ("sums", "recompose"):
            raise ConfigError(
                f"{given} is for --how subtract: {'sums have' if asked == 'sums' else 'recomposing has'} no coefficients"
            )
        return "subtract"
    if asked in (None, "sums"):
        why = sums.why_not(run, clients, tasks)
        if why is None:
            return "sums"
        solved = run.calibrator is not None and run.calibrator.subtracts
        if asked or (solved and not run.config.server.unlearning):
            otherwise = "" if asked else "; for another way run it again with server.unlearning=true"
            raise ConfigError(f"--how sums is not possible for {run.dir.path}: {why}{otherwise}")
    why = None if asked == "subtract" else run.not_exact
    if asked == "recompose" and why:
        raise ConfigError(f"--how recompose is not possible for {run.dir.path}: {why}")
    return asked or ("subtract" if why else "recompose")


def _replayed(run: FinishedRun, clients: set[int], tasks: set[int], way: str, alpha: float | None, renormalise: bool) -> Tensors:
    """The consolidator's work on the tasks' modules without the clients, and what it deploys at the end."""
    kept, before, module = run.consolidator.init(), dict[str, Tensor](), dict[str, Tensor]()
    removals: dict[str, Terms] = {}  # what is added to a tensor, since it began
    for task in run.tasks:
        start, end, whole = (run.vectors(task, name) for name in ("start", "end", "module"))
        gone = [c for c in run.participants(task) if c in clients] if task in tasks else []
        if way == "recompose":
            merged = _merged(run, task, start, set(gone)) if gone else whole
            module = {n: t + (module[n] - before[n] if same(start[n], before.get(n)) else 0) for n, t in merged.items()}
        else:
            new = _removal(run, task, start, whole, gone, alpha, renormalise)
            removals = {n: [*(removals.get(n, []) if _goes_on(n, start, before) else []), *new] for n in whole}
            module = _combined({n: [(whole, 1.0), *terms] for n, terms in removals.items()})
        before = end
        draw = rng.torch_stream(run.config.seed, "consolidate", task)
        kept = run.consolidator.end_task(kept, module, run.vectors(task, "total"), draw)
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
    asked = matching(start, rule.plan(state, 0).train)
    updates = []
    for client in run.participants(task):
        if client not in gone:
            own = run.vectors(task, f"client-{client}")
            updates.append(ClientUpdate(client, int(sizes[client]), {n: own[n] for n in asked if n in own}))
    state, params = rule.combine(state, start, updates, rng.torch_stream(run.config.seed, "aggregate", task, 0))
    return dict(rule.deployed(state, params))


def _goes_on(name: str, start: Tensors, before: Tensors) -> bool:
    """Whether a task began with this tensor as the last one left it; of a LoRA pair, with both."""
    pair = [name]
    for factor, other in ((LORA_A, LORA_B), (LORA_B, LORA_A)):
        if name.endswith(factor) and name.removesuffix(factor) + other in start:
            pair.append(name.removesuffix(factor) + other)
    return all(same(start[n], before.get(n)) for n in pair)
