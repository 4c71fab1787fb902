"""What the machine can do: where it decides numbers, it is written into the resolved config; where not, it is said in time."""

from __future__ import annotations

import os
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
    """The device as torch spells it. Raises ConfigError for what is no device, without a look at this machine."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in KINDS:
        raise ConfigError(f"runtime.device '{name}' is unknown. Choose from: auto, {', '.join(KINDS)}, or cuda:1 for the second GPU.")
    return name


def require_device(name: str) -> None:
    """Raise ConfigError for a device that this machine does not have."""
    device = torch.device(name)
    if device.type == "cpu":
        return
    backend = getattr(torch, "mps" if device.type == "mps" else device.type)
    count = backend.device_count() if device.type != "mps" or torch.backends.mps.is_available() else 0
    if (device.index or 0) >= count:
        there = f"it has {count} of the kind" if count else "torch finds none"
        raise ConfigError(f"runtime.device is {name}, which this machine does not have ({there}): set it to cpu or auto")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int | None:
    """Bytes that can be taken without swapping, in a container within its limit; None where the system does not say."""
    found = list[int]()
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    with suppress(OSError, ValueError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
        cache = [line.split()[1] for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines() if line[:14] == "inactive_file "]
        found.append(limit - used + int(cache[0] if cache else 0))
    return max(0, min(found)) if found else None
