"""The laws that every channel keeps, or says in its `exempt` why it cannot.

A channel is handed parcels of made-up changes, small and large, sparse and zero, with statistics of the names that it covers, and
sums of them. What it promises of its error is looked at over many draws with fixed seeds.

Shapes: P numbers of a parcel, M draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from fedsim.core.contracts import Channel, Parcel
from fedsim.core.errors import ClientFailed
from fedsim.core.messages import ClientJob, ClientUpdate, RoundPlan, StatisticRequest, Tensors
from fedsim.core.rng import torch_stream
from fedsim.core.tensors import same_layout
from fedsim.core.wire import Chain
from fedsim.laws.comparing import (
    expect_bits,
    expect_close,
    expect_finite,
    expect_unchanged,
    layout_difference,
    same,
    through_file,
)
from fedsim.laws.frame import Law, LawBroken
from fedsim.laws.made_up import make_params

NAME = "it"
STATISTICS = ("gram", "class_moments", "path_integral")  # names that are tried; a channel covers some, all or none
DRAWS = 1000
CHANCE = 1e-9  # that an unbiased channel is found biased, were the draws not fixed
ROUNDING = 1e-6  # of float32, relative to the norm


def start() -> dict[str, Tensor]:
    """The parameters as the clients received them."""
    return make_params(torch.float32)


def parcel(channel: Channel, scale: float = 1.0, client: int = 0, round: int = 0) -> Parcel:
    """A client's changes, some of them zero, and statistics that the channel covers."""
    delta = {n: scale * torch.randn(t.shape, generator=torch_stream(4, client, round, n)) for n, t in start().items()}
    delta["head.bias"] = torch.zeros_like(delta["head.bias"])
    covered = [n for n in STATISTICS if any(fnmatchcase(n, glob) for glob in channel.covers)]
    statistics = {f"{n}.form/head.weight": torch.rand(6, generator=torch_stream(5, client, n)) for n in covered}
    return Parcel(client, 0, round, delta, statistics)


def parcels(channel: Channel) -> Iterator[tuple[str, Parcel]]:
    """Parcels by a word."""
    for scale in (1e-6, 1.0, 1e3):
        yield f"changes of about {scale:g}", parcel(channel, scale)
    sparse = parcel(channel)
    yield "sparse changes", replace(sparse, delta={n: t.relu() - t.relu().clamp(max=1) for n, t in sparse.delta.items()})
    yield "no changes", replace(sparse, delta={n: torch.zeros_like(t) for n, t in sparse.delta.items()})
    yield "a pass for statistics", replace(sparse, delta={})


def sent(channel: Channel, given: Parcel, memory: Tensors | None = None, draw: int = 0) -> tuple[Parcel, Tensors]:
    """What goes on, and the new memory, from copies."""
    return channel.send(start(), deepcopy(given), deepcopy(memory or {}), torch_stream(6, draw))


def received(channel: Channel, params: Tensors, total: Tensors, draw: torch.Generator) -> Tensors:
    """What the server sees of a sum over three clients."""
    return channel.receive(params, total, 3, draw) if channel.receives else total


def distance(got: Tensors, want: Tensors) -> float:
    """‖got − want‖₂ over all tensors."""
    return math.sqrt(sum(float((t.double() - want[n].double()).square().sum()) for n, t in got.items()))


# ---------------------------------------------------------------- the laws


def _layout(channel: Channel) -> None:
    for what, given in parcels(channel):
        out, _ = sent(channel, given)
        for got, want in ((out.delta, given.delta), (out.statistics, given.statistics)):
            if not same_layout(got, want):
                raise LawBroken(f"{what}: {layout_difference(got, want)}")
            expect_finite(got, what)
        if (out.client_id, out.task, out.round) != (given.client_id, given.task, given.round):
            raise LawBroken(f"{what}: the parcel goes on as that of another client, task or round")
        if odd := [n for n in out.codes if n not in out.delta and n not in out.statistics]:
            raise LawBroken(f"{what}: there is a code for '{odd[0]}', which does not travel")


def _identity(channel: Channel) -> None:
    """Through the chain: what did not change comes out as the parameters that were received."""
    params, given = start(), parcel(channel)
    job = ClientJob(0, 0, 0, params, RoundPlan())
    update = ClientUpdate(0, 5, dict(params), dict(given.statistics))
    out = Chain(0, {NAME: channel}).sent(job, update)
    if isinstance(out, ClientFailed):
        raise LawBroken(f"an update that changes nothing is refused: {out.reason}")
    expect_bits(out.params, params, "an update that changes nothing")


def _bound(channel: Channel) -> None:
    for what, given in parcels(channel):
        most = channel.bound(given.delta)
        for draw in range(5):
            far = distance(sent(channel, given, draw=draw)[0].delta, given.delta)
            size = distance(given.delta, {n: torch.zeros_like(t) for n, t in given.delta.items()})
            if far > most * (1 + ROUNDING) + size * ROUNDING:
                raise LawBroken(f"{what}: what is sent is {far:.6g} from what was to be sent, beyond its bound of {most:.6g}")


def _unbiased(channel: Channel) -> None:
    """Errors e of M independent draws with ‖e‖ ≤ B: were their mean zero, E ‖ē‖ ≤ B/√M, and by McDiarmid's inequality
    ‖ē‖ ≤ (1 + √(2 ln 1/p)) B/√M but for a chance of p."""
    if not channel.unbiased:
        return
    whole = parcel(channel)
    given = replace(whole, delta={n: t for n, t in whole.delta.items() if n == "head.weight"}, statistics={})
    total = torch.zeros_like(given.delta["head.weight"], dtype=torch.float64)
    largest = 0.0
    for draw in range(DRAWS):
        error = sent(channel, given, draw=draw)[0].delta["head.weight"].double() - given.delta["head.weight"].double()
        largest, total = max(largest, float(error.norm())), total + error
    most = min(channel.bound(given.delta), 2 * largest)
    allowed = (1 + math.sqrt(2 * math.log(1 / CHANCE))) * most / math.sqrt(DRAWS) + ROUNDING
    if (far := float(total.norm()) / DRAWS) > allowed:
        raise LawBroken(
            f"it says that it is unbiased, but the mean of {DRAWS} draws is off by {far:.3g}, more than {allowed:.3g}"
        )


def _bytes(channel: Channel) -> None:
    for what, given in parcels(channel):
        out, _ = sent(channel, given)
        for name, code in out.codes.items():
            tensor = (out.delta[name] if name in out.delta else out.statistics[name]).flatten()
            where = f"{what}: '{name}' is written as {code.numbers} numbers of {code.bits} bits"
            if code.at is not None and (len(code.at) != code.numbers or bool((code.at.diff() <= 0).any())):
                raise LawBroken(f"{where}, but {len(code.at)} positions are told, or not in ascending order")
            travels = tensor if code.at is None else tensor[code.at]
            if int(tensor.count_nonzero()) > int(travels.count_nonzero()) or len(travels) > code.numbers:
                raise LawBroken(f"{where}, but {int(tensor.count_nonzero())} of its numbers are not zero")
            told_apart = 2**code.bits * max(1, code.extra // 32)  # as many as there are scales of 32 bits, at most
            if code.bits < 32 and len(torch.unique(travels)) > told_apart:
                raise LawBroken(f"{where}, but holds {len(torch.unique(travels))} different numbers")
            if code.extra < 0 or code.num_bytes < 0:
                raise LawBroken(f"{where} and {code.extra} bits beside them")


def _sums(channel: Channel) -> None:
    """`receive` is affine in the total for one draw, so that it does not matter which part of the sum came from whom."""
    one, other = ({n: t.double() for n, t in parcel(channel, client=k).delta.items()} for k in (1, 2))
    zero = {n: torch.zeros_like(t) for n, t in one.items()}
    both = {n: t + other[n] for n, t in one.items()}
    got = [received(channel, start(), deepcopy(t), torch_stream(7)) for t in (one, other, both, zero)]
    for total in got:
        if not same_layout(total, one):
            raise LawBroken(f"received: {layout_difference(total, one)}")
    want = {n: got[0][n] + got[1][n] - got[3][n] for n in one}
    expect_close(got[2], want, "two sums received together against each by itself")


def _deterministic(channel: Channel) -> None:
    for what, given in parcels(channel):
        (first, memory), (again, remembered) = (sent(channel, given) for _ in range(2))
        expect_bits({**again.delta, **again.statistics}, {**first.delta, **first.statistics}, f"{what}, sent twice")
        if not same(dict(memory), dict(remembered)) or not same(dict(first.codes), dict(again.codes)):
            raise LawBroken(f"{what}, sent twice with the same draw: memory or codes differ")
    total = {n: t.double() for n, t in parcel(channel).delta.items()}
    first_sum, sum_again = (received(channel, start(), deepcopy(total), torch_stream(7)) for _ in range(2))
    expect_bits(sum_again, first_sum, "a sum received twice")


def _no_mutation(channel: Channel) -> None:
    _, memory = sent(channel, parcel(channel))
    for what, given in parcels(channel):
        params, remembered, handed = start(), dict(deepcopy(memory)), deepcopy(given)
        channel.send(params, handed, remembered, torch_stream(6))
        got = {"parameters": params, "parcel": handed, "memory": remembered}
        expect_unchanged(got, {"parameters": start(), "parcel": given, "memory": dict(memory)}, what)
    params, total = start(), {n: t.double() for n, t in parcel(channel).delta.items()}
    received(channel, params, total, torch_stream(7))
    before = {"parameters": start(), "total": {n: t.double() for n, t in parcel(channel).delta.items()}}
    expect_unchanged({"parameters": params, "total": total}, before, "a sum")


def _memory_file(channel: Channel) -> None:
    memory: Tensors = {}
    for number in range(3):
        given = parcel(channel, round=number)
        read = through_file(dict(memory), "memory", f"round {number}")
        expected, after = sent(channel, given, memory)
        got, _ = sent(channel, given, read)
        expect_bits(got.delta, expected.delta, f"round {number}, with memory from a file")
        if odd := [n for n, t in after.items() if not isinstance(t, Tensor)]:
            raise LawBroken(f"round {number}: memory '{odd[0]}' is no tensor")
        expect_finite(after, f"round {number}, memory")
        memory = after


def _covers(channel: Channel) -> None:
    for name in (*STATISTICS, "something_else"):
        covered = any(fnmatchcase(name, glob) for glob in channel.covers)
        job = ClientJob(0, 0, 0, start(), RoundPlan(statistics=(StatisticRequest(name),)))
        out = Chain(0, {NAME: channel}).sent(job, ClientUpdate(0, 5, start(), {f"{name}.form/head.weight": torch.ones(3)}))
        if covered == isinstance(out, ClientFailed):
            said = f": {out.reason}" if isinstance(out, ClientFailed) else ""
            raise LawBroken(
                f"the statistic '{name}' {'is covered, but fails' if covered else 'is not covered, but travels'}{said}"
            )


def _suits(channel: Channel) -> None:
    for note in channel.suits(list(start()), 3, 10):
        if "\n" in note or not note.strip():
            raise LawBroken(f"its note is not one line: {note!r}")


LAWS: tuple[Law[Channel], ...] = (
    Law("layout", "names, shapes and types stay as they are, and numbers finite", _layout),
    Law("identity", "an update that changes nothing comes out with the same bits", _identity),
    Law("bound", "what is sent is no further from what was to be sent than `bound` says", _bound),
    Law("unbiased", "the mean over draws of a channel that says so is what was to be sent", _unbiased),
    Law("bytes", "codes hold all that travels: as many numbers, of as many bits", _bytes),
    Law("sums", "sums that are received together give what each gives by itself", _sums),
    Law("deterministic", "the same draw gives the same bits", _deterministic),
    Law("no_mutation", "parameters, parcels, memory and sums that go in are not changed", _no_mutation),
    Law("memory_file", "memory that was written to a file and read back goes on with the same bits", _memory_file),
    Law("covers", "statistics that it covers travel, others are refused", _covers),
    Law("suits", "what it says before a run is one line each", _suits),
)
