"""Optimizers and schedules by name: any class of `torch.optim` and `torch.optim.lr_scheduler`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from clients import eager
from fedsim.core.config import ClientConfig
from fedsim.core.errors import ConfigError, did_you_mean, one_line
from fedsim.core.tensors import matching

SETS_RATES = {"max_lr", "base_lr"}  # parameters of schedules that replace learning rates, where others multiply them
CHOOSES = {"fused", "foreach", "capturable", "differentiable"}  # options that say how a step is computed


def build(
    client: ClientConfig, parameters: Mapping[str, Tensor], steps: int, fused_step: bool = False
) -> tuple[Optimizer, LRScheduler | None]:
    """A new optimizer over the parameters, in the groups that their names are in, and its schedule over `steps` steps (None:
    constant learning rates).

    fused_step: in torch's fused form where the optimizer has one and the options do not say otherwise: the same step, rounded
    elsewhere, in a third of the time. Raises ConfigError for names and options that torch does not have.
    """
    options: dict[str, Any] = {"lr": client.lr, **_numbers(client.optimizer_options, steps)}
    cls = _find(torch.optim, Optimizer, client.optimizer, "client.optimizer")
    if "weight_decay" in inspect.signature(cls).parameters:
        options["weight_decay"] = client.weight_decay
    elif client.weight_decay:
        raise ConfigError(f"client.weight_decay is no option of {cls.__name__}: set it to 0")
    if fused_step and "fused" in inspect.signature(cls).parameters and not CHOOSES & options.keys():
        options["fused"] = True
    eager.keep_compiler_out()
    optimizer = _make(cls, "client.optimizer_options", _in_groups(client, parameters, cls), **options)
    eager.step_plainly(optimizer)
    if client.schedule is None:
        return optimizer, None
    schedule = _find(lr_scheduler, LRScheduler, client.schedule, "client.schedule")
    if client.groups and SETS_RATES & inspect.signature(schedule).parameters.keys():
        raise ConfigError(
            f"client.schedule {client.schedule} sets every learning rate itself, and those of client.groups would be lost: "
            "use one that multiplies them, such as CosineAnnealingLR"
        )
    return optimizer, _make(schedule, "client.schedule_options", optimizer, **_numbers(client.schedule_options, steps))


def group_of(client: ClientConfig, name: str) -> int:
    """Which of `client.groups` decides for a tensor; their number, if none does and it has the options of `client`."""
    return next((i for i, group in enumerate(client.groups) if fnmatchcase(name, group.match)), len(client.groups))


def check_groups(client: ClientConfig, trained: Sequence[str]) -> None:
    """Raise ConfigError for a group that decides for none of the tensors that are trained in some round."""
    used = {group_of(client, name) for name in trained}
    for i, group in enumerate(client.groups):
        if i not in used:
            taken = "earlier groups take what it matches" if matching(trained, [group.match]) else "it matches none"
            raise ConfigError(
                f"client.groups.{i}.match '{group.match}' decides for no tensor that is trained: {taken}; the first of them is "
                f"'{trained[0]}', the last '{trained[-1]}'"
            )


def check(client: ClientConfig, dims: Mapping[str, int] | None = None, steps: int = 10) -> None:
    """Take a step over dummy tensors with these names and numbers of axes, and all `steps` of the schedule, so that a wrong name
    or option, an optimizer that wants another kind of step or tensor, and a schedule that ends too early are errors before any
    training."""
    kinds = {(group_of(client, name), n): name for name, n in (dims or {"": 2}).items()}
    parameters = {name: torch.zeros((2,) * n, requires_grad=True) for (_, n), name in kinds.items()}
    optimizer, schedule = build(client, parameters, steps)
    for parameter in parameters.values():
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


def _in_groups(client: ClientConfig, parameters: Mapping[str, Tensor], cls: type[Optimizer]) -> list[Any]:
    """What an optimizer takes: tensors, or where there are groups, those of each with its options."""
    if not client.groups:
        return list(parameters.values())
    found: dict[int, dict[str, Any]] = {}
    for name, tensor in parameters.items():
        place = group_of(client, name)
        if place not in found:
            own = vars(client.groups[place]) if place < len(client.groups) else {}
            found[place] = {"params": [], **{k: v for k, v in own.items() if k != "match" and v is not None}}
            if "weight_decay" in found[place] and "weight_decay" not in inspect.signature(cls).parameters:
                raise ConfigError(f"client.groups.{place}.weight_decay is no option of {cls.__name__}: leave it out")
        found[place]["params"].append(tensor)
    return list(found.values())


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
