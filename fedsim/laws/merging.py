"""The laws that every merging rule keeps, or says in its `exempt` why it cannot.

A rule is pure maths, so it is held against laws in both of its roles: over made-up clients it keeps those of an aggregator, and
over tasks it is handed LoRA pairs of several ranks, as their products or, if it takes them, as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedsim.core.contracts import ChainedMerging, Member, Merging
from fedsim.core.messages import Tensors
from fedsim.core.rng import torch_stream
from fedsim.core.tensors import LORA_A
from fedsim.laws import aggregators
from fedsim.laws.comparing import copied, expect_bits, expect_close, expect_finite, expect_unchanged, layout_difference
from fedsim.laws.frame import Law, LawBroken, once
from fedsim.laws.made_up import RANK, make_client, make_params, stepped, synthesise
from server.aggregators.merged import Aggregator
from server.merging import _products

TASKS = 3
OF_CLIENTS = {law.name: law.check for law in aggregators.LAWS}


_of_clients = once(Aggregator)


def _over_clients(law: str) -> Callable[[Merging], None]:
    """A law of aggregators, of the one that merges by this rule."""

    def check(rule: Merging) -> None:
        OF_CLIENTS[law](_of_clients(rule))

    return check


def _products_of_pairs(rule: Merging) -> None:
    if isinstance(rule, ChainedMerging):
        return  # it merges no tasks
    start, tasks = {n: t for n, t in make_params().items() if n.startswith("adapter.")}, max(TASKS, rule.least)
    members = [_member(rule, _with_rank(start, RANK + k), k) for k in range(tasks)]
    base = _products.origin(start)
    out, again, turned = (_merged(rule, several, base) for several in (members, members, members[::-1]))
    shapes = {name: t.shape for name, t in _products.Products(start).items()}
    if {name: t.shape for name, t in out.items()} != shapes:
        raise LawBroken(f"{tasks} tasks: {layout_difference(out, _products.Products(start))}")
    expect_finite(out, f"{tasks} tasks")
    given = {"members": [(m.params, m.statistics) for m in members], "base": base}
    before = copied(given)
    _products.merged(rule, members, base, torch_stream(0, "merge"))
    expect_unchanged(given, before, f"{tasks} tasks")
    expect_bits(again, out, f"{tasks} tasks, merged twice")
    if "order" not in rule.exempt:
        expect_close(turned, out, f"{tasks} tasks, in reversed order")
    if "one_member" not in rule.exempt and rule.least == 1:
        alone = _merged(rule, members[:1], base)
        expect_close(alone, _products.Products(members[0].params), "one task alone")


def _member(rule: Merging, module: Tensors, task: int) -> Member:
    """A task's module, with made-up statistics."""
    found = {n: t for r in _products.asked(rule, module) for n, t in synthesise(r, make_client(task), module).items()}
    return Member(f"task {task}", module, 1.0, found)


def _with_rank(module: Tensors, rank: int) -> dict[str, Tensor]:
    """Another module, whose pairs have this rank."""
    draw = torch_stream(0, "rank", rank)
    size = {n: (rank, t.shape[1]) if n.endswith(LORA_A) else (len(t), rank) for n, t in module.items()}
    return {n: torch.randn(size[n], dtype=t.dtype, generator=draw) for n, t in module.items()}


def _merged(rule: Merging, members: Sequence[Member], base: Tensors) -> dict[str, Tensor]:
    """Of modules of pairs, as products."""
    return dict(_products.Products(_products.merged(rule, copied(members), base, torch_stream(0, "merge"))))


def _affine(rule: Merging) -> None:
    if isinstance(rule, ChainedMerging):
        return  # it merges nothing at once
    start = {n: t for n, t in make_params().items() if not (rule.pairs and n.startswith("adapter."))}
    members = []
    for k in range(max(TASKS, rule.least)):
        client, own = make_client(k), stepped(start, ("*",), "affine", k)
        found = {n: t for request in rule.asks() for n, t in synthesise(request, client, own).items()}
        members.append(Member(f"client {k}", own, float(len(client)), found))
    shifts = {n: torch.randn(t.shape, dtype=t.dtype, generator=torch_stream(0, "shift", n)) for n, t in start.items()}

    def moved(tensors: Tensors) -> dict[str, Tensor]:
        return {n: 3 * t + shifts[n] for n, t in tensors.items()}

    several = [replace(m, params=moved(m.params)) for m in members]
    got, want = (rule.merge(some, base, torch_stream(0, "merge")) for some, base in ((several, moved(start)), (members, start)))
    expect_close(got, moved(want), "models and base three times as large and moved by the same, against the merge moved so")


def _linear(rule: Merging) -> None:
    if not rule.linear:
        return
    start = {n: t for n, t in make_params().items() if n.startswith("adapter.")}
    members = [Member(f"task {k}", stepped(start, ("*",), "task", k), 1.0 + k) for k in range(TASKS)]
    mixing = {n: torch.randn(len(t), len(t), dtype=t.dtype, generator=torch_stream(0, "mix", n)) for n, t in start.items()}

    def mixed(tensors: Tensors) -> dict[str, Tensor]:
        return {n: mixing[n] @ t for n, t in tensors.items()}

    several = [replace(m, params=mixed(m.params)) for m in members]
    got, want = (rule.merge(some, base, torch_stream(0, "merge")) for some, base in ((several, mixed(start)), (members, start)))
    expect_close(got, mixed(want), "models whose tensors were multiplied from the left before the merge, against after it")


LAWS: tuple[Law[Merging], ...] = (
    Law(
        "further",
        "looks come to an end; what is merged in one stays merged, with names, shapes and types",
        _over_clients("further"),
    ),
    Law("layout", "the model that comes out has the names, shapes and types of those that went in", _over_clients("layout")),
    Law("finite", "from finite models comes a finite one, whatever their number", _over_clients("finite")),
    Law("fixed_point", "where all members are the same, they are the result", _over_clients("fixed_point")),
    Law("enough", "as many members as the rule says that it needs are enough, and fewer are refused", _over_clients("enough")),
    Law("one_member", "a member that is alone is the result", _over_clients("one_client")),
    Law("order", "the order of the members does not matter, rounding apart", _over_clients("order")),
    Law("no_mutation", "members and base that go in are not changed", _over_clients("no_mutation")),
    Law("deterministic", "the same inputs and the same generator give the same bits", _over_clients("deterministic")),
    Law("any_sequence", "members may hold read-only mappings", _over_clients("any_sequence")),
    Law("weights", "a member of twice the weight counts as much as the member there twice", _over_clients("weights")),
    Law("additive", "an additive rule gives the same result however its members are bundled", _over_clients("additive")),
    Law("float64", "float64 in gives float64 out, and float32 the same up to its rounding", _over_clients("float64")),
    Law(
        "products",
        "products of tasks' LoRA pairs, of any ranks, come out with their names and shapes, finite, in any order",
        _products_of_pairs,
    ),
    Law("affine", "where members and base are scaled and moved by the same, so is the result", _affine),
    Law("linear", "a rule that says that it is linear may merge before or after a linear map of the models", _linear),
)
