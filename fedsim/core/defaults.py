"""Torch as it starts: what a caller has set, which holds for the whole process, must not move our bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache, partial
from typing import Any

import torch

Switch = tuple[Callable[[], Any], Callable[[Any], Any], Any]  # how it is read, how it is set, what torch starts with
PRECISIONS = {  # torch's newer settings of float32 products, those first that others follow
    ("generic", "all"): "none",
    ("cuda", "all"): "none",
    ("cuda", "matmul"): "none",
    ("cuda", "conv"): "tf32",
    ("cuda", "rnn"): "tf32",
    **{("mkldnn", operator): "none" for operator in ("all", "matmul", "conv", "rnn")},
}


@contextmanager
def torch_defaults(threads: int) -> Iterator[None]:
    """Torch with so many threads, and all else as it starts: float32 on the CPU, gradients, no autocast, oneDNN, its own choice
    of kernels and of their precision. Afterwards everything is as the caller had it.

    Not to be left open across a `yield`: what the caller does there goes by the caller's settings.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in _device_kinds():
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        switches, older = (_threads(threads), *_switches()), _matmul_precision()
        before = [_changed(*switch) for switch in switches]
        if older not in (None, "highest"):  # it writes newer settings too: changed after them, and put back before them
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if older not in (None, _matmul_precision()):
                torch.set_float32_matmul_precision(older)
            for (read, write, _), value in zip(reversed(switches), reversed(before), strict=True):
                _changed(read, write, value)  # what we left alone, too: a user's plug-in may have changed it


def _changed(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Any:
    """Set to a value; what it was."""
    before = read()
    if before != value:
        write(value)
    return before


def _threads(count: int) -> Switch:
    return torch.get_num_threads, torch.set_num_threads, count


def _matmul_precision() -> str | None:
    """The older setting; None where the newer ones contradict it, and torch refuses to say."""
    with suppress(RuntimeError):
        return torch.get_float32_matmul_precision()
    return None


@lru_cache(maxsize=1)
def _device_kinds() -> tuple[str, ...]:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ("cpu",) if found is None else ("cpu", found.type)


@lru_cache(maxsize=1)
def _switches() -> tuple[Switch, ...]:
    cuda, cudnn, einsum = torch.backends.cuda, torch.backends.cudnn, torch.backends.opt_einsum
    switches: list[Switch] = [
        (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        (_deterministic, _set_deterministic, (False, False)),
        (torch._C._get_nnpack_enabled, torch.backends.nnpack.set_flags, True),
        _attribute(torch.backends.mkldnn, "enabled", True),
        _attribute(torch.backends.mkldnn, "deterministic", False),
        _attribute(cudnn, "enabled", True),
        _attribute(cudnn, "benchmark", False),
        _attribute(cudnn, "deterministic", False),
        _attribute(cuda.matmul, "allow_fp16_reduced_precision_reduction", True),
        _attribute(cuda.matmul, "allow_bf16_reduced_precision_reduction", True),
        _attribute(cuda.matmul, "allow_fp16_accumulation", False),
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp, True),  # attention's kernels on the CPU as well
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, True),
        (cuda.math_sdp_enabled, cuda.enable_math_sdp, True),
        (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp, True),
        (cuda.fp16_bf16_reduction_math_sdp_allowed, cuda.allow_fp16_bf16_reduction_math_sdp, False),
    ]
    if einsum.is_available():
        switches += [_attribute(einsum, "enabled", True), _attribute(einsum, "strategy", "auto")]
    for where, start in PRECISIONS.items():
        read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
        switches.append((partial(read, *where), partial(write, *where), start))
    return tuple(switches)


def _attribute(owner: Any, name: str, start: Any) -> Switch:
    return partial(getattr, owner, name), partial(setattr, owner, name), start


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])
