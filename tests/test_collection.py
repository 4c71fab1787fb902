"""Many runs as data: which runs count, under which labels, and that nothing is left out or counted silently."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsim
from fedsim.core.errors import RunDirError
from fedsim.runs import collection as collections
from fedsim.runs.collection import Absent, Collection, Entry, SweepRecord, collect
from fedsim.runs.directory import Holding
from fedsim.runs.results import Results
from fedsim.simulation import run
from tests import run_dirs
from tests.run_dirs import method, write_run
from tests.tiny import tiny

ACCURACY = ((90.0,), (60.0, 70.0))


def reasons(found: Collection) -> dict[str, str]:
    return {a.what: a.reason for a in found.absent}


# ---------------------------------------------------------------- a folder without a sweep


def test_what_varies_are_the_factors(tmp_path: Path) -> None:
    for rule in ("lorm", "fedavg"):
        for seed in (1, 0):
            write_run(tmp_path, method(rule, seed, alpha=0.1 if rule == "lorm" else 0.5))
    found = collect([tmp_path])
    assert {name: sorted(levels) for name, levels in found.factors.items()} == {
        "server.aggregator.name": ["fedavg", "lorm"]  # α, ridge and more follow from it; directories lie as hashes say
    }
    assert {"partition.alpha", "server.aggregator.ridge", "seed"} <= set(found.varying)
    frame = found.frame()
    assert list(frame.columns[:2]) == ["run", "server.aggregator.name"]
    assert frame["seed"].tolist() == [0, 1, 0, 1]
    frame = frame.sort_values(["server.aggregator.name", "seed"]).reset_index(drop=True)
    assert frame["server.aggregator.name"].tolist() == ["fedavg", "fedavg", "lorm", "lorm"]
    assert frame["seed"].tolist() == [0, 1, 0, 1]
    assert frame["partition.alpha"].tolist() == frame["dirichlet_alpha"].tolist() == [0.5, 0.5, 0.1, 0.1]
    assert frame["server.aggregator.ridge"].isna().tolist() == [True, True, False, False]
    assert frame["run"].tolist()[0] == method("fedavg", 0).identity()[:16]
    assert (found.absent, found.others, found.sweep) == ((), 0, None)


def test_accuracies_by_task_and_chance_are_columns(tmp_path: Path) -> None:
    """The learning curve, the last row of the matrix, and what guessing gives: among all classes, or among the told task's."""
    write_run(tmp_path, tiny("seed=0"), ((90,), (60, 70)))
    write_run(tmp_path, tiny("seed=1"), ((80,), (50, 70), (10, 20, 60)))
    write_run(tmp_path, tiny("seed=2", "stream.name=task_incremental"), ((90,), (60, 70)))
    frame = collect([tmp_path]).frame().set_index("seed")
    curve = frame[[c for c in frame if str(c).startswith("learning_curve")]].to_numpy()
    assert curve == pytest.approx(np.array([[90, 65, np.nan], [80, 60, 30], [90, 65, np.nan]]), nan_ok=True)
    final = frame[[c for c in frame if str(c).startswith("final_accuracy")]].to_numpy()
    assert final == pytest.approx(np.array([[60, 70, np.nan], [10, 20, 60], [60, 70, np.nan]]), nan_ok=True)
    assert frame["chance"].tolist() == pytest.approx([50.0, 100 / 3, 100.0])  # every task of these runs has one class


def test_a_key_that_tells_more_runs_apart_is_a_factor_too(tmp_path: Path) -> None:
    for rule in ("lorm", "fedavg"):
        for alpha in (1.0, 0.1):
            write_run(tmp_path, method(rule, 0, alpha))
    write_run(tmp_path, method("lorm", 0, 0.1, client={"lr": 0.5}))
    assert collect([tmp_path]).factors == {
        "server.aggregator.name": ("fedavg", "lorm"),
        "partition.alpha": (0.1, 1.0),
        "client.lr": (0.01, 0.5),
    }


def test_what_cannot_move_the_numbers_does_not_vary(tmp_path: Path) -> None:
    write_run(tmp_path, tiny("seed=0", "name=a", "runtime.workers=2"))
    write_run(tmp_path, tiny("seed=1", "name=b", "runtime.pool=ray", "trackers=[tensorboard]"))
    found = collect([tmp_path])
    assert (set(found.varying), found.factors, found.frame()["seed"].tolist()) == ({"seed"}, {}, [0, 1])
    write_run(tmp_path, tiny("runtime.eval_batch=7"))  # the size of a matrix product may move its last bit
    assert collect([tmp_path]).factors == {"runtime.eval_batch": (7, 256)}


def test_levels_that_are_not_there_come_last(tmp_path: Path) -> None:
    for ridge in (0.1, 0.01, None):
        rule: Any = "fedavg" if ridge is None else {"name": "lorm", "ridge": ridge}
        write_run(tmp_path, tiny(server={"aggregator": rule}))
    found = collect([tmp_path])
    assert found.factors["server.aggregator.ridge"] == (0.01, 0.1, None)
    rules = found.factors["server.aggregator.name"]  # as the directories lie, which are named by hashes
    assert sorted(map(str, rules)) == ["fedavg", "lorm"]
    ridges = found.frame().set_index("server.aggregator.name")["server.aggregator.ridge"]
    assert ridges["lorm"].tolist() == [0.01, 0.1]
    assert math.isnan(ridges["fedavg"])


def test_a_users_rule_is_one_rule_in_every_run_directory(tmp_path: Path) -> None:
    """Each run directory keeps a copy at a path of its own; an edited file is another rule."""
    rule = tmp_path / "my_rule.py"
    rule.write_text(
        "from dataclasses import dataclass\nfrom fedsim.core import contracts\n\n@dataclass(frozen=True)\n"
        "class Aggregator(contracts.Aggregator):\n"
        "    def combine(self, state, params, updates, draw):\n        return state, params\n"
    )
    for seed in (0, 1):
        write_run(tmp_path, tiny(f"seed={seed}", server={"aggregator": str(rule)}))
    assert collect([tmp_path]).factors == {}
    rule.write_text(rule.read_text() + "# edited\n")
    write_run(tmp_path, tiny(server={"aggregator": str(rule)}))
    (levels,) = collect([tmp_path]).factors.values()
    assert [str(level).split()[0] for level in levels] == ["my_rule.py"] * 2


def test_rules_by_group_have_one_name() -> None:
    config = tiny(server={"aggregator": [{"match": "head.*", "name": "regmean", "ridge": 0.5}, {"match": "*", "name": "fedavg"}]})
    flat = collections.flatten(config)
    assert flat["server.aggregator.name"] == "head.*: regmean, *: fedavg"
    assert flat["server.aggregator.0.ridge"] == 0.5
    assert not any(key.startswith("server.aggregator.1") for key in flat)
    assert flat["client.learners"] == "[]"
    assert flat["stream.tasks"] == 2


def test_a_run_that_lies_there_twice_counts_once(tmp_path: Path) -> None:
    path = write_run(tmp_path, tiny())
    shutil.copytree(path, tmp_path / "copy")
    found = collect([tmp_path, tmp_path, path])
    assert len(found.runs) == 1
    (absent,) = found.absent
    assert absent.reason.startswith("the same run as ")
    assert absent.reason.endswith(": counted once")


def test_run_directories_themselves(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, tiny(f"seed={seed}")) for seed, name in enumerate("ab")]
    assert [run.results.path for run in collect(paths).runs] == paths


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no folder .*out"),
        (lambda path: path.mkdir(), "no finished run in .*out$"),
        (lambda path: write_run(path / "deeper", tiny()), "no finished run in .*out: did you mean .*deeper"),
        (lambda path: (write_run(path, tiny()) / "costs.json").unlink(), "no finished run in .*out .*it holds no costs"),
    ],
)
def test_nothing_there(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path / "out")
    with pytest.raises(RunDirError, match=message) as caught:
        collect([tmp_path / "out"])
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- damage


def cut(name: str, lines: int) -> Callable[[Path], Any]:
    def harm(path: Path) -> None:
        kept = (path / name).read_text().splitlines(keepends=True)[:-lines]
        (path / name).write_text("".join(kept))

    return harm


def remove(name: str) -> Callable[[Path], Any]:
    return lambda path: (path / name).unlink()


def edit(name: str, old: str, new: str) -> Callable[[Path], Any]:
    def harm(path: Path) -> None:
        text = (path / name).read_text()
        assert old in text
        (path / name).write_text(text.replace(old, new))

    return harm


def write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_text(text)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (remove("status.json"), "it holds no status.json"),
        (write("status.json", "{"), "status.json is damaged"),
        (edit("status.json", '"finished"', '"running"'), "unfinished: go on with fedsim run --resume"),
        (remove("config.yaml"), "it holds no config.yaml"),
        (edit("config.yaml", "alpha: 0.5", "alpha: 0.1"), "its config.yaml or plugins/ were changed since it ran"),
        (edit("config.yaml", "alpha: 0.5", "alpha: -1"), "config.yaml is damaged"),
        (remove("rounds.csv"), "but the counts give None"),
        (cut("rounds.csv", 2), "but the counts give"),  # the last task is gone: the rest would pass for a shorter stream
        (cut("rounds.csv", 1), "but the counts give"),
        (edit("rounds.csv", ",700,", ",7x0,"), "rounds.csv is damaged"),
        (edit("rounds.csv", "1,2,task_end,1,700", "1,2,task_end,9,700"), "metrics.json is damaged (IndexError"),
        (cut("classes.csv", 1), "but the counts give"),
        (remove("partition.csv"), "client_accuracy_mean is 65.0, but the counts give None"),
        (remove("metrics.json"), "metrics.json is damaged"),
        (write("metrics.json", "[]"), "metrics.json is damaged"),
        (edit("metrics.json", ": 65.0", ": 66.0"), "is 66.0, but the counts give 65.0"),
        (edit("metrics.json", "{", '{"drift_cosine_head": 0.5,'), "drift_cosine_head is 0.5, but the counts give None"),
        (remove("costs.json"), "it holds no costs"),
        (write("costs.json", "{}"), "it holds no costs"),
        (write("costs.json", '{"bytes": {}}'), "damaged, left out: KeyError"),
        (write("costs.json", '{"bytes": 3}'), "damaged, left out: AttributeError"),
    ],
)
def test_damage_is_seen_and_said(tmp_path: Path, harm: Callable[[Path], Any], message: str) -> None:
    write_run(tmp_path, tiny("seed=0"), ACCURACY)
    harmed = write_run(tmp_path, tiny("seed=1"), ACCURACY)
    harm(harmed)
    found = collect([tmp_path])
    assert [run.results.config.seed for run in found.runs] == [0]
    ((what, reason),) = reasons(found).items()
    assert what == harmed.name
    assert message in reason
    assert "\n" not in reason


def test_a_run_of_an_earlier_version_is_read_as_it_is_read_today(tmp_path: Path) -> None:
    """A new key with a default changes what a config is called, not what it said."""
    path = write_run(tmp_path, tiny())
    edit("status.json", tiny().identity(), "0" * 64)(path)
    edit("status.json", fedsim.__version__, "0.0.0")(path)
    found = collect([tmp_path])
    assert (len(found.runs), found.absent) == (1, ())


def test_a_manifest_that_has_gone_since(tmp_path: Path) -> None:
    """Its content was part of the identity, which the run directory still knows."""
    manifest = tmp_path / "split.json"
    manifest.write_text("{}")
    config = tiny(manifest=str(manifest))
    write_run(tmp_path / "runs", config)
    record = SweepRecord("s", {"seed": (0,)}, (Entry(config.identity(), {"seed": 0}),))
    record.save(tmp_path / "runs")
    manifest.unlink()
    found = collect([tmp_path / "runs"])
    assert (len(found.runs), found.absent) == (1, ())


# ---------------------------------------------------------------- a sweep


def test_a_record_comes_back(tmp_path: Path) -> None:
    record = SweepRecord(
        "s", {"m": ("a", None, 0.1, True), "seed": (0, 1)}, (Entry("f" * 64, {"m": None, "seed": 1}),), "axes: {}\n"
    )
    path = record.save(tmp_path)
    assert path == tmp_path / "sweeps" / "s.json"
    loaded = SweepRecord.load(path)
    assert (loaded.name, loaded.text, loaded.runs) == (record.name, record.text, record.runs)
    assert {k: tuple(v) for k, v in loaded.axes.items()} == record.axes
    assert loaded.runs[0].folder == "f" * 16


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"format": "other"}', '{"format": "fedsim-sweep-1", "name": "s"}'])
def test_a_damaged_record(tmp_path: Path, text: str) -> None:
    write_run(tmp_path, tiny())
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "s.json").write_text(text)
    with pytest.raises(RunDirError, match=r"s\.json is damaged .*: start the sweep again, finished runs are kept"):
        collect([tmp_path])
    assert len(collect([tmp_path], everything=True).runs) == 1


def test_a_sweep_says_which_runs_count(tmp_path: Path) -> None:
    record = run_dirs.write_sweep(tmp_path, seeds=2)
    write_run(tmp_path, tiny("seed=7"))
    found = collect([tmp_path])
    assert (len(found.runs), found.absent, found.others) == (8, (), 1)
    assert found.sweep == SweepRecord.load(tmp_path / "sweeps" / "study.json")
    assert found.factors == {"method": ("lorm", "fedavg"), "alpha": (0.1, 0.5)}
    frame = found.frame()
    assert frame.columns[:3].tolist() == ["run", "method", "alpha"]
    assert frame["run"].tolist() == [entry.folder for entry in record.runs]
    for name in ("method", "alpha", "seed"):
        assert frame[name].tolist() == [entry.labels[name] for entry in record.runs]
    everything = collect([tmp_path], everything=True)
    assert (len(everything.runs), everything.sweep, everything.others) == (9, None, 0)


def test_what_is_missing_is_said_with_its_reason(tmp_path: Path) -> None:
    record = run_dirs.write_sweep(tmp_path, seeds=2, alphas=(0.5,))
    gone, failed, damaged, fine = record.runs
    shutil.rmtree(tmp_path / gone.folder)
    shutil.rmtree(tmp_path / failed.folder)
    collections.failure_file(tmp_path, failed).parent.mkdir()
    collections.failure_file(tmp_path, failed).write_text(json.dumps({"error": "client 3 failed"}))
    (tmp_path / damaged.folder / "rounds.csv").unlink()
    found = collect([tmp_path])
    assert [run.labels for run in found.runs] == [fine.labels]
    assert found.absent[:2] == (
        Absent("method=lorm alpha=0.5 seed=0", "not run yet: start the sweep again"),
        Absent("method=lorm alpha=0.5 seed=1", "failed: client 3 failed"),
    )
    assert "the counts give None" in reasons(found)["method=fedavg alpha=0.5 seed=0"]
    assert len(found.absent) == 3
    assert found.factors == {"method": ("fedavg",), "alpha": (0.5,)}
    collections.failure_file(tmp_path, failed).write_text("{")
    assert "is damaged" in reasons(collect([tmp_path]))["method=lorm alpha=0.5 seed=1"]


def test_a_sweep_of_which_nothing_is_there(tmp_path: Path) -> None:
    run_dirs.sweep(tmp_path)
    with pytest.raises(
        RunDirError, match="sweep study: none of its 12 runs is finished; the first: not run yet: start the sweep"
    ):
        collect([tmp_path])


def test_two_variants_that_are_the_same_run_have_a_row_each(tmp_path: Path) -> None:
    config = tiny()
    entries = [Entry(config.identity(), {"lr": lr, "seed": 0}) for lr in ("default", 0.01)]
    SweepRecord("s", {"lr": ("default", 0.01), "seed": (0,)}, tuple(entries)).save(tmp_path)
    write_run(tmp_path, config)
    found = collect([tmp_path])
    assert (found.frame()["lr"].tolist(), found.absent, found.others) == (["default", 0.01], (), 0)


def test_several_sweeps_in_one_folder(tmp_path: Path) -> None:
    run_dirs.write_sweep(tmp_path, seeds=1)
    record = SweepRecord("other", {"seed": (0,)}, (Entry(tiny("seed=0").identity(), {"seed": 0}),))
    record.save(tmp_path)
    assert collections.sweeps([tmp_path]) == ["other", "study"]
    assert collect([tmp_path]).sweep is None
    found = collect([tmp_path], sweep="study")
    assert (len(found.runs), found.others) == (4, 0)
    with pytest.raises(RunDirError, match=r"no sweep 'studdy' in .*\. Did you mean 'study'"):
        collect([tmp_path], sweep="studdy")


def test_a_sweep_that_was_run_on_two_machines(tmp_path: Path) -> None:
    record = run_dirs.write_sweep(tmp_path / "a", seeds=2, alphas=(0.5,))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "a" / record.runs[0].folder)
    shutil.rmtree(tmp_path / "b" / record.runs[1].folder)
    found = collect([tmp_path / "a", tmp_path / "b"])
    assert [run.labels for run in found.runs] == [entry.labels for entry in record.runs]
    assert {a.reason.partition(" as ")[0] for a in found.absent} == {"the same run"}
    run_dirs.sweep(tmp_path / "b", seeds=1)
    with pytest.raises(RunDirError, match="different sweeps of the name study: take one folder at a time"):
        collect([tmp_path / "a", tmp_path / "b"])


# ---------------------------------------------------------------- figures


def test_figures_of_a_split() -> None:
    """Client 0 holds 6 + 4 samples of classes 0 and 2, client 1 two of class 1, client 2 nothing."""
    held = (Holding(0, 0, 0, "a", 6), Holding(0, 1, 1, "b", 2), Holding(1, 0, 2, "c", 4))
    got = collections.split_figures(Results(tiny(), (), {}, holdings=held))
    assert (got["client_samples_min"], got["client_samples_max"], got["client_classes_mean"]) == (0, 10, 1.0)
    assert all(math.isnan(v) for v in collections.split_figures(Results(tiny(), (), {})).values())


def test_alpha_of_an_even_split_is_large() -> None:
    even = tuple(Holding(0, k, c, str(c), 100) for k in range(3) for c in range(6))
    one_each = tuple(Holding(0, c % 3, c, str(c), 100) for c in range(6))
    measured = [collections.split_figures(Results(tiny(), (), {}, holdings=held))["alpha_measured"] for held in (even, one_each)]
    assert measured[0] > 100
    assert measured[1] < 0.01


def test_heterogeneity_that_was_asked_for() -> None:
    assert collections.dirichlet_alpha(tiny("partition.alpha=0.3")) == 0.3
    assert collections.dirichlet_alpha(tiny(partition="iid")) == math.inf
    assert math.isnan(collections.dirichlet_alpha(tiny(partition="quantity")))
    assert math.isnan(collections.dirichlet_alpha(tiny("manifest=split.json", "partition.alpha=0.3")))


def test_costs_are_sums() -> None:
    costs = {"bytes": {"down": {"adapter": 3, "head": 4}, "up": {"head": 5}}, "seconds": {"a": 1.0, "b": 0.5}, "client_rounds": 6}
    assert collections.cost_figures(Results(tiny(), (), costs)) == {
        "bytes_down": 7, "bytes_down_adapter": 3, "bytes_down_head": 4, "bytes_up": 5, "bytes_up_head": 5,
        "seconds": 1.5, "seconds_a": 1.0, "seconds_b": 0.5, "client_rounds": 6,
    }  # fmt: skip
    stored = {"clients": 2, "mean": 3.5, "max": 4}
    figures = collections.cost_figures(Results(tiny(), (), {**costs, "stored": stored}))
    assert {k: v for k, v in figures.items() if k.startswith("stored")} == {f"stored_{k}": v for k, v in stored.items()}


def test_a_frame_of_real_runs_says_what_the_runs_say(run_dirs_folder: Path) -> None:
    made = [
        run(tiny(f"seed={seed}", f"server.aggregator={rule}", output=run_dirs_folder))
        for rule in ("lorm", "fedavg")
        for seed in (0, 1)
    ]
    frame = collect([run_dirs_folder]).frame()
    assert frame["path"].tolist() == [str(r.path) for r in (made[2], made[3], made[0], made[1])]
    by_path = frame.set_index("path")
    for results in made:
        row = by_path.loc[str(results.path)]
        for name, value in results.metrics.items():
            assert (math.isnan(row[name]) and value is None) or row[name] == value, name
        assert row["bytes_up"] == sum(results.costs["bytes"]["up"].values())
        assert row["partition_hash"] == results.manifest_hash[:16]
        assert row["client_samples_min"] >= 2 * 2  # min_samples of each of the two tasks
        assert np.isfinite(row["alpha_measured"])
    assert frame.groupby("seed")["partition_hash"].nunique().tolist() == [1, 1]
    assert frame["partition_hash"].nunique() == 2


@pytest.fixture
def run_dirs_folder(tmp_path: Path) -> Path:
    return tmp_path / "runs"
