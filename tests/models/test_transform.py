"""Batched image operations against PIL, closed forms, and their own generator."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from fedsim.core.config import TransformConfig
from fedsim.core.errors import ConfigError, ModelError
from fedsim.models import transform
from fedsim.models.transform import Transform

AUGMENTS = ("flip", "crop", "crop_flip", "affine")


def made(size: tuple[int, int] = (8, 8), channels: int = 1, **options: Any) -> Transform:
    mean, std = options.pop("own_mean", (0.5,)), options.pop("own_std", (0.5,))
    return transform.build(TransformConfig(**options), size, channels, mean, std, torch.device("cpu"))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_grey_and_colour_are_normalised_per_channel() -> None:
    grey = noise(2, 8, 8)
    want = (grey.double() / 255 - 0.5) / 0.5
    assert torch.allclose(made()(grey).double(), want[:, None], atol=1e-6)
    assert torch.equal(made()(grey), made()(grey[..., None]))
    colour = noise(2, 8, 8, 3)
    out = made(channels=3, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 4.0])(colour)
    for c in range(3):
        assert torch.allclose(out[:, c].double(), (colour[..., c].double() / 255 - (c + 1) / 10) / 2**c, atol=1e-6)


def test_grey_is_repeated_for_a_colour_backbone_and_colour_never_squeezed() -> None:
    grey = noise(2, 8, 8)
    out = made(channels=3, own_mean=(0.5, 0.4, 0.3), own_std=(0.5,))(grey)
    assert out.shape == (2, 3, 8, 8)
    assert torch.allclose(out[:, 2].double(), (grey.double() / 255 - 0.3) / 0.5, atol=1e-6)
    with pytest.raises(ModelError, match="images with 3 channels do not fit a backbone of 1 channel"):
        made()(noise(2, 8, 8, 3))
    with pytest.raises(ModelError, match=r"shape \(8, 8\)"):
        made()(noise(8, 8))


def test_number_of_means() -> None:
    with pytest.raises(ConfigError, match=r"transform\.mean has 2 values, but the backbone takes 3 channel"):
        made(channels=3, mean=[0.1, 0.2])


@pytest.mark.parametrize("size", [(20, 20), (5, 7), (8, 16)])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR), ("nearest", Image.Resampling.NEAREST)],
)
def test_resize_is_that_of_pil(size: tuple[int, int], ours: str, theirs: Image.Resampling) -> None:
    image = noise(12, 10) // 4 + 96  # PIL clamps after each axis: stay away from the ends
    want = np.asarray(Image.fromarray(image.numpy()).resize((size[1], size[0]), theirs)).astype(float)
    got = transform.resize(image[None, None].float(), size, ours)[0, 0]
    assert np.abs(got.numpy() - want).max() <= (0 if ours == "nearest" else 1.01)  # PIL rounds after each axis


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("shape", [(6, 8, 8), (6, 5, 7), (6, 12, 20)])
def test_same_generator_same_bits_and_no_global_draws(augment: str, shape: tuple[int, ...]) -> None:
    change, batch, state = made(augment=augment), noise(*shape), torch.random.get_rng_state()
    outs = [change(batch, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(o.shape == (6, 1, 8, 8) and float(o.min()) >= -1 and float(o.max()) <= 1 for o in outs)
    assert torch.equal(change(batch), made()(batch))  # no generator, no augmentation


def test_flip_mirrors_about_half() -> None:
    batch = noise(200, 4, 4)
    plain = made((4, 4))(batch)
    out = made((4, 4), augment="flip")(batch, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(o, p.flip(-1)) for o, p in zip(out, plain, strict=True)]
    assert all(m or torch.equal(o, p) for m, o, p in zip(mirrored, out, plain, strict=True))
    assert 70 < sum(mirrored) < 130


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), height=st.integers(4, 30), width=st.integers(4, 30))
def test_crops_lie_inside_with_the_area_and_ratio_promised(seed: int, height: int, width: int) -> None:
    theta = transform.crop_boxes(torch.zeros(50, 1, height, width), torch.Generator().manual_seed(seed)).double()
    w, h, x, y = theta[:, 0, 0], theta[:, 1, 1], theta[:, 0, 2], theta[:, 1, 2]
    assert not theta[:, 0, 1].any()
    assert not theta[:, 1, 0].any()
    assert bool((w + x.abs() <= 1 + 1e-6).all())
    assert bool((h + y.abs() <= 1 + 1e-6).all())
    inside = (w < 1) & (h < 1)
    assert bool(((w * h)[inside] >= transform.CROP_AREA[0] - 1e-6).all())
    ratio = (w * width / (h * height))[inside]
    assert bool(((ratio >= 3 / 4 - 1e-5) & (ratio <= 4 / 3 + 1e-5)).all())


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), height=st.integers(4, 30), width=st.integers(4, 30))
def test_affine_changes_are_small_similarities_in_pixels(seed: int, height: int, width: int) -> None:
    theta = transform.affine_changes(torch.zeros(50, 1, height, width), torch.Generator().manual_seed(seed)).double()
    to_pixels = torch.diag(torch.tensor([width / 2, height / 2], dtype=torch.float64))
    linear = to_pixels @ theta[:, :, :2] @ to_pixels.inverse()
    gram = linear @ linear.transpose(1, 2)  # of a rotation times a factor: that factor squared on the diagonal
    factor = gram[:, 0, 0].sqrt()
    assert torch.allclose(gram, factor.square()[:, None, None] * torch.eye(2, dtype=torch.float64), atol=1e-5)
    assert bool(((factor <= 1.1 + 1e-5) & (factor >= 1 / 1.1 - 1e-5)).all())
    turn = torch.atan2(linear[:, 1, 0], linear[:, 0, 0])
    assert float(turn.abs().max()) <= math.radians(10) + 1e-5
    assert float(theta[:, :, 2].abs().max()) <= 0.2 + 1e-6  # a grid is two units wide


def test_warp_that_changes_nothing_and_warp_that_shifts() -> None:
    x = noise(2, 1, 6, 6).float()
    change = made((6, 6), interpolation="bilinear")
    still = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(2, -1, -1)
    assert torch.allclose(change._warped(x, still), x, atol=1e-3)
    right = torch.tensor([[1.0, 0, 2 / 6], [0, 1, 0]]).expand(2, -1, -1)  # look one pixel to the right
    moved = change._warped(x, right)
    assert torch.allclose(moved[..., :5], x[..., 1:], atol=1e-3)
    assert float(moved[..., 5].abs().max()) < 1e-3  # what comes in is black
    large = made((3, 3), interpolation="bilinear")
    assert large._warped(x, still).shape == (2, 1, 6, 6)  # the antialiased resize comes after
