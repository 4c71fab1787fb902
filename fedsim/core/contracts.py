"""What a plug-in promises. One class per file, named as here; the file's name is the plug-in's name.

Every plug-in is a frozen dataclass whose fields are its YAML schema. Rules are pure: no self-mutation, no device, no Ray;
what they remember is the `State` they are handed and hand back.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.core.errors import AggregationError, ConfigError, ModelError
from fedsim.core.messages import Bundle, ClientJob, ClientUpdate, EvalJob, EvalResult, RoundPlan, State, Tensors
from fedsim.core.sums import BlockSum

if TYPE_CHECKING:
    from fedsim.core.config import SimConfig

IntArray = NDArray[np.int64]
Lift: TypeAlias = Callable[[ClientUpdate], Tensors]

# Every number of every section and plug-in must be finite, but for fields that say what infinity or NaN means there:
#     bound: float = field(default=math.inf, metadata=MAY_BE_INFINITE)
MAY_BE_INFINITE: Mapping[str, Any] = {"may_be_infinite": True}


def require_finite(part: Any, where: str = "", values: Mapping[str, Any] | None = None) -> None:
    """Raise ConfigError for a number in the fields of a dataclass, or in lists and mappings of them, that is NaN or infinite.

    part: a dataclass or an object of it; values: of the fields, those of the object by default.
    """
    for f in fields(part):
        value = getattr(part, f.name, None) if values is None else values.get(f.name)
        if not f.metadata.get("may_be_infinite"):
            for key, number in _numbers(value, f"{where}.{f.name}" if where else f.name):
                if not math.isfinite(number):
                    raise ConfigError(f"{key} must be a finite number, got {number}")


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, Mapping | list | tuple):
        for k, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _numbers(inner, f"{key}.{k}")


# ---------------------------------------------------------------- server side


@dataclass(frozen=True)
class Aggregator(ABC):
    """Merges clients, every round.

    exempt: law of the contract suite (`server/laws.py`) -> why this rule cannot keep it.
    examples: options under which the suite holds this rule against the laws.
    one_round: it takes what clients train in a single round per task; more rounds are refused.
    sources: what it deploys has a leading axis of sources, one per client, in place of one merged model (see `Adapter.sources`).
    """

    exempt: ClassVar[Mapping[str, str]] = {}
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    one_round: ClassVar[bool] = False
    sources: ClassVar[bool] = False

    @property
    def additive(self) -> bool:
        """Whether it merges from a sum over clients, see `AdditiveAggregator`."""
        return False

    def init(self, params: Tensors, task: int = 0) -> State:
        """State at the start of every task, 0-based (empty by default). `params` are the tensors this rule is in charge of."""
        return {}

    def plan(self, state: State, round: int) -> RoundPlan:
        """What the clients are asked to do in this round of the task (0-based). Default: train and send everything."""
        return RoundPlan()

    @abstractmethod
    def combine(self, state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
        """New state and new parameters (all of them, same layout), from updates in client-id order.

        Raises AggregationError when there are no updates.
        """

    def deployed(self, state: State, params: Tensors) -> Tensors:
        """What is evaluated, and what the consolidator is handed at a task's end: the parameters themselves, unless a rule keeps
        more than they hold."""
        return params


@dataclass(frozen=True)
class AdditiveAggregator(Aggregator):
    """A rule whose clients' contributions are closed under `+`, so that they are summed where the clients run.

    What `lift` makes of each update is summed by `BlockSum`, and the total is handed to `finish`: the server's memory does
    not grow with the number of clients.
    """

    @property
    def additive(self) -> bool:
        """Not where a subclass has a `combine` of its own, which a sum would pass by."""
        return type(self).combine is AdditiveAggregator.combine

    @abstractmethod
    def lift(self, update: ClientUpdate) -> Tensors:
        """One client's contribution, float64; every client gives the same names and shapes. Runs next to the client."""

    @abstractmethod
    def finish(self, state: State, params: Tensors, total: Tensors) -> tuple[State, Tensors]:
        """New state and parameters from the total."""

    def combine(self, state: State, params: Tensors, updates: Sequence[ClientUpdate]) -> tuple[State, Tensors]:
        """The same from whole updates: `finish` of the sum of their `lift`."""
        require_updates(updates)
        total = BlockSum()
        for place, update in enumerate(updates):
            total.add(place, 1, self.lift(update))
        return self.finish(state, params, total.result() or {})


def is_additive(rule: Aggregator) -> TypeGuard[AdditiveAggregator]:
    """Whether a rule merges from a sum over clients. A list of rules does if all of them do."""
    return rule.additive


def lift_statistics(update: ClientUpdate) -> Tensors:
    """A client's statistics as they are summed for a consolidator: float64, and `num_samples`."""
    n = torch.tensor(float(update.num_samples), dtype=torch.float64)
    return {name: t.double() for name, t in update.statistics.items()} | {"num_samples": n}


def require_updates(updates: Sequence[ClientUpdate]) -> None:
    """Raise AggregationError unless somebody sent something that is based on data."""
    if not updates:
        raise AggregationError("nothing to merge: no client sent an update in this round")
    if sum(u.num_samples for u in updates) <= 0:
        raise AggregationError("nothing to merge: the clients of this round hold no samples")


def sent(update: ClientUpdate, key: str) -> Tensor:
    """A statistic that a plan asked for. Raises AggregationError when the client did not send it."""
    if key not in update.statistics:
        raise AggregationError(f"client {update.client_id} sent no '{key}': the plan of this rule must reach the clients")
    return update.statistics[key]


def lift_of(plan: RoundPlan, rule: Aggregator | None, calibrator: Calibrator | None) -> Lift | None:
    """What is summed of an update, as the plan says it; None for nothing, and for a part that is not at hand or not additive."""
    if plan.lift == "rule":
        return rule.lift if rule is not None and is_additive(rule) else None
    if plan.lift == "calibrator":
        return None if calibrator is None else calibrator.lift
    return lift_statistics if plan.lift == "statistics" else None


@dataclass(frozen=True)
class Consolidator(ABC):
    """Merges tasks at a task's end, and says which tensors are deployed for evaluation.

    Works on `adapter.*`; the head is one for all classes and goes on.

    frozen: globs of tensors that no client trains, whatever the aggregator asks for.
    beside: clients train their module on top of those of past tasks (`background`), not on the bare backbone.
    freezes_heads: the head's rows of old tasks' classes stay as they are, bit for bit.
    sources: takes tensors with a leading axis of sources (see `Aggregator.sources`), and no others.
    """

    frozen: ClassVar[tuple[str, ...]] = ()
    beside: ClassVar[bool] = False
    freezes_heads: ClassVar[bool] = False
    sources: ClassVar[bool] = False

    def init(self) -> State:
        """State before the first task."""
        return {}

    def opening(self, state: State, params: Tensors) -> RoundPlan | None:
        """A statistics pass at a task's start (`server.pass_participation` says over whom), through the model that the last
        task ended with; None if none is needed."""
        return None

    @abstractmethod
    def start_task(self, state: State, params: Tensors, fresh: Tensors, total: Tensors) -> Tensors:
        """Parameters that a task begins with. `fresh`: newly drawn `adapter.*` tensors, shared by all clients; `total`: the
        statistics of `opening` and `num_samples`, summed over the clients, float64 (empty if there was no such pass).

        Raises ConfigError for tensors that it does not suit; it is called with no total once before any training.
        """

    def background(self, state: State) -> tuple[Tensors, float]:
        """Modules of past tasks (already weighted) and the weight of the current one, for blended statistics and for training
        beside them."""
        return {}, 1.0

    def modules(self, state: State) -> Sequence[Tensors]:
        """The modules that `background` is made of, as their tasks left them: what travels in a deployment, each once, where a
        client weighs and stacks them itself. None: the background travels as it is."""
        return ()

    def plan(self, state: State, params: Tensors) -> RoundPlan | None:
        """A statistics pass at the task's end (`server.pass_participation` says over whom); None if none is needed."""
        return None

    @abstractmethod
    def end_task(self, state: State, params: Tensors, total: Tensors) -> State:
        """State after the task. `total`: the statistics of `plan` and `num_samples`, summed over the clients, float64 (empty if
        the plan was None)."""

    @abstractmethod
    def deployed(self, state: State, params: Tensors, finished: bool) -> Tensors:
        """Tensors that evaluation uses: during a task (`finished` False) and after `end_task` (True)."""

    def without(self, state: State, clients: Collection[int], tasks: Collection[int]) -> State | None:
        """The state as if these clients had not taken part in these tasks, exactly; None if they cannot be told apart in it."""
        return None


@dataclass(frozen=True)
class Calibrator:
    """Repairs the head from statistics of features. It works in one of two places, or in both:

    after a round, from what comes with its updates (`plan`, `calibrate`): training goes on from the repaired head;
    at a task's end, from a pass through the model that is then deployed (`closing`, `lift`, `end_task`): what `deployed` makes of
    it is evaluated, and training goes on from the head as it was.

    `classes`: head rows of the classes of every task so far, the current task's last.
    """

    def can_be_told(self, held_KC: IntArray) -> NDArray[np.bool_]:
        """Of which classes of a task, (C,), the clients can send what it needs, by the samples (K, C) that each of them holds.
        A stream with a class of which they cannot is refused before any training."""
        return np.ones(held_KC.shape[1], dtype=np.bool_)

    @property
    def rewrites_old_rows(self) -> bool:
        """Whether it changes the head's rows of classes of past tasks."""
        return True

    def init(self) -> State:
        return {}

    def plan(self, state: State, round: int, last: bool) -> RoundPlan | None:
        """Statistics that are asked for on top of the aggregator's (`train` is ignored), of which those that are to see the
        features that are deployed are `blended`; None: nothing is done in this round. `last`: it is the task's last round."""
        return None if type(self).calibrate is Calibrator.calibrate else RoundPlan(train=())

    def calibrate(
        self,
        state: State,
        params: Tensors,
        updates: Sequence[ClientUpdate],
        classes: Sequence[Sequence[int]],
        generator: torch.Generator,
    ) -> tuple[State, Tensors]:
        """New state and parameters, of which only `head.*` may differ, from the updates of a round in client-id order."""
        return state, params

    def closing(self, state: State, classes: Sequence[Sequence[int]]) -> RoundPlan | None:
        """A statistics pass at the task's end (`server.pass_participation` says over whom), through the tensors that are deployed
        after the consolidator's work; None if none is needed."""
        return None

    def lift(self, update: ClientUpdate) -> Tensors:
        """One client's contribution to the sum over that pass, float64; every client gives the same names and shapes. Runs next
        to the client."""
        return lift_statistics(update)

    def end_task(
        self,
        state: State,
        params: Tensors,
        total: Tensors,
        classes: Sequence[Sequence[int]],
        generator: torch.Generator,
    ) -> State:
        """State after the task. `params`: what is deployed, its head as it was trained; `total`: the sum of what `lift` gave."""
        return state

    def deployed(self, state: State, params: Tensors) -> Tensors:
        """Tensors that are evaluated at a task's end, of which only `head.*` may differ from the consolidator's."""
        return params


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class ArraySplit:
    """One split as arrays: inputs keyed like the backbone's (`pixel_values` uint8 (N, H, W) or (N, H, W, C);
    `input_ids` and `attention_mask` (N, L)), labels (N,), and the domain of every sample where there are domains."""

    inputs: Mapping[str, NDArray[Any]]
    labels: IntArray
    domains: IntArray | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """What a source gives. `groups`: name of a grouping (e.g. "alphabet") -> group id of every class; `notes`: lines about what
    reading changed or left out, which results and log then say."""

    train: ArraySplit
    test: ArraySplit
    class_names: tuple[str, ...]
    groups: Mapping[str, IntArray] = field(default_factory=dict)
    group_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    domain_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source(ABC):
    """Loads a data set. What it gives is held against `Dataset`'s promises, and its classes are looked at, in `fedsim.data.door`:
    a source need not do that itself."""

    @abstractmethod
    def load(self, tokenizer_of: str | None = None, by_domain: bool = False) -> Dataset:
        """tokenizer_of: the backbone's name or folder, for sources of text; by_domain: tasks are domains, so that an option that
        counts samples per class counts them per class and domain.

        Raises DataError (one line: which file, what is wrong, what to do)."""


@dataclass(frozen=True)
class Partition(ABC):
    """Splits one task's training samples over clients.

    whole: nothing is split, so that no other split of a sweep applies to a variant that chooses it.
    """

    whole: ClassVar[bool] = False

    clients: int = 10
    min_samples: int = 1

    def __post_init__(self) -> None:
        """Raise ConfigError for values that can never work. A partition with checks of its own calls this one first."""
        if self.clients < 1:
            raise ConfigError(f"clients must be at least 1, got {self.clients}")
        if self.min_samples < 1:
            raise ConfigError(f"min_samples must be at least 1 (a client needs data to train), got {self.min_samples}")

    @abstractmethod
    def split(self, labels: IntArray, rng: np.random.Generator) -> Sequence[IntArray]:
        """Positions into `labels`, one array per client: a disjoint cover, every client with `min_samples` or more.

        Raises PartitionError when that is impossible or not found in a bounded number of draws.
        """


# ---------------------------------------------------------------- models and clients


class BackboneLike(Protocol):
    """What adapters see of a backbone: the frozen encoder and its width."""

    @property
    def encoder(self) -> nn.Module: ...
    @property
    def width(self) -> int: ...


@dataclass
class Slots:
    """Where K clients' samples lie in a batch. Whoever runs the encoder writes it anew before every forward.

    width: samples of a slot: client k's are the rows from `k · width` on. rows: how many of these are its own, K numbers; the
    rest of the slot only fills it. tokens: how long each client's texts would be without the others' beside them, None for
    images. dropout: the generators of the clients' dropout masks in training, None otherwise.
    """

    width: int
    rows: Sequence[int]
    tokens: Sequence[int] | None = None
    dropout: Sequence[torch.Generator] | None = None

    def axis(self, batch: int) -> int:
        """Rows of a slot in a tensor of `batch` rows in which a sample may take several (windows).

        Raises ModelError when they cannot be told apart: what the tensor holds is not sample after sample.
        """
        samples = len(self.rows) * self.width
        if batch % samples:
            raise ModelError(
                f"a layer's input has {batch} rows for {samples} samples, so the clients' parts cannot be told apart"
            )
        return batch // len(self.rows)


@dataclass(frozen=True)
class Adapter(ABC):
    """A small trainable module on a frozen backbone, as functions of its tensors (names without the `adapter.` prefix).

    lean: what it does to a token does not depend on the others being there, and it leaves the class token first, so that the
    last block may leave out all tokens but that one.
    sources: with tensors that have a leading axis of sources, `applied` and `merged` give features (b, S, D), one per source,
    each the same bits whatever the others are. `head.weight` (S, C, D) then makes one prediction of them (`head.logits`).
    affine: features are affine in the tensors, so that modules of clients and tasks add up.
    """

    lean: ClassVar[bool] = False
    affine: ClassVar[bool] = False
    sources: ClassVar[bool] = False

    @abstractmethod
    def init(self, backbone: BackboneLike, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh tensors; with them the backbone computes what it computes without an adapter (prompts apart)."""

    @abstractmethod
    def applied(
        self, backbone: BackboneLike, tensors: Tensors, dropout: torch.Generator | None = None
    ) -> AbstractContextManager[None]:
        """While open, the encoder's forward runs with these tensors, and gradients flow to them.
        `dropout`: the generator of dropout masks while training, None otherwise. The base weights are never touched."""

    def notes(self, backbone: BackboneLike) -> tuple[str, ...]:
        """Lines that whoever reads the numbers has to know of this adapter on this backbone, such as what is left out."""
        return ()

    def merged(self, backbone: BackboneLike, tensors: Tensors) -> AbstractContextManager[None]:
        """Like `applied`, in the cheapest form for inference; the base weights come back bit for bit."""
        return self.applied(backbone, tensors)

    def stacked(self, backbone: BackboneLike, tensors: Tensors, slots: Slots) -> AbstractContextManager[None]:
        """Like `applied` for K clients whose samples share the batch: a tensor has a leading axis of clients, or is the same for
        all of them and has none. What one client's samples give must not depend on the others. An adapter without this method
        is trained client by client."""
        raise ModelError(f"the adapter {type(self).__module__} cannot train several clients at once: it has no method 'stacked'")


class ModelLike(Protocol):
    """What objectives and statistics see of a client's model. `adapter.*` and `head.*` are in the tensors they are given."""

    num_classes: int

    def features(self, inputs: Tensors) -> Tensor: ...
    def logits(self, features: Tensor, params: Tensors) -> Tensor: ...
    def layer(self, parameter: str) -> nn.Module: ...


@dataclass(frozen=True)
class TrainStep:
    """What an objective sees of a training step.

    params: tensors being trained; start: the same, as received; logits (b, C) over all classes, unmasked; labels (b,), head rows;
    classes: head rows of the current task.
    """

    params: Tensors
    start: Tensors
    logits: Tensor
    labels: Tensor
    classes: Sequence[int]


@dataclass(frozen=True)
class Objective(ABC):
    """An extra loss term of local training.

    replaces_cross_entropy: it stands in the place of the cross-entropy, which is left out.
    learns_one_class: it teaches something even where a task has a single class, of which the cross-entropy is 0.
    """

    replaces_cross_entropy: ClassVar[bool] = False
    learns_one_class: ClassVar[bool] = False

    @abstractmethod
    def term(self, step: TrainStep) -> Tensor:
        """A scalar that is added to the loss."""


@dataclass(frozen=True)
class Statistic(ABC):
    """A statistic of a client's data under its trained model, as an accumulator over batches."""

    @abstractmethod
    def collect(self, model: ModelLike, params: Tensors, subjects: Sequence[str]) -> AbstractContextManager[Accumulator]:
        """Open for one pass over the client's samples. `params` are the client's own tensors; `subjects` the parameter
        names that the request matched."""


@dataclass(frozen=True)
class TrainingStatistic(Statistic):
    """A statistic of the training itself: it sees every step, and no pass over the samples is made for it."""

    @abstractmethod
    def follow(self, params: Tensors, subjects: Sequence[str]) -> Follower:
        """Before the first step. `params` are the client's own tensors, which training changes in place. `subjects` that are not
        trained in this round have no gradient."""

    def collect(self, model: ModelLike, params: Tensors, subjects: Sequence[str]) -> AbstractContextManager[Accumulator]:
        raise ConfigError(
            f"statistic {type(self).__module__} follows the training: there is none to follow in a pass over samples"
        )


class Follower(Protocol):
    """Sees every step of a client's training."""

    def before_step(self) -> None:
        """The gradients are there (`.grad` of the tensors), not clipped yet."""

    def after_step(self) -> None:
        """The optimizer has changed the tensors."""

    def result(self) -> dict[str, Tensor]:
        """Named `<form>/<subject>`; float32 on the CPU. Also asked for where a client holds nothing and took no step."""
        ...


class Accumulator(Protocol):
    """Sees every batch of a statistics pass, after the forward."""

    def update(self, features: Tensor, labels: Tensor) -> None: ...
    def result(self) -> dict[str, Tensor]:
        """Named `<form>/<subject>`; float32 on the CPU."""
        ...


class Pool(ABC):
    """Runs clients somewhere. Made with one `WorkSpec`."""

    @classmethod
    def check(cls, spec: WorkSpec) -> None:
        """Before there is a run directory. Raises PoolError for what this machine cannot hold."""
        return

    @abstractmethod
    def train(self, jobs: Sequence[ClientJob]) -> Iterator[Bundle]:
        """Every job's result, each job alone or in blocks of `sums.BLOCK` that lie side by side; in any order. Jobs come longest
        first. A client's own failure is a result, a pool's is raised (PoolError). A pool may leave `RoundPlan.lift` alone: the
        server then sums the updates, to the same bits."""

    @abstractmethod
    def evaluate(self, jobs: Sequence[EvalJob]) -> Iterator[EvalResult]:
        """One result per job, in any order."""

    @abstractmethod
    def close(self) -> None:
        """Give back workers and memory. May be called twice."""

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True, eq=False)
class ShardLookup:
    """Who holds what, found in flat arrays: shared by the manifest and by what is sent to the workers.

    shard_offsets (T·K + 1,): client k's samples of task t are `shard_indices[offsets[t*K+k] : offsets[t*K+k+1]]`, positions
    into the training split; test_offsets (T + 1,): the same for the test split.
    """

    num_clients: int
    shard_indices: IntArray
    shard_offsets: IntArray
    test_indices: IntArray
    test_offsets: IntArray

    def shard(self, task: int, client_id: int) -> IntArray:
        """Positions into the training split of one client's samples of one task."""
        cell = task * self.num_clients + client_id
        return self.shard_indices[self.shard_offsets[cell] : self.shard_offsets[cell + 1]]

    def test_of(self, task: int) -> IntArray:
        """Positions into the test split of one task's samples."""
        return self.test_indices[self.test_offsets[task] : self.test_offsets[task + 1]]


@dataclass(frozen=True)
class WorkSpec(ShardLookup):
    """All that a worker needs to build its model and find a client's shard; sent once. Labels are in the head's row order."""

    config: SimConfig
    train: ArraySplit
    test: ArraySplit
    task_classes: tuple[tuple[int, ...], ...]
    user_files: tuple[tuple[str, str], ...] = ()  # path and fingerprint of the user's plug-in files when the run began
    weights: int = 0  # bytes of the backbone, which every worker holds for itself


# ---------------------------------------------------------------- trackers


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told about a run.

    name: of the run directory; id: the same whenever this run directory is gone on in, and no other's; identity: the config's
    (two runs of one config share it); path: the run directory; config: all but its `trackers`, as YAML holds it; resumed:
    whether trackers have been told of this id before.
    """

    name: str
    id: str
    identity: str
    path: Path
    config: Mapping[str, Any]
    resumed: bool

    def options(self) -> dict[str, bool | int | float | str]:
        """The config as hyper-parameters: `client.lr`, `server.aggregator.0.name`. Null and lists of values are JSON."""
        return _flat(self.config)


class Recording(Protocol):
    """One run as its tracker keeps it. Whatever it raises switches it off; the run goes on."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers by name, such as `accuracy/task_0`. A step (0-based round of the whole stream) comes once per name."""
        ...

    def close(self, outcome: Outcome) -> None:
        """The last call. A run that was interrupted or failed may be gone on in, with the same `TrackedRun.id`."""
        ...


Outcome = Literal["finished", "interrupted", "failed"]


@dataclass(frozen=True)
class Tracker(ABC):
    """Copies what a run tells about itself to a tool of the user's. It never moves a number of the run."""

    def check(self) -> None:
        """Called before anything is loaded. Raises PluginError when a package is missing."""
        return

    @abstractmethod
    def open(self, run: TrackedRun) -> Recording:
        """Called before training, in a new run and in one that is gone on in; whatever it raises stops the run."""


def _flat(value: Any, key: str = "") -> dict[str, bool | int | float | str]:
    if isinstance(value, Mapping):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return {key: value if isinstance(value, bool | int | float | str) else json.dumps(value)}
    return {name: leaf for k, v in items for name, leaf in _flat(v, f"{key}.{k}" if key else k).items()}
