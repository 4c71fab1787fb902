"""What the numbers of a stream lie between: guessing, what needs no training, and training on all data at once.

A bound is an ordinary run on the stream, with the method of a preset:

    ncm      nearest class mean of the bare backbone's features: what the backbone knows before anybody trains
    ranpac   ridge regression on fixed random features of it: what a closed form makes of the same features
    joint    one client that trains on all tasks at once: what can be learned

Headroom is the difference between the last and the first, in points: how much there is to win by training. Where it is small, a
stream cannot tell methods apart. A joint run has one task; where its accuracy on each task of the stream is not known (domains,
say, which all have the same classes), both are taken over all test samples.

The runs are found by what they are (the identity of their config), in the folder of the run that is held against them; `fedsim
bounds` makes them. For the streams that are embedded in the package the figures come with it (assets/bounds.json, means over
seeds; `python -m experiments.ledger.bounds` writes them).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from fedsim.core import presets
from fedsim.core.config import SimConfig, compose, read_layers
from fedsim.core.errors import FedsimError, RunDirError
from fedsim.core.home import ROOT
from fedsim.runs.collection import chance
from fedsim.runs.metrics import HEADLINE, MICRO
from fedsim.runs.results import Results

REFERENCES = {  # preset -> what it is called
    "ncm": "nearest class mean of the bare backbone",
    "ranpac": "ridge regression on random features of it",
    "joint": "training on all data at once",
}
OVER_SAMPLES = "over all test samples"
LITTLE = 5.0  # points of headroom below which a stream says little about methods
SHIPPED = Path(ROOT) / "fedsim" / "assets" / "bounds.json"
OF_THE_STREAM = ("data", "transform", "model", "stream")  # sections that say which samples are told apart, and by what
NOT_OF_IT = ("online", "keep", "joint")  # keys of the stream that no bound depends on


@dataclass(frozen=True)
class Bounds:
    """Final average accuracies in percent, over the tasks of the stream, means over runs; None where there is no such run.

    ncm_micro, joint_micro: the accuracies over all test samples, where joint is not known over tasks (see `joint_accuracy`).
    """

    chance: float
    ncm: float | None = None
    ranpac: float | None = None
    joint: float | None = None
    ncm_micro: float | None = None
    joint_micro: float | None = None

    @property
    def over(self) -> str:
        """What joint and headroom are taken over, where it is not the tasks of the stream."""
        return OVER_SAMPLES if self.joint is None and self.joint_micro is not None else ""

    @property
    def headroom(self) -> float | None:
        """joint − ncm in points, both over the tasks of the stream, else both over all test samples."""
        joint, ncm = (self.joint_micro, self.ncm_micro) if self.over else (self.joint, self.ncm)
        return None if joint is None or ncm is None else joint - ncm

    @property
    def rows(self) -> dict[str, float]:
        """What is known, by what it is called."""
        known = {text: getattr(self, name) for name, text in REFERENCES.items()}
        known |= {f"{REFERENCES['joint']} ({self.over})": self.joint_micro} if self.over else {}
        return {"chance": self.chance} | {text: value for text, value in known.items() if value is not None}

    @property
    def lines(self) -> list[str]:
        """One line, and another one where the stream says little."""
        told = "Bounds: " + ", ".join(f"{text} {value:.1f}" for text, value in self.rows.items()) + "."
        if self.headroom is None:
            return [told]
        little = f"Headroom below {LITTLE:g} points: this stream says little about methods."
        return [
            f"{told} Headroom{self.over and f', {self.over}'}: {self.headroom:.1f} points.",
            *([little] if self.headroom < LITTLE else []),
        ]


def reference(config: SimConfig, name: str) -> SimConfig:
    """The run that gives a bound of this run's stream: its data, backbone, tasks, split and seed, with the method of the preset.

    Raises ConfigError where they do not go together.
    """
    plain = config.to_dict()
    kept = {key: plain[key] for key in ("seed", "manifest", "partition", "runtime", *OF_THE_STREAM)}
    kept |= {"name": f"{config.name}-{name}", "client": {"batch_size": config.client.batch_size}, "server": {"evaluate": "task"}}
    kept["stream"] |= {"online": False, "keep": True, "joint": False}
    if name == "joint":
        kept["manifest"] = None  # of the clients of the stream
    return compose([kept, *read_layers(presets.folder() / presets.METHODS / f"{name}{presets.SUFFIX}")], begun=True)


def find(results: Results) -> Bounds | None:
    """The bounds of a run's stream, as finished runs in the folder of its run directory tell them, else what comes with the
    package; None where nothing but chance is known."""
    made: dict[str, Results] = {}
    for name in REFERENCES:
        try:
            wanted = reference(results.config, name).identity()
        except FedsimError:  # a stream for which there is no such run
            continue
        run = None if results.path is None else beside(results.path.parent, wanted)
        if run is not None:
            made[name] = run
    known = reached(results, made)
    return Bounds(chance(results), **known) if known else shipped(results)


def common(runs: Sequence[Results]) -> Bounds | None:
    """Of the stream that all these runs share, joint ones beside them; None where they do not share one, or nothing is known."""
    asked: dict[str, Results] = {}  # what a reference run depends on beside the stream -> a run that asks for it
    for run in [run for run in runs if not run.config.stream.joint] or runs:
        config = run.config
        more = [config.seed, config.manifest, config.partition, config.client.batch_size, config.runtime.moves_bits()]
        asked.setdefault(json.dumps(more), run)
    if not all(_same_stream(run.config, runs[0].config) for run in runs):
        return None
    return mean([known for run in asked.values() if (known := find(run)) is not None])


def mean(bounds: Sequence[Bounds]) -> Bounds | None:
    """Over splits and seeds of one stream; None for none."""
    if not bounds:
        return None
    values = {f.name: [v for b in bounds if (v := getattr(b, f.name)) is not None] for f in fields(Bounds)}
    return Bounds(**{name: fmean(known) for name, known in values.items() if known})


def reached(results: Results, made: Mapping[str, Results]) -> dict[str, float]:
    """Fields of `Bounds` as the reference runs of a run's stream tell them, by their names.

    The joint run, which has a task of its own, is left out where it cannot be held against the others: it was tested on other
    samples, or the task is told at test time, which a joint run is not.
    """
    from fedsim.runs.compare import joint_accuracy, same_tests

    found = {name: run.metrics[HEADLINE] for name, run in made.items() if not run.config.stream.joint}
    of_tasks = next((run for run in (results, *made.values()) if not run.config.stream.joint), results)
    joint = made.get("joint")
    if joint is not None and of_tasks.config.stream.name != "task_incremental" and same_tests(of_tasks, joint):
        over_tasks = joint_accuracy(of_tasks, joint)
        if math.isnan(over_tasks):
            ncm = made["ncm"].metrics[MICRO] if "ncm" in made else None
            found |= {"joint_micro": joint.metrics[MICRO], "ncm_micro": ncm}
        else:
            found["joint"] = over_tasks
    return {name: value for name, value in found.items() if value is not None}


def shipped(results: Results) -> Bounds | None:
    """Those that come with the package. A key that came after a record was made has its default there."""
    asked = of_stream(results.config)
    return next((Bounds(**entry["bounds"]) for entry in _shipped() if of_stream(compose([entry["of"]])) == asked), None)


def of_stream(config: SimConfig) -> dict[str, Any]:
    """What bounds belong to: all that they depend on but the seed (of a joint run, and of the penalty of a ridge, the last digit
    depends on the split as well)."""
    plain = config.to_dict()
    found: dict[str, Any] = {key: plain[key] for key in OF_THE_STREAM}
    for key in NOT_OF_IT:
        del found["stream"][key]
    return found


def entry(config: SimConfig, bounds: Bounds, seeds: Iterable[int]) -> Mapping[str, Any]:
    """A record of the shipped file."""
    figures = {key: round(value, 4) for key, value in asdict(bounds).items() if value is not None}
    return {"name": config.name, "seeds": list(seeds), "bounds": figures, "of": of_stream(config)}


def beside(folder: Path, identity: str) -> Results | None:
    """The finished run of this identity in a folder, as `fedsim run` and `fedsim sweep` name it."""
    for path in (folder / identity[:16], *sorted(folder.glob(f"*-{identity[:8]}"))):
        try:
            run = Results.load(path)
        except RunDirError:
            continue
        if run.finished and run.config.identity() == identity:
            return run
    return None


def _same_stream(one: SimConfig, other: SimConfig) -> bool:
    """Whether `of_stream` is the same, without a copy of either: there may be many runs."""
    stream = replace(one.stream, **{key: getattr(other.stream, key) for key in NOT_OF_IT})
    return stream == other.stream and all(getattr(one, key) == getattr(other, key) for key in OF_THE_STREAM if key != "stream")


@cache
def _shipped() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(SHIPPED.read_text(encoding="utf-8")) if SHIPPED.is_file() else []
    return found
