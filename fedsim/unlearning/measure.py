"""How well a model forgot: accuracy on what is forgotten and on the rest, membership inference, a run without the clients."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from clients.work import batches
from fedsim import simulation, suitable
from fedsim.core.config import SimConfig
from fedsim.core.contracts import ArraySplit, IntArray
from fedsim.core.defaults import torch_defaults
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.models.logits import predict
from fedsim.unlearning.finished import FinishedRun


@dataclass(frozen=True)
class Measured:
    """Percent right of one model on the training samples of the clients that are forgotten and of those that remain, its final
    average accuracy on test samples, and how well its loss tells the forgotten samples from unseen ones (0.5: not at all)."""

    name: str
    forgotten: float
    retained: float
    test: float
    membership_auc: float


def measure(
    run: FinishedRun, name: str, deployed: Tensors, clients: Collection[int], tasks: Collection[int] | None = None
) -> Measured:
    """One model on what the clients held in the tasks that are forgotten (None: in all), on all else that was trained on, and on
    test samples."""
    spec, chosen = run.parts.spec, set(run.tasks if tasks is None else tasks)
    shards: dict[bool, list[IntArray]] = {True: [], False: []}
    for task in run.tasks:
        for client in run.contributors(task):
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
