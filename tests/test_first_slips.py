"""Small slips of the first hours: a path in place of a list, a tab, a folder, a name given twice, a method misspelt."""

from __future__ import annotations

import runpy
import time
from pathlib import Path

import numpy as np
import pytest

from fedsim import laws
from fedsim.core import config as configs
from fedsim.core import plugins
from fedsim.core.errors import ConfigError, DataError, PartitionError, PluginError
from fedsim.data.partitions import dirichlet
from fedsim.runs import known
from fedsim.runs.collection import collect
from fedsim.simulation import run
from fedsim.sweeps import plan
from tests.tiny import tiny


def test_one_path_and_one_override_need_no_list(tmp_path: Path) -> None:
    run(tiny("server.rounds=1", "server.aggregator=fedavg", "server.consolidator=none"), output=tmp_path / "runs" / "one")
    assert len(collect(str(tmp_path / "runs")).runs) == len(collect(tmp_path / "runs").runs) == 1
    assert configs.load("quickstart", "seed=7").seed == 7


def test_files_that_are_no_configs_say_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "tab.yaml").write_text("server:\n\trounds: 1\n")
    with pytest.raises(ConfigError, match=r"tab.yaml is not a YAML mapping: a tab \(line 2\): use spaces"):
        configs.load(tmp_path / "tab.yaml")
    with pytest.raises(ConfigError, match="is a folder: name a config file in it"):
        configs.load(tmp_path)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match=r"empty.csv is empty"):
        known.table(tmp_path / "empty.csv")


def test_a_seed_out_of_range_is_told_the_range_that_holds() -> None:
    with pytest.raises(ConfigError, match=r"seed must lie between 0 and 2\*\*63 - 1"):
        tiny(f"seed={2**64}")


def test_a_preset_listed_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("base: quickstart\nlist: {method: [fedavg, fedavg, lorm]}\n")
    with pytest.raises(ConfigError, match=r"list.method names 'fedavg' twice"):
        plan.expand(path)


def test_a_file_that_ends_the_process_is_no_plug_in(tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text("import sys; sys.exit(3)")
    with pytest.raises(PluginError, match=r"ends.py does not load: SystemExit: 3"):
        plugins.load("aggregators", str(tmp_path / "ends.py"))


def test_a_misspelt_method_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom fedsim import Learner as Base\n\n"
        "@dataclass(frozen=True)\nclass Learner(Base):\n    def losss(self, state, step):\n        return self.halved(2.0)\n\n"
        "    def halved(self, x):\n        return x / 2\n"  # a method of its own, which it calls
    )
    assert laws.strangers("learners", str(path)) == [
        "'losss' is no method of Learner: fedsim never calls it. Did you mean 'loss'?"
    ]
    assert laws.strangers("learners", "scaffold") == []


def test_the_package_runs_as_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["fedsim", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("fedsim", run_name="__main__")
    assert ended.value.code == 0


def test_a_hopeless_split_is_refused_at_once() -> None:
    labels, start = np.repeat(np.arange(4), 100), time.process_time()
    with pytest.raises(PartitionError, match=r"no split of 400 samples in 4 classes over 40 clients with alpha 0.001 gives"):
        dirichlet.Partition(40, alpha=0.001).split(labels, np.random.default_rng(0))
    assert time.process_time() - start < 0.5  # all of its draws take half a minute


@pytest.mark.parametrize(("classes", "clients", "alpha"), [(4, 6, 0.05), (2, 5, 0.1), (3, 3, 0.01), (2, 8, 0.2)])
def test_what_all_draws_reach_lies_below_its_bound(classes: int, clients: int, alpha: float) -> None:
    """The oracle is a count: how many of 50 000 draws give every client a sample."""
    rng, sizes_C = np.random.default_rng(1), np.full(classes, 30)
    q_DCK = rng.dirichlet(np.full(clients, alpha), size=(50_000, classes))
    often = (rng.multinomial(sizes_C, q_DCK).sum(1).min(1) > 0).mean()
    assert often <= np.exp(dirichlet.reached(sizes_C, clients, alpha)) <= 1
