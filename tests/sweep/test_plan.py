"""A sweep YAML becomes checked configs: what runs, under which labels, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsim.collection import Entry, SweepRecord
from fedsim.core import rng
from fedsim.core.errors import ConfigError, FedsimError, PartitionError, RunDirError
from fedsim.sweep.plan import SweepPlan, expand, verify
from tests.readme import median_rule, sweep_yaml
from tests.tiny import TINY

ROOT = Path(__file__).resolve().parents[2]
PARTITION = """
from dataclasses import dataclass

import numpy as np

from fedsim.core import contracts
from fedsim.core.errors import PartitionError


@dataclass(frozen=True)
class Partition(contracts.Partition):
    def split(self, labels, rng):
        if rng.integers(2**31) == UNLUCKY:
            raise PartitionError("no luck")
        return np.array_split(np.arange(len(labels)), self.clients)
"""


def plan_of(folder: Path, *overrides: str, base: Any = None, **sweep: Any) -> SweepPlan:
    (folder / "base.yaml").write_text(json.dumps(TINY))
    (folder / "my_sweep.yaml").write_text(yaml.safe_dump({"base": base or "base.yaml", **sweep}, sort_keys=False))
    return expand(folder / "my_sweep.yaml", overrides, folder / "out")


def verify_all(plan: SweepPlan) -> None:
    verify(plan, plan.runs)


def test_every_combination_is_a_run(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        list={"method": {"lorm": None, "mean": {"server.aggregator": "fedavg", "server": {"consolidator": "mean"}}}},
        zip={"client.lr": [0.1, 0.2], "client.epochs": [2, 1]},
        grid={"partition.alpha": [0.1, 1.0, 10.0]},
        seeds=2,
    )
    assert len(plan.runs) == 2 * 2 * 3 * 2
    assert list(plan.record.axes) == ["method", "client.lr", "client.epochs", "partition.alpha", "seed"]
    assert plan.record.axes["client.epochs"] == [2, 1]
    for run in plan.runs:
        config, labels = run.config, run.entry.labels
        rule, consolidator = config.server.aggregator["name"], config.server.consolidator["name"]
        assert (rule, consolidator) == {"lorm": ("lorm", "regmean"), "mean": ("fedavg", "mean")}[str(labels["method"])]
        assert (labels["client.lr"], labels["client.epochs"]) in {(0.1, 2), (0.2, 1)}
        found = {
            "client.lr": config.client.lr, "client.epochs": config.client.epochs,
            "partition.alpha": config.partition["alpha"], "seed": config.seed,
        }  # fmt: skip
        assert found == {k: labels[k] for k in found}
        assert run.entry.identity == config.identity()
    assert [run.config.seed for run in plan.runs] == [0] * 12 + [1] * 12  # every setting has a first result soon


axis = st.lists(st.integers(1, 50), min_size=1, max_size=3, unique=True)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(epochs=axis, batch=axis, seeds=st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True))
def test_runs_are_the_product_of_the_axes(tmp_path: Path, epochs: list[int], batch: list[int], seeds: list[int]) -> None:
    plan = plan_of(tmp_path, grid={"client.epochs": epochs, "client.batch_size": batch}, seeds=seeds)
    assert len({r.entry.identity for r in plan.runs}) == len(plan.runs) == math.prod(map(len, (epochs, batch, seeds)))


def test_the_later_layer_wins(tmp_path: Path) -> None:
    """base < what variants extend < set < what variants change < grid < seed < command line."""
    (tmp_path / "preset.yaml").write_text("client: {lr: 0.5, epochs: 7, batch_size: 3}\nserver: {rounds: 9}\n")
    plan = plan_of(
        tmp_path,
        "server.rounds=5",
        set={"client.epochs": 4},
        list={"method": {"preset": {"extends": "preset.yaml", "client.batch_size": 6}}, "other": {"x": {}}},
        grid={"client.lr": [0.25]},
    )
    (run,) = plan.runs
    client = run.config.client
    assert (client.lr, client.epochs, client.batch_size, run.config.server.rounds, run.config.seed) == (0.25, 4, 6, 5, 0)


def test_a_variant_that_extends_a_preset_does_not_undo_another_axis(tmp_path: Path) -> None:
    (tmp_path / "preset.yaml").write_text("extends: base.yaml\nserver: {aggregator: fedavg}\npartition: {alpha: 77}\n")
    levels = {"low": {"partition.alpha": 0.1}, "iid": {"partition": "iid"}}
    plan = plan_of(tmp_path, list={"heterogeneity": levels, "method": {"preset": {"extends": "preset.yaml"}}})
    assert [r.config.partition.get("alpha") for r in plan.runs] == [0.1, None]
    assert {r.config.server.aggregator["name"] for r in plan.runs} == {"fedavg"}
    assert {r.config.partition["clients"] for r in plan.runs} == {3}


def test_where_it_runs_is_no_part_of_what_it_is(tmp_path: Path) -> None:
    serial = plan_of(tmp_path, seeds=2)
    ray = plan_of(tmp_path, seeds=2, launch={"pool": "ray", "jobs": 3, "retry": 1})
    assert [r.entry for r in serial.runs] == [r.entry for r in ray.runs]
    assert {r.config.runtime.pool for r in serial.runs} == {"serial"}
    assert {r.config.runtime.pool for r in ray.runs} == {"ray"}


def test_a_rule_beside_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "rule.py").write_text((ROOT / "server/aggregators/fedavg.py").read_text())
    plan = plan_of(tmp_path, list={"rule": {"mine": {"server.aggregator": "./rule.py"}, "theirs": {}}})
    assert [Path(r.config.server.aggregator["name"]).name for r in plan.runs] == ["rule.py", "lorm"]


def test_the_sweep_of_the_readme(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my_rule.py").write_text(median_rule())
    (tmp_path / "my_sweep.yaml").write_text(sweep_yaml())
    plan = expand(tmp_path / "my_sweep.yaml")
    assert len(plan.runs) == 3 * 2 * 3
    verify_all(plan)


def test_name_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert plan_of(tmp_path).record.name == "my_sweep"
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "sweep.yaml").write_text("base: ../base.yaml\n")
    plan = expand("study/sweep.yaml")
    assert (plan.record.name, plan.folder) == ("study", tmp_path / "runs" / "study")


def test_the_record_comes_back(tmp_path: Path) -> None:
    record = plan_of(tmp_path, grid={"partition.alpha": [0.1, 1.0]}, seeds=2).record
    assert SweepRecord.load(record.save(tmp_path)) == SweepRecord(record.name, record.axes, tuple(record.runs), record.text)
    (tmp_path / "sweeps" / "my_sweep.json").write_text('{"format": "fedsim-sweep-1", "name"')
    with pytest.raises(RunDirError, match=r"my_sweep.json is damaged .* start the sweep again"):
        SweepRecord.load(tmp_path / "sweeps" / "my_sweep.json")
    assert Entry("0123456789abcdef9", {}).folder == "0123456789abcdef"


@pytest.mark.parametrize(
    ("sweep", "override", "message"),
    [
        ({"zip": {"client.lr": [0.1, 0.2], "client.epochs": [1, 2]}}, "client.epochs=7", "client.epochs is 7 in the end, not 1"),
        ({"seeds": [0]}, "seed=5", "seed is 5 in the end, not 0"),
        ({"grid": {"partition.alpha": [0.1], "client.lr": [1.0, 2.0]}}, "partition.alpha=9", "alpha is 9.0 in the end, not 0.1"),
        ({"grid": {"partition.alpha": [0.1], "partition": ["dirichlet", "iid"]}}, "name=x", "partition.alpha is None in the end"),
    ],
)
def test_a_label_never_lies(tmp_path: Path, sweep: dict[str, Any], override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(tmp_path, override, **sweep)


def test_values_as_they_may_be_written(tmp_path: Path) -> None:
    values = {"client.lr": ["1e-2", 1], "adapter.targets": ["all-linear", ["q_proj", "v_proj"]], "server.aggregator": ["fedavg"]}
    assert len(plan_of(tmp_path, grid=values | {"partition": [{"name": "iid"}, "dirichlet"]}).runs) == 8


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"grid": {"partition.alhpa": [1.0]}}, r"^partition.alhpa=1.0 seed=0: unknown key .* Did you mean 'alpha'"),
    "wrong value": ({"grid": {"partition.alpha": [1.0, -1.0]}}, "^partition.alpha=-1.0 seed=0: partition.alpha must be positive"),
    "unknown rule": ({"list": {"m": {"a": {"server.aggregator": "fedagv"}}}}, "^m=a seed=0: server.aggregator: unknown"),
    "empty axis": ({"grid": {"partition.alpha": []}}, "grid.partition.alpha is empty"),
    "empty variants": ({"list": {"method": {}}}, "list.method is empty"),
    "no seeds": ({"seeds": []}, "seeds is empty"),
    "zero seeds": ({"seeds": 0}, "at least 1"),
    "seeds of words": ({"seeds": ["a"]}, "whole numbers, got 'a'"),
    "a value for a list": ({"grid": {"partition.alpha": 0.1}}, "must be a list of values, got 0.1"),
    "unequal zip": ({"zip": {"client.lr": [1.0, 2.0], "client.epochs": [1]}}, "client.lr: 2, client.epochs: 1"),
    "the same value twice": ({"grid": {"client.lr": [1, 1.0]}}, "'client.lr=1 seed=0' and 'client.lr=1.0 seed=0' resolve"),
    "two names of one run": ({"list": {"m": {"a": {}, "b": {"client.epochs": 1}}}}, "'m=a seed=0' and 'm=b seed=0' resolve"),
    "the same seed twice": ({"seeds": [1, 1]}, "resolve to the same run"),
    "an axis twice": ({"grid": {"client.lr": [1.0]}, "zip": {"client.lr": [2.0]}}, "'client.lr' is there twice"),
    "a name that is taken": ({"list": {"run": {"a": {}}}}, "axis 'run': the table of results has a column of that name"),
    "seed as an axis": ({"grid": {"seed": [1]}}, "called seeds"),
    "unknown section": ({"gird": {}}, "unknown key 'gird' in my_sweep.yaml. Did you mean 'grid'"),
    "unknown launch": ({"launch": {"job": 1}}, "unknown key 'launch.job'. Did you mean 'jobs'"),
    "a seed in a variant": ({"list": {"m": {"a": {"seed": 3}}}}, "list.m.a: a variant cannot set the seed, use seeds"),
    "a variant called on": ({"list": {"m": {True: {}}}}, "named by a word or a number: put True in quotes"),
    "a preset that is a number": ({"list": {"m": {"a": {"extends": 5}}}}, "list.m.a.extends must name a config file, got 5"),
    "the pool of the runs": ({"set": {"runtime.pool": "ray"}}, "in a sweep launch.pool decides"),
    "a base that extends": ({"base": {"extends": "base.yaml"}}, "name the file itself as the base"),
    "gpus of a run on Ray": ({"launch": {"pool": "ray", "gpus": 1}}, "launch.gpus is for runs in one process"),
    "no jobs": ({"launch": {"jobs": 0}}, "launch.jobs must be 'auto' or at least 1"),
    "gpus": ({"launch": {"gpus": "two"}}, "launch.gpus must be"),
    "retry": ({"launch": {"retry": -1}}, "launch.retry must not be negative"),
    "memory": ({"launch": {"memory_gb": 0}}, "launch.memory_gb must be positive"),
    "set": ({"set": [1]}, r"set must be a mapping, got \[1\]"),
    "missing preset": ({"list": {"m": {"a": {"extends": "nothing.yaml"}}}}, "no config file .*nothing.yaml"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sweeps(name: str, tmp_path: Path) -> None:
    sweep, message = BAD[name]
    with pytest.raises(FedsimError, match=message) as caught:
        plan_of(tmp_path, **sweep)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no sweep file"):
        expand(tmp_path / "nothing.yaml")
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    with pytest.raises(ConfigError, match=r"unknown key 'seed' in config.yaml\. Did you mean 'seeds'"):
        expand(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("seeds: 3\n")
    with pytest.raises(ConfigError, match="names no base"):
        expand(tmp_path / "config.yaml")


def test_verify_looks_at_data_and_model(tmp_path: Path) -> None:
    verify_all(plan_of(tmp_path, grid={"adapter.rank": [2, 4]}, seeds=2))
    with pytest.raises(PartitionError, match=r"^partition.clients=100 seed=0: task 0 .* 100 clients"):
        verify_all(plan_of(tmp_path, grid={"partition.clients": [3, 100]}))
    with pytest.raises(FedsimError, match=r"^adapter.rank=17 seed=0: adapter.rank 17 is larger than layer"):
        verify_all(plan_of(tmp_path, grid={"adapter.rank": [2, 17]}))


def test_verify_splits_for_every_seed(tmp_path: Path) -> None:
    """A split that fails for the second seed only."""
    unlucky = int(rng.stream(1, "partition", 0).integers(2**31))
    (tmp_path / "part.py").write_text(PARTITION.replace("UNLUCKY", str(unlucky)))
    plan = plan_of(tmp_path, seeds=2, set={"partition": {"name": "./part.py", "clients": 3}})
    verify(plan, plan.runs[:1])
    with pytest.raises(PartitionError, match=r"^seed=1: task 0 .*no luck"):
        verify_all(plan)
