"""What happens on the wire: each channel against closed forms, and the chain that applies them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedsim.core import config as configs
from fedsim.core import rng
from fedsim.core.contracts import Channel, Parcel
from tests.tiny import same_bits

FEDAVG = ("server.aggregator=fedavg", "server.consolidator=none")


def channel(name: str, **options: object) -> Channel:
    made: Channel = configs.build("channels", {"name": name, **options})
    return made


def parcel(task: int = 0, **delta: Tensor) -> Parcel:
    return Parcel(client_id=0, task=task, round=0, delta=delta)


def sent(one: Channel, given: Parcel, number: int = 0, memory: dict[str, Tensor] | None = None) -> Parcel:
    start = {n: torch.zeros_like(t) for n, t in given.delta.items()}
    return one.send(start, given, memory or {}, rng.torch_stream(number, "test"))[0]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng.torch_stream(seed, "numbers"))


# ---------------------------------------------------------------- quantise


@pytest.mark.parametrize(("bits", "levels"), [(8, 127), (4, 7)])
@pytest.mark.parametrize("block", [None, 7, 1])
def test_quantised_numbers_lie_on_the_grid_of_their_block(bits: int, levels: int, block: int | None) -> None:
    x = normal(5, 9)
    size = block or 45
    found = sent(channel("quantise", bits=bits, block=block), parcel(w=x))
    for part, read in zip(x.flatten().split(size), found.delta["w"].flatten().split(size), strict=True):
        step = float(part.abs().max()) / levels
        on_grid = read.double() / step
        assert (on_grid - on_grid.round()).abs().max() < 1e-4
        assert (read - part).abs().max() < step * (1 + 1e-6)
        assert read.abs().max() <= part.abs().max()
    assert found.codes["w"].num_bytes == math.ceil((45 * bits + 32 * math.ceil(45 / size)) / 8)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantisation_is_true_in_the_mean_and_half_a_step_wide(bits: int) -> None:
    """Numbers at known places between two steps: the share that is rounded up is their distance from the lower one."""
    levels = 2 ** (bits - 1) - 1
    x, draws = torch.tensor([levels, 0.0, 0.25, 1.5, -0.9, -levels + 0.5]), 20_000
    many = x.repeat(draws, 1)  # each row is a block, with scale `levels`: the step is 1
    read = sent(channel("quantise", bits=bits, block=6), parcel(w=many)).delta["w"]
    up = (x - x.floor()).double()
    error = read.double().mean(dim=0) - x.double()
    assert (error.abs() <= 4 * (up * (1 - up) / draws).sqrt() + 1e-6).all()
    rms = (read - many).double().square().mean(dim=0).sqrt()
    assert torch.allclose(rms, (up * (1 - up)).sqrt(), atol=0.01) and rms.max() <= 0.5 + 0.01
    assert channel("quantise", bits=bits, block=6).bound({"w": many}) == pytest.approx(math.sqrt(many.numel()))


def test_quantisation_of_nothing_and_of_zeros_and_extremes() -> None:
    odd = {"none": torch.zeros(0, 3), "zeros": torch.zeros(4), "huge": torch.tensor([3e38, -3e38]), "tiny": torch.tensor([1e-40])}
    found = sent(channel("quantise"), parcel(**odd))
    for name in ("none", "zeros", "huge"):
        assert torch.equal(found.delta[name], odd[name])
    assert torch.allclose(found.delta["tiny"], odd["tiny"], rtol=1e-4)
    assert found.codes["none"].num_bytes == 0 and found.codes["zeros"].num_bytes == 4 + 4


# ---------------------------------------------------------------- topk


def test_topk_keeps_the_largest_and_remembers_the_rest_bit_for_bit() -> None:
    one, memory, old = channel("topk", share=0.07), {}, torch.zeros(10, 10)
    for number in range(5):
        x = normal(10, 10, seed=number)
        found, memory = one.send({}, parcel(w=x), memory, rng.torch_stream(0, "unused"))
        whole, read, left = x + old, found.delta["w"], memory["w"]
        assert torch.equal(read + left, whole) and not ((read != 0) & (left != 0)).any()
        assert int((read != 0).sum()) == 7  # 0.07 · 100, which in binary is a little more
        kept, rest = whole[read != 0].abs(), whole[read == 0].abs()
        assert kept.min() >= rest.max()
        old = left
    assert old.abs().max() > 0


def test_topk_with_feedback_loses_nothing_over_time() -> None:
    """Σ sent = Σ changes − what is still left, and a constant change gets through at its own rate; without feedback most never
    does."""
    x = torch.linspace(1, 2, 20)
    totals = {}
    for feedback in (True, False):
        one, memory, total = channel("topk", share=0.1, feedback=feedback), {}, torch.zeros(20)
        for _ in range(200):
            found, memory = one.send({}, parcel(w=x), memory, rng.torch_stream(0, "unused"))
            total = total + found.delta["w"]
        totals[feedback] = total / 200
    assert torch.allclose(totals[True], x, rtol=0.1)
    assert int((totals[False] == 0).sum()) == 18 and not memory


@pytest.mark.parametrize(
    ("share", "size", "numbers", "places"),
    [
        (0.01, 1000, 10, 10 * 10),  # positions in ⌈log₂ 1000⌉ bits
        (0.5, 1000, 500, 1000),  # a bitmap is less than 500 · 10
        (0.1, 1024, 103, 1024),  # 103 · 10 = 1030 > 1024
        (1.0, 1000, 1000, 0),
        (0.3, 1, 1, 0),
        (1e-9, 33, 1, 6),
    ],
)
def test_topk_counts_values_and_positions(share: float, size: int, numbers: int, places: int) -> None:
    for bits, chain in ((32, []), (8, [channel("quantise")])):
        found = sent(channel("topk", share=share), parcel(w=normal(size)))
        for further in chain:
            found = sent(further, found)
        scales = 32 * math.ceil(numbers / 256) if chain else 0
        assert found.code("w").num_bytes == math.ceil((numbers * bits + places + scales) / 8)
        assert int((found.delta["w"] != 0).sum()) <= numbers


def test_a_residual_ends_with_its_task_and_waits_for_its_tensor() -> None:
    one, x = channel("topk", share=0.1), normal(20)
    _, memory = one.send({}, parcel(a=x, b=x), {}, rng.torch_stream(0, "unused"))
    kept = memory["b"]
    found, memory = one.send({}, parcel(a=x), memory, rng.torch_stream(0, "unused"))  # a round in which b is not trained
    assert torch.equal(memory["b"], kept) and torch.equal(found.delta["a"] + memory["a"], x + kept)
    found, again = one.send({}, Parcel(0, 0, 0, {}), memory, rng.torch_stream(0, "unused"))  # a pass for statistics
    assert same_bits(again, memory) and not found.delta
    found, after = one.send({}, parcel(task=1, a=x), memory, rng.torch_stream(0, "unused"))
    assert torch.equal(found.delta["a"] + after["a"], x) and "b" not in after


DECLARING = [
    channel("topk", share=0.2),
    channel("quantise", bits=4),
    channel("quantise", block=None),
    channel("clip_noise", clip=2.0),
]


@pytest.mark.parametrize("one", DECLARING)
def test_channels_keep_to_the_error_that_they_declare(one: Channel) -> None:
    for number in range(20):
        x = {"a": normal(7, 9, seed=number), "b": normal(130, seed=number) * 10**number, "c": torch.zeros(3)}
        found = sent(one, parcel(**x), number)
        off = math.sqrt(sum(float((found.delta[n].double() - t.double()).square().sum()) for n, t in x.items()))
        assert off <= one.bound(x) * (1 + 1e-6)
