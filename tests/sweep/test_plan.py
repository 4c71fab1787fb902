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

from fedsim.core import rng
from fedsim.core.errors import ConfigError, FedsimError, PartitionError, RunDirError
from fedsim.runs.collection import Entry, SweepRecord
from fedsim.sweeps.plan import SweepPlan, expand, verify
from tests.pages import median_rule, sweep_yaml
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


def test_a_pattern_of_files_is_a_variant_each(tmp_path: Path) -> None:
    """Such as what `fedsim tune` writes: called as the file is, in the order of the names."""
    (tmp_path / "best").mkdir()
    for name, epochs in (("b", 3), ("a", 2)):
        (tmp_path / "best" / f"{name}.yaml").write_text(f"client: {{epochs: {epochs}}}\n")
    plan = plan_of(tmp_path, list={"method": "best/*.yaml"})
    assert [(run.entry.labels["method"], run.config.client.epochs) for run in plan.runs] == [("a", 2), ("b", 3)]
    one_by_one = {name: {"client.epochs": epochs} for name, epochs in (("a", 2), ("b", 3))}
    assert [run.entry for run in plan.runs] == [run.entry for run in plan_of(tmp_path, list={"method": one_by_one}).runs]
    with pytest.raises(ConfigError, match=r"list.method: no file is called worst/\*.yaml in .*presets go in a list"):
        plan_of(tmp_path, list={"method": "worst/*.yaml"})


axis = st.lists(st.integers(1, 50), min_size=1, max_size=3, unique=True)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


def test_what_a_variant_lacks_is_left_out_there_and_said(tmp_path: Path) -> None:
    """Shared options hold for the variants that have them, whatever the order; runs that differ in nothing are one."""
    methods = {"lora": {}, "tangent": {"adapter": "tangent"}, "prompts": {"adapter": "prefix"}, "head": {"adapter": "none"}}
    plan = plan_of(tmp_path, set={"adapter.rank": 7}, list={"method": methods}, grid={"adapter.targets": ["all-linear", ["fc1"]]})
    found = {(r.entry.labels["method"], r.entry.labels["adapter.targets"]): r.config.adapter for r in plan.runs}
    lora = [(method, targets) for method in ("lora", "tangent") for targets in ("all-linear", '["fc1"]')]
    assert list(found) == [*lora, ("prompts", None), ("head", None)]
    assert [found[key].get("rank") for key in found] == [7, 7, 7, 7, None, None]
    assert [found[key]["targets"] for key in lora] == ["all-linear", ["fc1"]] * 2
    assert plan.record.axes["adapter.targets"] == ["all-linear", '["fc1"]', None]
    assert plan.record.notes == (
        "adapter.rank does not apply to method=prompts, head",
        "adapter.targets does not apply to method=prompts, head",
    )
    assert {r.config.name for r in plan.runs} >= {"prompts-0", "lora-all-linear-0"}
    alone = plan_of(tmp_path, list={"method": {"prompts": methods["prompts"]}})
    assert alone.runs[0].entry.identity == plan.runs[4].entry.identity


def test_options_of_plugins_that_are_not_there(tmp_path: Path) -> None:
    """No calibrator, and a list of rules, have no option that could be set for them."""
    groups = [{"match": "*", "name": "fedavg"}]
    plan = plan_of(
        tmp_path,
        "server.aggregator.ridge=0.5",
        base={**TINY, "server": {"aggregator": {"name": "lorm"}}},
        list={
            "repair": {"none": {}, "hgp": {"server.calibrator": "hgp"}},
            "rule": {"one": {}, "some": {"server.aggregator": groups}},
        },
        set={"server.calibrator.epochs": 3},
    )  # fmt: skip
    assert [(r.config.server.calibrator or {}).get("epochs") for r in plan.runs] == [None, None, 3, 3]
    assert [isinstance(r.config.server.aggregator, list) for r in plan.runs] == [False, True, False, True]
    assert [r.config.server.aggregator["ridge"] for r in plan.runs[::2]] == [0.5, 0.5]
    assert plan.record.notes == (
        "server.calibrator.epochs does not apply to repair=none", "server.aggregator.ridge does not apply to rule=some"
    )  # fmt: skip


@pytest.mark.parametrize("first", ["method", "heterogeneity"])
def test_a_joint_run_is_one_whatever_the_heterogeneity(tmp_path: Path, first: str) -> None:
    (tmp_path / "joint.yaml").write_text("stream: {joint: true}\npartition: {name: joint, clients: 1, min_samples: 1}\n")
    axes: dict[str, Any] = {
        "method": {"lorm": {}, "joint": {"extends": "joint.yaml"}},
        "heterogeneity": {"low": {"partition.alpha": 0.1}, "iid": {"partition": "iid"}, "other": {"extends": "other.yaml"}},
    }
    (tmp_path / "other.yaml").write_text("partition: {name: quantity}\n")
    plan = plan_of(tmp_path, list={first: axes.pop(first), **axes}, grid={"partition.clients": [2, 3]}, seeds=2)
    joint = [r for r in plan.runs if r.entry.labels["method"] == "joint"]
    assert {r.config.partition["name"] for r in joint} == {"joint"}
    assert len({r.entry.identity for r in joint}) == 2 and len(plan.runs) == 2 * (3 * 2) + len(joint)
    assert {r.entry.labels["heterogeneity"] for r in joint} == {None}
    assert {r.entry.labels["partition.clients"] for r in joint} == {None}
    assert [r.config.partition["clients"] for r in plan.runs if r not in joint] == [2, 3] * 6
    assert "partition.alpha does not apply to method=joint" in plan.record.notes


POOL = """
from clients.pools import serial


class Pool(serial.Pool):
    scale = SCALE
"""


def test_a_pool_of_the_users_own_is_swept_as_it_is(tmp_path: Path) -> None:
    """It may compute otherwise, so it is part of what a run is; `launch` decides among ours, which give the same bits."""
    (tmp_path / "pool.py").write_text(POOL.replace("SCALE", "1"))
    mine = str(tmp_path / "pool.py")
    base = {**TINY, "runtime": {**TINY["runtime"], "pool": "./pool.py"}}
    (own,) = plan_of(tmp_path, base=base).runs
    (ours,) = plan_of(tmp_path).runs
    assert (own.config.runtime.pool, ours.config.runtime.pool) == (mine, "serial")
    assert own.entry.identity != ours.entry.identity
    axis = plan_of(tmp_path, grid={"runtime.pool": ["./pool.py", "serial"]}, seeds=2).runs
    assert [r.config.runtime.pool for r in axis] == [mine, "serial"] * 2
    assert [axis[0].entry.identity, axis[1].entry.identity] == [own.entry.identity, ours.entry.identity]
    (again,) = plan_of(tmp_path, f"runtime.pool={mine}").runs
    assert again.entry.identity == own.entry.identity
    with pytest.raises(ConfigError, match=rf"^seed=0: runtime.pool is {mine}, which launch.pool cannot replace: leave that out"):
        plan_of(tmp_path, base=base, launch={"pool": "ray"})
    (tmp_path / "pool.py").write_text(POOL.replace("SCALE", "2"))
    assert plan_of(tmp_path, base=base).runs[0].entry.identity != own.entry.identity


def test_several_files_as_the_base(tmp_path: Path) -> None:
    """The later one wins."""
    (tmp_path / "base.yaml").write_text(json.dumps(TINY))
    (tmp_path / "method.yaml").write_text("adapter: prefix\nclient: {lr: 0.125}\n")
    (run,) = plan_of(tmp_path, base=["base.yaml", "method.yaml"]).runs
    assert (run.config.adapter["name"], run.config.client.lr, run.config.stream.tasks) == ("prefix", 0.125, 2)


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


def test_the_sweep_of_the_tutorial(tmp_path: Path) -> None:
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
    assert SweepRecord.load(record.save(tmp_path)) == record
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
    "the pool of the runs": ({"set": {"runtime.pool": "ray"}}, "runtime.pool cannot be ray: in a sweep launch.pool decides"),
    "pools as an axis": (
        {"grid": {"runtime.pool": ["serial", "ray"]}},
        "^runtime.pool=ray seed=0: runtime.pool cannot be ray: in a",
    ),
    "an option of no variant": (
        {"list": {"m": {"a": {"adapter": "none"}, "b": {"adapter": {"name": "prefix"}}}}, "set": {"adapter.rank": 2}},
        "^m=a seed=0: unknown key 'adapter.rank'. There are no options of adapter.",
    ),
    "an option beside another plug-in's name": (
        {"list": {"m": {"a": {}, "b": {"adapter.rank": 2, "adapter.name": "prefix"}}}},
        "^m=b seed=0: unknown key 'adapter.rank'",
    ),
    "a split of a joint run alone": (
        {"list": {"m": {"a": {"partition": {"name": "joint", "clients": 1}}}}, "grid": {"partition": ["iid"]}},
        "^m=a partition=iid seed=0: partition applies to none of the runs: leave it out",
    ),
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
