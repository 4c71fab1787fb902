"""Images as the backbone wants them: batched tensor operations on the device, random only through a given generator."""

# b samples, C channels, H height, W width

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.core.config import TransformConfig
from fedsim.core.errors import ConfigError, ModelError

CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random resized crop, as in torchvision
MAX_TURN, MAX_SHIFT, MAX_SCALE = math.radians(10), 0.1, 1.1  # of an affine change: angle, share of the size, factor


@dataclass(frozen=True)
class Transform:
    """`uint8 (b, H, W) or (b, H, W, C) -> float32 (b, C, *size)`, `(x / 255 − mean) / std` per channel. Pixels may be float32 in
    0 … 255, and get gradients.

    size: the backbone's (height, width); mean, std: (C, 1, 1) in 0..1; augment and interpolation as in TransformConfig.
    Grey images are repeated over the channels of a colour backbone.
    """

    size: tuple[int, int]
    mean: Tensor
    std: Tensor
    augment: str
    interpolation: str

    def __call__(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Resize and normalise; augment as well when there is a generator. Raises ModelError if the channels do not fit."""
        x = _channels_first(pixels, self.mean.shape[0])
        if generator is not None and self.augment != "none":
            x = self._augmented(x, generator)
        if x.shape[-2:] != self.size:
            x = resize(x, self.size, self.interpolation)
        if x.shape[1] != self.mean.shape[0]:
            x = x.expand(-1, self.mean.shape[0], -1, -1)
        return (x / 255 - self.mean) / self.std

    def _augmented(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if self.augment in ("flip", "crop_flip"):
            mirrored = uniform(len(x), 0, 1, generator, x) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        if self.augment == "flip":
            return x
        theta = crop_boxes(x, generator) if self.augment != "affine" else affine_changes(x, generator)
        return self._warped(x, theta)

    def _warped(self, x: Tensor, theta: Tensor) -> Tensor:
        """Sampled along `theta` (b, 2, 3) at the larger of both sizes: small images are enlarged in the same step, the
        detail of large ones is kept for the antialiased resize that follows. Outside of the image is black."""
        height, width = max(x.shape[-2], self.size[0]), max(x.shape[-1], self.size[1])
        grid = F.affine_grid(theta, [len(x), x.shape[1], height, width], align_corners=False)
        warped = F.grid_sample(x, grid, mode=self.interpolation, padding_mode="zeros", align_corners=False)
        return warped.clamp(0, 255)


def build(
    config: TransformConfig,
    size: tuple[int, int],
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
) -> Transform:
    """The transform of a run: `config.mean` and `config.std` go before the backbone's own. One value is for every channel."""
    scales = []
    for key, own, default in (("mean", config.mean, mean), ("std", config.std, std)):
        values = list(default if own is None else own)
        if len(values) not in (1, channels):
            raise ConfigError(
                f"transform.{key} has {len(values)} values, but the backbone takes {channels} channel(s): give 1 or {channels}"
            )
        scales.append(torch.tensor(values * (channels // len(values)), dtype=torch.float32, device=device)[:, None, None])
    return Transform(size, scales[0], scales[1], config.augment, config.interpolation)


def resize(x: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Antialiased resize of float (b, C, H, W) in 0..255, clamped to that range as image libraries do."""
    if interpolation == "nearest":
        return F.interpolate(x, size=size, mode="nearest-exact")
    return F.interpolate(x, size=size, mode=interpolation, antialias=True, align_corners=False).clamp(0, 255)


def crop_boxes(x: Tensor, generator: torch.Generator) -> Tensor:
    """Sampling matrices (b, 2, 3) of random resized crops: area uniform in CROP_AREA, log aspect ratio uniform in CROP_RATIO.

    A side that comes out longer than the image is cut to it.
    """
    b, aspect = len(x), x.shape[-1] / x.shape[-2]
    area = uniform(b, *CROP_AREA, generator, x)
    ratio = uniform(b, math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1]), generator, x).exp() / aspect
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left, top = uniform(b, -1, 1, generator, x) * (1 - w), uniform(b, -1, 1, generator, x) * (1 - h)
    zero = torch.zeros_like(w)
    return torch.stack([torch.stack([w, zero, left], 1), torch.stack([zero, h, top], 1)], 1)


def affine_changes(x: Tensor, generator: torch.Generator) -> Tensor:
    """Sampling matrices (b, 2, 3) of small rotations, shifts and scales, uniform within MAX_TURN, MAX_SHIFT, MAX_SCALE."""
    b, aspect = len(x), x.shape[-1] / x.shape[-2]
    turn = uniform(b, -MAX_TURN, MAX_TURN, generator, x)
    scale = uniform(b, -math.log(MAX_SCALE), math.log(MAX_SCALE), generator, x).exp()
    right, down = (uniform(b, -2 * MAX_SHIFT, 2 * MAX_SHIFT, generator, x) for _ in range(2))
    cos, sin = turn.cos() * scale, turn.sin() * scale
    return torch.stack([torch.stack([cos, -sin / aspect, right], 1), torch.stack([sin * aspect, cos, down], 1)], 1)


def uniform(count: int, low: float, high: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """`count` draws from [low, high) on the device of `like`; the same from the same state of the generator."""
    return (torch.rand(count, generator=generator, device=generator.device) * (high - low) + low).to(like)


def _channels_first(pixels: Tensor, channels: int) -> Tensor:
    """Float (b, 1 or C, H, W) in 0..255."""
    if pixels.dim() not in (3, 4) or (pixels.dim() == 4 and pixels.shape[-1] not in (1, channels)):
        got = f"{pixels.shape[-1]} channels" if pixels.dim() == 4 else f"shape {tuple(pixels.shape)}"
        raise ModelError(
            f"images with {got} do not fit a backbone of {channels} channel(s): expected uint8 (N, H, W) or (N, H, W, {channels})"
        )
    x = pixels[:, None] if pixels.dim() == 3 else pixels.movedim(-1, 1)
    return x.to(torch.float32)
