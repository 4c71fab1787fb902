"""Learners that are broken on purpose are caught, each by the law that it breaks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim import laws
from fedsim.core import contracts
from fedsim.core.contracts import OWN, ClientWork, Context, Ending, IntArray, LocalState, Step
from fedsim.core.messages import RoundPlan, State, StatisticRequest, Tensors
from tests.laws.one import against

CALLS: list[int] = []


@dataclass(frozen=True)
class Changed(contracts.Learner):
    """Pulls gradients towards a mean of earlier steps that client and server remember; but for one thing."""

    what: str = ""

    @property
    def alone(self) -> str:  # type: ignore[override]
        return "it counts its calls" if self.what == "alone" else ""

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        if self.what == "needy":
            return {"teacher": context["teacher"]}
        if self.what == "in place" and memory:
            next(iter(memory.values())).zero_()
        common = context[OWN].get("mean", torch.tensor(0.0))
        if self.what == "global":
            CALLS.append(work.client_id)
            common = common + 0.01 * len(CALLS)
        return {"pull": 0.1 * memory.get("own", torch.tensor(0.0)) + 0.1 * common, "norm": torch.tensor(0.0), "draw": draw}

    def replay(self, state: LocalState, positions: IntArray, draw: torch.Generator) -> IntArray:
        return np.array([29]) if self.what == "stranger" else positions[:1]

    def loss(self, state: LocalState, step: Step) -> Tensor | None:
        if self.what == "explosive":
            return step.logits.sum() / 0
        if self.what == "huddled":  # looks at rows that are the fused slot's, not the client's
            return 0.01 * step.logits.sum() * torch.rand(())
        return 0.01 * step.logits[step.replayed].square().mean()

    def corrected(self, state: LocalState, gradients: Tensors, params: Tensors) -> Tensors:
        scale = 1e-3 * torch.rand(()) if self.what == "noisy" else 0.0
        state["norm"] = state["norm"] + sum(g.square().sum() for g in gradients.values())
        if self.what == "batch-wise" and not next(iter(params.values())).requires_grad:
            scale = 0.5
        return {n: g * (1 - scale) + state["pull"] * 0.01 for n, g in gradients.items()}

    def end(self, state: LocalState, work: ClientWork, params: Tensors, draw: torch.Generator) -> Ending:
        norm = state["norm"].detach().reshape(())
        ragged = self.what == "ragged" and work.client_id == 1
        return Ending({"own": norm}, {"mean2" if ragged else "mean": norm})

    def lift(self, statistics: Tensors, num_samples: int) -> Tensors:
        lifted = super().lift(statistics, num_samples)
        return {n: t.float() for n, t in lifted.items()} if self.what == "narrow" else lifted

    def context(self, state: State) -> Tensors:
        return {} if not state else {"mean": state["mean"].float()}

    def heard(self, state: State, total: Tensors, clients: int) -> State:
        if self.what == "total in place":
            total["mean"].zero_()
        if self.what == "forgetful":
            return {"mean": torch.rand((), dtype=torch.float64)}
        after: dict[str, Any] = {"mean": total["mean"] / clients}
        return after | {"me": Changed} if self.what == "unsavable" else after

    def closing(self, state: State, params: Tensors) -> RoundPlan | None:
        requests = (StatisticRequest("gram", ("head.weight",)),)
        return RoundPlan() if self.what == "training" else RoundPlan(train=(), statistics=requests)

    def closed(self, state: State, params: Tensors, total: Tensors) -> State:
        return state if "gram.diagonal/head.weight" in total else {}


def broken(learner: contracts.Learner) -> dict[str, str]:
    return {r.name: r.explanation for r in laws.check("learners", learner) if not r.ok}


def test_good_ones_keep_all() -> None:
    assert broken(contracts.Learner()) == {}
    assert broken(Changed()) == {}


@pytest.mark.parametrize(
    ("what", "law", "says"),
    [
        ("needy", "works", "task 0, round 0: client 0 fails in the stage training: .* looks for the context 'teacher'"),
        ("explosive", "works", "task 0, round 0: client 0 fails in the stage training: the loss is"),
        ("training", "works", "the end of task 0: its plan trains"),
        ("noisy", "deterministic", "task 1, round 1, client 0, trained twice"),
        ("global", "any_worker", "in a worker of its own"),
        ("batch-wise", "fused", "together against one by one"),
        ("unsavable", "memory_file", "a file cannot hold the server's state"),
        ("stranger", "held", "task 0, round 0: client 0 looks at sample 29, which it has never held"),
        ("in place", "no_mutation", "task 0, round 1: client 0: the memory that it was given changed"),
        ("total in place", "no_mutation", "the server's half: the total that it was given changed"),
        ("ragged", "order", "different names or shapes"),
        ("narrow", "order", "torch.float32: sums are kept in float64"),
        ("forgetful", "order", "heard twice: the new states differ"),
    ],
)
def test_broken_one_is_caught_by_its_law(what: str, law: str, says: str) -> None:
    told = against("learners", Changed(what), law)
    assert re.search(says, told), told
