"""Optimizers and schedules by name: any class of `torch.optim` and `torch.optim.lr_scheduler`."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from clients import eager
from fedsim.core.config import ClientConfig
from fedsim.core.errors import ConfigError, did_you_mean, one_line

CHOOSES = {"fused", "foreach", "capturable", "differentiable"}  # options that say how a step is computed


def build(
    client: ClientConfig, parameters: Sequence[Tensor], steps: int, fused: bool = False
) -> tuple[Optimizer, LRScheduler | None]:
    """A new optimizer over the parameters, and its schedule over `steps` steps (None: constant learning rate).

    fused: in torch's fused form where the optimizer has one and the options do not say otherwise: the same step, rounded
    elsewhere, in a third of the time. Raises ConfigError for names and options that torch does not have.
    """
    options: dict[str, Any] = {"lr": client.lr, **_numbers(client.optimizer_options, steps)}
    cls = _find(torch.optim, Optimizer, client.optimizer, "client.optimizer")
    if "weight_decay" in inspect.signature(cls).parameters:
        options.setdefault("weight_decay", client.weight_decay)
    if fused and "fused" in inspect.signature(cls).parameters and not CHOOSES & options.keys():
        options["fused"] = True
    eager.keep_compiler_out()
    optimizer = _make(cls, "client.optimizer_options", list(parameters), **options)
    eager.step_plainly(optimizer)
    if client.schedule is None:
        return optimizer, None
    schedule = _find(lr_scheduler, LRScheduler, client.schedule, "client.schedule")
    return optimizer, _make(schedule, "client.schedule_options", optimizer, **_numbers(client.schedule_options, steps))


def check(client: ClientConfig, dims: Collection[int] = (2,), steps: int = 10) -> None:
    """Take a step over dummy tensors with these numbers of axes, and all `steps` of the schedule, so that a wrong name or option,
    an optimizer that wants another kind of step or tensor, and a schedule that ends too early are errors before any training."""
    parameters = [torch.zeros((2,) * n, requires_grad=True) for n in sorted(dims)]
    optimizer, schedule = build(client, parameters, steps)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    name, key = type(optimizer).__name__, "client.optimizer"
    try:
        optimizer.step()
        if schedule is not None:
            name, key = type(schedule).__name__, "client.schedule"
            for _ in range(steps):
                schedule.step()
    except Exception as e:
        raise ConfigError(f"{key} {name} does not work in this training: {one_line(e)}") from e


def _find(module: Any, base: type[Any], name: str, key: str) -> type[Any]:
    known = {
        n.lower(): c
        for n, c in vars(module).items()
        if inspect.isclass(c) and issubclass(c, base) and c is not base and n[0] != "_"
    }
    known.pop("reducelronplateau", None)  # wants a loss at every step, which a schedule per batch does not have
    if name.lower() not in known:
        raise ConfigError(f"{key} '{name}' is unknown.{did_you_mean(name.lower(), known)}")
    return known[name.lower()]


def _make(cls: type[Any], key: str, *args: Any, **options: Any) -> Any:
    allowed = list(inspect.signature(cls).parameters)
    for name in options:
        if name not in allowed:
            raise ConfigError(f"{key}.{name} is no option of {cls.__name__}.{did_you_mean(name, allowed)}")
    try:
        return cls(*args, **options)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{key} does not suit {cls.__name__}: {e}") from e


def _numbers(options: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The word "steps" stands for the number of steps of this client's round."""
    return {k: steps if v == "steps" else v for k, v in options.items()}
