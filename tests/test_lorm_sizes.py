"""LoRM keeps its promise of size: in a B-round and in a diagonal A-round nobody forms a d×d matrix, and what is sent is small.

Shapes: d inputs of the adapted layer, larger than all else; r rank, m outputs, N rows, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clients.statistics.gram import Statistic as Gram
from fedsim.core.messages import ClientUpdate, num_bytes
from fedsim.core.tensors import matching
from server.aggregators.lorm import Aggregator as Lorm

D_IN, M, R, N, D, C = 320, 24, 4, 30, 12, 5  # every other product of two sizes is below d·d
LAYER, HEAD = "adapter.body", "head.weight"


class Largest(TorchDispatchMode):
    """The most numbers that any tensor held which an operation made or gave back."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


class Body:
    """One wide layer; features are a few of its outputs."""

    num_classes = C

    def __init__(self) -> None:
        self.body = nn.Linear(D_IN, M).requires_grad_(False)

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        out: Tensor = self.body(inputs["x"])
        return out[:, :D]

    def logits(self, features: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        return features @ params[HEAD].T

    def layer(self, parameter: str) -> nn.Module:
        return self.body


def params(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {f"{LAYER}.lora_A": (R, D_IN), f"{LAYER}.lora_B": (M, R), HEAD: (C, D), "head.bias": (C,)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def updates(rule: Lorm, round: int) -> Iterator[ClientUpdate]:
    """What three clients send: trained tensors by the plan's globs, and the statistics that it asks for."""
    plan, model = rule.plan({}, round), Body()
    for client in range(3):
        own = params(0) | {n: t for n, t in params(1 + client).items() if n in matching(params(0), plan.train)}
        x_Nd = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(client))
        statistics: dict[str, Tensor] = {}
        for request in plan.statistics:
            with torch.no_grad(), Gram(**request.options).collect(model, own, matching(own, request.match)) as accumulator:
                for rows in x_Nd.split(8):  # type: ignore[no-untyped-call]
                    accumulator.update(model.features({"x": rows}), torch.zeros(len(rows), dtype=torch.int64))
                statistics |= {f"gram.{name}": t for name, t in accumulator.result().items()}
        yield ClientUpdate(client, N, {n: own[n] for n in matching(own, plan.train)}, statistics)


ROUNDS = [({}, 0), ({}, 1), ({"decay": 0.5}, 0), ({"ridge": 1e-3}, 1), ({"keep_unseen": True}, 0)]


@pytest.mark.parametrize(("options", "round"), ROUNDS)
def test_no_matrix_of_the_inputs_squared_is_formed(options: dict[str, Any], round: int) -> None:
    rule = Lorm(**options)
    with Largest() as client:
        sent = list(updates(rule, round))
    with Largest() as server:
        merged = rule.combine({}, params(0), sent, torch.Generator())[1]
    assert D_IN * N <= client.numel < D_IN * D_IN  # it did see the inputs
    assert R * R < server.numel < D_IN * D_IN
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in params(0).items()}


@pytest.mark.parametrize(("options", "round"), [({"decay": 0.5}, 1), ({"gram": "full"}, 0)])
def test_the_watch_sees_such_a_matrix_where_one_is_asked_for(options: dict[str, Any], round: int) -> None:
    rule = Lorm(**options)
    with Largest() as client:
        sent = list(updates(rule, round))
    with Largest() as server:
        rule.combine({}, params(0), sent, torch.Generator())
    assert client.numel >= D_IN * D_IN
    assert server.numel >= D_IN * D_IN


def test_a_b_round_sends_b_and_the_head_and_little_more() -> None:
    (update, *_) = updates(Lorm(), 0)
    plain = num_bytes({n: t for n, t in params(0).items() if not n.endswith("lora_A")})
    head_gram = 4 * D * (D + 1) // 2
    assert num_bytes(update.params) == plain
    assert num_bytes(update.statistics) == head_gram + 4 * R * R


def test_a_diagonal_a_round_sends_a_number_per_input() -> None:
    (update, *_) = updates(Lorm(), 1)
    assert num_bytes(update.statistics) == 4 * D * (D + 1) // 2 + 4 * D_IN
