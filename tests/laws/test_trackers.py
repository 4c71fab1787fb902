"""Trackers that are broken on purpose are caught, each by the law that it breaks."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from fedsim import laws
from fedsim.core import contracts
from fedsim.core.contracts import Outcome, TrackedRun
from fedsim.core.errors import PluginError
from tests.laws.one import against


@dataclass
class Recording:
    what: str
    run: TrackedRun
    open: list[str]
    told: int = 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self.what == "huge" and max(values.values()) > 1e9:
            raise OverflowError("too large")
        if self.what == "from zero" and self.run.resumed and self.told == 0 and step != 0:
            raise ValueError("the first step is 0")
        if self.what == "values":
            values.update(step=step)  # type: ignore[attr-defined]
        if self.what == "draws":
            torch.rand(1)
        self.told += 1

    def close(self, outcome: Outcome) -> None:
        self.open.remove(self.run.id)
        if self.what == "never failed" and outcome == "failed":
            raise KeyError(outcome)
        if self.what == "mean":
            assert 1 / self.told <= 1
        if self.what == "python":
            random.random()
        if self.what == "numpy":
            np.random.seed(0)  # noqa: NPY002


@dataclass(frozen=True)
class Changed(contracts.Tracker):
    """Keeps nothing; but for one thing, it does all right."""

    what: str = ""
    going: list[str] = field(default_factory=list)

    def check(self) -> None:
        if self.what == "missing":
            raise PluginError("pip install it")

    def open(self, run: TrackedRun) -> Recording:
        if self.what == "one at a time" and self.going:
            raise RuntimeError("there is one already")
        if self.what == "config":
            run.config.pop("seed")  # type: ignore[attr-defined]
        if self.what == "plain":
            assert all(len(str(v)) < 500 for v in run.options().values())
        if self.what == "new only" and run.resumed:
            raise FileExistsError(run.id)
        if self.what == "moves":
            os.chdir(run.path)
        self.going.append(run.id)
        return Recording(self.what, run, self.going)


def test_a_good_one_keeps_all() -> None:
    assert [r.explanation for r in laws.check("trackers", Changed()) if not r.ok] == []


@pytest.mark.parametrize(
    ("what", "law", "says"),
    [
        ("missing", "takes", "pip install it"),
        ("huge", "takes", "OverflowError: too large"),
        ("never failed", "takes", "KeyError: 'failed'"),
        ("plain", "takes", "AssertionError"),
        ("new only", "goes_on", "FileExistsError"),
        ("from zero", "goes_on", "the first step is 0"),
        ("mean", "nothing_said", "ZeroDivisionError"),
        ("one at a time", "side_by_side", "there is one already"),
        ("config", "no_mutation", "the config that it was given changed"),
        ("values", "no_mutation", "the values that it was given changed"),
        ("draws", "no_trace", "while it is told, torch's generator is no more what it was"),
        ("python", "no_trace", "once it is closed, Python's generator"),
        ("numpy", "no_trace", "once it is closed, numpy's generator"),
        ("moves", "no_trace", "while it is told, the working directory"),
    ],
)
def test_broken_one_is_caught_by_its_law(what: str, law: str, says: str) -> None:
    told = against("trackers", Changed(what), law)
    assert re.search(says, told), told
