"""One small batch forward and backward before any training: what would fail, or do nothing, for every client.

A trained tensor that moves nothing, a shape that breaks inside a layer, features that are not finite, a backbone that draws at
random in evaluation: each is one line that names the adapter, the tensor and the backbone. Nothing of the run is touched: the
probe works on copies, draws from addresses of its own, and leaves the global generator as it was.
"""

# b samples, D features

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clients import local
from clients.samples import Samples
from clients.work import Work
from fedsim.core import plugins, rng
from fedsim.core.config import SimConfig
from fedsim.core.contracts import LEARNER, ArraySplit, IntArray, Learner, lifts_of
from fedsim.core.errors import ClientFailed, ConfigError, FedsimError, ModelError, one_line
from fedsim.core.messages import ClientJob, ClientUpdate, RoundPlan, Tensors
from fedsim.core.wire import Chain
from fedsim.core.work import WorkSpec
from fedsim.models import inject
from fedsim.models.model import ADAPTER, Asked, Model

SIGMA = 0.02  # how far from its start every trained tensor is moved: at B = 0 LoRA's A has no gradient
FEW, MANY = 2, 16  # samples; where a tensor seems to do nothing, more samples may know better
NOT_FINITE = "gives features that are not finite (NaN or infinity): check its weights, transform.mean and transform.std"
AT_RANDOM = (
    "draws at random in evaluation: the same samples give other features each time, so that no run could be repeated; choose "
    "another backbone"
)

_passed: set[str] = set()  # probes of this process that found nothing: a sweep prepares the same model many times


def require(config: SimConfig, model: Model, spec: WorkSpec, params: Tensors, trained: Sequence[str]) -> None:
    """Raise ModelError for a model that cannot be trained on these data, whoever the client.

    params: what a task starts with; trained: names of the tensors that clients train in any of its rounds.
    """
    training, tested = _few(spec.train, spec.shard_indices, FEW), _few(spec.test, spec.test_indices, 1)
    key = _key(config, spec, params, trained, (training, tested))
    if key in _passed:
        return
    probe, samples = _Probe(config, model, params, trained), Samples(spec.train, model.device)
    with torch.random.fork_rng(devices=[]):
        if len(tested):
            probe.evaluation(Samples(spec.test, model.device).batch(tested)[0])
        if probe.idle(samples.batch(training)[0]):
            probe.require_effect(samples.batch(_few(spec.train, spec.shard_indices, MANY))[0])
    _passed.add(key)


def require_learners(
    config: SimConfig, model: Model, spec: WorkSpec, params: Tensors, first: RoundPlan, learners: Mapping[str, Learner]
) -> None:
    """Raise ConfigError for a learner that fails in the first round of the first task: a batch or two of the client that holds
    most, without memory, with what the first round's plan and the learners' server halves tell, through the channels and back to
    the server."""
    if not learners:
        return
    states = {name: _asked(name, rule.opened, None, params, 0) for name, rule in learners.items()}
    context = {f"{LEARNER}.{name}": _asked(name, rule.context, states[name]) for name, rule in learners.items()}
    told = {name: tensors for name, tensors in {**first.context, **context}.items() if tensors}
    plan = RoundPlan(train=first.train, context=told)
    client = max(range(spec.num_clients), key=lambda k: len(spec.shard(0, k)))
    shard, classes = spec.shard(0, client)[: config.client.batch_size + 1], spec.task_classes[0]
    job = ClientJob(client, 0, 0, params, plan)
    once = replace(config, client=replace(config.client, epochs=1))
    with torch.random.fork_rng(devices=[]):
        update = local.train(Work.of(model, Samples(spec.train, model.device), shard, classes, job, once, learners))
        if isinstance(update, ClientUpdate):
            update = Chain.of(config).sent(job, update)
    if isinstance(update, ClientFailed):
        raise ConfigError(f"client.learners: a client's first round would fail in stage {update.stage}: {update.reason}")
    lifts = lifts_of([f"{LEARNER}.{name}" for name in learners], None, None, learners) or {}
    for (name, rule), lift in zip(learners.items(), lifts.values(), strict=True):
        state = _asked(name, rule.heard, states[name], _asked(name, lift, update) or {}, spec.num_clients)
        _asked(name, rule.merged, state, params, params, 1, spec.num_clients)


def _asked(name: str, half: Callable[..., Any], *args: Any) -> Any:
    """What a learner's server half gives. Raises ConfigError if it raises."""
    try:
        return half(*args)
    except Exception as e:
        reason = str(e) if isinstance(e, FedsimError) else one_line(e)
        raise ConfigError(f"client.learners: the server half of {name} fails before the first round: {reason}") from e


class _Probe:
    """The passes, and who is to blame when one of them goes wrong."""

    def __init__(self, config: SimConfig, model: Model, params: Tensors, trained: Sequence[str]) -> None:
        self.model, self.trained = model, [n for n in trained if n.startswith(ADAPTER)]
        self.params = {n: t.to(model.device) for n, t in params.items() if n.startswith(ADAPTER)}
        self.backbone = f"model.backbone '{config.model.backbone}' ({type(model.backbone.encoder).__name__})"
        self.adapter = f"adapter {config.adapter['name']}"

    def evaluation(self, inputs: Tensors) -> None:
        """Twice the same samples through the deployed model."""
        merged = partial(self.model.merged, self.params)
        passes = self._features(merged, inputs), self._features(merged, inputs)
        for bad, what in ((_not_finite, NOT_FINITE), (_differ, AT_RANDOM)):
            if bad(*passes):
                alone = bad(self._features(nullcontext, inputs), self._features(nullcontext, inputs))
                raise ModelError(f"{self.backbone} {what}" if alone else f"{self.adapter} on {self.backbone} {what}")

    def idle(self, inputs: Tensors, moving: Collection[str] | None = None) -> list[str]:
        """The trained tensors that the features of these samples do not depend on, once tensors have moved a step away from the
        start: those that are trained, or these."""
        moving = self.trained if moving is None else moving
        draw = rng.torch_stream(0, "probe")
        steps = {n: SIGMA * torch.randn(t.shape, generator=draw).to(t) for n, t in self.params.items()}
        away = {n: (t + steps[n]).detach() if n in moving else t for n, t in self.params.items()}
        for name in self.trained:
            away[name].requires_grad_()
        augment, dropout = (rng.torch_stream(0, "probe", what, device=self.model.device) for what in ("augment", "dropout"))
        features_bD, query_bD = self._asked(lambda: self.model.applied(away, dropout), inputs, augment=augment, training=True)
        direction_bD = torch.randn(features_bD.shape, generator=draw).to(features_bD)
        own_term = self.model.loss(away, query_bD)
        moved = (features_bD * direction_bD).sum() + (0.0 if own_term is None else own_term)
        if not moved.requires_grad:
            return self.trained
        try:
            moved.backward()  # type: ignore[no-untyped-call]
        except Exception as e:
            raise ModelError(f"{self.adapter} on {self.backbone} cannot be trained: {one_line(e)}") from e
        found = {n: away[n].grad for n in self.trained}
        for name, gradient in found.items():
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                raise ModelError(f"{self.adapter} on {self.backbone}: the gradient of '{name}' is not finite (NaN or infinity)")
        return [n for n, gradient in found.items() if gradient is None or not bool(gradient.any())]

    def require_effect(self, inputs: Tensors) -> None:
        """Raise ModelError for a tensor that does nothing to these samples either."""
        idle = self.idle(inputs)
        if idle:
            rest = f" (nor do {len(idle) - 1} more)" if len(idle) > 1 else ""
            what = "choose other targets or blocks, another adapter or another backbone"
            if idle[0] not in self.idle(inputs, self.params):
                still = "what it is multiplied with is zero and is trained in no round"
                what = f"{still}: train both factors (server.aggregator.train: alternate), or the other one alone"
            does = f"the trained tensor '{idle[0]}' moves no feature and gets no gradient{rest}"
            raise ModelError(f"{self.adapter} on {self.backbone}: {does}: {what}")

    def _features(self, applied: Callable[[], AbstractContextManager[None]], inputs: Tensors) -> Tensor:
        return self._asked(applied, inputs).features

    def _asked(
        self,
        applied: Callable[[], AbstractContextManager[None]],
        inputs: Tensors,
        augment: torch.Generator | None = None,
        training: bool = False,
    ) -> Asked:
        try:
            with torch.set_grad_enabled(training), applied():
                return self.model.asked(inputs, augment, lean=True)
        except Exception as e:
            raise ModelError(self._broken(applied, inputs, e)) from e

    def _broken(self, applied: Callable[[], AbstractContextManager[None]], inputs: Tensors, error: Exception) -> str:
        """Who is to blame for a pass that breaks: the backbone, if it breaks by itself too, else the adapter; in which layer."""
        with torch.no_grad():
            alone, _ = _breaks(self.model, nullcontext, inputs)
            if alone is not None:
                return f"{self.backbone} cannot read samples of the data: {one_line(alone)}"
            _, layer = _breaks(self.model, applied, inputs)
        where = f" in layer '{layer}'" if layer else ""
        near = next((n for n in self.params if layer and layer.startswith(n.removeprefix(ADAPTER).rpartition(".")[0])), None)
        tensor = f" (tensor '{near or next(iter(self.params))}')" if self.params else ""
        return f"{self.adapter} does not fit {self.backbone}{tensor}: {one_line(error)}{where}; choose another adapter"


def _not_finite(first_bD: Tensor, again_bD: Tensor) -> bool:
    return not bool(torch.isfinite(first_bD).all())


def _differ(first_bD: Tensor, again_bD: Tensor) -> bool:
    return not torch.equal(first_bD, again_bD)


def _breaks(
    model: Model, applied: Callable[[], AbstractContextManager[None]], inputs: Tensors
) -> tuple[Exception | None, str | None]:
    """The error of a pass, if there is one, and the innermost layer that it came from."""
    inside: list[str] = []

    def enter(name: str, module: nn.Module, args: Any) -> None:
        inside.append(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        inside.pop()

    hooks: list[Callable[[], inject.Removable]] = []
    for name, module in model.backbone.encoder.named_modules():
        hooks += [partial(module.register_forward_pre_hook, partial(enter, name)), partial(module.register_forward_hook, leave)]
    try:
        with applied(), inject.installed(hooks):
            model.features(inputs, lean=True)
    except Exception as e:
        return e, inside[-1] if inside else None
    return None, None


def _few(data: ArraySplit, used: IntArray, count: int) -> IntArray:
    """Positions of some of the samples that are used, spread evenly; of texts the longest one is among them."""
    if not len(used):
        return used
    chosen = {int(used[i * (len(used) - 1) // max(1, count - 1)]) for i in range(count)}
    if "attention_mask" in data.inputs:
        mask_NL = data.inputs["attention_mask"]
        columns = (mask_NL[:, i][used] for i in reversed(range(mask_NL.shape[1])))
        longest_n = next((column_n for column_n in columns if column_n.any()), np.zeros(1))
        chosen.add(int(used[np.argmax(longest_n != 0)]))
    return np.array(sorted(chosen))


def _key(config: SimConfig, spec: WorkSpec, params: Tensors, trained: Sequence[str], splits: Sequence[IntArray]) -> str:
    """All that the outcome of a probe depends on, but for the values of the samples."""
    runtime = config.runtime
    files = [(path, plugins.fingerprint(path)) for path in config.user_files()]
    shapes = [{n: (a.shape[1:], str(a.dtype)) for n, a in data.inputs.items()} for data in (spec.train, spec.test)]
    parts = config.model, config.adapter, config.transform, runtime.kernels, runtime.precision, runtime.threads, files, shapes
    tensors = {n: tuple(t.shape) for n, t in params.items()}
    return repr((parts, [len(s) for s in splits], tensors, sorted(trained)))
