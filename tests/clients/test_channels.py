"""What happens on the wire: each channel against closed forms, and the chain that applies them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clients.channels.clip_noise import Channel as ClipNoise
from fedsim.core import config as configs
from fedsim.core import rng
from fedsim.core.contracts import Channel, Parcel
from fedsim.core.errors import ClientFailed, FedsimError
from fedsim.core.messages import ClientJob, ClientUpdate, RoundPlan, StatisticRequest, bytes_up
from fedsim.core.wire import Chain
from fedsim.simulation import prepare, rehearse, run
from tests.tiny import final_state, same_bits, tiny

FAIRAVG = ("server.aggregator=fairavg", "server.consolidator=none", "stream.tasks=1", "server.rounds=1", "server.evaluate=task")


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


# ---------------------------------------------------------------- clip_noise


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("clip", [1e-6, 0.1, 5.0])
def test_what_is_sent_lies_within_the_clip(scale: float, clip: float) -> None:
    """Of the parameters that arrive, in float64, whatever float32 makes of w₀ + Δ."""
    start = {"a": normal(50, 20) * 10, "b": normal(30, seed=1)}
    trained = {n: t + scale * normal(*t.shape, seed=2) for n, t in start.items()}
    arrived = chain(ClipNoise(clip=clip)).sent(job(start), update(trained))
    assert isinstance(arrived, ClientUpdate)
    change = {n: arrived.params[n].double() - start[n].double() for n in start}
    before = {n: trained[n].double() - start[n].double() for n in start}
    assert norm(change) <= clip * (1 + 1e-6)
    if norm(before) < clip:
        assert same_bits(dict(arrived.params), trained)
    elif clip > 1e-3:  # not below the last digit of w₀
        assert norm(change) > clip * (1 - 1e-3)
        cosine = sum(float((change[n] * before[n]).sum()) for n in start) / norm(change) / norm(before)
        assert cosine > 1 - 1e-5


@pytest.mark.parametrize("digits", [0.7, 1.7, 2.6])
def test_a_clip_in_the_last_digits_of_the_parameters_is_kept_to(digits: float) -> None:
    """100 numbers at 1 go up by 10 units in the last place each, and are clipped to 0.7, 1.7 or 2.6: the nearest is beyond."""
    unit = 2.0**-23
    clip = digits * unit * 10
    arrived = chain(ClipNoise(clip=clip)).sent(job({"w": torch.ones(100)}), update({"w": torch.ones(100) + 10 * unit}))
    assert isinstance(arrived, ClientUpdate)
    assert norm({"w": arrived.params["w"].double() - 1}) <= clip
    assert torch.equal(arrived.params["w"], torch.ones(100) + int(digits) * unit)


def test_groups_are_clipped_by_themselves_and_the_first_match_decides() -> None:
    one = channel("clip_noise", groups=[{"match": "head.*", "clip": 3.0}, {"match": "*", "clip": 4.0}], noise=1.0)
    assert isinstance(one, ClipNoise) and one.sensitivity == 5.0
    given = {"adapter.a": normal(100), "adapter.b": normal(100, seed=1), "head.weight": normal(10, seed=2) / 10}
    found = sent(one, Parcel(0, 0, 0, given)).delta
    assert found["head.weight"] is given["head.weight"]
    assert norm({n: t for n, t in found.items() if n != "head.weight"}) == pytest.approx(4.0, rel=1e-6)


def test_noise_has_the_declared_spread_and_is_drawn_once_for_each_round() -> None:
    """The standard deviation of z S over 10⁶ numbers of the sum, ± 2 %; counts and what nobody received are left alone."""
    one, size = ClipNoise(clip=0.3, noise=1.5), 1_000_000
    start = {"w": torch.zeros(size)}
    total = {"w": torch.zeros(size, dtype=torch.float64), "num_clients": torch.tensor(7.0)}
    made = [chain(one, seed=s).received(start, {"rule": total}, [update({})], *where)["rule"] for s, *where in PLACES]
    assert all(float(m["w"].std()) == pytest.approx(1.5 * 0.3, rel=0.02) and abs(float(m["w"].mean())) < 0.002 for m in made)
    assert all(m["num_clients"] is total["num_clients"] for m in made)
    assert same_bits(dict(made[0]), dict(made[1]))
    for k, other in enumerate(made[2:]):
        assert abs(float((made[0]["w"] * other["w"]).mean())) < 0.001, k


PLACES = [(0, 0, 0), (0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]  # seed, task, round


def test_epsilon_is_that_of_the_closed_form_and_grows_with_rounds_and_falls_with_noise() -> None:
    """ρ = R / 2z² = 0.5 and ε = 0.5 + 2 (0.5 · ln 10⁵)^½ = 5.2985 for z = 1, R = 1, δ = 10⁻⁵."""
    assert ClipNoise(clip=1.0, noise=1.0).rho(1) == 0.5
    assert ClipNoise(clip=1.0, noise=1.0).epsilon(1) == pytest.approx(5.2985, abs=1e-4)
    by_rounds = [ClipNoise(clip=1.0, noise=1.0).epsilon(r) for r in (1, 2, 15, 100)]
    by_noise = [ClipNoise(clip=1.0, noise=z).epsilon(3) for z in (10.0, 2.0, 0.5, 0.0)]
    assert by_rounds == sorted(by_rounds) and by_noise == sorted(by_noise) and by_noise[-1] == math.inf
    assert ClipNoise(clip=1.0, noise=2.0).epsilon(12) == ClipNoise(clip=9.0, noise=1.0).epsilon(3)


@pytest.mark.parametrize("options", ["clip_noise", "{name: clip_noise, clip: 1.0e+6}"])
def test_without_a_bound_and_noise_it_is_fairavg_bit_for_bit(options: str, tmp_path: Path) -> None:
    states = []
    for k, listed in enumerate(("[]", f"[{options}]")):
        config = tiny(*FAIRAVG, "stream.tasks=2", "server.rounds=2", f"server.channel={listed}", output=tmp_path / str(k))
        found = run(config)
        assert not found.notes
        states.append(final_state(found.path, config))  # type: ignore[arg-type]
    assert same_bits(dict(states[0].params), dict(states[1].params)) and states[0].bytes == states[1].bytes


@pytest.mark.parametrize("repair", [False, True], ids=["sums travel", "updates travel"])
def test_a_run_adds_the_addressed_noise_to_the_sum_of_clipped_updates(repair: bool, tmp_path: Path) -> None:
    """w⁺ with noise − w⁺ without = z S n / N, n of the round's own stream, in the order of the tensors. A calibrator that looks
    at every client's statistics changes nothing of it."""
    more = ("server.calibrator=hgp",) if repair else ()
    params, clip = [], "{name: clip_noise, clip: 0.2, public: ['class_*']%s}"
    for k, noise in enumerate(("", ", noise: 3.0")):
        config = tiny(*FAIRAVG, *more, f"server.channel=[{clip % noise}]", output=tmp_path / str(k))
        found = run(config)
        params.append(final_state(found.path, config).params)  # type: ignore[arg-type]
    assert len(found.notes) == 1 and "ρ = 0.05556" in found.notes[0] and "ε = 1.655 at δ = 1e-05" in found.notes[0]
    assert "losses and drift are not covered, nor statistics (class_*)" in found.notes[0]
    draw = rng.torch_stream(0, "channel", 0, 0, 0, "rule")
    for name, quiet in params[0].items():
        noise = 3.0 * 0.2 / 3 * torch.randn(quiet.shape, generator=draw, dtype=torch.float64)
        if not (repair and name.startswith("head.")):
            assert torch.allclose(params[1][name].double(), quiet.double() + noise, atol=1e-6, rtol=1e-6), name


# ---------------------------------------------------------------- the chain


def chain(*channels: Channel, seed: int = 0) -> Chain:
    return Chain(seed, {type(c).__module__.rpartition(".")[2]: c for c in channels})


def job(start: dict[str, Tensor], memory: dict[str, Tensor] | None = None, client: int = 0, **plan: object) -> ClientJob:
    return ClientJob(client, 0, 0, start, RoundPlan(**plan), memory or {})  # type: ignore[arg-type]


def update(params: dict[str, Tensor], samples: int = 5, **more: object) -> ClientUpdate:
    return ClientUpdate(0, samples, params, **more)  # type: ignore[arg-type]


def norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def test_no_channel_touches_nothing() -> None:
    given = update({"w": normal(5)}, memory={"learner.0.x/y": normal(2)})
    assert Chain(0, {}).sent(job({"w": normal(5)}), given) is given
    assert chain(ClipNoise(clip=1.0, noise=1.0)).receives and not chain(ClipNoise(clip=1.0), channel("topk")).receives


def test_bytes_are_those_of_the_encoded_message() -> None:
    """1 % of 100 × 10 numbers in 8 bits: 10 numbers, 10 positions of 10 bits, one scale; half of 3: 2 numbers, a bitmap of 3
    bits. Statistics in full, equal ones once."""
    start = {"adapter.a": torch.zeros(100, 10), "head.bias": torch.zeros(3)}
    gram = {"gram.full/a": normal(6), "gram.full/b": normal(6), "gram.full/c": normal(6, seed=1)}
    given = update({n: normal(*t.shape) for n, t in start.items()}, statistics=gram)
    asked = (StatisticRequest("gram"),)
    for share, one, other in ((0.01, 10 * 8 + 100 + 32, 1 * 8 + 2 + 32), (0.5, 500 * 8 + 1000 + 2 * 32, 2 * 8 + 3 + 32)):
        found = chain(channel("topk", share=share), channel("quantise")).sent(job(start, statistics=asked), given)
        assert isinstance(found, ClientUpdate)
        assert bytes_up(found) == {"adapter": math.ceil(one / 8), "head": math.ceil(other / 8), "statistics": 2 * 6 * 4}
        assert bytes_up(found.summed(observed=True)) == bytes_up(found)
    assert bytes_up(given) == {"adapter": 4000, "head": 12, "statistics": 2 * 6 * 4}


def test_memory_is_each_channels_own_and_waits_for_clients_without_samples() -> None:
    start, trained = {"w": torch.zeros(50)}, {"w": normal(50)}
    wire = chain(channel("topk", share=0.1))
    first = wire.sent(job(start), update(trained, memory={"learner.er/seen": torch.ones(1)}))
    assert isinstance(first, ClientUpdate)
    assert first.memory.keys() == {"learner.er/seen", "channel.0.topk/w", "channel.0.topk/task"}
    assert torch.equal(first.params["w"] + first.memory["channel.0.topk/w"], trained["w"])
    idle = wire.sent(job(start, dict(first.memory)), update(start, samples=0))
    assert isinstance(idle, ClientUpdate)
    assert torch.equal(idle.params["w"], start["w"]) and idle.encoded == first.encoded and idle.memory is None
    passing = wire.sent(job(start, dict(first.memory), train=(), statistics=(StatisticRequest("gram"),)), update({}))
    assert isinstance(passing, ClientUpdate) and passing.memory is None and not passing.encoded
    again = wire.sent(job(start, dict(first.memory)), update(trained, memory=first.memory))
    assert isinstance(again, ClientUpdate)
    whole = trained["w"] + first.memory["channel.0.topk/w"]
    assert torch.equal(again.params["w"] + again.memory["channel.0.topk/w"], whole)
    assert torch.equal(again.memory["learner.er/seen"], torch.ones(1))


def test_every_client_place_and_round_draws_for_itself() -> None:
    start, trained = {"w": torch.zeros(200)}, {"w": normal(200)}
    made = [Chain(0, {"quantise": channel("quantise", bits=4)}).sent(job(start, client=k), update(trained)) for k in (0, 0, 1)]
    first, again, other = (m.params["w"] for m in made if isinstance(m, ClientUpdate))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_clients_that_train_together_send_through_the_same_chain() -> None:
    """Fused training rounds in another order, so its bits differ; what is sent has the same size, and is not the dense update."""
    up = []
    for fused, listed in (("false", "[topk, quantise]"), ("true", "[topk, quantise]"), ("true", "[]")):
        found = rehearse(tiny(*FAIRAVG, f"runtime.fused={fused}", f"server.channel={listed}"))
        up.append(found.costs["bytes"]["up"])
    assert up[0] == up[1] and 20 * sum(up[0].values()) < sum(up[2].values())


@dataclass(frozen=True)
class Bad(Channel):
    how: str = "raises"

    def send(self, start, parcel, memory, draw):  # type: ignore[no-untyped-def]
        if self.how == "raises":
            raise ZeroDivisionError("two\nlines")
        given = {"shape": {"w": torch.zeros(3)}, "names": {}, "nan": {"w": torch.full((5,), math.nan)}}[self.how]
        return Parcel(parcel.client_id, parcel.task, parcel.round, given), memory


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raises", "ZeroDivisionError: two lines"),
        ("shape", "channel bad gives other tensors than it was given"),
        ("names", "channel bad gives other tensors than it was given"),
        ("nan", "on the wire, tensor 'w' holds NaN or infinity"),
    ],
)
def test_a_channel_that_fails_is_a_clients_failure_of_one_line(how: str, told: str) -> None:
    failed = Chain(0, {"bad": Bad(how)}).sent(job({"w": torch.zeros(5)}, client=3), update({"w": normal(5)}))
    assert isinstance(failed, ClientFailed) and (failed.client_id, failed.stage) == (3, "channel")
    assert failed.reason.startswith(told) and "\n" not in str(failed)


NOISY = "server.channel=[{name: clip_noise, clip: 1.0, noise: 1.0%s}]"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["server.channel=[{name: quantise, bits: 3}]"], r"^server.channel.0.bits cannot be 3. Choose from: 8, 4.$"),
        (["server.channel=[{name: quantise, block: 0}]"], r"^server.channel.0.block must be at least 1"),
        (["server.channel=[{name: topk, share: 0}]"], r"^server.channel.0.share must be in \(0, 1\], got 0.0$"),
        (["server.channel=[{name: clip_noise, clip: 0}]"], r"^server.channel.0.clip must be positive, got 0.0$"),
        (["server.channel=[{name: clip_noise, noise: 1}]"], r"^server.channel.0.noise is in units of clip, which is not given"),
        (["server.channel=[{name: clip_noise, clip: 1, noise: -1}]"], r"^server.channel.0.noise must not be negative"),
        (["server.channel=[{name: clip_noise, clip: 1, delta: 1}]"], r"^server.channel.0.delta must be in \(0, 1\)"),
        (["server.channel=[{name: clip_noise, clip: 1, groups: [{match: '*', clip: 1}]}]"], "clip and groups exclude each other"),
        (["server.channel=[{name: clip_noise, groups: [{match: '*', clip: 0}]}]"], r"groups.0.clip must be positive, got 0.0"),
        (["server.channel=[{name: clip_noise, groups: [{match: 'head.*', clip: 1}]}]"], "has no group for 'adapter.layers.0"),
        (
            ["server.channel=[{name: clip_noise, groups: [{match: 'prompt.*', clip: 5}, {match: '*', clip: 1}]}]"],
            r"clip_noise has a group 'prompt\.\*' that decides for no trained tensor",
        ),
        (
            ["server.channel=[{name: clip_noise, groups: [{match: '*', clip: 5}, {match: 'head.*', clip: 1}]}]"],
            r"clip_noise has a group 'head\.\*' that decides for no trained tensor",
        ),
        (["server.channel=[topk, quantise, topk]"], r"^server.channel.2: 'topk' is there already: name a channel once$"),
        (["server.channel=[quantise, topk]"], "^server.channel: topk cannot come after quantise, which has encoded the numbers"),
        (
            [NOISY.replace("}]", "}, quantise]") % "", "server.aggregator=fairavg", "server.consolidator=none"],
            "^server.channel: quantise cannot come after clip_noise: what it clips must not grow",
        ),
        (["server.channel=topk"], r"^server.channel must be a list"),
        (["server.channel=[topq]"], r"^server.channel.0: unknown channel 'topq'. Did you mean 'topk'\?$"),
        (["server.channel=[topk]", "server.unlearning=true"], "^server.unlearning and server.channel exclude each other"),
        ([NOISY % "", "server.aggregator=fedavg"], "but aggregator fedavg weighs them"),
        (
            [NOISY % "", "server.aggregator=[{match: 'head.*', name: fairavg}, {match: '*', name: fairavg}]"],
            "which a list of rules does not make",
        ),
        ([NOISY % "", "server.aggregator=fairavg", "server.consolidator=regmean"], "does not cover the statistic 'gram'"),
        ([NOISY % "", *FAIRAVG, "server.calibrator=ccvr"], "does not cover the statistic 'class_moments'"),
        ([NOISY % "", *FAIRAVG, "server.calibrator=nearest_mean"], "does not cover the statistic 'class_moments'"),
    ],
)
def test_what_cannot_work_is_one_line_before_any_training(overrides: list[str], told: str) -> None:
    with pytest.raises(FedsimError, match=told):
        prepare(tiny("server.consolidator=none", *overrides))


LEARNER = """
from dataclasses import dataclass
from fedsim.core import contracts

@dataclass(frozen=True)
class Learner(contracts.Learner):
    def heard(self, state, total, clients):
        return state
"""


def test_what_a_learner_sends_has_to_be_covered_too(tmp_path: Path) -> None:
    (tmp_path / "counting.py").write_text(LEARNER)
    learner = f"client.learners=[{tmp_path / 'counting.py'}]"
    with pytest.raises(FedsimError, match="clip_noise does not cover the statistic 'counting'"):
        prepare(tiny(*FAIRAVG, NOISY % "", learner))
    assert prepare(tiny(*FAIRAVG, NOISY % ", public: [counting]", learner)).notes
    prepare(tiny(*FAIRAVG, "server.channel=[topk]", learner))


# ---------------------------------------------------------------- byzantine


def test_byzantine_clients_send_what_they_are_told_and_others_what_they_learned() -> None:
    delta = {"a": normal(40, 50), "b": normal(7, seed=1)}
    given, honest = parcel(**delta), Parcel(1, 0, 0, delta)
    for attack, times in (("sign_flip", -3.0), ("scale", 3.0)):
        one = channel("byzantine", clients=[0, 5], attack=attack, factor=3.0)
        assert all(torch.equal(t, times * delta[n]) for n, t in sent(one, given).delta.items())
        assert sent(one, honest) is honest
    assert sent(channel("byzantine"), given) is given


def test_byzantine_noise_is_so_many_times_as_long_as_the_change_and_has_nothing_of_it() -> None:
    delta = {"a": 0.01 * normal(40, 50), "b": 5 * normal(7, 300, seed=1)}
    one = channel("byzantine", clients=[0], attack="gaussian", factor=2.0)
    first, again, other = (sent(one, parcel(**delta), number).delta for number in (0, 0, 1))
    assert all(torch.equal(t, again[n]) for n, t in first.items()) and not torch.equal(first["a"], other["a"])
    want = 2 * math.sqrt(sum(float(t.square().sum()) for t in delta.values()) / 4100)
    for name, tensor in first.items():
        assert float(tensor.std()) == pytest.approx(want, rel=0.05) and abs(float(tensor.mean())) < 0.1 * want
        assert abs(float((tensor * delta[name]).sum() / tensor.norm() / delta[name].norm())) < 0.1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("clients: [3]", r"byzantine names client 3, but there are clients 0 to 2"),
        ("clients: [-1]", r"clients must be numbers of clients, from 0, each once, got \[-1\]"),
        ("clients: [1, 1]", r"each once, got \[1, 1\]"),
        ("clients: [1], factor: 0.0", "factor must be above 0"),
        ("clients: [1], attack: flip", "attack 'flip' is unknown"),
    ],
)
def test_byzantine_clients_that_there_are_not(options: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(FedsimError, match=says):
        prepare(tiny(*FAIRAVG, f"server.channel=[{{name: byzantine, {options}}}]", output=tmp_path))


def test_the_median_is_the_honest_one_and_the_bytes_are_the_same(tmp_path: Path) -> None:
    """Three clients, of which one sends a million times its change the other way: the others' numbers bound the median, the mean
    is far away. What was sent is as many bytes, and the run says who was byzantine."""
    found = {}
    for rule in ("fairavg", "{name: merged, rule: median}"):
        for factor in (0, 1e6):
            channels = f"server.channel=[{{name: byzantine, clients: [1], factor: {factor}}}]" if factor else "server.channel=[]"
            config = tiny(*FAIRAVG, channels, f"server.aggregator={rule}", "server.drift=false", output=tmp_path)
            results = run(config)
            found[rule, factor] = final_state(results.path, config)  # type: ignore[arg-type]
            assert any("of 3 clients 1 (1) send sign_flip" in note for note in results.notes) is bool(factor)
    away = {
        rule: max(float((found[rule, 1e6].params[n] - t).abs().max()) for n, t in found[rule, 0].params.items())
        for rule, _ in found
    }
    assert away["fairavg"] > 1e3 and away["{name: merged, rule: median}"] < 1
    assert len({str(state.bytes) for state in found.values()}) == 1
