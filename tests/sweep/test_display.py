"""What a sweep prints while it goes, and what it estimates before."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from fedsim import simulation
from fedsim.sweeps import estimate
from fedsim.sweeps.display import SweepDisplay, progress, share_done
from fedsim.sweeps.job import Cost, JobResult, measure
from fedsim.sweeps.launch import Begun, Ended, Tick
from fedsim.sweeps.plan import SweepPlan
from tests.sweep.test_plan import plan_of


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def shown(plan: SweepPlan, terminal: bool, quiet: bool = False) -> tuple[SweepDisplay, Clock, io.StringIO]:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=100, force_terminal=terminal, color_system=None)
    return SweepDisplay(plan, {}, console, quiet, clock), clock, out


def test_a_line_per_run_where_there_is_no_terminal(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, grid={"partition.alpha": [0.1, 1.0]}, seeds=2)
    display, clock, out = shown(plan, terminal=False)
    with display:
        display(Begun(plan.runs[0], 1))
        clock.now += 30
        display(Ended(plan.runs[0], JobResult("finished", 30.0, 41.25), 1))
        display(Ended(plan.runs[1], JobResult("failed", 1.0, error="no luck"), 1, again=True))
        display(Ended(plan.runs[1], JobResult("failed", 1.0, error="no luck"), 2))
        display(Ended(plan.runs[2], JobResult("elsewhere"), 1))
        display(Tick())
    assert out.getvalue().splitlines() == [
        "[1/4] partition.alpha=0.1 seed=0: accuracy 41.2 %, 30 s, ETA 1:30 min",
        "[1/4] partition.alpha=1.0 seed=0: failed, will be tried again: no luck, ETA 1:30 min",
        "[1/4] partition.alpha=1.0 seed=0: FAILED: no luck, ETA 1:00 min",
        "partition.alpha=0.1 seed=1: another process is at it",
    ]
    assert display.failed == {"partition.alpha=1.0 seed=0": "no luck"}


def test_a_live_table_on_a_terminal(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, grid={"partition.alpha": [0.1, 1.0]})
    simulation.run(plan.runs[1].config, output=plan.folder / plan.runs[1].entry.folder)  # rounds.csv of a run that goes
    display, _, out = shown(plan, terminal=True)
    with display:
        for run in plan.runs:
            display(Begun(run, 1))
        display(Ended(plan.runs[0], JobResult("finished", 30.0, 41.25), 1))
    text = out.getvalue()
    assert "my_sweep: 0 of 2 done, 2 running, 0 waiting" in text
    assert "my_sweep: 1 of 2 done, 1 running, 0 waiting" in text
    assert "best so far 41.2 % partition.alpha=0.1" in text
    assert progress(plan.folder / plan.runs[1].entry.folder)[0] == 4  # 2 tasks of 2 rounds
    assert share_done(plan.folder, plan.runs[1]) == 1.0


def test_quiet(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    display, _, out = shown(plan, terminal=True, quiet=True)
    with display:
        display(Ended(plan.runs[0], JobResult("finished", 30.0, 41.25), 1))
    assert out.getvalue() == ""


def test_best_is_of_the_mean_over_seeds(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, grid={"partition.alpha": [0.1, 1.0]}, seeds=2)
    display, _, _ = shown(plan, terminal=False)
    assert display.best() == ""
    for run, accuracy in zip(plan.runs, (90.0, 60.0, 10.0, 60.0), strict=True):
        display(Ended(run, JobResult("finished", 1.0, accuracy), 1))
    assert display.best() == "best so far 60.0 % partition.alpha=1.0"


def test_bytes_of_an_estimate_are_those_of_the_run(tmp_path: Path) -> None:
    """FedAvg sends the same in every round, so one round tells the bytes of the whole run."""
    plan = plan_of(tmp_path, set={"server": {"aggregator": "fedavg", "consolidator": "none"}})
    (run,) = plan.runs
    of_round = simulation.rehearse(run.config, rounds=1)
    assert {r.task for r in of_round.rows} == {0}
    one = estimate.of_run(run, Cost(of_round, 10**9))
    whole = simulation.run(run.config, output=tmp_path / "whole")
    assert one.traffic_bytes == sum(sum(kinds.values()) for kinds in whole.costs["bytes"].values())
    seconds = of_round.costs["seconds"]
    assert one.seconds == pytest.approx(4 * (seconds["train"] + seconds["combine"]) + 9 * seconds["evaluate"])
    assert (one.peak_bytes, one.measured) == (10**9, True)


def test_evaluations_are_estimated_whenever_they_are_made(tmp_path: Path) -> None:
    """Two tasks of two rounds: 3 evaluations of a task at the ends of tasks, and 6 more where every round has them."""
    for when, number in (("task", 3), ("round", 9)):
        (run,) = plan_of(tmp_path, set={"server.evaluate": when}).runs
        cost = measure(run.config)
        assert isinstance(cost, Cost)
        seconds = cost.results.costs["seconds"]
        assert seconds["evaluate"] > 0
        training = sum(seconds.get(phase, 0.0) for phase in ("train", "statistics", "combine"))
        assert estimate.of_run(run, cost).seconds == pytest.approx(4 * training + number * seconds["evaluate"])


def test_kinds_of_runs(tmp_path: Path) -> None:
    grid = {"adapter.rank": [2, 4], "client.lr": [0.1, 0.2], "partition.alpha": [0.1, 1.0]}
    plan = plan_of(tmp_path, grid=grid, seeds=2)
    assert [run.config.adapter["rank"] for run in estimate.samples(plan.runs)] == [2, 4]
    many = plan_of(tmp_path, grid={"client.batch_size": list(range(1, 41))})
    assert [run.config.client.batch_size for run in estimate.samples(many.runs)] == [1 + int(i * 40 / 12) for i in range(12)]
    mean = estimate.mean([estimate.Estimate(1, 2, 3), estimate.Estimate(3, 4, 5)])
    assert mean == estimate.Estimate(2, 3, 4, measured=False)
