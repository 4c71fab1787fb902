"""Layers of other kinds that are linear maps, made `nn.Linear`, so that every adapter, statistic and kernel knows them."""

# b samples, C channels, H × W places

from __future__ import annotations

import torch
from torch import Tensor, nn

EMBEDDING = "embed"  # in the name of what turns pixels to tokens, which stays as it is


class Pointwise(nn.Module):
    """A convolution of 1 × 1 as a linear layer over the channels: (b, C, H, W) -> (b, C', H', W')."""

    stride: tuple[int, int]

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        for said in ("kernel_size", "stride", "padding", "dilation", "groups"):  # some models ask a convolution for its shape
            setattr(self, said, getattr(convolution, said))
        weight = convolution.weight.detach().flatten(1)
        self.linear = _linear(weight, convolution.bias)

    def forward(self, x_bCHW: Tensor) -> Tensor:
        down, across = self.stride
        x_bHWC = x_bCHW[:, :, ::down, ::across].movedim(1, -1)
        out_bHWC: Tensor = self.linear(x_bHWC)
        return out_bHWC.movedim(-1, 1)


def as_linear(encoder: nn.Module) -> None:
    """Replace, in place, convolutions of 1 × 1 by `Pointwise`, and transformers' Conv1D, which is a linear layer with the
    weight transposed, by `nn.Linear` under its own name."""
    for name, module in list(encoder.named_modules()):
        if _is_pointwise(module) and EMBEDDING not in name:
            encoder.set_submodule(name, Pointwise(module))
        elif type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
            encoder.set_submodule(name, _linear(module.weight.detach().t().contiguous(), module.bias))


def _is_pointwise(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.groups == 1 and module.padding in ((0, 0), "valid")
    )


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer that holds this weight (m, d) and bias (m,)."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer
