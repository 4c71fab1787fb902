"""From Python what `fedsim sweep` and `fedsim tune` do.

from fedsim import sweep
runs = sweep(base="omniglot", list={"method": ["fedavg", "lorm"]}, grid={"partition.alpha": [0.1, 0.5]}, seeds=3)
runs.frame()   # one row per run
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.core import config as configs
from fedsim.core.config import SimConfig, text
from fedsim.core.errors import ConfigError
from fedsim.runs.collection import Collection, collect
from fedsim.runs.known import Known
from fedsim.runs.results import Results
from fedsim.sweeps import plan as plans
from fedsim.sweeps import tune as tuning
from fedsim.sweeps.plan import PlannedRun, SweepPlan
from fedsim.watch.progress import in_notebook


def sweep(
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    output: str | Path | None = None,
    launch: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    known: Sequence[str | Path] = (),
    **axes: Any,
) -> Collection:
    """Run a config over axes and seeds, in parallel, and give all of its runs; what is there already is not run again.

    file: a sweep YAML; or in its place, axes: the keys of such a YAML (`fedsim.sweeps.plan`), which are base, set, list, grid,
        zip and seeds; base may be a config too.
    overrides: for every run, such as "client.epochs=1"; name: of a sweep without a file (default: the folder's, else study);
        output: folder of the runs (default: runs/<name>); launch: {"jobs": 2, …}, where and how; progress: show how it goes
        (default: in a notebook); known: tables of `fedsim results --csv`, whose runs are not made again and count as they stand
        there.
    A run that failed is in `absent` of the collection, with the reason. Raises ConfigError or PluginError before anything runs,
    with the labels of the run that is wrong, and RunDirError when every run failed.
    """
    if file is not None:
        if axes:
            raise ConfigError(f"give a sweep file or its keys, not both: {file} and {', '.join(axes)}")
        plan = plans.expand(file, overrides, output, **(launch or {}))
    else:
        plan = _planned(axes, name or (Path(output).absolute().name if output else "study"), overrides, output, launch or {})
    done: dict[str, Results | Known] = {**plans.told(plan, known), **plans.finished(plan)}
    missing = plan.missing(done)
    plans.verify(plan, missing)
    plan = plans.keep_record(plan)
    if missing:
        make(plan, done, missing, quiet=not shown(progress))
    return collect([plan.folder, *known], sweep=plan.record.name)


def tune(
    file: str | Path,
    overrides: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    launch: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    known: Sequence[str | Path] = (),
) -> dict[str, tuning.Winner]:
    """Give every variant of a tuning YAML the same budget, write the best of each as a preset, and give them by variant.

    See `sweep` for the arguments and `fedsim.sweeps.tune` for the YAML; known: tables of `fedsim tune --csv` too. A variant whose
    configurations all failed is left out.
    """
    asked = tuning.read(file, overrides, output, **(launch or {}))
    quiet = not shown(progress)
    scores = tuning.played(asked, lambda plan, done, missing: make(plan, done, missing, quiet), tuning.told(asked, known))
    winners = asked.winners(scores)
    tuning.write(asked, winners)
    return winners


def make(plan: SweepPlan, done: Mapping[str, Results | Known], missing: Sequence[PlannedRun], quiet: bool) -> dict[str, str]:
    """Make the runs that are missing, and show how they go; by label, why those failed that did."""
    from fedsim.sweeps import launch
    from fedsim.sweeps.display import SweepDisplay

    with SweepDisplay(plan, done, quiet=quiet) as display:
        for event in launch.execute(plan, missing):
            display(event)
    return display.failed


def shown(progress: bool | None) -> bool:
    """Whether progress is shown: as asked, else in a notebook."""
    return in_notebook() if progress is None else progress


def _planned(
    axes: Mapping[str, Any], name: str, overrides: Sequence[str], output: str | Path | None, launch: Mapping[str, Any]
) -> SweepPlan:
    """The plan of a sweep from its keys, as if they stood in a YAML of that name in the working directory."""
    if name == "sweep" or not name.strip(".") or set(name) & set("/\\"):
        raise ConfigError(f"name must be a plain word other than sweep, by which it goes in its folder, got {name!r}")
    keys = {key: value.to_dict() if isinstance(value, SimConfig) else value for key, value in axes.items()}
    keys = configs.anchored(text.plain(keys, ""), Path.cwd())
    plans.require_keys(keys, "the sweep")
    return plans.planned(keys, Path.cwd() / f"{name}.yaml", overrides, output, text.write(keys), **launch)
