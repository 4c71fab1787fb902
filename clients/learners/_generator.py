"""What methods share whose server trains a generator of images against the deployed model, without data: the generator, and what
is asked of its images."""

# b images, z a latent vector (Z numbers), C channels, H height, W width, w width of the generator

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from clients import eager
from fedsim.core.contracts import TEACHER
from fedsim.core.messages import Tensors
from fedsim.models import inject

NEEDS: Mapping[str, str] = {
    f"context {TEACHER}": "trains a generator for the tasks that follow, but there is one task (stream.tasks: "
    "{stream.tasks}, stream.joint: {stream.joint}): use several tasks"
}
REFUSES: Mapping[str, str] = {"texts": "trains a generator of images, but data.source {data.source} has texts"}
SMALLEST = 8  # pixels along the longer side from which on a size is doubled
LEAK, MOMENTUM, EPS = 0.2, 0.1, 1e-5
MEAN, VARIANCE = ".running_mean", ".running_var"


@dataclass(frozen=True)
class ImageGenerator:
    """Images of a shape from latent vectors, as functions of its tensors.

        z -> linear to 2w channels at 1/2ⁿ of the size -> batch norm
          -> n times: nearest-neighbour upsampling by 2, 3 × 3 convolution, batch norm, leaky ReLU -> 3 × 3 convolution -> sigmoid

    2w channels, w after the last upsampling, as in DeepInversion's kin (TARGET and MFCL among them, whose n is 2). Here n is the
    smallest with which the first size is at most 8 pixels along the longer side, 1 at least: 2 for 28 and 32 pixels, 5 for 224.
    shape: of an image as the data's are, (H, W) or (H, W, C).
    """

    latent: int
    width: int
    shape: tuple[int, ...]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) before the first upsampling and after each."""
        height, width = self.shape[:2]
        doublings = max(1, math.ceil(math.log2(max(height, width) / SMALLEST)))
        return [(math.ceil(height / 2**i), math.ceil(width / 2**i)) for i in reversed(range(doublings + 1))]

    @property
    def channels(self) -> int:
        return self.shape[2] if len(self.shape) == 3 else 1

    def init(self, draw: torch.Generator, device: torch.device) -> dict[str, Tensor]:
        """Torch's usual draws for linear layers and convolutions; batch norms start as the identity."""
        (h, w), *stages = self.sizes
        last = len(stages)
        shapes: dict[str, tuple[int, ...]] = {"linear": (2 * self.width * h * w, self.latent)}
        for i in range(1, last + 1):
            shapes[f"conv{i}"] = (self.width if i == last else 2 * self.width, 2 * self.width, 3, 3)
        shapes["image"] = (self.channels, self.width, 3, 3)
        tensors: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            bound = 1 / math.sqrt(math.prod(shape[1:]))
            for part, size in (("weight", shape), ("bias", shape[:1])):
                tensors[f"{name}.{part}"] = torch.empty(size).uniform_(-bound, bound, generator=draw)
        for i in range(last + 1):
            width = self.width if i == last else 2 * self.width
            ones, zeros = torch.ones(width), torch.zeros(width)
            norm = {".weight": ones, ".bias": zeros, MEAN: zeros, VARIANCE: ones}
            tensors |= {f"norm{i}{part}": t.clone() for part, t in norm.items()}
        return {n: t.to(device) for n, t in tensors.items()}

    def images(self, tensors: Tensors, z_bZ: Tensor, training: bool = False) -> Tensor:
        """(b, *shape) in 0 … 1. training: normalised by the batch's own moments, of which the running ones take a share."""
        (h, w), *stages = self.sizes
        x = F.linear(z_bZ, tensors["linear.weight"], tensors["linear.bias"]).view(len(z_bZ), -1, h, w)
        x = _norm(tensors, "norm0", x, training)
        for i, size in enumerate(stages, 1):
            x = _conv(tensors, f"conv{i}", F.interpolate(x, size=size, mode="nearest"))
            x = F.leaky_relu(_norm(tensors, f"norm{i}", x, training), LEAK)
        x_bCHW = _conv(tensors, "image", x).sigmoid()
        return x_bCHW.movedim(1, -1).reshape(len(x_bCHW), *self.shape)

    def latents(self, count: int, draw: torch.Generator, device: torch.device) -> Tensor:
        """Standard normal, drawn on the CPU."""
        return torch.randn(count, self.latent, generator=draw).to(device)


def trained(tensors: Tensors) -> dict[str, Tensor]:
    """A copy whose tensors want gradients, but for running moments."""
    return {n: t.detach().clone().requires_grad_(not n.endswith((MEAN, VARIANCE))) for n, t in tensors.items()}


def leaves(tensors: Tensors) -> list[Tensor]:
    """Those that want gradients."""
    return [t for t in tensors.values() if t.requires_grad]


def adam(groups: Sequence[Mapping[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> Adam:
    """An optimizer without torch's compiler behind it."""
    eager.keep_compiler_out()
    optimizer = Adam([dict(group) for group in groups], lr=lr, betas=betas)
    eager.step_plainly(optimizer)
    return optimizer


def as_bytes(images: Tensor) -> Tensor:
    """0 … 1 as uint8, the nearest."""
    return (255 * images.detach()).round().to(torch.uint8)


@contextmanager
def moments_watched(encoder: nn.Module) -> Iterator[list[Tensor]]:
    """While open, every forward pass adds to the list, for every batch norm with running moments μ, σ² and what goes into it,

        ‖mean − μ‖ + ‖variance − σ²‖

    (Yin et al. 2020, DeepInversion). Empty for a backbone without such layers, as transformers are."""
    found: list[Tensor] = []

    def watch(norm: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0].transpose(0, 1).flatten(1)
        found.append((x.mean(1) - norm.running_mean).norm() + (x.var(1, correction=0) - norm.running_var).norm())

    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
    with inject.installed([partial(norm.register_forward_pre_hook, watch) for norm in norms]):
        yield found


def smoothed(images: Tensor, sigma: float = 1.0, size: int = 5) -> Tensor:
    """(b, H, W) or (b, H, W, C), each channel convolved with a Gaussian of `size`², mirrored at its borders."""
    away = torch.arange(size, dtype=images.dtype, device=images.device) - size // 2
    bell = torch.exp(-(away**2) / (2 * sigma**2))
    bell = bell / bell.sum()
    x_n1HW = images.reshape(*images.shape[:3], -1).movedim(-1, 1).flatten(0, 1)[:, None]
    x_n1HW = F.pad(x_n1HW, [size // 2] * 4, mode="reflect")
    x_n1HW = F.conv2d(x_n1HW, torch.outer(bell, bell)[None, None])
    return x_n1HW.view(len(images), -1, *images.shape[1:3]).movedim(1, -1).reshape(images.shape)


def _norm(tensors: Tensors, name: str, x: Tensor, training: bool) -> Tensor:
    mean, variance = tensors[name + MEAN], tensors[name + VARIANCE]
    return F.batch_norm(x, mean, variance, tensors[f"{name}.weight"], tensors[f"{name}.bias"], training, MOMENTUM, EPS)


def _conv(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    return F.conv2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], padding=1)
