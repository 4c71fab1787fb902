"""What clients do with their samples: learners (the client's algorithm) and statistics."""

# b rows of a step's batch, C classes (head rows), D features

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from fedsim.core.contracts.models import BackboneLike, ModelLike
from fedsim.core.contracts.plugin import Plugin
from fedsim.core.contracts.traits import Part
from fedsim.core.errors import ConfigError, PluginError
from fedsim.core.messages import RoundPlan, State, Tensors
from fedsim.core.numbers import IntArray

if TYPE_CHECKING:
    from fedsim.core.config import SimConfig

CROSS_ENTROPY, BUFFER, ONE_CLASS = "the cross-entropy", "the buffer", "learns one class"  # words of `Traits`
TEACHER = "teacher"  # the context that the server gives to whoever needs it: the model that the last task's end deployed
OWN = "own"  # the context that a learner's own server half gives it

LocalState: TypeAlias = dict[str, Any]  # of one learner and one client's round; the learner may write into it
Context: TypeAlias = Mapping[str, Tensors]


class Outputs(NamedTuple):
    """What a model makes of samples: features (b, D) and logits (b, C) over all classes, unmasked."""

    features: Tensor
    logits: Tensor


class ServerWork(Protocol):
    """What a learner sees where the server trains something by itself, without data, at a task's end.

    params: all tensors of the model that is deployed, on the device; fresh: those that a run starts with (a new adapter, the
    head); seen: head rows of the classes so far; image_shape: (H, W) or (H, W, C), as the data's images are; draw: on the CPU.
    """

    @property
    def task(self) -> int: ...
    @property
    def config(self) -> SimConfig: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def params(self) -> Tensors: ...
    @property
    def fresh(self) -> Tensors: ...
    @property
    def seen(self) -> Sequence[int]: ...
    @property
    def image_shape(self) -> tuple[int, ...]: ...
    @property
    def backbone(self) -> BackboneLike: ...
    @property
    def draw(self) -> torch.Generator: ...
    def outputs(self, pixels: Tensor, params: Tensors | None = None) -> Outputs:
        """Of images (b, *image_shape) in 0 … 1, not augmented, through the deployed tensors or these. Gradients flow to the
        images, and to those of `params` that want them."""
        ...


class Synthetic(NamedTuple):
    """Samples that nobody holds, for a batch. inputs: raw, by name, as the data's are (`pixel_values` uint8); labels: head rows,
    −1 for none."""

    inputs: Tensors
    labels: Tensor


class ClientWork(Protocol):
    """What a learner sees of a client's round: before its first step, and after the last.

    shard: positions of this round's samples in the training split; params: all tensors, as received, on the device; trained:
    names of those that are trained; steps: optimizer steps of the round; classes: head rows of the current task; seen: of all
    tasks so far, the current one included.
    """

    @property
    def client_id(self) -> int: ...
    @property
    def task(self) -> int: ...
    @property
    def round(self) -> int: ...
    @property
    def config(self) -> SimConfig: ...
    @property
    def shard(self) -> IntArray: ...
    @property
    def params(self) -> Tensors: ...
    @property
    def trained(self) -> Sequence[str]: ...
    @property
    def steps(self) -> int: ...
    @property
    def classes(self) -> Sequence[int]: ...
    @property
    def seen(self) -> Sequence[int]: ...
    def gradients(
        self, positions: IntArray, params: Tensors, names: Sequence[str], loss: Callable[[Tensor, Tensor], Tensor]
    ) -> Iterator[tuple[IntArray, Tensors]]:
        """Every sample's own gradient of these tensors, (b, …), chunk by chunk with the samples' positions, as in `outputs`.

        loss: logits (b, C) and labels (b,) -> the loss of each sample, (b,)."""
        ...

    def traced(
        self, positions: IntArray, subjects: Sequence[str], directions: Callable[[Tensor], Tensor]
    ) -> Iterator[Mapping[str, tuple[Tensor, Sequence[Tensor]]]]:
        """Batch by batch, of the bare backbone in evaluation: what goes into the linear layers that these tensors belong to,
        (…, I), and the gradients of what comes out, (…, O), along each of K directions.

        directions: features (b, D) -> (K, b, D)."""
        ...

    def layer_shape(self, subject: str) -> tuple[int, int]:
        """Outputs and inputs of the linear layer that a tensor belongs to. Raises ConfigError where there is none."""
        ...

    @property
    def own(self) -> Tensors:
        """In a further look: all tensors as this client has trained them in the round."""
        ...

    @property
    def scale(self) -> float:
        """What the product of a LoRA pair counts for in the model."""
        ...

    def passing(
        self, positions: IntArray, subjects: Sequence[str], params: Tensors
    ) -> Iterator[Mapping[str, tuple[Tensor, Tensor]]]:
        """Batch by batch, in evaluation through these tensors: what goes into the linear layers that the subjects belong to,
        (…, I), and what comes out without the bias, (…, O); of `head.weight` what its map is given, and the logits."""
        ...

    def changes(self, params: Tensors) -> Mapping[str, Sequence[Tensor]]:
        """What the adapter's tensors add to weights, see `Adapter.changes`, by `adapter.<layer>`."""
        ...

    def outputs(self, positions: IntArray, params: Tensors) -> Outputs:
        """Of these samples of the training split, each by itself: no augmentation, no dropout, no gradient. On top of past
        modules where clients train on top of them, and with the prompts that training gives a sample where an adapter chooses;
        but for the teacher (the context's own mapping, not a copy), which is whole, and in passes without training: as in
        inference."""
        ...

    def labels(self, positions: IntArray) -> Tensor:
        """Head rows, on the device."""
        ...


class HeadLike(Protocol):
    """Logits of features, (…, C) from (…, D): see `Step.head`."""

    def __call__(self, features: Tensor, params: Tensors | None = None) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Step:
    """What a learner sees of a training step.

    The batch is the client's own part, then the samples that learners replay, each learner's together, then further views of
    both, then the synthetic samples, in the same way. `own` and `rehearsed` are the rows of the first two parts; `replayed`,
    `again` and `synthetic` those that this learner added. inputs: the raw batch; positions: of its samples in the training split,
    −1 for a synthetic one; labels: head rows, −1 for none; features and logits as in `Outputs`, with gradients. params: the
    tensors being trained; start: the same, as received. classes, seen: head rows of the current task, and of all tasks so far.
    query: what an adapter with queries was asked with, (b, D). draw: this learner's generator (CPU). model: runs other tensors (a
    teacher's) on the same inputs, augmented alike, without gradient, on past modules and with prompts as in `ClientWork.outputs`,
    so that `start` gives what the step itself gives before the first one; once per batch for one mapping, however many learners
    ask. head: logits of features (…, D), through the tensors that are trained (gradients flow to them), or through other ones.
    outputs: `ClientWork.outputs`, which by itself is for before and after the steps. What a mapping lacks that is handed to these
    three (as `start` does where a rule trains one factor of a pair) is as received; the teacher, the context's own mapping, is
    whole. blocks: what comes out of every block of the encoder, (b, L, D) each, with gradients, for a learner that says so
    (`Learner.blocks`).
    """

    inputs: Tensors
    positions: IntArray
    labels: Tensor
    features: Tensor
    logits: Tensor
    params: Tensors
    start: Tensors
    classes: Sequence[int]
    seen: Sequence[int]
    own: slice
    rehearsed: slice
    replayed: slice
    again: slice
    synthetic: slice
    draw: torch.Generator
    model: Callable[[Tensors], Outputs]
    head: HeadLike
    outputs: Callable[[IntArray, Tensors], Outputs]
    blocks: Sequence[Tensor] = ()
    query: Tensor | None = None


class Ending(NamedTuple):
    """What is left of a client's round. memory: what this client is handed when it trains next, and nobody else ever sees (None:
    what it was); statistics: what travels to the server. Tensors by name. A memory named `positions` stands for samples of the
    training split, which the simulator has: what a device must store is counted by the sample."""

    memory: Tensors | None = None
    statistics: Tensors = MappingProxyType({})


@dataclass(frozen=True)
class Learner(Part):
    """What a client does that is not plain SGD on the cross-entropy: one method, both of its halves. Several add up.

    **The client's half** is asked in this order in every round of a client with samples. Where nothing is overridden, nothing is
    computed, and no bit of the run moves.

        state = begin(work, memory, context, draw)
        every step:  replay, again, synthetic -> loss (added to the others')
                     -> gradients -> corrected -> clipping, optimizer -> stepped
        memory, statistics = end(state, work, params, draw)

    It is a function of what it is handed: a state lives for one round of one client and may be written into, all that outlasts
    the round is memory (the client's own) or statistics (which travel). Clients that train together (`runtime.fused`) call the
    same methods, each with its own state. alone: why this learner's clients cannot train together; empty: they can.

    **The server's half** keeps a `State` over the whole run and is pure. What `context` gives travels to the clients of a round,
    which find it as `context["own"]`; what clients sent as statistics comes back as the sum of what `lift` makes of it.

        opened (task's start) -> every round: context -> clients -> merge -> heard -> merged
        -> task's end: closing -> pass over clients (review) -> closed -> made (if another task follows) -> deployed

    `traits`: `takes` CROSS_ENTROPY if `loss` stands in its place, BUFFER if it keeps samples; needs "context teacher" if the last
    task's model is to be sent.
    blocks: whether steps show what comes out of every block, which is then computed anew in every step, client by client.
    """

    alone: ClassVar[str] = ""
    blocks: ClassVar[bool] = False

    def does(self, *methods: str) -> bool:
        """Whether it has one of these methods of its own; what it has not is left out."""
        return any(getattr(type(self), method) is not getattr(Learner, method) for method in methods)

    def suits(self, config: SimConfig, sizes_TK: IntArray) -> tuple[str, ...]:
        """Before any training: raise ConfigError for what cannot work; lines that whoever reads the numbers has to know.

        sizes_TK: training samples of every task and client."""
        return ()

    # ------------------------------------------------ on the client

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        """What this round needs: teacher, importance, buffer, prototypes.

        memory: what `end` gave when this client last trained, on the device; empty at first. context: what the server tells
        clients in this round, by name, on the device; a name that is not there is a ConfigError of one line."""
        return {}

    def replay(self, state: LocalState, positions: IntArray, draw: torch.Generator) -> IntArray:
        """Positions of samples that join the batch at these positions: of samples that this client has held."""
        return positions[:0]

    def again(self, state: LocalState, positions: IntArray, draw: torch.Generator) -> IntArray:
        """Positions of samples of the batch, the client's own at these positions or those just replayed, that join it once more,
        augmented anew."""
        return positions[:0]

    def synthetic(self, state: LocalState, positions: IntArray, draw: torch.Generator) -> Synthetic | None:
        """Samples that nobody holds, which join the batch at these positions; None for none. The cross-entropy does not see them;
        they are augmented as the others are."""
        return None

    def loss(self, state: LocalState, step: Step) -> Tensor | None:
        """A scalar that is added to the loss; None for nothing."""
        return None

    def corrected(self, state: LocalState, gradients: Tensors, params: Tensors) -> Tensors:
        """Gradients in the place of these, of the same names and shapes, before they are clipped. `params` are trained in
        place."""
        return gradients

    def stepped(self, state: LocalState, params: Tensors) -> None:
        """The optimizer has changed the tensors."""
        return

    def end(self, state: LocalState, work: ClientWork, params: Tensors, draw: torch.Generator) -> Ending:
        """Memory and statistics, from all tensors as they are after the last step."""
        return Ending()

    def review(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> Ending:
        """In the pass at the task's end, for which a learner with this method need not ask: memory and statistics, with
        `work.params` being what is deployed. Clients without samples of the task are asked too: they may remember older ones.
        The statistics are handed to `lift` under their own names."""
        return Ending()

    # ------------------------------------------------ on the server

    def opened(self, state: State, params: Tensors, task: int) -> State:
        """State at a task's start; None before the first. `params`: what the task begins with."""
        return state

    def context(self, state: State) -> Tensors:
        """What the clients of the next round are told."""
        return {}

    def lift(self, statistics: Tensors, num_samples: int) -> Tensors:
        """One client's contribution to the sum, from what its `end` (or, at a task's end, the pass of `closing`) sent; every
        client gives the same names and shapes. Runs next to the client. By default the statistics as they are, in float64."""
        return {name: t.double() for name, t in statistics.items()}

    def heard(self, state: State, total: Tensors, clients: int) -> State:
        """State after a round. total: the sum over those that took part; clients: how many there are in all, without those
        of `server.without`."""
        return state

    def merged(self, state: State, before: Tensors, after: Tensors, taken: int, clients: int) -> tuple[State, Tensors]:
        """State and parameters that a round leaves, from all tensors before and after the rule's merge. taken: clients that took
        part with samples; clients: as in `heard`."""
        return state, after

    def closing(self, state: State, params: Tensors) -> RoundPlan | None:
        """A statistics pass at the task's end, through the tensors that are deployed then; None if none is needed. What it is
        sent is named as in `RoundPlan`: `<statistic>.<form>/<subject>`."""
        return None

    def closed(self, state: State, params: Tensors, total: Tensors) -> State:
        """State after the task. `params`: what is deployed; total: the sum over the pass of what `lift` made of it."""
        return state

    def made(self, state: State, server: ServerWork) -> State:
        """State after what the server has trained by itself with the deployed model, such as a generator of images: after
        `closed`, where clients run and the model is at hand, for the tasks that follow. The state's tensors are on the CPU."""
        return state

    def deployed(self, state: State, params: Tensors) -> Tensors:
        """Tensors that are evaluated at the task's end, of which only `head.*` may differ from these. Neither the teacher of the
        next task nor the training that goes on knows of it."""
        return params


@dataclass(frozen=True)
class Seen:
    """Samples as a statistics pass sees them, made up: no model is behind them.

    inputs: name of a layer (`adapter.layers.0.mlp.fc1`) -> what goes into it, (N, I); features (N, D); labels (N,), head rows;
    num_classes: rows of the head.
    """

    inputs: Tensors
    features: Tensor
    labels: Tensor
    num_classes: int


@dataclass(frozen=True)
class Statistic(Plugin, ABC):
    """A statistic of a client's data under its trained model, as an accumulator over batches.

    additive: what the samples of two clients give, with the same parameters, is the sum of what each gives. Statistics that are
    summed as they are, where clients run, must be.
    of_trained: it says something of tensors that are trained. A rule that asks for it of frozen ones is refused.
    """

    additive: ClassVar[bool] = False
    of_trained: ClassVar[bool] = False

    @abstractmethod
    def collect(self, model: ModelLike, params: Tensors, subjects: Sequence[str]) -> AbstractContextManager[Accumulator]:
        """Open for one pass over the client's samples. `params` are the client's own tensors; `subjects` the parameter
        names that the request matched."""

    def for_client(self, draw: torch.Generator) -> Statistic:
        """What it is for one client's pass: itself, unless it draws something. draw: on the CPU; addressed by the run's seed, the
        client, the task and the round."""
        return self

    def synthetic(self, seen: Seen, params: Tensors, subjects: Sequence[str]) -> dict[str, Tensor]:
        """What `collect` would send for these samples, float64, by its formula: the laws make up with it what clients send to a
        rule that asks for this statistic."""
        raise PluginError(
            f"statistic {type(self).__module__} has no synthetic form: write its method 'synthetic', or test it in a run"
        )


@dataclass(frozen=True)
class TrainingStatistic(Statistic):
    """A statistic of the training itself: a learner that a rule asks for. No pass over the samples is made for it."""

    @abstractmethod
    def learner(self, subjects: Sequence[str]) -> Learner:
        """What follows the training. Its `end` names statistics `<form>/<subject>`, zeros for a client that took no step and for
        subjects that are not trained in this round."""

    def collect(self, model: ModelLike, params: Tensors, subjects: Sequence[str]) -> AbstractContextManager[Accumulator]:
        raise ConfigError(
            f"statistic {type(self).__module__} follows the training: there is none to follow in a pass over samples"
        )


@dataclass(frozen=True)
class WorkStatistic(Statistic):
    """A statistic that takes more than a look at features: what it needs of a client it asks `ClientWork` for."""

    @abstractmethod
    def measured(self, work: ClientWork, params: Tensors, subjects: Sequence[str]) -> dict[str, Tensor]:
        """Named `<form>/<subject>`; float32 on the CPU. params: all tensors, through which the pass looks."""

    def collect(self, model: ModelLike, params: Tensors, subjects: Sequence[str]) -> AbstractContextManager[Accumulator]:
        raise ConfigError(f"statistic {type(self).__module__} looks at a client's work, not at batches of a pass")


class Accumulator(Protocol):
    """Sees every batch of a statistics pass, after the forward."""

    def update(self, features: Tensor, labels: Tensor) -> None:
        """features: what the last linear map of the head is given (`Head.inputs`), (b, M); labels (b,), head rows."""

    def result(self) -> dict[str, Tensor]:
        """Named `<form>/<subject>`; float32 on the CPU."""
        ...
