"""The run directory: what is written is what is loaded, and what is in the way or damaged is said in one line."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import getsource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.channels import quantise
from clients.learners import proximal
from fedsim import simulation
from fedsim.core import config as configs
from fedsim.core import files, plugins
from fedsim.core.config import SimConfig
from fedsim.core.errors import FedsimError, RunDirError, StorageError
from fedsim.core.events import ClassRow, DriftRow, Row
from fedsim.runs.collection import collect, flatten
from fedsim.runs.directory import Holding, RunDir
from fedsim.runs.environment import environment
from fedsim.runs.results import Results
from server import checkpoint
from tests.tiny import stopping, tiny

COSTS = {
    "bytes": {"down": {"adapter": 1200, "head": 80}, "up": {"adapter": 600}},
    "seconds": {"start_up": 0.1, "train": 1 / 3},
    "client_rounds": 6,
}
ROWS = (
    Row(0, 0, "round", 0, 3, 5, 10),
    Row(0, 1, "task_end", 0, 9, 9, 10),
    Row(1, 0, "round", 0, 7, 8, 10),
    Row(1, 0, "round", 1, 1, 2, 3),
    Row(1, 1, "task_end", 0, 6, 8, 10),
    Row(1, 1, "task_end", 1, 2, 3, 3),
)
CLASSES = (
    ClassRow(0, 1, "task_end", 0, 5, 7, 5),
    ClassRow(0, 1, "task_end", 1, 4, 3, 5),
    ClassRow(1, 1, "task_end", 0, 4, 5, 5),
    ClassRow(1, 1, "task_end", 1, 2, 2, 5),
    ClassRow(1, 1, "task_end", 2, 2, 6, 3),
)
DRIFTS = (
    DriftRow(0, 0, "head", 2, None, 0.5, 0.5, 0.75, 0.6, 1.5, None),
    DriftRow(0, 1, "head", 2, 0.25, 0.25, 0.25, 0.5, 0.7, 2.0, None),
)
HOLDINGS = (Holding(0, 0, 0, "a", 6), Holding(0, 1, 1, "b", 2), Holding(1, 1, 2, "c", 4))


@dataclass(frozen=True)
class FakeManifest:
    hash: str = "abc"
    names: tuple[str, ...] = ()  # of classes, one held by each client

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"hash": self.hash}))

    def holdings(self) -> list[tuple[int, int, int, str, int]]:
        if self.names:
            return [(0, i, i, name, i + 1) for i, name in enumerate(self.names)]
        return [(h.task, h.client, h.class_row, h.class_name, h.samples) for h in HOLDINGS]


def known(*failures: str, rows: Sequence[Row] = ROWS, config: SimConfig | None = None) -> Results:
    return Results(config or tiny(), tuple(rows), COSTS, manifest_hash="abc", failures=failures, classes=CLASSES, drifts=DRIFTS)


def begun(config: SimConfig, output: Path | None = None) -> RunDir:
    run_dir = RunDir.create(config, output)
    run_dir.write_start(FakeManifest())
    return run_dir


# ---------------------------------------------------------------- Results


def test_accuracy_is_of_the_tasks_ends() -> None:
    results = Results(tiny(), ROWS, COSTS)
    np.testing.assert_array_equal(results.accuracy, [[90, np.nan], [60, 200 / 3]])
    np.testing.assert_array_equal(results.accuracy_task_incremental, [[90, np.nan], [80, 100]])
    assert results.metrics["final_average_accuracy"] == (60 + 200 / 3) / 2
    assert results.metrics["forgetting"] == 30
    assert results.metrics["forgetting_task_incremental"] == 10


def test_a_task_incremental_stream_is_judged_with_the_task_known() -> None:
    results = Results(tiny("stream.name=task_incremental"), ROWS, COSTS)
    np.testing.assert_array_equal(results.accuracy, results.accuracy_task_incremental)
    assert results.metrics["forgetting"] == 10
    assert results.frame()["accuracy"].tolist() == results.frame()["accuracy_task_incremental"].tolist()


def test_frame_has_one_row_per_test() -> None:
    frame = Results(tiny(), ROWS, COSTS).frame()
    assert list(frame.columns) == [
        "task", "round", "stage", "tested", "correct", "correct_in_task", "total", "accuracy", "accuracy_task_incremental",
    ]  # fmt: skip
    assert len(frame) == len(ROWS)
    end = frame[(frame.stage == "task_end") & (frame.task == 1)]
    assert end.accuracy.mean() == Results(tiny(), ROWS, COSTS).metrics["final_average_accuracy"]


def test_before_the_first_task_ends_nothing_is_claimed() -> None:
    results = Results(tiny(), ROWS[:1], COSTS)
    assert results.accuracy.shape == (0, 0)
    assert set(results.metrics.values()) == {None}


def test_accuracy_at_the_clients() -> None:
    """Final class accuracies 4/5, 2/5, 2/3. Client 0 holds class 0 only, client 1 two of class 1 and four of class 2."""
    results = dataclasses.replace(known(), holdings=HOLDINGS)
    np.testing.assert_allclose(results.client_accuracy, [80, (2 * 40 + 4 * 200 / 3) / 6, np.nan])
    found = results.metrics
    assert found["client_accuracy_min"] == found["client_accuracy_worst_decile"] == pytest.approx((80 + 800 / 3) / 6)
    assert found["client_accuracy_mean"] == pytest.approx(np.nanmean(results.client_accuracy))


def test_classes_that_nobody_holds_do_not_disturb() -> None:
    """Class 2 is tested and held by nobody; a class that is held and not tested has no accuracy."""
    results = dataclasses.replace(known(), holdings=(*HOLDINGS[:2], Holding(1, 2, 9, "z", 4)))
    np.testing.assert_allclose(results.client_accuracy, [80, 40, np.nan])
    assert np.isnan(known().client_accuracy).all()  # nothing is known of the split


def test_share_of_the_newest_classes() -> None:
    """After task 1, which brought class 2, 6 of 13 predictions fall on it."""
    assert known().metrics["newest_share"] == pytest.approx(600 / 13)
    one_task = dataclasses.replace(known(), classes=CLASSES[:2])
    assert one_task.metrics["newest_share"] is None


def test_a_domain_brings_no_class_that_predictions_could_have_a_share_of() -> None:
    """Runs of earlier versions, which wrote 0 for it, are read."""
    again = tuple(dataclasses.replace(c, task=1) for c in CLASSES[:2])
    domains = dataclasses.replace(known(), classes=(*CLASSES[:2], *again))
    assert domains.metrics["newest_share"] is None
    domains._require_metrics(domains.metrics | {"newest_share": 0.0})
    with pytest.raises(ValueError, match=r"newest_share is 5\.0, but the counts give None"):
        domains._require_metrics(domains.metrics | {"newest_share": 5.0})


def test_drift_is_a_mean_over_rounds() -> None:
    """Rounds in which a measure is undefined do not count; a measure that never is defined has no name."""
    drift = {name: value for name, value in known().metrics.items() if name.startswith("drift_")}
    assert drift == pytest.approx(
        {
            "drift_relative_norm_head": 0.25, "drift_cosine_head": 0.375, "drift_cosine_min_head": 0.375,
            "drift_cosine_to_mean_head": 0.625, "drift_diversity_head": 0.65, "drift_effective_rank_head": 1.75,
        }
    )  # fmt: skip


# ---------------------------------------------------------------- written and loaded


def test_round_trip(run_dirs: Path) -> None:
    run_dir = begun(tiny(output=run_dirs))
    written = known("client 1 failed").write_end(run_dir)
    loaded = Results.load(run_dir.path)
    assert loaded == written
    assert (loaded.manifest_hash, loaded.failures, loaded.finished) == ("abc", ("client 1 failed",), True)
    assert loaded.config.identity() == run_dir.config.identity()


def test_tables_come_back_as_they_were(run_dirs: Path) -> None:
    """Thirds, tiny and undefined numbers, and class names with whatever a CSV could trip over."""
    names = ["a,b", 'say "a"', "two\nlines", "ñ ä 字", "", " blank "]
    drifts = (*DRIFTS, DriftRow(1, 0, "adapter", 3, 1 / 3, -1e-17, -1.0, 0.1 + 0.2, 1e300, 5e-324, None))
    run_dir = RunDir.create(tiny(output=run_dirs))
    run_dir.write_start(FakeManifest(names=tuple(names)))
    written = dataclasses.replace(known(), drifts=drifts).write_end(run_dir)
    loaded = Results.load(run_dir.path)
    assert loaded.drifts == written.drifts == drifts
    assert loaded.classes == written.classes == CLASSES
    assert loaded.holdings == written.holdings == tuple(Holding(0, i, i, name, i + 1) for i, name in enumerate(names))
    assert loaded.metrics == written.metrics


def test_only_what_a_tasks_end_gave_is_kept_by_class(run_dirs: Path) -> None:
    run_dir = begun(tiny(output=run_dirs))
    dataclasses.replace(known(), classes=(*CLASSES, ClassRow(1, 0, "round", 0, 1, 2, 5))).write_progress(run_dir)
    assert Results.load(run_dir.path).classes == CLASSES


def test_files_at_the_end(run_dirs: Path) -> None:
    import pandas as pd

    run_dir = begun(tiny(output=run_dirs))
    results = known().write_end(run_dir)
    names = {p.name for p in run_dir.path.iterdir()}
    assert names == {
        "config.yaml", "manifest.json", "environment.json", "rounds.csv", "costs.json", "status.json",
        "accuracy.csv", "accuracy_task_incremental.csv", "metrics.json", "partition.csv", "classes.csv", "drift.csv",
    }  # fmt: skip
    np.testing.assert_array_equal(pd.read_csv(run_dir.path / "accuracy.csv", index_col=0).to_numpy(), results.accuracy)
    pd.testing.assert_frame_equal(pd.read_csv(run_dir.path / "rounds.csv"), results.frame())
    assert json.loads((run_dir.path / "metrics.json").read_text()) == results.metrics
    assert json.loads((run_dir.path / "costs.json").read_text()) == COSTS


def test_an_unfinished_run_loads_what_there_is(run_dirs: Path) -> None:
    run_dir = begun(tiny(output=run_dirs))
    assert Results.load(run_dir.path).rows == ()
    known(rows=ROWS[:2]).write_progress(run_dir)
    loaded = Results.load(run_dir.path)
    assert (loaded.rows, loaded.costs, loaded.finished) == (ROWS[:2], COSTS, False)
    np.testing.assert_array_equal(loaded.accuracy, [[90]])


def test_environment_says_what_made_the_numbers(run_dirs: Path) -> None:
    import torch

    run_dir = begun(tiny(output=run_dirs))
    told = json.loads((run_dir.path / "environment.json").read_text())
    assert told["packages"]["torch"] == torch.__version__
    assert set(told) >= {"fedsim", "git", "python", "platform", "cpu", "cores", "command", "started"}
    assert told["git"] is None or len(told["git"]["commit"]) == 40
    RunDir.open(run_dir.path).write_start(FakeManifest())
    again = json.loads((run_dir.path / "environment.json").read_text())
    assert again.pop("resumed")[0]["packages"] == told["packages"]
    assert again == told
    assert told["processor"] == f"{told['cpu']}, {torch.backends.cpu.get_cpu_capability()}"


def test_a_run_says_which_version_and_processor_made_it(run_dirs: Path) -> None:
    """In every table of runs; one that goes on elsewhere is of both processors, and what is not known stays empty."""
    run_dir = begun(tiny(output=run_dirs))
    known().write_end(run_dir)
    path = run_dir.path / "environment.json"
    told = json.loads(path.read_text())
    git = {"commit": "a" * 40, "dirty": True}
    for noted, version, processor in [
        (told | {"fedsim": "0.8.0", "git": None, "processor": "One, AVX2"}, "0.8.0", "One, AVX2"),
        (told | {"git": git, "processor": "One", "resumed": [{"processor": "Two"}, {"cpu": "One"}]}, None, "One and Two"),
        ({"fedsim": "0.7.0", "cpu": "One"}, "0.7.0", "One"),
        ([], "", ""),
    ]:
        path.write_text(json.dumps(noted))
        row = collect([run_dirs]).frame().iloc[0]
        version = f"{told['fedsim']} commit aaaaaaa with changes" if version is None else version
        assert (row["version"], row["processor"]) == (version, processor)
    path.unlink()
    assert collect([run_dirs]).frame()["processor"].tolist() == [""]


def test_a_device_of_torch_goes_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: {"cuda:1": "A card"}[device])
    assert environment("cuda:1")["processor"] == "A card"


@pytest.mark.parametrize("device", ["mps", "cuda:99", "xpu:99"])
def test_a_device_that_has_no_name_here_goes_by_its_word(device: str) -> None:
    assert environment(device)["processor"] == device


def test_nan_accuracy_of_a_task_without_test_samples(run_dirs: Path) -> None:
    run_dir = begun(tiny(output=run_dirs))
    rows = (Row(0, 1, "task_end", 0, 0, 0, 0),)
    assert known(rows=rows).write_end(run_dir).metrics["final_average_accuracy"] is None
    assert Results.load(run_dir.path).rows == rows
    assert math.isnan(Results.load(run_dir.path).frame()["accuracy"][0])


# ---------------------------------------------------------------- plug-in files


RULE = """
from dataclasses import dataclass
from fedsim.core import contracts

@dataclass(frozen=True)
class Aggregator(contracts.Aggregator):
    scale: float = 1.0
    def combine(self, state, params, updates, draw):
        return state, {n: self.scale * t for n, t in params.items()}
"""


def test_plugin_files_travel_with_the_run(tmp_path: Path, run_dirs: Path) -> None:
    for folder in ("a", "b"):  # two files of the same name
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rule.py").write_text(RULE + f"# {folder}\n")
    groups = [{"match": "head.*", "name": str(tmp_path / "a" / "rule.py"), "scale": 2.0}]
    groups += [{"match": "*", "name": str(tmp_path / "b" / "rule.py")}]
    config = tiny(output=run_dirs, server={"aggregator": groups})
    run_dir = begun(config)
    for folder in ("a", "b"):
        (tmp_path / folder / "rule.py").unlink()
    moved = run_dir.path.rename(tmp_path / "elsewhere")
    found = RunDir.open(moved)
    sections = found.config.server.aggregator
    assert [Path(s["name"]).read_text()[-2] for s in sections] == ["a", "b"]
    assert [s["name"] for s in sections] == [str(moved / "plugins" / name) for name in ("rule.py", "1/rule.py")]
    assert configs.build("aggregators", {k: v for k, v in sections[0].items() if k != "match"}).scale == 2.0
    (moved / "plugins" / "rule.py").write_text(RULE)
    with pytest.raises(RunDirError, match="plugins/ were changed"):
        RunDir.open(moved)


@pytest.mark.parametrize(
    ("key", "content", "named"),
    [
        ("client.learners", getsource(proximal), True),
        ("server.channel", getsource(quantise), True),
        ("server.aggregator", RULE, False),
    ],
)
def test_a_files_name_is_part_of_the_identity_where_memory_and_draws_go_by_it(
    key: str, content: str, named: bool, tmp_path: Path, run_dirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(name: str) -> SimConfig:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        chosen = f"{key}={path}" if key == "server.aggregator" else f"{key}=[{path}]"
        return tiny("server.aggregator=fedavg", "server.consolidator=none", chosen, output=run_dirs)

    mine, moved, yours = config("mine.py"), config("elsewhere/mine.py"), config("yours.py")
    assert mine.identity() == moved.identity()
    assert (mine.identity() == yours.identity()) is not named
    run_dir = begun(mine)
    assert RunDir.open(run_dir.path, moved).identity == RunDir.open(run_dir.path).config.identity() == mine.identity()
    if named:
        with pytest.raises(RunDirError, match="belongs to another config"):
            RunDir.open(run_dir.path, yours)
    with monkeypatch.context() as patched:  # as runs began before names counted
        patched.setattr(plugins, "BY_NAME", ())
        formerly = begun(mine)
    assert (formerly.identity == mine.identity()) is not named
    assert RunDir.open(formerly.path, moved).identity == formerly.identity


def test_a_pool_of_the_users_own_travels_with_the_run(tmp_path: Path, run_dirs: Path) -> None:
    (tmp_path / "pool.py").write_text("from clients.pools.serial import Pool as Serial\n\n\nclass Pool(Serial):\n    pass\n")
    config = tiny(f"runtime.pool={tmp_path / 'pool.py'}", output=run_dirs)
    assert config.identity() != tiny(output=run_dirs).identity()
    assert flatten(config)["runtime.pool"].startswith("pool.py ") and "runtime.pool" not in flatten(tiny())  # type: ignore[union-attr]
    run_dir = begun(config)
    (tmp_path / "pool.py").unlink()
    moved = run_dir.path.rename(tmp_path / "elsewhere")
    found = RunDir.open(moved)
    assert found.config.runtime.pool == str(moved / "plugins" / "pool.py")
    assert found.config.identity() == run_dir.identity
    (moved / "plugins" / "pool.py").write_text(
        "from clients.pools.serial import Pool as Serial\n\n\nclass Pool(Serial):\n    x = 1\n"
    )
    with pytest.raises(RunDirError, match="plugins/ were changed"):
        RunDir.open(moved)


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        ("seriel", "runtime.pool 'seriel' is unknown. Did you mean 'serial'"),
        ("./gone.py", "runtime.pool: no file .*gone.py"),
        ("./empty.py", "runtime.pool: .*empty.py defines no class named Pool"),
    ],
)
def test_a_pool_is_looked_at_at_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(FedsimError, match=said):
        tiny(f"runtime.pool={pool}")


def test_a_rule_object_stays_as_a_description(run_dirs: Path) -> None:
    from fedsim.simulation import run
    from server.aggregators.fedavg import Aggregator

    results = run(tiny("stream.tasks=1", "server.rounds=1", output=run_dirs), aggregator=Aggregator())
    assert results.path is not None
    loaded = Results.load(results.path)
    assert loaded.config.server.aggregator["name"] == "python:server.aggregators.fedavg.Aggregator"
    assert loaded.config.identity() == results.config.identity()
    assert loaded.rows == results.rows


# ---------------------------------------------------------------- names of folders


def test_default_folders_are_numbered(run_dirs: Path) -> None:
    config = tiny(output=run_dirs)
    stem = f"tiny-{config.identity()[:8]}"
    assert [RunDir.create(config).path.name for _ in range(3)] == [stem, f"{stem}-2", f"{stem}-3"]


def test_a_given_folder_may_be_new_or_empty(tmp_path: Path) -> None:
    assert RunDir.create(tiny(), tmp_path / "deep" / "new").path.is_dir()
    (tmp_path / "empty").mkdir()
    assert RunDir.create(tiny(), tmp_path / "empty").path == tmp_path / "empty"


def occupied(path: Path) -> Path:
    path.mkdir()
    (path / "thesis.tex").write_text("\\section{}")
    return path


def unfinished(path: Path) -> Path:
    return begun(tiny(), path).path


def finished(path: Path) -> Path:
    known().write_end(begun(tiny(), path))
    return path


def of_another_config(path: Path) -> Path:
    return begun(tiny("seed=1"), path).path


def a_file(path: Path) -> Path:
    path.write_text("")
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (occupied, "is not empty, and no run directory"),
        (unfinished, "unfinished run of this config: go on with fedsim run --resume"),
        (finished, "already holds a finished run"),
        (of_another_config, "belongs to another config"),
        (a_file, "is a file"),
    ],
)
def test_what_is_in_the_way(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    path = make(tmp_path / "out")
    before = sorted(path.rglob("*"))
    with pytest.raises(RunDirError, match=message):
        RunDir.create(tiny(), path)
    assert sorted(path.rglob("*")) == before


# ---------------------------------------------------------------- resuming


def test_where_it_runs_may_change_on_resume(tmp_path: Path) -> None:
    run_dir = begun(tiny(), tmp_path / "out")
    config = tiny("runtime.pool=ray", "runtime.workers=2", "name=other")
    assert RunDir.open(run_dir.path, config).config is config


def test_resume_of_another_config(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="belongs to another config"):
        RunDir.open(begun(tiny(), tmp_path / "out").path, tiny("partition.alpha=0.1"))


def test_resume_with_another_split(tmp_path: Path) -> None:
    run_dir = begun(tiny(), tmp_path / "out")
    with pytest.raises(RunDirError, match="another split"):
        run_dir.write_start(FakeManifest("xyz"))


def remove(name: str) -> Callable[[Path], Any]:
    return lambda path: (path / name).unlink()


def write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_text(text)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (remove("status.json"), "no run directory: it holds no status.json"),
        (remove("config.yaml"), "is damaged: it holds no config.yaml"),
        (write("status.json", "{"), "status.json is damaged"),
        (write("status.json", "[]"), "status.json is damaged"),
        (write("status.json", "{}"), "status.json is damaged"),
        (write("config.yaml", "- 1"), "config.yaml is damaged"),
        (write("config.yaml", "sed: 1"), "unknown key 'sed'"),
        (write("rounds.csv", "task,round\n0,x\n"), "rounds.csv is damaged"),
        (write("rounds.csv", "task,round,stage,tested,correct,correct_in_task,total\n0,0,round,0,1,"), "rounds.csv is damaged"),
        (write("costs.json", "null"), "costs.json is damaged"),
        (write("failures.json", "3"), "failures.json is damaged"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, harm: Callable[[Path], Any], message: str) -> None:
    run_dir = begun(tiny(), tmp_path / "out")
    known().write_end(run_dir)
    harm(run_dir.path)
    with pytest.raises(RunDirError, match=message) as caught:
        Results.load(run_dir.path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="no run directory"):
        RunDir.open(tmp_path / "nothing")


# ---------------------------------------------------------------- whole files


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = begun(tiny(), tmp_path / "out")
    known(rows=ROWS[:1]).write_progress(run_dir)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StorageError, match=f"disk full, .*rounds.csv.*fedsim run --resume {run_dir.path}"):
        known().write_progress(run_dir)
    monkeypatch.undo()
    assert Results.load(run_dir.path).rows == ROWS[:1]
    assert not list(run_dir.path.glob(".*"))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="could not be written: No such file or directory"):
        files.write_atomic(tmp_path / "nothing" / "file", b"")


def test_write_atomic_replaces_and_cleans_up_when_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    files.write_atomic(target, b"old")

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_processor_seconds_go_on_where_a_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one process does it all; workers have clocks of their own."""
    config, clock = tiny(), time.process_time()
    monkeypatch.setattr(checkpoint, "save", stopping(after=3))
    with pytest.raises(KeyboardInterrupt):
        simulation.run(config, output=tmp_path / "run")
    monkeypatch.undo()
    before = Results.load(tmp_path / "run").costs
    first = time.process_time() - clock
    after = simulation.run(config, resume=tmp_path / "run").costs
    both = time.process_time() - clock
    assert both / 2 < after["processor_seconds"] <= both
    assert 0 < before["processor_seconds"] <= first < after["processor_seconds"]
    assert "processor" not in after["seconds"]
    assert after["peak_memory"] > 50e6
    assert "processor_seconds" not in simulation.rehearse(config, rounds=1).costs
