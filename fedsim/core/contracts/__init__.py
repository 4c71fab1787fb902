"""What a plug-in promises, room by room. One class per file, named as here; the file's name is the plug-in's name.

Every plug-in is a frozen dataclass whose fields are its YAML schema. Rules are pure: no self-mutation, no device, no Ray;
what they remember is the `State` they are handed and hand back.
"""

from fedsim.core.contracts.channels import Channel, Code, Parcel, require_covered
from fedsim.core.contracts.clients import (
    CROSS_ENTROPY,
    ONE_CLASS,
    OWN,
    TEACHER,
    Accumulator,
    ClientWork,
    Context,
    Ending,
    Learner,
    LocalState,
    Outputs,
    Seen,
    Statistic,
    Step,
    Synthetic,
    TrainingStatistic,
)
from fedsim.core.contracts.data import Dataset, Partition, Source
from fedsim.core.contracts.merging import AdditiveMerging, Member, Merging
from fedsim.core.contracts.models import Adapter, BackboneLike, Head, ModelLike, Slots
from fedsim.core.contracts.plugin import Plugin
from fedsim.core.contracts.pools import Pool
from fedsim.core.contracts.server import (
    CALIBRATOR,
    CLOSING,
    LEARNER,
    RULE,
    STATISTICS,
    AdditiveAggregator,
    Aggregator,
    Calibrator,
    Consolidator,
    Opening,
    Past,
    TaskStart,
    is_additive,
    lift_statistics,
    lifts_of,
    require_updates,
    statistic,
)
from fedsim.core.contracts.trackers import Outcome, Recording, TrackedRun, Tracker
from fedsim.core.contracts.traits import ONE_ROUND, WORDS, Part, Traits
from fedsim.core.numbers import MAY_BE_INFINITE, IntArray, require_finite_numbers
from fedsim.core.work import ArraySplit

__all__ = [
    "CALIBRATOR",
    "CLOSING",
    "CROSS_ENTROPY",
    "LEARNER",
    "MAY_BE_INFINITE",
    "ONE_CLASS",
    "ONE_ROUND",
    "OWN",
    "RULE",
    "STATISTICS",
    "TEACHER",
    "WORDS",
    "Accumulator",
    "Adapter",
    "AdditiveAggregator",
    "AdditiveMerging",
    "Aggregator",
    "ArraySplit",
    "BackboneLike",
    "Calibrator",
    "Channel",
    "ClientWork",
    "Code",
    "Consolidator",
    "Context",
    "Dataset",
    "Ending",
    "Head",
    "IntArray",
    "Learner",
    "LocalState",
    "Member",
    "Merging",
    "ModelLike",
    "Opening",
    "Outcome",
    "Outputs",
    "Parcel",
    "Part",
    "Partition",
    "Past",
    "Plugin",
    "Pool",
    "Recording",
    "Seen",
    "Slots",
    "Source",
    "Statistic",
    "Step",
    "Synthetic",
    "TaskStart",
    "TrackedRun",
    "Tracker",
    "TrainingStatistic",
    "Traits",
    "is_additive",
    "lift_statistics",
    "lifts_of",
    "require_covered",
    "require_finite_numbers",
    "require_updates",
    "statistic",
]
