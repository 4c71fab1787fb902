"""What one client does with a job: train what the plan names, then compute the statistics it asks for.

Knows no Ray, no files, no server. Every random draw has an address (client, task, round), so any worker may run any client.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clients import optim
from clients.learning import Learning, follows, reviewed, statistic_of
from clients.lower_states import NOTHING, Kept
from clients.work import Work, batches
from fedsim.core import ranks
from fedsim.core.contracts import Outputs, Slots, WorkStatistic
from fedsim.core.errors import ClientFailed, FedsimError, NonFinite
from fedsim.core.messages import ClientUpdate, StatisticRequest, Tensors
from fedsim.core.tensors import matching, require_finite, stack_modules, with_prefix
from fedsim.models import lower
from fedsim.models.model import Model


@dataclass
class StageFailed(Exception):
    """Something went wrong in one stage of a client's work."""

    stage: str
    reason: str


def train(work: Work) -> ClientUpdate | ClientFailed:
    """One client's round: train, then compute the statistics that the plan asks for.

    Returns the trained tensors and statistics as CPU tensors, or a `ClientFailed` that names the stage.
    A client without samples sends back what it received, with `num_samples` 0.
    """
    start, job = time.perf_counter(), work.job
    local = dict(work.params)
    for name in work.trained:
        local[name] = local[name].detach().clone().requires_grad_()
    try:
        metrics, kept = {}, NOTHING
        with stage("training"):
            if work.trained or work.plan.statistics:
                kept = Kept.of(work.model, work.samples, work.shard, local, work.config.runtime)
            learning = Learning(work)
            if work.steps:
                metrics["loss"] = fit(work, local, learning, kept)
        local = {n: t.detach() for n, t in local.items()}
        with stage("update"):
            update, encoded = work.sends(local)
            require_finite({n: local[n] for n in work.trained}, "trained tensor")
        with stage("statistics"):
            memory, statistics = reviewed(work) if work.plan.review else learning.end(local)
            memory = work.remembers(local, memory)
            statistics = {**statistics, **collect(work, local, kept)}
            require_finite(statistics, "statistic")
    except StageFailed as e:
        return ClientFailed(job.client_id, job.task, job.round, e.stage, e.reason)
    metrics["seconds"] = time.perf_counter() - start
    return ClientUpdate(job.client_id, len(work.shard), update, statistics, memory, metrics, encoded=encoded)


def fit(work: Work, local: dict[str, Tensor], learning: Learning, kept: Kept = NOTHING) -> float:
    """Train `local[work.trained]` in place; the mean loss of the last epoch. Raises NonFinite when a loss is not finite."""
    client, model = work.config.client, work.model
    augment, dropout = (work.draw(purpose, model.device) for purpose in ("augment", "dropout"))
    parameters = {n: local[n] for n in work.trained}
    lacking = ranks.beyond(parameters, work.rank)
    optimizer, schedule = optim.build(client, parameters, work.steps, fused_step=work.config.runtime.kernels == "onednn")
    losses: list[Tensor] = []
    kept = replace(kept, below=None) if learning.blocks else kept
    shown: AbstractContextManager[list[Tensor]] = lower.watching(model.backbone.encoder) if learning.blocks else nullcontext([])
    with shown as blocks, Frame(work.on_past_modules, lambda: model.applied(local, dropout)) as frame:
        for own in work.batches():
            positions, inputs, labels = learning.batch(own)
            drawn = augment.get_state() if learning.looks and model.augments else None
            blocks.clear()
            features, query = kept.asked(model, inputs, positions, augment, lean=not learning.blocks)
            outputs = Outputs(features, model.logits(features, local))
            terms = [] if learning.replaces else [learning.cross_entropy(outputs.logits, labels)]
            of_adapter = learning.adapter_term(local, query)
            if of_adapter is not None:
                terms.append(of_adapter)
            if learning.looks:
                other = _other(work, frame, inputs, drawn, query)
                terms += learning.terms(inputs, positions, labels, outputs, parameters, other, frame.left, tuple(blocks), query)
            loss = sum(terms[1:], terms[0])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if learning.corrects:
                correct(learning, parameters)
            for name, mask in lacking.items():
                parameters[name].grad = _without(parameters[name].grad, mask)
            if client.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters.values(), client.clip_norm)
            optimizer.step()
            learning.stepped(parameters)
            if schedule is not None:
                schedule.step()
            losses.append(loss.detach())
    return last_epoch(torch.stack(losses), work.epochs)  # looked at once: a look at every step would wait for the GPU


def _without(gradient: Tensor | None, mask: Tensor) -> Tensor | None:
    """A gradient that is zero where a client has no ranks: learners may have put something there."""
    return None if gradient is None else gradient.masked_fill(mask, 0.0)


def correct(learning: Learning, parameters: Tensors) -> None:
    """Put what learners make of the gradients in their place."""
    found = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    for name, gradient in learning.corrected(found, parameters).items():
        parameters[name].grad = gradient


def _other(work: Work, frame: Frame, inputs: Tensors, drawn: Tensor | None, query: Tensor | None) -> Callable[[Tensors], Outputs]:
    """Runs other tensors on a batch with its queries and the augmentation that it had (drawn: the state of its generator before),
    no dropout."""

    def run(params: Tensors) -> Outputs:
        augment = None if drawn is None else redrawn(work.model, drawn)
        return through(work, frame, params, lambda: work.model.features(inputs, augment, True, query))

    return run


def redrawn(model: Model, drawn: Tensor) -> torch.Generator:
    """A generator in the state that another one had."""
    generator = torch.Generator(model.device)
    generator.set_state(drawn)
    return generator


@torch.no_grad()
def through(work: Work, frame: Frame, params: Tensors, features: Callable[[], Tensor], slots: Slots | None = None) -> Outputs:
    """What other tensors make of a batch, while those that are trained step aside. slots: of several clients' samples."""
    with frame.left(), work.looking(params, slots):
        features_bD = features()
        return Outputs(features_bD, work.model.logits(features_bD, params))


class Frame:
    """Contexts that are open, one in the other, and can be left for a moment."""

    def __init__(self, *opening: Callable[[], AbstractContextManager[None]]) -> None:
        self._opening, self._open = opening, ExitStack()

    def __enter__(self) -> Frame:
        with ExitStack() as stack:
            for opened in self._opening:
                stack.enter_context(opened())
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    @contextmanager
    def left(self) -> Iterator[None]:
        """While open, none of them is."""
        self._open.close()
        try:
            yield
        finally:
            self.__enter__()


def last_epoch(losses: Tensor, epochs: int) -> float:
    """The mean loss of a round's last epoch, from the losses of all its steps. Raises NonFinite if one is not finite."""
    if not bool(torch.isfinite(losses).all()):
        step = int((~torch.isfinite(losses)).nonzero()[0])
        raise NonFinite(
            f"the loss is {losses[step].item()} at step {step + 1} of {len(losses)}: lower client.lr or set client.clip_norm"
        )
    return float(losses[-(len(losses) // epochs) :].mean())


@torch.no_grad()
def collect(work: Work, local: Tensors, kept: Kept = NOTHING) -> dict[str, Tensor]:
    """The statistics of a plan, named `<statistic>.<form>/<subject>`.

    One pass over the shard without augmentation through the client's model, and one through the blend of past tasks'
    modules and the client's own, for the requests that want each. A client that trained beside those modules has no other model.
    """
    out: dict[str, Tensor] = {}
    plan, background = work.plan, work.received.background
    passes = [r for r in plan.statistics if not follows(r)]
    for blended in (False, True):
        requests = [r for r in passes if (plan.beside or (r.blended and bool(background))) == blended]
        if not requests:
            continue
        of_work = [r for r in requests if isinstance(statistic_of(r), WorkStatistic)]
        out |= _measured(work, local, _seen_through(work, local, blended, opened=True), of_work) if of_work else {}
        in_pass = [r for r in requests if r not in of_work]
        out |= one_pass(work, local, _seen_through(work, local, blended), in_pass, kept) if in_pass else {}
    return out


def _seen_through(work: Work, local: Tensors, blended: bool, opened: bool = False) -> dict[str, Tensor]:
    """All tensors, the module on top of what lies beneath it; blended: and of modules of past tasks, beside which it counts for
    `RoundPlan.share`. opened: for a model that has in it already what clients train on top of (`Work.on_past_modules`)."""
    background, beneath = work.received.background, work.received.beneath
    past = bool(blended and background)
    share, under = work.plan.share if past else 1.0, 1.0 if opened else 0.0
    terms = [
        (background, 1.0 if past and not (opened and work.plan.beside) else 0.0),
        (beneath, share - under if beneath else 0.0),
        (with_prefix(local, "adapter."), share),
    ]
    chosen = [(module, weight) for module, weight in terms[:2] if weight] + terms[2:]
    return dict(local) | stack_modules([m for m, _ in chosen], [w for _, w in chosen])


def _measured(work: Work, local: Tensors, through: Tensors, requests: Sequence[StatisticRequest]) -> dict[str, Tensor]:
    """Statistics that look at the client's work themselves."""
    out: dict[str, Tensor] = {}
    for request in requests:
        statistic = statistic_of(request).for_client(work.draw(f"statistic {request.name}"))
        if isinstance(statistic, WorkStatistic):
            found = statistic.measured(work, through, matching(local, request.match))
            out |= {f"{request.name}.{key}": value for key, value in found.items()}
    return out


def one_pass(
    work: Work, local: Tensors, through: Tensors, requests: Sequence[StatisticRequest], kept: Kept = NOTHING
) -> dict[str, Tensor]:
    """Statistics of several requests in one pass of the model with the parameters `through`."""
    out: dict[str, Tensor] = {}
    model, kept = work.model, kept.serving(work.model, through)
    with ExitStack() as stack:
        stack.enter_context(model.merged(through))
        collecting = []
        for request in requests:
            subjects = matching(local, request.match)
            statistic = statistic_of(request).for_client(work.draw(f"statistic {request.name}"))
            collecting.append((request.name, stack.enter_context(statistic.collect(model, local, subjects))))
        for positions in batches(work.shard, work.config.runtime.eval_batch):
            inputs, labels = work.samples.batch(positions)
            features = kept.asked(model, inputs, positions).features
            seen_by_head = model.head_inputs(features, local)
            for _, accumulator in collecting:
                accumulator.update(seen_by_head, labels)
        for name, accumulator in collecting:
            out |= {f"{name}.{key}": value for key, value in accumulator.result().items()}
    return out


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Name the stage in which an error happened."""
    try:
        yield
    except FedsimError as e:
        raise StageFailed(name, str(e)) from e
    except Exception as e:
        raise StageFailed(name, f"{type(e).__name__}: {' '.join(str(e).split())}") from e
