"""What the machine can do: where it decides numbers, it is written into the resolved config; where not, it is said in time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.core.errors import ConfigError

KINDS = ("cpu", "cuda", "mps", "xpu")
Product: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x, W, b) -> x Wᵀ + b


@lru_cache(maxsize=1)
def onednn_product() -> Product | None:
    """oneDNN's matrix product in float32 on the CPU, None where this torch has none that works.

    torch sends float32 to MKL, which leaves AVX-512 unused on processors that are not Intel's. The operator that does not is
    one of torch's inner ones: it is held against `F.linear` before it is trusted.
    """
    try:
        operator: Any = torch.ops.mkldnn._linear_pointwise

        def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            out: Tensor = operator(x, weight, bias, "none", [], "")
            return out

        x, weight, bias = (torch.linspace(-1, 1, n).sin() for n in (2 * 3 * 8, 5 * 8, 5))
        x, weight = x.view(2, 3, 8), weight.view(5, 8)
        with torch.no_grad():
            works = torch.allclose(product(x, weight, bias), F.linear(x, weight, bias), atol=1e-5) and torch.allclose(
                product(x, weight.view(8, 5).t()), F.linear(x, weight.view(8, 5).t()), atol=1e-5
            )
    except (AttributeError, RuntimeError, TypeError):
        return None
    return product if works else None


def best_kernels(device: str) -> str:
    """What `runtime.kernels: auto` stands for: "onednn" on the CPU where it makes use of AVX-512, else "torch"."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "onednn" if device == "cpu" and wide and onednn_product() is not None else "torch"


def has_bf16(device: str) -> bool:
    """Whether bfloat16 products are faster than float32 here: AVX512-BF16 or AMX on the CPU, hardware support on a GPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_available() and bool(torch.cuda.is_bf16_supported(including_emulation=False))
    told = torch.cpu.get_capabilities() if kind == "cpu" else {}
    return bool(told.get("avx512_bf16") or told.get("amx_bf16"))


def known_device(name: str) -> str:
    """The name of a device, as it is. Raises ConfigError for what is none, without a look at this machine."""
    with suppress(RuntimeError):
        if torch.device(name).type in KINDS:
            return name
    raise ConfigError(f"runtime.device '{name}' is unknown. Choose from: auto, {', '.join(KINDS)}, or e.g. cuda:1.")


def require_device(name: str) -> None:
    """Raise ConfigError for a device that this machine does not have."""
    device = torch.device(name)
    if device.type == "cpu":
        return
    there = getattr(torch, device.type).device_count() if device.type != "mps" or torch.backends.mps.is_available() else 0
    if (device.index or 0) >= there:
        raise ConfigError(f"runtime.device is {name}, and torch finds {there} of this kind here: set it to cpu or auto")


def too_many_threads(threads: int) -> tuple[str, ...]:
    """What is to be said of more threads than cores. They are part of what a run is, so nobody changes them."""
    if threads <= cores():
        return ()
    text = f"runtime.threads is {threads}, but this machine has {cores()} core{'s' * (cores() > 1)}: that is far slower than"
    return (f"{text} runtime.threads={cores()}, whose numbers differ in their last digits",)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int | None:
    """Bytes that can be taken without swapping, in a container within its limit; None where the system does not say."""
    found = list[int]()
    with suppress(OSError, KeyError):
        found.append(1024 * _numbers(Path("/proc/meminfo"))["MemAvailable"])
    with suppress(OSError, ValueError, KeyError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
        found.append(limit - used + _numbers(group / "memory.stat")["inactive_file"])
    return max(0, min(found)) if found else None


def _numbers(path: Path) -> dict[str, int]:
    """Lines such as `MemFree: 12 kB`."""
    lines = [line.replace(":", " ").split() for line in path.read_text(encoding="utf-8").splitlines()]
    return {words[0]: int(words[1]) for words in lines}


def forget_peak() -> None:
    """Begin to measure the most memory of this process anew, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """The most memory that this process has held at once, in bytes; since `forget_peak` where the system can tell."""
    with suppress(OSError, ValueError, StopIteration):
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
