"""`fedsim check` finds what a name or a file stands for, and tells of every class."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim import cli, laws
from fedsim.core import plugins
from fedsim.core.errors import PluginError

TWO = '''
"""A rule and the statistic that it asks for."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedsim.core import contracts
from fedsim.core.contracts import Adapter  # imported to be named, no plug-in of this file
from server.aggregators.fedavg import Aggregator as FedAvg


class Sum:
    def __init__(self):
        self.total = torch.zeros((), dtype=torch.float64)

    def update(self, features, labels):
        self.total = self.total + features.double().square().sum()

    def result(self):
        return {"energy/head.weight": self.total.float()}


@dataclass(frozen=True)
class Statistic(contracts.Statistic):
    additive: ClassVar[bool] = True

    @contextmanager
    def collect(self, model, params, subjects):
        if list(subjects) != ["head.weight"]:
            raise contracts.clients.ConfigError("of the head only")
        yield Sum()

    def synthetic(self, seen, params, subjects):
        if list(subjects) != ["head.weight"]:
            raise contracts.clients.ConfigError("of the head only")
        return {"energy/head.weight": SCALE * seen.features.square().sum()}


@dataclass(frozen=True)
class Aggregator(FedAvg):
    twice: bool = False

    def plan(self, state, round):
        return contracts.server.RoundPlan()

SCALE = 1.0
'''


def check(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = cli.main(["check", *words])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_a_file_with_two_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "both.py"
    path.write_text(TWO)
    assert plugins.kinds_of(str(path)) == ["aggregators", "statistics"]
    code, out = check(capsys, str(path))
    assert code == 0, out
    assert [line for line in out.splitlines() if line in plugins.KINDS] == ["aggregators", "statistics"]
    assert out.count("laws kept, 0 exempt, 0 broken") == 2
    path.write_text(TWO.replace("SCALE = 1.0", "SCALE = 2.0"))
    code, out = check(capsys, str(path), "--kind", "statistics")
    assert (code, "BROKEN  synthetic" in out) == (1, True)
    code, out = check(capsys, str(path), "twice=true")
    assert (code, "say by --kind" in out) == (2, True)
    assert check(capsys, str(path), "twice=true", "--kind", "aggregators")[0] == 0


def test_names_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = check(capsys, "fedavgg")
    assert (code, "there is no plug-in 'fedavgg'. Did you mean 'fedavg'?" in out) == (2, True)
    code, out = check(capsys, "fedavg", "--kind", "aggregator")
    assert (code, "Did you mean 'aggregators'?" in out) == (2, True)
    (tmp_path / "empty.py").write_text("from fedsim.core.contracts import Aggregator\n")
    with pytest.raises(PluginError, match="defines no plug-in: its class is named like its contract, one of Aggregator, "):
        plugins.kinds_of(str(tmp_path / "empty.py"))


def test_every_kind_has_laws() -> None:
    assert all(len(laws.laws_of(kind)) >= 5 for kind in plugins.KINDS)


def test_a_pool_has_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = check(capsys, "serial", "workers=2")
    assert (code, "pool serial has no options here" in out) == (2, True)


def test_a_name_of_several_kinds() -> None:
    assert plugins.kinds_of("regmean") == ["aggregators", "consolidators", "merging"]
    assert plugins.kinds_of("server.aggregators.regmean") == ["aggregators"]


def test_broken_with_one_of_its_examples_says_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rule.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "from server.aggregators.fedavg import Aggregator as FedAvg\n"
        "@dataclass(frozen=True)\n"
        "class Aggregator(FedAvg):\n"
        "    tilt: float = 0.0\n"
        "    examples = ({}, {'tilt': 0.5})\n"
        "    def finish(self, state, params, total, draw):\n"
        "        state, out = super().finish(state, params, total, draw)\n"
        "        return state, {n: t + self.tilt for n, t in out.items()}\n"
    )
    code, out = check(capsys, str(path))
    assert code == 1
    assert "with tilt=0.5: round 0" in " ".join(out.split())
