"""The laws that every merging rule keeps, or says in its `exempt` why it cannot.

A rule is pure maths, so it is held against laws in both of its roles: over made-up clients it keeps those of an aggregator, and
over tasks it is handed the products of LoRA pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedsim.core.contracts import Member, Merging
from fedsim.core.rng import torch_stream
from fedsim.laws import aggregators
from fedsim.laws.comparing import expect_bits, expect_close, expect_finite, layout_difference
from fedsim.laws.frame import Law, LawBroken, once
from fedsim.laws.made_up import make_params, some_clients, stepped, synthesise
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
    start, tasks = {n: t for n, t in make_params().items() if n.startswith("adapter.")}, max(TASKS, rule.least)
    modules = [stepped(start, ("*",), "task", task) for task in range(tasks)]
    members = []
    for task, (module, client) in enumerate(zip(modules, some_clients(tasks), strict=True)):
        requests = _products.asked(rule.asks(), module)
        found = {n: t for request in requests for n, t in synthesise(request, client, module).items()}
        statistics = _products.received(found, module)
        members.append(Member(f"task {task}", _products.Products(module), 1.0, statistics))
    base = _products.zeros(start)
    out, again, turned = (rule.merge(several, base, torch_stream(0, "merge")) for several in (members, members, members[::-1]))
    if out.keys() != base.keys() or any(out[n].shape != t.shape for n, t in base.items()):
        raise LawBroken(f"{tasks} tasks: {layout_difference(out, base)}")
    expect_finite(out, f"{tasks} tasks")
    expect_bits(again, out, f"{tasks} tasks, merged twice")
    if "order" not in rule.exempt:
        expect_close(turned, out, f"{tasks} tasks, in reversed order")
    if "one_member" not in rule.exempt and rule.least == 1:
        alone = rule.merge(members[:1], base, torch.Generator())
        expect_close(alone, dict(members[0].params), "one task alone")


LAWS: tuple[Law[Merging], ...] = (
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
        "products of tasks' LoRA pairs come out with their names and shapes, finite, in any order",
        _products_of_pairs,
    ),
)
