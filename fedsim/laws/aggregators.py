"""The laws that every merging rule keeps, or says in its `exempt` why it cannot.

A rule is held against them on small made-up clients, over the first three rounds of a task (so that rules that alternate are
seen in every phase), and with 1 to 32 clients where it may count them. Statistics that the rule's plan asks for are computed
from each client's made-up data.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import overload

import torch
from torch import Tensor

from fedsim.core.contracts import AdditiveAggregator, Aggregator
from fedsim.core.errors import AggregationError
from fedsim.core.messages import ClientUpdate, RoundPlan, State, Tensors
from fedsim.core.rng import torch_stream
from fedsim.core.tensors import matching, same_layout
from fedsim.laws.comparing import (
    ROUNDED,
    expect_bits,
    expect_close,
    expect_finite,
    expect_unchanged,
    layout_difference,
    same,
    sum_of_lifts,
    through_file,
)
from fedsim.laws.frame import Law, LawBroken
from fedsim.laws.made_up import NUMBERS, Client, make_params, some_clients, stepped, synthesise

ROUNDS = 3
CLIENTS = 11  # one more than a block of sums
ENOUGH = 9  # clients that no rule may refuse; of fewer it may say in one line that they are too few


@dataclass(frozen=True)
class Scene:
    """One round before it is merged."""

    round: int
    state: State
    params: Tensors
    plan: RoundPlan
    dtype: torch.dtype = torch.float64
    clients: tuple[Client, ...] = field(default_factory=lambda: some_clients(CLIENTS))

    def trained(self, client_id: int) -> dict[str, Tensor]:
        """What a client makes of the tensors that the plan trains."""
        return stepped(self.params, self.plan.train, client_id, self.round)

    def update(self, client: Client, tensors: Tensors | None = None) -> ClientUpdate:
        """A client's update, with these tensors or else its own."""
        tensors = self.trained(client.client_id) if tensors is None else tensors
        own = {**self.params, **tensors}
        statistics = {n: t for request in self.plan.statistics for n, t in synthesise(request, client, own).items()}
        sent = {n: t.to(self.dtype) for n, t in statistics.items()}
        return ClientUpdate(client.client_id, len(client), tensors, sent, metrics={"loss": 1.0})

    def draw(self) -> torch.Generator:
        """What the merge of this round draws from: the same at every call."""
        return torch_stream(0, "aggregate", 0, self.round)

    @cached_property
    def updates(self) -> list[ClientUpdate]:
        """All clients' updates, in the order of their ids."""
        return [self.update(c) for c in self.clients]


def scenes(rule: Aggregator, dtype: torch.dtype = torch.float64, clients: int = CLIENTS) -> Iterator[Scene]:
    """The first rounds of a task with so many clients, each going on from the merge of the one before."""
    params: Tensors = make_params(dtype)
    state = rule.init(deepcopy(params))
    for number in range(ROUNDS):
        scene = Scene(number, state, params, rule.plan(deepcopy(state), number), dtype, some_clients(clients))
        yield scene
        state, params = _merge(rule, scene, scene.updates)


def _merge(rule: Aggregator, scene: Scene, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
    """`combine` on copies, so that a rule that changes its inputs breaks the law on that and no other."""
    return rule.combine(deepcopy(scene.state), deepcopy(scene.params), deepcopy(updates), scene.draw())


def _if_enough(rule: Aggregator, scene: Scene, updates: Sequence[ClientUpdate]) -> Tensors:
    """The parameters that a merge gives; none where the rule says that so few clients are not enough for it."""
    try:
        return _merge(rule, scene, updates)[1]
    except AggregationError:
        if len(updates) >= ENOUGH:
            raise
        return {}


# ---------------------------------------------------------------- the laws


def _plan(rule: Aggregator) -> None:
    for scene in scenes(rule):
        if scene.plan.train and not matching(scene.params, scene.plan.train):
            raise LawBroken(
                f"round {scene.round}: the plan trains {scene.plan.train}, which matches none of {', '.join(scene.params)}"
            )
        again = rule.plan(deepcopy(scene.state), scene.round)
        if (again.train, again.statistics) != (scene.plan.train, scene.plan.statistics):
            raise LawBroken(f"round {scene.round}: plan gave {again}, after {scene.plan} for the same state and round")
        for request in scene.plan.statistics:
            synthesise(request, scene.clients[0], scene.params)


def _layout(rule: Aggregator) -> None:
    for dtype in (torch.float32, torch.float64):
        for scene in scenes(rule, dtype):
            _, out = _merge(rule, scene, scene.updates)
            if not same_layout(out, scene.params):
                raise LawBroken(f"round {scene.round}: {layout_difference(out, scene.params)}")


def _finite(rule: Aggregator) -> None:
    for dtype, numbers in ((torch.float64, NUMBERS[-1:]), (torch.float32, NUMBERS)):
        for scene, clients in itertools.product(scenes(rule, dtype, max(NUMBERS)), numbers):
            expect_finite(_if_enough(rule, scene, scene.updates[:clients]), f"round {scene.round}, {clients} clients")


def _fixed_point(rule: Aggregator) -> None:
    for scene in scenes(rule, clients=max(NUMBERS)):
        common = scene.trained(0)
        updates = [scene.update(c, common) for c in scene.clients]
        for clients in NUMBERS:
            when = f"round {scene.round}, all {clients} clients sent the same tensors"
            if out := _if_enough(rule, scene, updates[:clients]):
                expect_close(out, {**scene.params, **common}, when)


def _one_client(rule: Aggregator) -> None:
    for scene in scenes(rule):
        update = scene.update(scene.clients[0])
        _, out = _merge(rule, scene, [update])
        expect_close(out, {**scene.params, **update.params}, f"round {scene.round}, one client alone")


def _order(rule: Aggregator) -> None:
    for scene in scenes(rule):
        updates = scene.updates
        _, want = _merge(rule, scene, updates)
        for name, other in (("reversed", updates[::-1]), ("rotated by 4", updates[4:] + updates[:4])):
            expect_close(_merge(rule, scene, other)[1], want, f"round {scene.round}, updates {name}")


def _no_mutation(rule: Aggregator) -> None:
    for scene in scenes(rule):
        before = {"state": scene.state, "params": scene.params, "updates": scene.updates}
        given = deepcopy(before)
        rule.init(given["params"])
        rule.plan(given["state"], scene.round)
        rule.combine(given["state"], given["params"], given["updates"], scene.draw())
        expect_unchanged(given, before, f"round {scene.round}")


def _deterministic(rule: Aggregator) -> None:
    for scene in scenes(rule):
        (state, out), (state_again, again) = (_merge(rule, scene, scene.updates) for _ in range(2))
        expect_bits(again, out, f"round {scene.round}, merged twice")
        if not same(state, state_again):
            raise LawBroken(f"round {scene.round}, merged twice: the new states differ")


def _state_file(rule: Aggregator) -> None:
    for scene in scenes(rule):
        loaded = through_file(scene.state, "state", f"round {scene.round}")
        again = rule.plan(loaded, scene.round)
        if (again.train, again.statistics) != (scene.plan.train, scene.plan.statistics):
            raise LawBroken(f"round {scene.round}: the plan from the state in the file is another one")
        resumed = replace(scene, state=loaded)
        expect_bits(
            _merge(rule, resumed, scene.updates)[1],
            _merge(rule, scene, scene.updates)[1],
            f"round {scene.round}, state from a file",
        )


def _any_sequence(rule: Aggregator) -> None:
    for scene in scenes(rule):
        updates = scene.updates
        _, want = _merge(rule, scene, updates)
        frozen = [
            replace(u, params=MappingProxyType(dict(u.params)), statistics=MappingProxyType(dict(u.statistics))) for u in updates
        ]
        params = MappingProxyType(dict(deepcopy(scene.params)))
        _, out = rule.combine(deepcopy(scene.state), params, _ReadOnly(frozen), scene.draw())
        expect_bits(out, want, f"round {scene.round}, a read-only sequence in place of a list")


def _no_data(rule: Aggregator) -> None:
    for scene in scenes(rule):
        empty = [
            replace(u, num_samples=0, statistics={n: torch.zeros_like(t) for n, t in u.statistics.items()}) for u in scene.updates
        ]
        for what, updates in (("no updates", []), ("only clients without samples", empty)):
            try:
                _merge(rule, scene, updates)
            except AggregationError:
                continue
            except Exception as e:
                raise LawBroken(
                    f"round {scene.round}, {what}: raised {type(e).__name__} ({e}), not AggregationError: call require_updates"
                ) from e
            raise LawBroken(
                f"round {scene.round}, {what}: combine returned tensors instead of raising AggregationError: call require_updates"
            )


def _weights(rule: Aggregator) -> None:
    for scene in scenes(rule):
        number = CLIENTS // 2
        once, before, after = scene.updates[number], scene.updates[:number], scene.updates[number + 1 :]
        double = scene.update(scene.clients[number].repeated(2), once.params)
        _, out = _merge(rule, scene, [*before, double, *after])
        _, want = _merge(rule, scene, [*before, once, once, *after])
        expect_close(out, want, f"round {scene.round}, a client with twice the samples against the client sent twice")


def _additive(rule: Aggregator) -> None:
    if not isinstance(rule, AdditiveAggregator) or (type(rule).additive is not AdditiveAggregator.additive and not rule.additive):
        return  # a `combine` of its own beside `lift` and `finish` must agree with them, so that is no way out
    for scene in scenes(rule):
        updates = scene.updates
        _, want = _merge(rule, scene, updates)
        for cuts in ((CLIENTS,), (1, CLIENTS), (4, 5, CLIENTS), tuple(range(1, CLIENTS + 1))):
            bundles = [updates[a:b] for a, b in zip((0, *cuts), cuts, strict=False)]
            partial_sums = [sum_of_lifts([rule.lift(u) for u in bundle]) for bundle in bundles]
            _, out = rule.finish(deepcopy(scene.state), deepcopy(scene.params), sum_of_lifts(partial_sums), scene.draw())
            expect_close(out, want, f"round {scene.round}, summed in bundles of {', '.join(str(len(b)) for b in bundles)}")


def _float64(rule: Aggregator) -> None:
    for narrow, wide in zip(scenes(rule, torch.float32), scenes(rule), strict=True):
        _, got = _merge(rule, narrow, narrow.updates)
        _, want = _merge(rule, wide, wide.updates)
        expect_close({n: t.double() for n, t in got.items()}, want, f"round {narrow.round}, float32 against float64", ROUNDED)
        narrowed = [n for n, t in want.items() if bool(t.any()) and torch.equal(t, t.float().double())]
        if narrowed:
            raise LawBroken(f"round {wide.round}: '{narrowed[0]}' went in as float64 and came out with the digits of float32")


LAWS: tuple[Law[Aggregator], ...] = (
    Law("plan", "every plan names tensors and statistics that there are, and the same ones when asked again", _plan),
    Law("layout", "the parameters that come out have the names, shapes and types of those that went in", _layout),
    Law("finite", "from finite updates come finite parameters, whatever the number of clients", _finite),
    Law(
        "fixed_point",
        "when all clients, however many, send the same tensors these are the result, and what nobody trained stays",
        _fixed_point,
    ),
    Law("one_client", "a client that is alone gets its own tensors back", _one_client),
    Law("order", "the order of the updates does not matter, rounding apart", _order),
    Law("no_mutation", "state, parameters and updates that go in are not changed", _no_mutation),
    Law("deterministic", "the same inputs and the same generator give the same bits", _deterministic),
    Law("state_file", "a state that was written to a file and read back goes on with the same bits", _state_file),
    Law("any_sequence", "updates may come as any read-only sequence, with read-only mappings in them", _any_sequence),
    Law("no_data", "without updates, or without samples, AggregationError is raised", _no_data),
    Law("weights", "a client with every sample twice counts as much as the client sent twice", _weights),
    Law("additive", "an additive rule gives the same result however its clients are bundled", _additive),
    Law("float64", "float64 in gives float64 out, and float32 the same up to its rounding", _float64),
)


class _ReadOnly(Sequence[ClientUpdate]):
    """A sequence that is no list."""

    def __init__(self, items: Sequence[ClientUpdate]) -> None:
        self._items = tuple(items)

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> ClientUpdate: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ClientUpdate]: ...
    def __getitem__(self, index: int | slice) -> ClientUpdate | Sequence[ClientUpdate]:
        return self._items[index] if isinstance(index, int) else _ReadOnly(self._items[index])
