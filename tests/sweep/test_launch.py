"""Sweeps that run: same bits as single runs, only what is missing is made, nothing is lost and nothing is made twice."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file, save_file

from fedsim import simulation
from fedsim.core.errors import DataError, PoolError, RunDirError
from fedsim.runs.collection import collect
from fedsim.runs.results import Results
from fedsim.simulation import run
from fedsim.sweeps import launch
from fedsim.sweeps.job import lock_of
from fedsim.sweeps.launch import Begun, Ended
from fedsim.sweeps.plan import PlannedRun, SweepPlan, expand, finished, verify
from tests import interrupts
from tests.tiny import TINY, final_state, learned, plain_vit, same_bits

ROOT = Path(__file__).resolve().parents[2]
LOGGING_RULE = '''
import os
from dataclasses import dataclass

import torch

from fedsim.core import contracts


@dataclass(frozen=True)
class Aggregator(contracts.Aggregator):
    """A mean that notes every merge, may be slow, and may fail."""

    log: str = ""
    wait_s: float = 0.0
    fail: str = ""

    def combine(self, state, params, updates, draw):
        import time

        time.sleep(self.wait_s)
        if self.fail == "die once" and not os.path.exists(self.log):
            open(self.log, "w").close()
            os.kill(os.getpid(), 9)
        if self.fail == "always" or (self.fail == "once" and not os.path.exists(self.log)):
            open(self.log, "a").write("failed\\n")
            raise ValueError("no such\\nluck")
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()}\\n")
        return state, {**params, **{n: torch.stack([u.params[n] for u in updates]).mean(0) for n in updates[0].params}}
'''


def sweep(folder: Path, output: str = "out", **sections: Any) -> SweepPlan:
    """A sweep of tiny runs, with a backbone that a new process loads without transformers."""
    (folder / "base.yaml").write_text(json.dumps({**TINY, "model": plain_vit()}))
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"base": "base.yaml", **sections}, sort_keys=False))
    return expand(folder / "sweep.yaml", output=folder / output)


def logging(folder: Path, **options: Any) -> dict[str, Any]:
    """Changes that make a run note its merges in a file of this folder, named by the option `log`."""
    (folder / "rule.py").write_text(LOGGING_RULE)
    return {"server": {"aggregator": {"name": "./rule.py", "log": str(folder / "log"), **options}, "consolidator": "none"}}


def execute(plan: SweepPlan) -> list[Ended]:
    """Make what is missing; how every attempt ended."""
    plan.record.save(plan.folder)
    done = finished(plan)
    missing = [r for r in plan.runs if r.entry.identity not in done]
    return [e for e in launch.execute(plan, missing) if isinstance(e, Ended)] if missing else []


def path_of(plan: SweepPlan, planned: PlannedRun) -> Path:
    return plan.folder / planned.entry.folder


def test_runs_of_a_sweep_are_single_runs(one_ray: None, tmp_path: Path) -> None:
    rules = {"lorm": {}, "fair": {"server.aggregator": "fairavg"}}
    plan = sweep(tmp_path, grid={"partition.alpha": [0.1, 1.0]}, list={"rule": rules})
    ended = execute(plan)
    assert sorted(e.outcome.state for e in ended) == ["finished"] * 4
    for planned in plan.runs:
        alone = run(planned.config, output=tmp_path / "alone" / planned.entry.folder)
        assert alone.path is not None
        a, b = (final_state(p, planned.config) for p in (alone.path, path_of(plan, planned)))
        assert same_bits(learned(a), learned(b))
        assert json.loads((path_of(plan, planned) / "environment.json").read_text())["command"] == sys.argv
        of_sweep = next(e.outcome for e in ended if e.run is planned)
        assert of_sweep.accuracy == alone.metrics["final_average_accuracy"]


def test_only_what_is_missing_is_made(one_ray: None, tmp_path: Path) -> None:
    plan = sweep(tmp_path, grid={"partition.alpha": [0.1, 1.0]}, seeds=2)
    execute(plan)
    before = collect([plan.folder]).frame()
    kept, gone = plan.runs[::2], plan.runs[1::2]
    stamps = [(path_of(plan, r) / "status.json").stat().st_mtime_ns for r in kept]
    for r in gone:
        shutil.rmtree(path_of(plan, r))
    again = execute(plan)
    assert sorted(e.run.label for e in again) == sorted(r.label for r in gone)
    assert [(path_of(plan, r) / "status.json").stat().st_mtime_ns for r in kept] == stamps
    counted = [c for c in before.columns if "seconds" not in c and c != "peak_memory"]
    pd.testing.assert_frame_equal(collect([plan.folder]).frame()[counted], before[counted])
    assert execute(plan) == []

    wider = sweep(tmp_path, grid={"partition.alpha": [1.0, 10.0]}, seeds=2)  # shares half of its runs
    assert {e.run.config.partition["alpha"] for e in execute(wider)} == {10.0}


def test_a_run_that_was_stopped_goes_on(one_ray: None, tmp_path: Path) -> None:
    plan = sweep(tmp_path, set=logging(tmp_path))
    (planned,) = plan.runs

    def stop(event: Any) -> None:
        if type(event).__name__ == "RoundDone" and event.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(planned.config, output=path_of(plan, planned), progress=stop)
    rounds = len((tmp_path / "log").read_text().split())
    (ended,) = execute(plan)
    assert ended.outcome.state == "finished"
    total = TINY["stream"]["tasks"] * TINY["server"]["rounds"]
    assert rounds < len((tmp_path / "log").read_text().split()) <= total + 1  # at most the stopped round was played twice
    assert json.loads((path_of(plan, planned) / "environment.json").read_text())["resumed"]


def test_a_failing_run_is_noted_and_the_rest_goes_on(one_ray: None, tmp_path: Path) -> None:
    variants = {"good": {}, "bad": logging(tmp_path, fail="always")}
    plan = sweep(tmp_path, list={"rule": variants}, launch={"retry": 1, "jobs": 1})
    ended = execute(plan)
    assert [(e.run.entry.labels["rule"], e.outcome.state, e.attempt, e.again) for e in ended] == [
        ("good", "finished", 1, False),
        ("bad", "failed", 1, True),
        ("bad", "failed", 2, False),
    ]
    error = str(ended[-1].outcome.error)
    assert re.search(r"server\.aggregator \S+: task 0, round 0: \w+ fails: ValueError: no such luck", error)
    note = json.loads((plan.folder / "failures" / f"{ended[-1].run.entry.folder}.json").read_text())
    assert (note["attempts"], note["labels"]["rule"], note["error"]) == (2, "bad", error)
    assert "raise ValueError" in note["traceback"]
    collection = collect([plan.folder])
    assert [r.labels["rule"] for r in collection.runs] == ["good"]
    assert [(a.what, a.reason) for a in collection.absent if a.what.startswith("rule")] == [
        ("rule=bad seed=0", f"failed: {error}")
    ]


def test_a_second_attempt_may_succeed(one_ray: None, tmp_path: Path) -> None:
    plan = sweep(tmp_path, set=logging(tmp_path, fail="once"), launch={"retry": 3})
    assert [e.outcome.state for e in execute(plan)] == ["failed", "finished"]
    assert not list((plan.folder / "failures").iterdir())


def test_what_would_fail_again_is_not_tried_again(one_ray: None, tmp_path: Path) -> None:
    plan = sweep(tmp_path, grid={"partition.clients": [3, 100]}, launch={"retry": 5})
    assert [(e.outcome.state, e.attempt) for e in execute(plan) if e.run.config.partition["clients"] == 100] == [("failed", 1)]


def test_a_process_that_dies_is_a_failure(one_ray: None, tmp_path: Path) -> None:
    plan = sweep(tmp_path, list={"rule": {"good": {}, "dies": logging(tmp_path, fail="die once")}}, launch={"retry": 1})
    dies = [e for e in execute(plan) if e.run.entry.labels["rule"] == "dies"]
    assert [e.outcome.state for e in dies] == ["failed", "finished"]
    assert "its process died" in dies[0].outcome.error


@pytest.mark.parametrize("damage", ["rounds.csv", "config.yaml", "status.json", "checkpoint.pt", "a cut start"])
def test_a_damaged_run_is_set_aside_and_made_again(one_ray: None, tmp_path: Path, damage: str) -> None:
    plan = sweep(tmp_path)
    (planned,) = plan.runs
    execute(plan)
    path = path_of(plan, planned)
    before = Results.load(path).rows
    if damage == "a cut start":
        for name in ("status.json", "rounds.csv", "checkpoint.pt"):
            (path / name).unlink()
    elif damage == "checkpoint.pt":
        status = json.loads((path / "status.json").read_text())
        (path / "status.json").write_text(json.dumps(status | {"state": "running"}))
        (path / damage).write_bytes(b"torn")
    else:
        (path / damage).write_text("{torn,\n1")
    (ended,) = execute(plan)
    assert ended.outcome.state == "finished"
    assert str(plan.folder / "damaged") in ended.outcome.note
    assert Results.load(path).rows == before
    assert len(list((plan.folder / "damaged").iterdir())) == 1


def test_a_start_that_was_cut_short_is_made_anew(one_ray: None, tmp_path: Path) -> None:
    plan = sweep(tmp_path)
    path = path_of(plan, plan.runs[0])
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("torn")
    (path / ".manifest.json.123.tmp").write_text("{")
    (ended,) = execute(plan)
    assert (ended.outcome.state, ended.outcome.note) == ("finished", "")
    assert not list(path.rglob("*.tmp"))


def test_a_run_that_somebody_else_makes_is_waited_for(one_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "LOOK_S", 0.1)
    plan = sweep(tmp_path, seeds=2)
    lock = lock_of(plan.folder, plan.runs[0].entry)
    lock.acquire()
    states = []
    for event in launch.execute(plan, plan.runs):
        if isinstance(event, Ended):
            states.append((event.run.config.seed, event.outcome.state))
        if (1, "finished") in states and lock.is_locked:
            lock.release()
    assert sorted(states) == [(0, "elsewhere"), (0, "finished"), (1, "finished")]


def test_no_more_runs_at_a_time_than_asked(one_ray: None, tmp_path: Path) -> None:
    plan = sweep(tmp_path, seeds=3, launch={"jobs": 1})
    going = most = 0
    for event in launch.execute(plan, plan.runs):
        going += isinstance(event, Begun) - isinstance(event, Ended)
        most = max(most, going)
    assert most == 1


def test_clients_on_ray_inside_a_sweep(one_ray: None, tmp_path: Path) -> None:
    plan = sweep(tmp_path, set={"runtime.workers": 2}, launch={"pool": "ray"})
    (ended,) = execute(plan)
    assert ended.outcome.state == "finished", ended.outcome.error
    (planned,) = plan.runs
    (serial,) = sweep(tmp_path, "serial").runs
    alone = run(serial.config, output=tmp_path / "alone")
    assert alone.path is not None
    a, b = final_state(alone.path, serial.config), final_state(path_of(plan, planned), planned.config)
    assert same_bits(learned(a), learned(b))


def test_more_gpus_than_there_are(one_ray: None, tmp_path: Path) -> None:
    plan = sweep(tmp_path, launch={"gpus": 0.5})
    with pytest.raises(PoolError, match=r"^seed=0 wants CPU 1, GPU 0.5, and Ray has no such machine: lower launch.gpus"):
        list(launch.execute(plan, plan.runs))


@pytest.mark.parametrize(
    "sections",
    [{"launch": {"memory_gb": 1e6}}, {"grid": {"runtime.threads": [1, 64]}}, {"launch": {"pool": "ray", "jobs": 3}}],
    ids=["memory", "threads", "cores"],
)
def test_what_would_wait_for_ever_is_refused(one_ray: None, tmp_path: Path, sections: dict[str, Any]) -> None:
    plan = sweep(tmp_path, seeds=2, **sections)
    with pytest.raises(PoolError, match=r"Ray has"):
        list(launch.execute(plan, plan.runs))


def test_two_runs_at_a_time_with_clients_on_ray(one_ray: None, tmp_path: Path) -> None:
    """Neither of two waits for the other's workers; a third gets those of one that ended."""
    plan = sweep(tmp_path, seeds=3, launch={"pool": "ray", "jobs": 2})
    assert [e.outcome.state for e in execute(plan)] == ["finished"] * 3


def test_a_rule_that_is_edited_meanwhile_is_not_taken_for_the_planned_one(one_ray: None, tmp_path: Path) -> None:
    plan = sweep(tmp_path, set=logging(tmp_path))
    (tmp_path / "rule.py").write_text(LOGGING_RULE + "\n# edited\n")
    (ended,) = execute(plan)
    assert (ended.outcome.state, ended.outcome.final) == ("failed", True)
    assert "was changed since the sweep began: start the sweep again" in ended.outcome.error
    again = sweep(tmp_path, set=logging(tmp_path))
    assert [e.outcome.state for e in execute(again)] == ["finished"]


def test_a_split_from_a_file_that_moved(one_ray: None, tmp_path: Path) -> None:
    """The file's content counts, wherever it lies: a run keeps a copy."""
    (first,) = sweep(tmp_path).runs
    simulation.prepare(first.config).manifest.save(tmp_path / "a.json")
    (tmp_path / "b.json").write_bytes((tmp_path / "a.json").read_bytes())
    assert len(execute(sweep(tmp_path, set={"manifest": "./a.json"}))) == 1
    (tmp_path / "a.json").unlink()
    plan = sweep(tmp_path, set={"manifest": "./b.json"})
    assert execute(plan) == []
    assert len(collect([plan.folder]).runs) == 1


def test_data_that_changed_since_the_first_runs(one_ray: None, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def write() -> None:
        labels = np.tile(np.arange(6), 12)
        images = rng.integers(0, 255, (72, 8, 8), dtype=np.uint8)
        arrays = {"train_images": images, "train_labels": labels, "test_images": images[:24], "test_labels": labels[:24]}
        np.savez(tmp_path / "data.npz", **arrays)

    write()
    data = {"data": {"source": "npz", "path": str(tmp_path / "data.npz")}}
    first = sweep(tmp_path, set=data)
    execute(first)
    verify(first, [])
    write()
    plan = sweep(tmp_path, set=data, seeds=2)
    with pytest.raises(DataError, match=r"^seed=0 was made with other data than lie there now"):
        verify(plan, plan.runs[1:])


def test_weights_that_changed_since_the_first_runs(tmp_path: Path) -> None:
    shutil.copytree(plain_vit()["backbone"], tmp_path / "vit")
    model = {"model": {"backbone": str(tmp_path / "vit")}}
    first = sweep(tmp_path, set=model)
    run(first.runs[0].config, output=path_of(first, first.runs[0]))
    plan = sweep(tmp_path, set=model, seeds=2)
    verify(plan, plan.runs[1:])
    weights = load_file(tmp_path / "vit" / "model.safetensors")
    save_file({n: t.flip(0).contiguous() for n, t in weights.items()}, tmp_path / "vit" / "model.safetensors")
    with pytest.raises(RunDirError, match=r"the weights of the backbone '.*vit' are not those that the run began with"):
        verify(plan, plan.runs[1:])


def test_a_backbone_that_is_used_otherwise_since_the_first_runs(tmp_path: Path) -> None:
    """The same weights, images normalised in another way. A run of an older version, which noted the weights alone, goes on."""
    shutil.copytree(plain_vit()["backbone"], tmp_path / "vit")
    model = {"model": {"backbone": str(tmp_path / "vit")}}
    first = sweep(tmp_path, set=model)
    folder = path_of(first, first.runs[0])
    run(first.runs[0].config, output=folder)
    plan = sweep(tmp_path, set=model, seeds=2)
    (tmp_path / "vit" / "preprocessor_config.json").write_text('{"image_mean": [0.4], "image_std": [0.2]}')
    with pytest.raises(RunDirError, match=r"its config.json or preprocessor_config.json changed how they are used"):
        verify(plan, plan.runs[1:])
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**status, "backbone": status["backbone"].partition(".")[0]}))
    verify(plan, plan.runs[1:])


def test_held_out_samples_are_no_other_data(one_ray: None, tmp_path: Path) -> None:
    """Runs with and without them share a data section, and each is held against the data that it was made with."""
    plan = sweep(tmp_path, grid={"stream.validation": [0.0, 0.3]})
    execute(plan)
    more = sweep(tmp_path, grid={"stream.validation": [0.0, 0.3]}, seeds=2)
    verify(more, more.missing(finished(more)))


def test_a_run_without_costs_is_made_again(one_ray: None, tmp_path: Path) -> None:
    """What `fedsim results` leaves out is not finished for a sweep."""
    plan = sweep(tmp_path)
    execute(plan)
    (path_of(plan, plan.runs[0]) / "costs.json").unlink()
    (ended,) = execute(plan)
    assert ended.outcome.state == "finished" and "it holds no costs" in ended.outcome.note
    assert len(collect([plan.folder]).runs) == 1


# ---------------------------------------------------------------- whole processes


def command(folder: Path, *words: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = (sys.executable, "-m", "fedsim.cli", "sweep", "sweep.yaml", "--output", "out", *words)
    with interrupts.heard_by_children():
        return subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def merges(folder: Path) -> int:
    return len((folder / "log").read_text().split()) if (folder / "log").exists() else 0


@pytest.mark.processes
def test_kill_9_in_the_middle_and_two_sweeps_at_once(tmp_path: Path) -> None:
    """The first sweep is killed in its second run; then two are started at once over the same folder. Every merge of every run is
    made once, but for the round that was going when the process died."""
    plan = sweep(tmp_path, set=logging(tmp_path, wait_s=0.15), seeds=4, launch={"jobs": 1})
    total = 4 * TINY["stream"]["tasks"] * TINY["server"]["rounds"]
    first = command(tmp_path)
    deadline = time.monotonic() + 120
    while merges(tmp_path) < 6:  # two of the second run: its start anew would be more than one merge too many
        assert time.monotonic() < deadline, first.communicate()[0] if first.poll() is not None else "no progress"
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()

    both = [command(tmp_path), command(tmp_path)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert total <= merges(tmp_path) <= total + 1
    frame = collect([plan.folder]).frame()
    assert sorted(frame["seed"]) == list(range(4))
    assert not list(plan.folder.rglob("*.tmp"))
    for planned in plan.runs[:2]:  # one was finished, one went on
        alone = run(planned.config, output=tmp_path / "alone" / planned.entry.folder)
        assert alone.rows == Results.load(path_of(plan, planned)).rows


@pytest.mark.processes
@pytest.mark.parametrize(("how", "jobs"), [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_ctrl_c(tmp_path: Path, how: signal.Signals, jobs: int) -> None:
    sweep(tmp_path, set=logging(tmp_path, wait_s=0.3), seeds=4, launch={"jobs": jobs})
    process = command(tmp_path)
    deadline = time.monotonic() + 120
    while merges(tmp_path) < jobs and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(how)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert output.strip().splitlines()[-1].startswith("fedsim: stopped, ")
    assert "of 4 runs are finished; the same command goes on with the others" in output
