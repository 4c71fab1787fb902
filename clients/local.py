"""What one client does with a job: train what the plan names, then compute the statistics it asks for.

Knows no Ray, no files, no server. Every random draw has an address (client, task, round), so any worker may run any client.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from clients import kept, optim
from clients.kept import Lower
from clients.samples import Samples
from fedsim.core import config as configs
from fedsim.core import contracts, plugins, rng
from fedsim.core.config import SimConfig
from fedsim.core.contracts import Follower, IntArray, TrainingStatistic, TrainStep
from fedsim.core.errors import ClientFailed, FedsimError, NonFinite
from fedsim.core.messages import ClientJob, ClientUpdate, RoundPlan, StatisticRequest, Tensors
from fedsim.core.tensors import matching, require_finite, stack_modules, with_prefix
from fedsim.models.logits import masked_cross_entropy
from fedsim.models.model import Model


@dataclass
class StageFailed(Exception):
    """Something went wrong in one stage of a client's work."""

    stage: str
    reason: str


def train(
    model: Model,
    samples: Samples,
    shard: IntArray,
    classes: Sequence[int],
    job: ClientJob,
    config: SimConfig,
    objectives: Sequence[contracts.Objective] = (),
) -> ClientUpdate | ClientFailed:
    """One client's round: `shard` are its positions into `samples`, `classes` the head rows of its task.

    Returns the trained tensors and statistics as CPU tensors, or a `ClientFailed` that names the stage.
    A client without samples sends back what it received, with `num_samples` 0.
    """
    start = time.perf_counter()
    config = repeated(config, job.plan)
    local = {n: t.to(model.device) for n, t in job.params.items()}
    trained = matching(local, job.plan.train)
    for name in trained:
        local[name] = local[name].detach().clone().requires_grad_()
    try:
        metrics, below = {}, None
        with stage("training"):
            if trained or job.plan.statistics:
                below = kept.lower(model, samples, shard, local, config.runtime)
            followers = following(job.plan, local)
            if trained and len(shard):
                told = [follower for _, follower in followers]
                metrics["loss"] = fit(model, samples, shard, classes, local, trained, job, config, objectives, told, below)
        local = {n: t.detach() for n, t in local.items()}
        with stage("update"):
            update = {n: local[n].cpu() for n in trained}
            require_finite(update, "trained tensor")
        with stage("statistics"):
            statistics = {f"{name}.{key}": t for name, follower in followers for key, t in follower.result().items()}
            statistics |= collect(model, samples, shard, local, job.plan, config.runtime.eval_batch, below)
            require_finite(statistics, "statistic")
    except StageFailed as e:
        return ClientFailed(job.client_id, job.task, job.round, e.stage, e.reason)
    metrics["seconds"] = time.perf_counter() - start
    return ClientUpdate(job.client_id, len(shard), update, statistics, metrics=metrics)


def fit(
    model: Model,
    samples: Samples,
    shard: IntArray,
    classes: Sequence[int],
    local: dict[str, Tensor],
    trained: Sequence[str],
    job: ClientJob,
    config: SimConfig,
    objectives: Sequence[contracts.Objective],
    followers: Sequence[Follower] = (),
    below: Lower | None = None,
) -> float:
    """Train `local[trained]` in place; the mean loss of the last epoch. Raises NonFinite when a loss is not finite.

    followers: see every step; below: what the frozen blocks make of the shard, if that is at hand.
    """
    client, seed, address = config.client, config.seed, (job.client_id, job.task, job.round)
    order = rng.stream(seed, "batches", *address)
    augment = rng.torch_stream(seed, "augment", *address, device=model.device)
    dropout = rng.torch_stream(seed, "dropout", *address, device=model.device)
    parameters = {n: local[n] for n in trained}
    steps = client.epochs * math.ceil(len(shard) / client.batch_size)
    optimizer, schedule = optim.build(client, parameters, steps, fused=config.runtime.kernels == "onednn")
    start = {n: job.params[n].to(model.device) for n in trained} if objectives else {}
    losses: list[Tensor] = []
    with beside(model, job.plan), model.applied(local, dropout):
        for _ in range(client.epochs):
            for positions in batches(order.permutation(shard), client.batch_size):
                inputs, labels = samples.batch(positions)
                if below is None:
                    features = model.features(inputs, augment, lean=True)
                else:
                    features = below.features(model, inputs, positions, lean=True)
                logits = model.logits(features, local)
                terms = [] if replaced(objectives) else [masked_cross_entropy(logits, labels, classes)]
                if objectives:
                    step = TrainStep({n: local[n] for n in trained}, start, logits, labels, classes)
                    terms += [objective.term(step) for objective in objectives]
                loss = sum(terms[1:], terms[0])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                for follower in followers:
                    follower.before_step()
                if client.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(parameters.values(), client.clip_norm)
                optimizer.step()
                for follower in followers:
                    follower.after_step()
                if schedule is not None:
                    schedule.step()
                losses.append(loss.detach())
    return last_epoch(torch.stack(losses), client.epochs)  # looked at once: a look at every step would wait for the GPU


def last_epoch(losses: Tensor, epochs: int) -> float:
    """The mean loss of a round's last epoch, from the losses of all its steps. Raises NonFinite if one is not finite."""
    if not bool(torch.isfinite(losses).all()):
        step = int((~torch.isfinite(losses)).nonzero()[0])
        raise NonFinite(
            f"the loss is {losses[step].item()} at step {step + 1} of {len(losses)}: lower client.lr or set client.clip_norm"
        )
    return float(losses[-(len(losses) // epochs) :].mean())


@torch.no_grad()
def collect(
    model: Model,
    samples: Samples,
    shard: IntArray,
    local: Tensors,
    plan: RoundPlan,
    batch_size: int,
    below: Lower | None = None,
) -> dict[str, Tensor]:
    """The statistics of a plan, named `<statistic>.<form>/<subject>`.

    One pass over the shard without augmentation through the client's model, and one through the blend of past tasks'
    modules and the client's own, for the requests that want each. A client that trained beside those modules has no other model.
    """
    out: dict[str, Tensor] = {}
    passes = [r for r in plan.statistics if not follows(r)]
    for blended in (False, True):
        requests = [r for r in passes if (plan.beside or (r.blended and bool(plan.background))) == blended]
        if not requests:
            continue
        through = dict(local)
        if blended and plan.background:
            background = {n: t.to(model.device) for n, t in plan.background.items()}
            through |= stack_modules([background, with_prefix(local, "adapter.")], [1.0, plan.share])
        out |= one_pass(model, samples, shard, local, through, requests, batch_size, below)
    return out


def one_pass(
    model: Model,
    samples: Samples,
    shard: IntArray,
    local: Tensors,
    through: Tensors,
    requests: Sequence[StatisticRequest],
    batch_size: int,
    below: Lower | None = None,
) -> dict[str, Tensor]:
    """Statistics of several requests in one pass of the model with the parameters `through`."""
    out: dict[str, Tensor] = {}
    if below is not None and not below.serves(model, through):
        below = None
    with ExitStack() as stack:
        stack.enter_context(model.merged(through))
        collecting = []
        for request in requests:
            subjects = matching(local, request.match)
            collecting.append((request.name, stack.enter_context(statistic_of(request).collect(model, local, subjects))))
        for positions in batches(shard, batch_size):
            inputs, labels = samples.batch(positions)
            features = model.features(inputs) if below is None else below.features(model, inputs, positions)
            seen_by_head = model.head_inputs(features, local)
            for _, accumulator in collecting:
                accumulator.update(seen_by_head, labels)
        for name, accumulator in collecting:
            out |= {f"{name}.{key}": value for key, value in accumulator.result().items()}
    return out


def statistic_of(request: StatisticRequest) -> contracts.Statistic:
    """The plug-in that a request names."""
    statistic: contracts.Statistic = configs.build("statistics", {"name": request.name, **request.options})
    return statistic


def following(plan: RoundPlan, local: Tensors) -> list[tuple[str, Follower]]:
    """What follows the training, of the statistics that a plan asks for, with their names."""
    built = [(r, statistic_of(r)) for r in plan.statistics if follows(r)]
    return [(r.name, s.follow(local, matching(local, r.match))) for r, s in built if isinstance(s, TrainingStatistic)]


def follows(request: StatisticRequest) -> bool:
    """Whether it asks for a statistic of the training itself."""
    return issubclass(plugins.load("statistics", request.name), TrainingStatistic)


def replaced(objectives: Sequence[contracts.Objective]) -> bool:
    """Whether one of them stands in the place of the cross-entropy."""
    return any(objective.replaces_cross_entropy for objective in objectives)


def repeated(config: SimConfig, plan: RoundPlan) -> SimConfig:
    """The config of a client that trains as many times `client.epochs` as its plan says."""
    if plan.repeat == 1:
        return config
    return replace(config, client=replace(config.client, epochs=config.client.epochs * plan.repeat))


def beside(model: Model, plan: RoundPlan) -> AbstractContextManager[None]:
    """While open, the model has the modules of past tasks in it, if the plan says that clients train on top of them."""
    if not plan.beside or not plan.background:
        return nullcontext()
    return model.merged({n: t.to(model.device) for n, t in plan.background.items()})


def batches(positions: IntArray, size: int) -> Iterator[IntArray]:
    """Consecutive batches; the last one may be smaller."""
    for start in range(0, len(positions), size):
        yield positions[start : start + size]


def round_shard(shard: IntArray, config: SimConfig, job: ClientJob) -> IntArray:
    """The samples of this round: all of the task's shard, or with `stream.online` its own part of a single pass.

    The statistics pass at a task's end (round = number of rounds) sees the last part again: nothing older is kept.
    """
    if not config.stream.online:
        return shard
    once = rng.stream(config.seed, "online", job.client_id, job.task).permutation(shard)
    return np.array_split(once, config.server.rounds)[min(job.round, config.server.rounds - 1)]


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Name the stage in which an error happened."""
    try:
        yield
    except FedsimError as e:
        raise StageFailed(name, str(e)) from e
    except Exception as e:
        raise StageFailed(name, f"{type(e).__name__}: {' '.join(str(e).split())}") from e
