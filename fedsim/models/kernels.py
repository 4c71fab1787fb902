"""Frozen linear layers in the fastest form that the machine has.

A frozen weight W gets no gradient, so that a LoRA layer needs no more than two products with W, forward and backward, and thin
ones: u = A x for the gradient of B, v = Bᵀ ∂y for that of A. Derivatives of derivatives are not there: nothing in local
training asks for them.
"""

# r rank, d inputs of a layer, m outputs, N rows (samples × tokens); W (m, d), A (r, d), B (m, r), x (N, d), y (N, m)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fedsim.core import hardware
from fedsim.core.errors import ModelError
from fedsim.core.hardware import Product

LowRank: TypeAlias = tuple[Tensor, Tensor, float]  # A, B, s
SMALL = 1 << 15  # weights below which rounding the factors costs what the faster product spares
TALL = 1024  # rows from which on oneDNN is ahead of MKL in products of two thin matrices


class FrozenLinear(nn.Linear):
    """`x Wᵀ + b`, plus `s x Aᵀ Bᵀ` while `low_rank` holds (A, B, s). Gradients flow to x, A and B.

    With `bf16`, products with W or W + s B A are of bfloat16, summed in float32; the weights themselves stay float32, since a
    small change that is added to a rounded weight would be lost. Inputs of another type than float32 go through torch's own
    operations, and so does a layer whose weight or bias somebody put a trained tensor in the place of.
    """

    product: Product
    bf16: bool
    rounded: tuple[Tensor, Tensor] | None = None  # a weight, and the same in bfloat16
    low_rank: LowRank | None = None

    def forward(self, input: Tensor) -> Tensor:
        trained = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if input.dtype != torch.float32 or not input.numel() or trained:
            return self._plain(input)
        function: Any
        if self.low_rank is None:
            function, weight = _Frozen, self._factor()
        else:
            summed = mergeable(self) and self._sum_pays(input.numel() // input.shape[-1])
            function, weight = (_Merged, self.weight) if summed else (_Beside, self._factor())
        out: Tensor = function.apply(input, weight, self.bias, *(self.low_rank or ()), self.product, self.bf16)
        return out

    def _factor(self) -> Tensor:
        """W as it is multiplied with."""
        if not self.bf16:
            return self.weight
        if self.rounded is None or self.rounded[0] is not self.weight:
            with torch.inference_mode(False), torch.no_grad():  # evaluation may be the first to ask, training keeps it
                self.rounded = self.weight, self.weight.to(torch.bfloat16)
        return self.rounded[1]

    def _sum_pays(self, rows: int) -> bool:
        """Whether W + s B A, made anew in every step, takes less work than x Aᵀ Bᵀ on so many rows."""
        return rows * (self.in_features + self.out_features) >= self.in_features * self.out_features

    def beside(self, a_rd: Tensor, b_mr: Tensor, scale: float) -> Beside:
        """Add the low-rank path of A and B from now on, until `remove` is called on what is handed back."""
        if self.low_rank is not None:
            raise ModelError("a low-rank path is applied to a layer that has one: stack the modules along the rank instead")
        self.low_rank = (a_rd, b_mr, scale)
        return Beside(self)

    def _plain(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        if self.low_rank is None:
            return y
        a_rd, b_mr, scale = self.low_rank
        return torch.add(y, F.linear(F.linear(x, a_rd.to(x.dtype)), b_mr.to(x.dtype)), alpha=scale)


@dataclass(frozen=True)
class Beside:
    """A low-rank path that is open."""

    layer: FrozenLinear

    def remove(self) -> None:
        del self.layer.low_rank  # back to the class's None


def freeze(encoder: nn.Module, kernels: str, precision: str) -> None:
    """Make every linear layer of an encoder on the CPU a `FrozenLinear`, in place.

    kernels: onednn | torch, for products in float32; precision: fp32 | bf16, of products with frozen weights in layers that
    are not small.
    Raises ModelError where torch has no oneDNN.
    """
    product = hardware.onednn_product() if kernels == "onednn" else torch_product
    if product is None:
        raise ModelError("runtime.kernels is onednn, but this build of torch has no such matrix product: set it to torch")
    for layer in encoder.modules():
        if type(layer) is nn.Linear:
            layer.requires_grad_(False)
            layer.__class__ = FrozenLinear
            layer.__dict__ |= {"product": product, "bf16": precision == "bf16" and layer.weight.numel() >= SMALL}


def mergeable(layer: nn.Linear) -> bool:
    """Whether W + s B A keeps small changes: not where W is in half precision, or the sum is rounded to where W is already."""
    if layer.weight.dtype in (torch.bfloat16, torch.float16):
        return False
    if not isinstance(layer, FrozenLinear) or not layer.bf16:
        return True
    if "fine" not in layer.__dict__:
        layer.__dict__["fine"] = not torch.equal(layer.weight, layer.weight.to(torch.bfloat16).float())
    return bool(layer.__dict__["fine"])


def product_with(layer: nn.Linear, x: Tensor) -> Tensor:
    """`x Wᵀ` of a frozen layer without its bias, in the layer's own form; gradients flow to x alone."""
    if isinstance(layer, FrozenLinear) and x.dtype == torch.float32 and x.numel():
        out: Tensor = _Frozen.apply(x, layer._factor(), None, layer.product, layer.bf16)  # type: ignore[no-untyped-call]
        return out
    return F.linear(x, layer.weight.detach().to(x.dtype))


def torch_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + b` in torch's own form."""
    return F.linear(x, weight, bias)


def _times(product: Product, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + b` in float32; with a bfloat16 W, x is rounded, the sum runs in float32, and the result is rounded once."""
    if weight.dtype == torch.float32:
        return product(x, weight, bias)
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).float()


def _own(y: Tensor) -> Tensor:
    """The same memory as a tensor that is nobody's view: an operation in place may follow a layer, and autograd forbids that on
    views made in a `Function`. (`.data` is a tenth of the time of the operators that do the same.)"""
    return y.data if y._is_view() else y


def _rows(x: Tensor) -> Tensor:
    """(…, d) as (N, d), dense."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _outer(product: Product, v_Nr: Tensor, x_Nd: Tensor) -> Tensor:
    """Σ v xᵀ, (r, d)."""
    return product(v_Nr.t(), x_Nd.t(), None) if len(x_Nd) >= TALL else v_Nr.t() @ x_Nd


class _Frozen(Function):
    """`x Wᵀ + b` with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product, bf16: bool) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.product = product
        return _own(_times(product, x, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return _times(ctx.product, _rows(dy), weight.t()).view(*dy.shape[:-1], -1), None, None, None, None


class _Merged(Function):
    """`x (W + s B A)ᵀ + b`. The sum is made in every step: on many rows that costs less than what it spares on x and y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a_rd: Tensor,
        b_mr: Tensor,
        scale: float,
        product: Product,
        bf16: bool,
    ) -> Tensor:
        merged = torch.addmm(weight, b_mr, a_rd, alpha=scale)
        merged = merged.to(torch.bfloat16) if bf16 else merged
        _keep(ctx, x, merged, a_rd, b_mr, scale, product)
        return _own(_times(product, x, merged, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, u_Nr, merged, _, b_mr = ctx.saved_tensors
        dy_Nm, dx = _rows(dy), None
        if ctx.needs_input_grad[0]:
            dx = _times(ctx.product, dy_Nm, merged.t()).view(*dy.shape[:-1], -1)
        v_Nr = ctx.product(dy_Nm, b_mr.t(), None) if ctx.needs_input_grad[3] else None
        return dx, None, None, *_low_rank_gradients(ctx, x, u_Nr, v_Nr, dy_Nm), None, None, None


class _Beside(Function):
    """`x Wᵀ + b + s x Aᵀ Bᵀ`, the second path in float32 whatever W is."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a_rd: Tensor,
        b_mr: Tensor,
        scale: float,
        product: Product,
        bf16: bool,
    ) -> Tensor:
        u_Nr = _keep(ctx, x, weight, a_rd, b_mr, scale, product)
        u_Nr = product(_rows(x), a_rd, None) if u_Nr is None else u_Nr
        y_Nm = _times(product, _rows(x), weight, bias).addmm_(u_Nr, b_mr.t(), alpha=scale)
        return _own(y_Nm.view(*x.shape[:-1], -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, u_Nr, weight, a_rd, b_mr = ctx.saved_tensors
        dy_Nm, dx, v_Nr = _rows(dy), None, None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
            v_Nr = ctx.product(dy_Nm, b_mr.t(), None)
        if ctx.needs_input_grad[0] and v_Nr is not None:
            dx = _times(ctx.product, dy_Nm, weight.t()).addmm_(v_Nr, a_rd, alpha=ctx.scale).view(*dy.shape[:-1], -1)
        return dx, None, None, *_low_rank_gradients(ctx, x, u_Nr, v_Nr, dy_Nm), None, None, None


def _keep(ctx: Any, x: Tensor, weight: Tensor, a_rd: Tensor, b_mr: Tensor, scale: float, product: Product) -> Tensor | None:
    """Save for the way back no more than it needs: x only if A is trained, u = x Aᵀ, which is handed back, only if B is."""
    trains_a, trains_b = ctx.needs_input_grad[3:5]
    u_Nr = product(_rows(x), a_rd, None) if trains_b else None
    ctx.save_for_backward(x if trains_a else None, u_Nr, weight, a_rd, b_mr)
    ctx.scale, ctx.product = scale, product
    return u_Nr


def _low_rank_gradients(
    ctx: Any, x: Tensor | None, u_Nr: Tensor | None, v_Nr: Tensor | None, dy_Nm: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """∂A = s Σ v xᵀ with v = Bᵀ ∂y, and ∂B = s Σ ∂y uᵀ: None for what is not trained."""
    da_rd = db_mr = None
    if ctx.needs_input_grad[3]:
        assert x is not None and v_Nr is not None
        da_rd = _outer(ctx.product, v_Nr, _rows(x)).mul_(ctx.scale)
    if u_Nr is not None:
        db_mr = _outer(ctx.product, u_Nr, dy_Nm).mul_(ctx.scale).t().contiguous()  # several times faster than ∂yᵀ u
    return da_rd, db_mr
