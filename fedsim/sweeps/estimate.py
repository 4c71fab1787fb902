"""What a sweep will take, from one measured round of each kind of run: seconds, memory, bytes.

With T tasks of R rounds and a first round that takes `train` + `combine` seconds and `evaluate` seconds for one task:

    seconds ≈ T·R·(train + combine) + n·evaluate,   n = (R + 1)·T(T+1)/2 evaluations of a task (without R where only ends are)
    bytes   ≈ T·R·(bytes of the round)

Rounds are not alike (LoRM sends other tensors in other rounds, a task's end may have a statistics pass of its own): estimates.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from fedsim.sweeps.job import Cost
from fedsim.sweeps.plan import PlannedRun

MOST_KINDS = 12  # measured at most; the others get the mean
SAME_COST = (
    "lr",
    "weight_decay",
    "groups",
    "clip_norm",
    "optimizer_options",
    "schedule_options",
)  # of the client: move numbers, not seconds


@dataclass(frozen=True)
class Estimate:
    """Of one run. `measured`: a round of a run of its kind was played; else it is the mean over the kinds that were."""

    seconds: float
    peak_bytes: float
    traffic_bytes: float
    measured: bool = True


def kind(run: PlannedRun) -> str:
    """Runs of one kind cost the same: they differ in seed, split or learning rate."""
    plain = run.config.to_dict()
    for key in ("seed", "name", "manifest", "trackers"):
        del plain[key]
    plain["partition"] = plain["partition"]["clients"]
    plain["client"] = {k: v for k, v in plain["client"].items() if k not in SAME_COST}
    return json.dumps(plain, sort_keys=True)


def samples(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """One run of every kind; when there are many kinds, some of them, evenly spaced."""
    first: dict[str, PlannedRun] = {}
    for run in runs:
        first.setdefault(kind(run), run)
    found = list(first.values())
    step = max(1.0, len(found) / MOST_KINDS)
    return [found[int(i * step)] for i in range(min(len(found), MOST_KINDS))]


def of_run(run: PlannedRun, cost: Cost) -> Estimate:
    """From one measured round of a run of this kind."""
    config, seconds = run.config, cost.results.costs["seconds"]
    tasks = 1 + max(h.task for h in cost.results.holdings)
    rounds = config.server.rounds
    turns = tasks * rounds
    tested = tasks * (tasks + 1) / 2 * (1 + rounds * (config.server.evaluate == "round"))
    traffic = sum(sum(kinds.values()) for kinds in cost.results.costs["bytes"].values())
    training = sum(seconds.get(phase, 0.0) for phase in ("train", "statistics", "combine"))
    return Estimate(turns * training + tested * seconds.get("evaluate", 0.0), cost.peak_bytes, turns * traffic)


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """For kinds that were not measured."""
    n = len(estimates)
    seconds, peak, traffic = (sum(getattr(e, f) for e in estimates) / n for f in ("seconds", "peak_bytes", "traffic_bytes"))
    return Estimate(seconds, peak, traffic, measured=False)


def of_sweep(estimates: Sequence[Estimate], jobs: int) -> Estimate:
    """Of all runs together, so many at a time: wall seconds, the memory of the largest that may go at once, bytes of all."""
    seconds = max(sum(e.seconds for e in estimates) / jobs, max(e.seconds for e in estimates))
    peak = sum(sorted((e.peak_bytes for e in estimates), reverse=True)[:jobs])
    return Estimate(seconds, peak, sum(e.traffic_bytes for e in estimates))
