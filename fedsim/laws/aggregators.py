"""The laws that every merging rule keeps, or says in its `exempt` why it cannot.

A rule is held against them on small made-up clients, over the first three rounds of a task (so that rules that alternate are
seen in every phase), and with 1 to 32 clients where it may count them (with no fewer than it needs). Statistics that the rule's
plan asks for are computed from each client's made-up data.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import overload

import torch
from torch import Tensor

from fedsim.core.contracts import BENEATH, AdditiveAggregator, Aggregator, Further
from fedsim.core.errors import AggregationError
from fedsim.core.messages import ClientUpdate, RoundPlan, State, Tensors
from fedsim.core.rng import torch_stream
from fedsim.core.tensors import LORA_A, LORA_B, lora_layers, matching, same_layout
from fedsim.laws.comparing import (
    ROUNDED,
    copied,
    expect_bits,
    expect_close,
    expect_finite,
    expect_unchanged,
    layout_difference,
    same,
    sum_of_lifts,
    through_file,
)
from fedsim.laws.frame import Law, LawBroken, once
from fedsim.laws.made_up import NUMBERS, Client, make_params, some_clients, stepped, synthesise
from server.beneath import Beneath
from server.merging._products import Products

ROUNDS = 3
CLIENTS = 11  # one more than a block of sums
MOST_LOOKS = 100


@dataclass(frozen=True)
class Scene:
    """One round before it is merged, and what its merge gives."""

    rule: Aggregator
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

    def seen(self, tensors: Tensors, state: State = None) -> dict[str, Tensor]:
        """The tensors as the rule means them: LoRA pairs by their products, if all that it merges are those, on top of what the
        merge that gave this state has left beneath them."""
        if not self.rule.products:
            return dict(tensors)
        left = self.rule.beneath(state) if state else {}
        return dict(Products(Beneath().with_part("merge", left).under(tensors)))

    def draw(self) -> torch.Generator:
        """What the merge of this round draws from: the same at every call."""
        return torch_stream(0, "aggregate", 0, self.round)

    @cached_property
    def updates(self) -> list[ClientUpdate]:
        """All clients' updates, in the order of their ids."""
        return [self.update(c) for c in self.clients]

    def merge(self, updates: Sequence[ClientUpdate], state: State = None) -> tuple[State, Tensors]:
        """`combine` on copies, so that a rule that changes its inputs breaks the law on that and no other; from this state, or
        else from the scene's."""
        state = self.looked(updates, self.state if state is None else state)
        return self.rule.combine(copied(state), copied(self.params), copied(updates), self.draw())

    def looked(self, updates: Sequence[ClientUpdate], state: State = None) -> State:
        """The rule's state, from this one or else the scene's, after the further looks that it asks for."""
        *_, (after, _) = self.looks(updates, self.state if state is None else state)
        return after

    def looks(self, updates: Sequence[ClientUpdate], state: State) -> Iterator[tuple[State, Further | None]]:
        """What the rule says every time that it is asked for a further look."""
        sent = updates
        for _ in range(MOST_LOOKS):
            state, look = self.rule.further(state, self.params, sent, True)
            yield state, look
            if look is None:
                return
            sent = [replace(u, statistics={**u.statistics, **self._seen(u, look)}) for u in updates]
        raise LawBroken(f"round {self.round}: after {MOST_LOOKS} further looks it asks for one more")

    def _seen(self, update: ClientUpdate, look: Further) -> Tensors:
        """What a client sends of a further look; nothing without samples."""
        if not update.num_samples:
            return {}
        client = next(c for c in self.clients if c.client_id == update.client_id)
        own = {**self.params, **update.params, **look.merged}
        found = [synthesise(r, client.repeated(update.num_samples // len(client)), own) for r in look.statistics]
        return {n: t.to(self.dtype) for sent in found for n, t in sent.items()}

    @cached_property
    def merged(self) -> tuple[State, Tensors]:
        """The new state and parameters, of all clients' updates."""
        return self.merge(self.updates)

    @property
    def out(self) -> Tensors:
        """The new parameters."""
        return self.merged[1]

    @property
    def model(self) -> dict[str, Tensor]:
        """The same as the rule means them."""
        return self.seen(self.out, self.merged[0])


@dataclass(frozen=True)
class Scenes:
    """The first rounds of a task with so many clients, each going on from the merge of the one before. A round is played when it
    is asked for, and once."""

    rule: Aggregator
    dtype: torch.dtype
    clients: int
    played: list[Scene] = field(default_factory=list)

    def __iter__(self) -> Iterator[Scene]:
        for number in range(ROUNDS):
            if number == len(self.played):
                self.played.append(self._next())
            yield self.played[number]

    def _next(self) -> Scene:
        number = len(self.played)
        params: Tensors = make_params(self.dtype)
        state, params = self.played[-1].merged if number else (self.rule.init(copied(params)), params)
        plan = self.rule.plan(copied(state), number)
        return Scene(self.rule, number, state, params, plan, self.dtype, some_clients(self.clients))


@once
def scenes(rule: Aggregator, dtype: torch.dtype = torch.float64, clients: int = CLIENTS) -> Scenes:
    """The rounds that the laws of a rule examine, with as many clients as it needs."""
    return Scenes(rule, dtype, max(clients, rule.least))


def _numbers(rule: Aggregator) -> list[int]:
    """Of clients, tried where a rule may count them."""
    return sorted({max(n, rule.least) for n in NUMBERS})


# ---------------------------------------------------------------- the laws


def _plan(rule: Aggregator) -> None:
    for scene in scenes(rule):
        if scene.plan.train and not matching(scene.params, scene.plan.train):
            raise LawBroken(
                f"round {scene.round}: the plan trains {scene.plan.train}, which matches none of {', '.join(scene.params)}"
            )
        again = rule.plan(copied(scene.state), scene.round)
        if (again.train, again.statistics) != (scene.plan.train, scene.plan.statistics):
            raise LawBroken(f"round {scene.round}: plan gave {again}, after {scene.plan} for the same state and round")
        for request in scene.plan.statistics:
            synthesise(request, scene.clients[0], scene.params)


def _further(rule: Aggregator) -> None:
    for scene in scenes(rule):
        merged, said = dict[str, Tensor](), list(scene.looks(scene.updates, scene.state))
        for _, look in said:
            if look is None:
                break
            if lost := [n for n in merged if n not in look.merged]:
                raise LawBroken(f"round {scene.round}: what was merged in one further look, '{lost[0]}', is not in the next")
            merged, there = dict(look.merged), {n: t for n, t in scene.params.items() if n in look.merged}
            if not same_layout(merged, there):
                raise LawBroken(f"round {scene.round}, a further look: {layout_difference(merged, there)}")
        if rule.further(copied(said[-1][0]), copied(scene.params), copied(scene.updates), True)[1] is not None:
            raise LawBroken(f"round {scene.round}: further said that it has come to its end, and asks for one more look")


def _layout(rule: Aggregator) -> None:
    for dtype in (torch.float32, torch.float64):
        for scene in scenes(rule, dtype):
            if not same_layout(scene.out, scene.params):
                raise LawBroken(f"round {scene.round}: {layout_difference(scene.out, scene.params)}")


def _finite(rule: Aggregator) -> None:
    for dtype, numbers in ((torch.float64, _numbers(rule)[-1:]), (torch.float32, _numbers(rule))):
        for scene, clients in itertools.product(scenes(rule, dtype, max(NUMBERS)), numbers):
            expect_finite(scene.merge(scene.updates[:clients])[1], f"round {scene.round}, {clients} clients")


def _fixed_point(rule: Aggregator) -> None:
    for scene in scenes(rule, torch.float64, max(NUMBERS)):
        common = scene.trained(0)
        updates = [scene.update(c, common) for c in scene.clients]
        for clients in _numbers(rule):
            when = f"round {scene.round}, all {clients} clients sent the same tensors"
            after, out = scene.merge(updates[:clients])
            expect_close(scene.seen(out, after), scene.seen({**scene.params, **common}), when)


def _enough(rule: Aggregator) -> None:
    for scene in scenes(rule) if rule.least > 1 else ():  # of nobody "no_data" tells
        scene.merge(scene.updates[: rule.least])
        few = [replace(u, num_samples=u.num_samples * (k < rule.least - 1)) for k, u in enumerate(scene.updates)]
        for what, updates in (("clients", scene.updates[: rule.least - 1]), ("clients with samples", few)):
            try:
                scene.merge(updates)
            except AggregationError:
                continue
            raise LawBroken(
                f"round {scene.round}: it says that it needs {rule.least} clients (`least`), but merges {rule.least - 1} {what}"
            )


def _without_samples(rule: Aggregator) -> None:
    for scene in scenes(rule):
        empty = scene.clients[0].of(())
        update = scene.update(empty, {n: scene.params[n] for n in matching(scene.params, scene.plan.train)})
        nobody = replace(update, client_id=CLIENTS)
        after, out = scene.merge([*scene.updates, nobody])
        alone, expected = scene.merge(scene.updates)
        expect_close(scene.seen(out, after), scene.seen(expected, alone), f"round {scene.round}, one more client without samples")


def _one_client(rule: Aggregator) -> None:
    for scene in scenes(rule) if rule.least == 1 else ():
        update = scene.update(scene.clients[0])
        after, out = scene.merge([update])
        alone = {**scene.params, **update.params}
        expect_close(scene.seen(out, after), scene.seen(alone), f"round {scene.round}, one client alone")


def _order(rule: Aggregator) -> None:
    for scene in scenes(rule):
        updates = scene.updates
        for name, other in (("reversed", updates[::-1]), ("rotated by 4", updates[4:] + updates[:4])):
            after, turned = scene.merge(other)
            expect_close(scene.seen(turned, after), scene.model, f"round {scene.round}, updates {name}")


def _no_mutation(rule: Aggregator) -> None:
    for scene in scenes(rule):
        before = {"state": scene.state, "params": scene.params, "updates": scene.updates}
        given = copied(before)
        rule.init(given["params"])
        rule.plan(given["state"], scene.round)
        rule.further(given["state"], given["params"], given["updates"], True)
        looked = scene.looked(given["updates"], given["state"])  # the state as it was given, of a rule that does not look
        rule.combine(looked, given["params"], given["updates"], scene.draw())
        expect_unchanged(given, before, f"round {scene.round}")


def _deterministic(rule: Aggregator) -> None:
    for scene in scenes(rule):
        (state, out), (state_again, again) = scene.merged, scene.merge(scene.updates)
        expect_bits(again, out, f"round {scene.round}, merged twice")
        if not same(state, state_again):
            raise LawBroken(f"round {scene.round}, merged twice: the new states differ")


def _next_task(rule: Aggregator) -> None:
    *_, last = scenes(rule)
    before, params = last.merged
    given = {"state": copied(before), "params": copied(params)}
    state, again = (rule.next_task(given["state"], given["params"], 1) for _ in range(2))
    expect_unchanged(given, {"state": before, "params": params}, "a task begun")
    if not same(state, again):
        raise LawBroken("a task begun twice from the same state: the new states differ")
    if type(rule).next_task is not Aggregator.next_task:
        state = through_file(state, "state", "a task begun")
    first = Scene(rule, 0, state, params, rule.plan(copied(state), 0), last.dtype, last.clients)
    if not same_layout(first.out, params):
        raise LawBroken(f"first round of the next task: {layout_difference(first.out, params)}")
    expect_finite(first.out, "first round of the next task")


def _state_file(rule: Aggregator) -> None:
    for scene in scenes(rule):
        loaded = through_file(scene.state, "state", f"round {scene.round}")
        again = rule.plan(loaded, scene.round)
        if (again.train, again.statistics) != (scene.plan.train, scene.plan.statistics):
            raise LawBroken(f"round {scene.round}: the plan from the state in the file is another one")
        expect_bits(scene.merge(scene.updates, loaded)[1], scene.out, f"round {scene.round}, state from a file")


def _any_sequence(rule: Aggregator) -> None:
    for scene in scenes(rule):
        params = MappingProxyType(copied(scene.params))
        frozen = _ReadOnly(
            [
                replace(u, params=MappingProxyType(copied(u.params)), statistics=MappingProxyType(copied(u.statistics)))
                for u in scene.updates
            ]
        )
        _, out = rule.combine(copied(scene.looked(frozen)), params, frozen, scene.draw())
        expect_bits(out, scene.out, f"round {scene.round}, a read-only sequence in place of a list")


def _no_data(rule: Aggregator) -> None:
    for scene in scenes(rule):
        empty = [
            replace(u, num_samples=0, statistics={n: torch.zeros_like(t) for n, t in u.statistics.items()}) for u in scene.updates
        ]
        for what, updates in (("no updates", []), ("only clients without samples", empty)):
            try:
                scene.merge(updates)
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
        number = len(scene.updates) // 2
        single, before, after = scene.updates[number], scene.updates[:number], scene.updates[number + 1 :]
        double = scene.update(scene.clients[number].repeated(2), single.params)
        one, out = scene.merge([*before, double, *after])
        two, want = scene.merge([*before, single, single, *after])
        when = f"round {scene.round}, a client with twice the samples against the client sent twice"
        expect_close(scene.seen(out, one), scene.seen(want, two), when)


def _additive(rule: Aggregator) -> None:
    if not isinstance(rule, AdditiveAggregator) or (type(rule).additive is not AdditiveAggregator.additive and not rule.additive):
        return  # a `combine` of its own beside `lift` and `finish` must agree with them, so that is no way out
    for scene in scenes(rule):
        clients = len(scene.updates)
        for cuts in ((clients,), (1, clients), (4, 5, clients), tuple(range(1, clients + 1))):
            bundles = [scene.updates[a:b] for a, b in zip((0, *cuts), cuts, strict=False)]
            partial_sums = [sum_of_lifts([rule.lift(copied(u)) for u in bundle]) for bundle in bundles]
            _, out = rule.finish(copied(scene.state), copied(scene.params), sum_of_lifts(partial_sums), scene.draw())
            expect_close(out, scene.out, f"round {scene.round}, summed in bundles of {', '.join(str(len(b)) for b in bundles)}")


def _float64(rule: Aggregator) -> None:
    for narrow, wide in zip(scenes(rule, torch.float32), scenes(rule), strict=True):
        want = wide.out
        expect_close(
            {n: t.double() for n, t in narrow.model.items()},
            wide.model,
            f"round {narrow.round}, float32 against float64",
            ROUNDED,
        )
        narrowed = [n for n, t in want.items() if bool(t.any()) and torch.equal(t, t.float().double())]
        if narrowed:
            raise LawBroken(f"round {wide.round}: '{narrowed[0]}' went in as float64 and came out with the digits of float32")


def _beneath(rule: Aggregator) -> None:
    gives = BENEATH in rule.traits.gives
    for scene in scenes(rule):
        left = rule.beneath(copied(scene.merged[0]))
        if left and not (gives and rule.products):
            raise LawBroken(
                f"round {scene.round}: it leaves '{next(iter(left))}' beneath, and does not say so: its traits must give "
                f"'{BENEATH}', and `products` be True"
            )
        layers = lora_layers(left)
        if odd := [n for n in left if n.rpartition(".")[0] not in layers or n not in scene.params]:
            raise LawBroken(f"round {scene.round}: '{odd[0]}', left beneath, is no factor of one of the adapter's pairs")
        for p in layers:
            a, b = left[p + LORA_A], left[p + LORA_B]
            if (len(b), a.shape[1]) != (len(scene.params[p + LORA_B]), scene.params[p + LORA_A].shape[1]) or len(a) != b.shape[1]:
                raise LawBroken(f"round {scene.round}: the pair of '{p}' beneath is {tuple(b.shape)} by {tuple(a.shape)}")
        expect_finite(left, f"round {scene.round}, what is left beneath")


LAWS: tuple[Law[Aggregator], ...] = (
    Law("plan", "every plan names tensors and statistics that there are, and the same ones when asked again", _plan),
    Law("layout", "the parameters that come out have the names, shapes and types of those that went in", _layout),
    Law("finite", "from finite updates come finite parameters, whatever the number of clients", _finite),
    Law(
        "fixed_point",
        "when all clients, however many, send the same tensors these are the result, and what nobody trained stays",
        _fixed_point,
    ),
    Law("enough", "as many clients as the rule says that it needs are enough, and fewer are refused", _enough),
    Law("without_samples", "a client without samples, which sends what it was sent, changes nothing", _without_samples),
    Law("one_client", "a client that is alone gets its own tensors back", _one_client),
    Law("order", "the order of the updates does not matter, rounding apart", _order),
    Law("no_mutation", "state, parameters and updates that go in are not changed", _no_mutation),
    Law("deterministic", "the same inputs and the same generator give the same bits", _deterministic),
    Law("state_file", "a state that was written to a file and read back goes on with the same bits", _state_file),
    Law("next_task", "a task that follows begins with a state that goes on, the same one when begun again", _next_task),
    Law("any_sequence", "updates may come as any read-only sequence, with read-only mappings in them", _any_sequence),
    Law("no_data", "without updates, or without samples, AggregationError is raised", _no_data),
    Law("weights", "a client with every sample twice counts as much as the client sent twice", _weights),
    Law("additive", "an additive rule gives the same result however its clients are bundled", _additive),
    Law("further", "further looks come to an end; what is merged in one stays merged, with names, shapes and types", _further),
    Law(
        "beneath", "what is left beneath the parameters are finite pairs of the adapter's layers, and the rule says so", _beneath
    ),
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
