"""Optimizers without torch's compiler: torch imports it, a second of work, when the first one is made, used or not."""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

import torch
from torch.optim import Optimizer

MARK = "__dynamo_disable"  # where torch keeps what its `_disable_dynamo` wrapper calls


def keep_compiler_out() -> None:
    """Let the methods that torch shields from its compiler run as they are. Call it before an optimizer is made.

    Nothing here compiles an optimizer. Where the compiler is loaded already, or torch is built another way, nothing changes.
    """
    if "torch._dynamo" in sys.modules:
        return
    for method in vars(Optimizer).values():
        plain = getattr(method, "__wrapped__", None)
        if plain is not None and not hasattr(plain, MARK):
            setattr(plain, MARK, plain)


def step_plainly(optimizer: Optimizer) -> None:
    """Take the compiler's wrapper off `optimizer.step`: no gradient is recorded, as it would see to, and no hook is called.

    Left as it is where the options ask for gradients through the step, or it is wrapped in another way.
    """
    cls = type(optimizer)
    wrappers: list[Any] = [cls.step]
    while (inner := getattr(wrappers[-1], "__wrapped__", None)) is not None:
        wrappers.append(inner)
    switches_gradients = any(getattr(w, "__name__", "") and w.__code__.co_name == "_use_grad" for w in wrappers)
    if switches_gradients and not optimizer.defaults.get("differentiable"):
        optimizer.step = MethodType(torch.no_grad()(wrappers[-1]), optimizer)  # type: ignore[method-assign]
