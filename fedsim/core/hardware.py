"""What the machine can do, where it decides numbers: found out once, and written into the resolved config."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

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
