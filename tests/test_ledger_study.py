"""The ledger's study: every method stands in it, and everything in it can be run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fedsim.core import presets
from fedsim.sweeps import tune

LEDGER = Path(__file__).resolve().parents[1] / "experiments" / "ledger"
NOT_A_METHOD = {"unlearning"}  # what is removed again, by a command of its own


def methods(name: str) -> list[str]:
    return list(yaml.safe_load((LEDGER / name).read_text())["list"]["method"])


@pytest.mark.parametrize("name", ["fashion.yaml", "tune_fashion.yaml"])
def test_every_method_is_in_the_ledger(name: str) -> None:
    assert set(methods(name)) == set(presets.names(presets.METHODS)) - NOT_A_METHOD


@pytest.mark.parametrize("name", ["characters", "digits", "cifar100", "intents"])
def test_a_chosen_few_on_other_streams_with_their_bounds(name: str) -> None:
    assert {"ncm", "ranpac", "joint", "fedavg"} <= set(methods(f"{name}.yaml")) < set(methods("fashion.yaml"))


def test_all_have_the_same_small_budget() -> None:
    tuning = tune.read(LEDGER / "tune_fashion.yaml")
    seeds = set(tuning.options.seeds)
    assert seeds.isdisjoint({0, 1, 2}), "which the tables use"
    assert all(len(tuning.of(name)) <= tuning.options.budget for name in tuning.variants)
    assert {run.config.stream.order for one in tuning.candidates for run in one.runs.values()} == {"shuffle"}
