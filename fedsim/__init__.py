"""fedsim: a simulator for federated continual learning with parameter-efficient modules.

    from fedsim import load, run, sweep
    results = run(load("lorm", ["partition.alpha=0.1"]))
    results = run(data=(images, labels), clients=10, alpha=0.5, method="lorm")
    runs = sweep(base="omniglot", list={"method": ["fedavg", "lorm"]}, seeds=3)

What stands here is imported when it is asked for: `import fedsim` alone costs nothing. fedsim itself never imports from here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedsim.core.home import __version__, claim_names

if TYPE_CHECKING:
    from fedsim.core.config import SimConfig, load
    from fedsim.core.contracts import (
        Adapter,
        AdditiveAggregator,
        AdditiveMerging,
        Aggregator,
        ArraySplit,
        Calibrator,
        Channel,
        Consolidator,
        Dataset,
        Ending,
        Head,
        Learner,
        LocalState,
        Merging,
        Outputs,
        Parcel,
        Partition,
        Pool,
        Source,
        Statistic,
        Step,
        Synthetic,
        TaskStart,
        Tracker,
        TrainingStatistic,
        Traits,
        WorkStatistic,
    )
    from fedsim.core.errors import FedsimError
    from fedsim.core.messages import ClientUpdate, RoundPlan, State, StatisticRequest, Tensors
    from fedsim.exports.deployed import DeployedModel, load_model
    from fedsim.exports.write import export
    from fedsim.notebook import experiment
    from fedsim.runs.collection import Collection, collect
    from fedsim.runs.metrics import METRICS, Metric
    from fedsim.runs.results import Results
    from fedsim.simulation import run
    from fedsim.sweeps.making import sweep, tune
    from fedsim.unlearning.finished import FinishedRun

claim_names()

__all__ = [
    "METRICS",
    "Adapter",
    "AdditiveAggregator",
    "AdditiveMerging",
    "Aggregator",
    "ArraySplit",
    "Calibrator",
    "Channel",
    "ClientUpdate",
    "Collection",
    "Consolidator",
    "Dataset",
    "DeployedModel",
    "Ending",
    "FedsimError",
    "FinishedRun",
    "Head",
    "Learner",
    "LocalState",
    "Merging",
    "Metric",
    "Outputs",
    "Parcel",
    "Partition",
    "Pool",
    "Results",
    "RoundPlan",
    "SimConfig",
    "Source",
    "State",
    "Statistic",
    "StatisticRequest",
    "Step",
    "Synthetic",
    "TaskStart",
    "Tensors",
    "Tracker",
    "TrainingStatistic",
    "Traits",
    "WorkStatistic",
    "__version__",
    "collect",
    "experiment",
    "export",
    "load",
    "load_model",
    "run",
    "sweep",
    "tune",
]  # fmt: skip

_MODULE_OF = {  # name -> where it lies
    name: module
    for module, names in {
        "fedsim.core.config": "SimConfig load",
        "fedsim.core.contracts": (
            "Adapter AdditiveAggregator AdditiveMerging Aggregator ArraySplit Calibrator Channel "
            "Consolidator Dataset Ending Head Learner LocalState Merging Outputs Parcel Partition "
            "Pool Source Statistic Step Synthetic TaskStart Tracker TrainingStatistic Traits WorkStatistic"
        ),
        "fedsim.core.errors": "FedsimError",
        "fedsim.core.messages": "ClientUpdate RoundPlan State StatisticRequest Tensors",
        "fedsim.exports.deployed": "DeployedModel load_model",
        "fedsim.exports.write": "export",
        "fedsim.notebook": "experiment",
        "fedsim.runs.collection": "Collection collect",
        "fedsim.runs.metrics": "METRICS Metric",
        "fedsim.runs.results": "Results",
        "fedsim.simulation": "run",
        "fedsim.sweeps.making": "sweep tune",
        "fedsim.unlearning.finished": "FinishedRun",
    }.items()
    for name in names.split()
}
_ROOMS = ("merging", "report", "sweeps", "unlearning")  # packages of which a user takes more than a name


if not TYPE_CHECKING:  # to which every name would be there

    def __getattr__(name: str) -> Any:
        """A public name, imported now."""
        if name in _MODULE_OF:
            return getattr(import_module(_MODULE_OF[name]), name)
        if name in _ROOMS:
            return import_module(f"fedsim.{name}")
        raise AttributeError(f"module 'fedsim' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
