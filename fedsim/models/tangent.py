"""The tangent of a plain vision transformer: its features and how they change along a direction of its weights, in one pass.

The pair (x, ẋ) goes through the layers, ẋ being the derivative of x at the pretrained weights θ₀ along a direction w (analytic
rules as in TMC's linearised layers, Liu & Soatto 2023, arXiv:2307.08114; the code is ours):

    linear      ẏ = W ẋ + ẇ_W x + ẇ_b
    GELU        ẏ = ẋ (Φ(x) + x φ(x))
    LayerNorm   ẏ = γ (ẋ − mean ẋ − x̂ mean(x̂ ẋ)) / σ + ẇ_γ x̂ + ẇ_β          with x̂ = (x − μ) / σ
    attention   Ȯ = (P ∘ Ṡ − P ∘ rowsum(P ∘ Ṡ)) V + P V̇                     with Ṡ = (Q̇ Kᵀ + Q K̇ᵀ) / √e, P = softmax(Q Kᵀ / √e)

Sums add both streams. x does not depend on w, so that nothing of it is differentiated, and ẋ is linear in w: the way back is one
pass through transposed maps. A tangent that is zero is None, and costs nothing.
"""

# b samples, L tokens, a tokens that ask, D width, h heads, e head width, d inputs of a layer, m outputs, r rank, K clients

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fedsim.core.contracts import Slots
from fedsim.core.errors import ModelError
from fedsim.core.messages import Tensors
from fedsim.models import inject, kernels

Pair: TypeAlias = tuple[Tensor, Tensor | None]  # x and ẋ
Projection: TypeAlias = Callable[[str, nn.Linear, int], Tensor]  # a layer's name, the layer, r -> s A₀ (r, d)

LOW_RANK, WEIGHT, BIAS = ".tangent_B", ".tangent_weight", ".tangent_bias"
FINAL = "layernorm"
IN_BLOCK = (
    "layernorm_before", "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "layernorm_after",
    "mlp.fc1", "mlp.fc2",
)  # fmt: skip


def blocks(encoder: nn.Module) -> Mapping[str, nn.Module]:
    """The blocks of a plain ViT by name. Raises ModelError for any other encoder: its forward pass is not known here."""
    layout: Any = getattr(encoder, "config", None)
    plain = getattr(layout, "model_type", None) == "vit" and getattr(layout, "hidden_act", "gelu") == "gelu"
    known = {n for n, _ in encoder.named_modules()}
    if not plain or not {"embeddings", "layers.0", FINAL} <= known:
        raise ModelError(
            "the adapter tangent knows plain ViTs with GELU only (model_type vit), and the backbone is a "
            f"{type(encoder).__name__}: use the adapter lora"
        )
    return inject.blocks(encoder)


@contextmanager
def linearised(encoder: nn.Module, tensors: Tensors, projection: Projection, slots: Slots | None = None) -> Iterator[None]:
    """While open, `encoder(pixel_values)` gives `h₀ + ḣ[w]` for the direction w that the tensors `<module>.tangent_*` are.

    Opened inside another one, the directions add up. slots: tensors may have a leading axis of clients. Raises ModelError for an
    encoder that is no plain ViT, and for a module that it does not have.
    """
    before = encoder.__dict__.get("forward")
    outer = before.parts if isinstance(before, _Linearised) else ()
    encoder.__dict__["forward"] = _Linearised(encoder, (*outer, tensors), projection, slots)
    try:
        yield
    finally:
        if before is None:
            del encoder.__dict__["forward"]
        else:
            encoder.__dict__["forward"] = before


class _Linearised:
    """The forward pass of a plain ViT with tangents, in the place of its own."""

    def __init__(self, encoder: Any, parts: Sequence[Tensors], projection: Projection, slots: Slots | None) -> None:
        self.encoder, self.parts, self.projection, self.slots = encoder, tuple(parts), projection, slots
        self.blocks = blocks(encoder)
        modules = {n.rpartition(".")[0] for part in parts for n in part}
        for name in modules:
            inject.submodule(encoder, name)
        places = [i for i, block in enumerate(self.blocks) if any(m.startswith(f"{block}.") for m in modules)]
        self.first_touched = min(places, default=len(self.blocks))

    def __call__(self, pixel_values: Tensor, first: int | None = None) -> Any:
        """An object with `last_hidden_state` (b, L, D); with `first`, of so many tokens only."""
        if self.slots is not None:
            self.slots.axis(len(pixel_values))
        encoder, summed = self.encoder, _Directions(self.parts)
        x_bLD = encoder.embeddings(pixel_values.to(encoder.embeddings.patch_embeddings.projection.weight.dtype))
        pair: Pair = x_bLD, None
        last = len(self.blocks) - 1
        for i, (name, block) in enumerate(self.blocks.items()):
            asking = first if i == last else None
            if i >= self.first_touched:
                pair = self._block(name, block, pair, asking, summed)
            elif asking is None:
                pair = block(pair[0], None), None
            else:
                pair = block(pair[0], None, first=asking), None
        y_bLD, t_bLD = self._norm(FINAL, encoder.layernorm, pair, summed)
        return SimpleNamespace(last_hidden_state=y_bLD if t_bLD is None else y_bLD + t_bLD)

    def _block(self, name: str, block: Any, pair: Pair, first: int | None, w: _Directions) -> Pair:
        """The same operations on x as the block's own, in the same order: a direction of zeros changes no bit."""
        normed = self._norm(f"{name}.layernorm_before", block.layernorm_before, pair, w)
        mixed = self._attention(f"{name}.attention", block.attention, normed, first, w)
        pair = _plus(mixed, _firsts(pair, first))
        inner = self._norm(f"{name}.layernorm_after", block.layernorm_after, pair, w)
        inner = gelu(self._linear(f"{name}.mlp.fc1", block.mlp.fc1, inner, w))
        return _plus(self._linear(f"{name}.mlp.fc2", block.mlp.fc2, inner, w), pair)

    def _attention(self, name: str, module: Any, pair: Pair, first: int | None, w: _Directions) -> Pair:
        asking = _firsts(pair, first)
        q = _heads(self._linear(f"{name}.q_proj", module.q_proj, asking, w), module.head_dim)
        k = _heads(self._linear(f"{name}.k_proj", module.k_proj, pair, w), module.head_dim)
        v = _heads(self._linear(f"{name}.v_proj", module.v_proj, pair, w), module.head_dim)
        out, dout = attention(q, k, v, module.scaling)
        return self._linear(f"{name}.o_proj", module.o_proj, (_joined(out), None if dout is None else _joined(dout)), w)

    def _linear(self, name: str, layer: nn.Linear, pair: Pair, w: _Directions) -> Pair:
        x, dx = pair
        dy = None if dx is None else kernels.product_with(layer, dx)
        low_rank, weight, bias = w.get(name + LOW_RANK), w.get(name + WEIGHT), w.get(name + BIAS)
        if low_rank is not None:
            a_rd = self.projection(name, layer, low_rank.shape[-1])
            dy = _plus_product(dy, F.linear(x, a_rd.to(x)), low_rank.to(x))
        if weight is not None:
            dy = _plus_product(dy, x, weight.to(x))
        if bias is not None:
            dy = _sum(dy, _per_row(bias.to(x), x))
        return layer(x), dy

    def _norm(self, name: str, norm: nn.LayerNorm, pair: Pair, w: _Directions) -> Pair:
        x, dx = pair
        y, mean, rstd = torch.native_layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        dy: Tensor | None = None
        if dx is not None:
            dy = _norm_tangent(dx, x, norm) if x.requires_grad else _NormTangent.apply(dx, x, mean, rstd, norm.weight)  # type: ignore[no-untyped-call]
        weight, bias = w.get(name + WEIGHT), w.get(name + BIAS)
        if weight is not None:
            hat = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
            dy = _sum(dy, hat * _per_row(weight.to(x), x))
        if bias is not None:
            dy = _sum(dy, _per_row(bias.to(x), x))
        return y, dy


class _Directions:
    """The sum of several directions, each tensor being made when it is asked for: training changes them in place."""

    def __init__(self, parts: Sequence[Tensors]) -> None:
        self.parts = parts

    def get(self, name: str) -> Tensor | None:
        total: Tensor | None = None
        for part in self.parts:
            if name in part:
                total = part[name] if total is None else total + part[name]
        return total


def gelu(pair: Pair) -> Pair:
    """y = x Φ(x) and ẏ = ẋ (Φ(x) + x φ(x))."""
    x, dx = pair
    if dx is None:
        return F.gelu(x), None
    slope: Tensor = torch.ops.aten.gelu_backward(torch.ones_like(x), x)
    return F.gelu(x), dx * slope


def attention(q: Pair, k: Pair, v: Pair, scale: float) -> Pair:
    """O = softmax(scale · Q Kᵀ) V and its tangent, Q (b, h, a, e), K and V (b, h, L, e).

    O is torch's own, as in the block, so that it has the block's bits; P is made once more for the tangent.
    """
    out_bhae = F.scaled_dot_product_attention(q[0], k[0], v[0], scale=scale)
    if q[1] is None and k[1] is None and v[1] is None:
        return out_bhae, None
    p_bhaL = torch.softmax((q[0] @ k[0].mT).mul_(scale), dim=-1)
    ds_bhaL = None if q[1] is None else q[1] @ k[0].mT
    if k[1] is not None:
        ds_bhaL = _sum(ds_bhaL, q[0] @ k[1].mT)
    dout_bhae = None if v[1] is None else p_bhaL @ v[1]
    if ds_bhaL is not None:
        weighted_bhaL = p_bhaL * ds_bhaL
        dp_bhaL = weighted_bhaL - p_bhaL * weighted_bhaL.sum(dim=-1, keepdim=True)
        dout_bhae = _sum(dout_bhae, dp_bhaL @ (v[0] * scale))
    return out_bhae, dout_bhae


def _norm_tangent(dx: Tensor, x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The same in operations that are differentiated by x too, for whoever asks what an image does to the features."""
    hat = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
    centred = dx - dx.mean(-1, keepdim=True) - hat * (hat * dx).mean(-1, keepdim=True)
    return norm.weight * centred * (x.var(-1, correction=0, keepdim=True) + norm.eps).rsqrt()


class _NormTangent(Function):
    """γ M ẋ with M = (1 − 1 1ᵀ/D − x̂ x̂ᵀ/D) / σ, which is symmetric: what torch's kernel applies to a gradient."""

    @staticmethod
    def forward(ctx: Any, dx: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gamma_D: Tensor) -> Tensor:
        ctx.save_for_backward(x, mean, rstd, gamma_D)
        return _symmetric(dx, x, mean, rstd).mul_(gamma_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, mean, rstd, gamma_D = ctx.saved_tensors
        return _symmetric(g * gamma_D, x, mean, rstd), None, None, None, None


def _symmetric(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """M g for every row."""
    out: Tensor = torch.ops.aten.native_layer_norm_backward(
        g.contiguous(), x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
    )[0]
    return out


def _heads(pair: Pair, width: int) -> Pair:
    """(b, L, h·e) as (b, h, L, e)."""
    x, dx = pair
    return _split(x, width), None if dx is None else _split(dx, width)


def _split(x_bLD: Tensor, width: int) -> Tensor:
    return x_bLD.view(*x_bLD.shape[:2], -1, width).transpose(1, 2)


def _joined(x_bhLe: Tensor) -> Tensor:
    """(b, h, L, e) as (b, L, h·e)."""
    return x_bhLe.transpose(1, 2).contiguous().flatten(2)


def _firsts(pair: Pair, first: int | None) -> Pair:
    x, dx = pair
    return pair if first is None else (x[:, :first], None if dx is None else dx[:, :first])


def _plus(a: Pair, b: Pair) -> Pair:
    return a[0] + b[0], b[1] if a[1] is None else _sum(b[1], a[1])


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def _plus_product(dy: Tensor | None, x: Tensor, w: Tensor) -> Tensor:
    """ẏ + x wᵀ for x (b, L, d) and w (m, d), or (K, m, d) with every client's own on its part of the batch."""
    shape = (*x.shape[:-1], w.shape[-2])
    if w.dim() == 2:  # as a product with wᵀ, whose gradient is several times faster than that of `F.linear` where r is small
        rows = x.reshape(-1, x.shape[-1])
        out = rows @ w.t() if dy is None else torch.addmm(dy.reshape(-1, w.shape[-2]), rows, w.t())
        return out.view(shape)
    parts = x.reshape(len(w), -1, x.shape[-1])
    out = parts @ w.mT if dy is None else torch.baddbmm(dy.reshape(len(w), -1, w.shape[-2]), parts, w.mT)
    return out.view(shape)


def _per_row(v: Tensor, x: Tensor) -> Tensor:
    """A vector (m,) for all rows of x (b, L, …), or (K, m) as (b, 1, m) with every client's own for its samples."""
    return v if v.dim() == 1 else v.repeat_interleave(len(x) // len(v), dim=0)[:, None]
