"""Optimizers that are made without torch's compiler take the very steps that torch's own take."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import optim
from torch.optim import Optimizer, lr_scheduler

from clients import eager

NEEDS_MORE = ("LBFGS", "SparseAdam")  # a closure, sparse gradients
OPTIMIZERS = [
    c
    for n, c in vars(optim).items()
    if inspect.isclass(c) and issubclass(c, Optimizer) and c is not Optimizer and n not in NEEDS_MORE
]


def after_steps(cls: type[Optimizer], plainly: bool) -> torch.Tensor:
    weight = torch.arange(15.0).reshape(5, 3).sin().requires_grad_()
    optimizer = cls([weight], lr=0.01)  # type: ignore[call-arg]
    if plainly:
        eager.step_plainly(optimizer)
        assert not isinstance(optimizer.step, type(cls.step)), "nothing was taken off"
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, 7)
    for _ in range(5):
        optimizer.zero_grad(set_to_none=True)
        (weight.square().sum() * 1.1).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return weight.detach()


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_steps_are_the_same_bits(cls: type[Optimizer]) -> None:
    assert torch.equal(after_steps(cls, plainly=True), after_steps(cls, plainly=False))


def test_no_gradient_is_recorded_in_a_step() -> None:
    weight = torch.ones(2, requires_grad=True)
    optimizer = optim.SGD([weight], lr=0.1)
    eager.step_plainly(optimizer)
    weight.grad = torch.ones(2)
    optimizer.step()  # in place on a leaf: an error where gradients are recorded
    assert weight.is_leaf
    assert torch.is_grad_enabled()
    assert weight.tolist() == pytest.approx([0.9, 0.9])


def test_a_differentiable_step_keeps_torchs_wrapper() -> None:
    optimizer = optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1, differentiable=True)
    before = optimizer.step
    eager.step_plainly(optimizer)
    assert optimizer.step == before


@pytest.mark.processes
def test_making_and_stepping_loads_no_compiler_and_compiling_still_works() -> None:
    program = """
import sys, torch
from clients import eager
eager.keep_compiler_out()
weight = torch.ones(2, requires_grad=True)
optimizer = torch.optim.AdamW([weight], lr=0.1)
eager.step_plainly(optimizer)
weight.sum().backward()
optimizer.step()
optimizer.zero_grad()
assert "torch._dynamo" not in sys.modules
double = torch.compile(lambda x: 2 * x, backend="eager")
assert double(torch.ones(2)).tolist() == [2, 2]
later = torch.optim.AdamW([torch.ones(2, requires_grad=True)], lr=0.1)
later.zero_grad()
"""
    root = Path(eager.__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
