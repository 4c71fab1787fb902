"""What the numbers of a stream lie between: guessing, what needs no training, and training on all data at once.

A bound is an ordinary run on the stream, with the method of a preset:

    ncm      nearest class mean of the bare backbone's features: what the backbone knows before anybody trains
    ranpac   ridge regression on fixed random features of it: what a closed form makes of the same features
    joint    one client that trains on all tasks at once: what can be learned

Headroom is the difference between the last and the first, in points: how much there is to win by training. Where it is small, a
stream cannot tell methods apart.

The runs are found by what they are (the identity of their config), in the folder of the run that is held against them; `fedsim
bounds` makes them. For the streams that are embedded in the package the figures come with it (assets/bounds.json, means over
seeds; `python -m experiments.ledger.bounds` writes them).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from fedsim.core import presets
from fedsim.core.config import SimConfig, compose, read_layers
from fedsim.core.errors import FedsimError, RunDirError
from fedsim.core.home import ROOT
from fedsim.runs.collection import chance
from fedsim.runs.metrics import HEADLINE
from fedsim.runs.results import Results

REFERENCES = {  # preset -> what it is called
    "ncm": "nearest class mean of the bare backbone",
    "ranpac": "ridge regression on random features of it",
    "joint": "training on all data at once",
}
LITTLE = 5.0  # points of headroom below which a stream says little about methods
SHIPPED = Path(ROOT) / "fedsim" / "assets" / "bounds.json"
OF_THE_STREAM = ("data", "transform", "model", "stream")  # sections that say which samples are told apart, and by what
NOT_OF_IT = ("online", "keep", "joint")  # keys of the stream that no bound depends on


@dataclass(frozen=True)
class Bounds:
    """Final average accuracies in percent, means over runs; None where there is no such run."""

    chance: float
    ncm: float | None = None
    ranpac: float | None = None
    joint: float | None = None

    @property
    def headroom(self) -> float | None:
        """joint − ncm, in points."""
        return None if self.joint is None or self.ncm is None else self.joint - self.ncm

    @property
    def rows(self) -> dict[str, float]:
        """What is known, by what it is called."""
        known = {text: getattr(self, name) for name, text in REFERENCES.items()}
        return {"chance": self.chance} | {text: value for text, value in known.items() if value is not None}

    @property
    def lines(self) -> list[str]:
        """One line, and another one where the stream says little."""
        told = "Bounds: " + ", ".join(f"{text} {value:.1f}" for text, value in self.rows.items()) + "."
        if self.headroom is None:
            return [told]
        little = f"Headroom below {LITTLE:g} points: this stream says little about methods."
        return [f"{told} Headroom: {self.headroom:.1f} points.", *([little] if self.headroom < LITTLE else [])]


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
    found: dict[str, float] = {}
    for name in REFERENCES:
        try:
            wanted = reference(results.config, name).identity()
        except FedsimError:  # a stream for which there is no such run
            continue
        run = None if results.path is None else beside(results.path.parent, wanted)
        if run is not None and (value := reached(results, run)) is not None:
            found[name] = value
    if not found:
        return shipped(results)
    return Bounds(chance(results), **found)


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
    values = {name: [v for b in bounds if (v := getattr(b, name)) is not None] for name in REFERENCES}
    means = {name: fmean(known) for name, known in values.items() if known}
    return Bounds(fmean(b.chance for b in bounds), **means)


def reached(results: Results, run: Results) -> float | None:
    """The final average accuracy of a reference run over the tasks of a run: a joint run has one task of its own. None where that
    cannot be said: it was tested on other samples, or the task is told at test time, which a joint run is not."""
    if not run.config.stream.joint or results.config.stream.joint:
        return run.metrics[HEADLINE]
    if results.config.stream.name == "task_incremental":
        return None
    from fedsim.runs.compare import joint_accuracy

    value = joint_accuracy(results, run)
    return None if math.isnan(value) else value


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
    figures = {key: value if value is None else round(value, 4) for key, value in asdict(bounds).items()}
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
