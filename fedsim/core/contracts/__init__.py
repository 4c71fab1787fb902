"""What a plug-in promises, room by room. One class per file, named as here; the file's name is the plug-in's name.

Every plug-in is a frozen dataclass whose fields are its YAML schema. Rules are pure: no self-mutation, no device, no Ray;
what they remember is the `State` they are handed and hand back.
"""

from fedsim.core.contracts.channels import Channel, Code, Parcel, require_covered
from fedsim.core.contracts.clients import Accumulator, Follower, Objective, Seen, Statistic, TrainingStatistic, TrainStep
from fedsim.core.contracts.data import Dataset, Partition, Source
from fedsim.core.contracts.models import Adapter, BackboneLike, Head, ModelLike, Slots
from fedsim.core.contracts.plugin import Plugin
from fedsim.core.contracts.pools import Pool
from fedsim.core.contracts.server import (
    AdditiveAggregator,
    Aggregator,
    Calibrator,
    Consolidator,
    Lift,
    is_additive,
    lift_of,
    lift_statistics,
    require_updates,
    sent,
)
from fedsim.core.contracts.trackers import Outcome, Recording, TrackedRun, Tracker
from fedsim.core.contracts.traits import ONE_ROUND, WORDS, Part, Traits
from fedsim.core.numbers import MAY_BE_INFINITE, IntArray, require_finite
from fedsim.core.work import ArraySplit

__all__ = [
    "MAY_BE_INFINITE",
    "ONE_ROUND",
    "WORDS",
    "Accumulator",
    "Adapter",
    "AdditiveAggregator",
    "Aggregator",
    "ArraySplit",
    "BackboneLike",
    "Calibrator",
    "Channel",
    "Code",
    "Consolidator",
    "Dataset",
    "Follower",
    "Head",
    "IntArray",
    "Lift",
    "ModelLike",
    "Objective",
    "Outcome",
    "Parcel",
    "Part",
    "Partition",
    "Plugin",
    "Pool",
    "Recording",
    "Seen",
    "Slots",
    "Source",
    "Statistic",
    "TrackedRun",
    "Tracker",
    "TrainStep",
    "TrainingStatistic",
    "Traits",
    "is_additive",
    "lift_of",
    "lift_statistics",
    "require_covered",
    "require_finite",
    "require_updates",
    "sent",
]
