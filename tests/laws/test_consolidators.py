"""Consolidators that are broken on purpose are caught, each by the law that it breaks."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fedsim import laws
from fedsim.core import contracts
from fedsim.core.contracts import TaskStart
from fedsim.core.messages import RoundPlan, State, StatisticRequest, Tensors
from fedsim.core.tensors import with_prefix
from server.consolidators.mean import Consolidator as Mean
from tests.laws.one import against


@dataclass(frozen=True)
class Changed(Mean):
    """The mean of modules, but for one thing."""

    what: str = ""

    def start_task(self, state: State, params: Tensors, fresh: Tensors, total: Tensors) -> TaskStart:
        start = super().start_task(state, params, fresh, total)
        if self.what == "headless":
            return TaskStart({n: t for n, t in start.params.items() if n != "head.bias"})
        if self.what == "shrinking head":
            return TaskStart({n: 0.5 * t if n == "head.weight" else t for n, t in start.params.items()})
        if self.what == "frozen":
            return TaskStart(start.params, frozen=("*",))
        if self.what == "keeping":
            return TaskStart(start.params, keeps_old_rows=True)
        if self.what == "noisy":
            return TaskStart({n: t + 1e-12 * torch.rand_like(t) if "lora" in n else t for n, t in start.params.items()})
        if self.what == "in place":
            next(iter(fresh.values())).zero_()
        return start

    def plan(self, state: State, params: Tensors) -> RoundPlan | None:
        moments = (StatisticRequest("class_moments", ("head.weight",)),)
        plans: dict[str, Any] = {"moments": RoundPlan(train=(), statistics=moments), "training": RoundPlan()}
        return plans.get(self.what)

    def end_task(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> State:
        state = super().end_task(state, params, total, draw)
        return state | {"rule": Mean} if self.what == "unsavable" else state

    def deployed(self, state: State, params: Tensors, finished: bool) -> Tensors:
        out = super().deployed(state, params, finished)
        if self.what == "half":
            return {n: 0.5 * t if n.startswith("adapter.") else t for n, t in out.items()}
        if self.what == "wide":
            return {n: t.double() for n, t in out.items()}
        if self.what == "lost":
            return with_prefix(out, "adapter.")
        if self.what == "torn":
            return {n: t[:-1] if n.endswith("lora_A") else t for n, t in out.items()}
        if self.what == "nan" and finished and len(state["past"]) > 1:
            return {n: t * float("nan") for n, t in out.items()}
        if self.what == "narrow":
            return {n: (t.half().to(t.dtype) if t.dtype == torch.float32 and "lora" in n else t) for n, t in out.items()}
        return out

    def without(self, state: State, clients: Collection[int], tasks: Collection[int]) -> State | None:
        return {"past": []} if self.what == "forgetful" else None


def broken(rule: contracts.Consolidator) -> dict[str, str]:
    return {r.name: r.explanation for r in laws.check("consolidators", rule) if not r.ok}


def test_a_good_one_keeps_all() -> None:
    assert broken(Changed()) == {}


@pytest.mark.parametrize(
    ("what", "law", "says"),
    [
        ("headless", "start", "task 0 starts with .*, not with the head and the tensors of a fresh module"),
        ("shrinking head", "start", "task 0, the head that it starts with: 'head.weight'"),
        ("frozen", "start", "freezes all tensors"),
        (
            "keeping",
            "start",
            "keeps the head's rows of old classes, and the rule's traits do not refuse 'old head rows rewritten'",
        ),
        ("half", "first_task", "during the first task, what is deployed against what was trained"),
        ("wide", "layout", "is torch.float64 and should be torch.float32"),
        ("lost", "layout", "'head.weight' is not deployed"),
        ("torn", "layout", "no module of this layer"),
        ("nan", "finite", "task 1, what is deployed: .* are NaN or infinite"),
        ("moments", "sums", "the statistic 'class_moments' is not additive"),
        ("training", "sums", "it is a pass for statistics, with train="),
        ("in place", "no_mutation", "task 0, at its start: the fresh that it was given changed"),
        ("noisy", "deterministic", "task 0, started twice"),
        ("unsavable", "state_file", "a file cannot hold the state"),
        ("narrow", "float64", "float32 against float64"),
        ("forgetful", "without", "without nobody, the state is another one"),
    ],
)
def test_broken_one_is_caught_by_its_law(what: str, law: str, says: str) -> None:
    told = against("consolidators", Changed(what), law)
    assert re.search(says, told), told


@dataclass(frozen=True)
class Keeping(contracts.Consolidator):
    """Keeps clients apart, and takes out the wrong ones."""

    @property
    def traits(self) -> contracts.Traits:
        return contracts.Traits(needs={"a module per client": "needs clients apart"})

    def init(self) -> State:
        return {"all": {}}

    def start_task(self, state: State, params: Tensors, fresh: Tensors, total: Tensors) -> TaskStart:
        return TaskStart({**params, **fresh})

    def end_task(self, state: State, params: Tensors, total: Tensors, draw: torch.Generator) -> State:
        past = state["all"]
        return {"all": {n: torch.cat([past[n], t]) if past else t for n, t in params.items()}}

    def deployed(self, state: State, params: Tensors, finished: bool) -> Tensors:
        return dict(self.end_task(state, params, {}, torch.Generator())["all"] if not finished else state["all"])

    def without(self, state: State, clients: Collection[int], tasks: Collection[int]) -> State | None:
        return {"all": {n: t[::2] if clients == [3] and n != "head.bias" else t for n, t in state["all"].items()}}


def test_clients_that_are_taken_out_are_gone() -> None:
    found = broken(Keeping())
    assert set(found) == {"without"}
    assert "without client 3, against tasks that it had no part in" in found["without"]
