"""What travels between server and clients, as frozen values.

Wire tensors are CPU float32 in flat mappings. Names of trainable tensors:
    adapter.<layer>.lora_A (r, d)   adapter.<layer>.lora_B (m, r)   other adapters: adapter.<block>.<tensor>
    head.weight (C, D)   head.bias (C,)
Statistics are named `<statistic>.<form>/<subject>`, e.g. `gram.diagonal/adapter.layers.0.mlp.fc1.lora_A`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedsim.core.errors import ClientFailed

Tensors: TypeAlias = Mapping[str, Tensor]
BACKGROUND = "background"  # the context of modules of past tasks
BENEATH = "beneath"  # the context of what past rounds left beneath the module that is trained: a part of it
RECEIPT = "receipt"  # in the place of a memory that stays on its client's own device: (its number, bytes, positions of samples)
POSITIONS = "/positions"  # the end of a memory's name that stands for samples
State: TypeAlias = Any  # nested dicts, lists and tuples of tensors, numbers, strings and None: what a file can hold


@dataclass(frozen=True)
class StatisticRequest:
    """One statistic that a rule asks its clients for, after local training.

    name: plug-in in `clients/statistics`; options: fields of that plug-in.
    match: globs over parameter names (the subjects).
    blended: run the pass through the mean of past tasks' modules and this one (the background), which is what will be deployed:
    as LoRM does, and whatever repairs a head.
    """

    name: str
    match: tuple[str, ...] = ("*",)
    options: Mapping[str, Any] = field(default_factory=dict)
    blended: bool = False


@dataclass(frozen=True)
class RoundPlan:
    """What the clients of a round are asked to do.

    train: globs over parameter names that are trained and sent back; empty: a statistics pass only.
    statistics: what is computed after training, or follows it.
    context: tensors that clients are told beside the parameters, by who tells it and their own names: "background" (modules of
    past tasks, already weighted), "beneath" (what the rule has left beneath the module, see `Aggregator.beneath`), "teacher" (the
    model that the last task's end deployed), what learners' server halves and rules give. share: weight of the client's own
    module, with what is beneath it, beside the background.
    beside: the module is trained on top of the background, which stays as it is.
    keeps: globs of tensors that are trained, but stay with the client: it begins with those that it had after its last round, if
    that was in task `since` or later, and sends them only if it is to hand them in; the loop says these two, no rule.
    repeat: times `client.epochs` that is trained.
    review: the learner that looks through the parameters in a pass at a task's end; the loop says so, no rule.
    merged: in a further look at a round's clients, before they are merged: names of the tensors that stand as they are sent; of
    all others that it has trained in the round a client takes its own. None: no such look. The loop says so, no rule.
    """

    train: tuple[str, ...] = ("*",)
    statistics: tuple[StatisticRequest, ...] = ()
    context: Mapping[str, Tensors] = field(default_factory=dict)
    share: float = 1.0
    beside: bool = False
    keeps: tuple[str, ...] = ()
    since: int = 0
    hand_in: bool = False
    repeat: int = 1
    review: str = ""
    merged: tuple[str, ...] | None = None

    @property
    def background(self) -> Tensors:
        """Modules of past tasks as one; empty in the first task, and where nobody looks through them."""
        return self.context.get(BACKGROUND, {})


@dataclass(frozen=True)
class Reply:
    """How what clients send comes back; the loop says so, no rule.

    sums: parts of the run (see `server.gather.lifts`) of which every one that looks at an update is satisfied with a sum, so that
    sums travel instead of updates: "rule", "calibrator", "statistics", "learner.<name>". Empty: updates travel whole.
    observed: clients whose trained tensors come back one by one all the same, for those who watch.
    """

    sums: tuple[str, ...] = ()
    observed: tuple[int, ...] = ()


@dataclass(frozen=True)
class ClientJob:
    """One client's work as a value. `params`, `plan` and `reply` are the same objects for all clients of a round.

    memory: what only the client has: what it remembers from rounds before or, in a further look (`RoundPlan.merged`), what it has
    trained in this round."""

    client_id: int
    task: int
    round: int
    params: Tensors
    plan: RoundPlan
    memory: Tensors = field(default_factory=dict)
    reply: Reply = Reply()


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sends back: only the tensors that were trained, the statistics asked for, and its new memory.

    memory: what the client remembers from now on, and is handed when it trains next; None: what it did before. So it is, whatever
    stands here, for a client without samples and in a pass for statistics. It never travels: the run keeps it (`server.store`),
    and in a deployment the client's own device, of which the run keeps a receipt.
    bytes_sent: bytes by kind of object, noted before the tensors went into a sum (None: they are all here).
    encoded: bytes of tensors that a channel has encoded, by name; the others travel as they are.
    """

    client_id: int
    num_samples: int
    params: Tensors
    statistics: Tensors = field(default_factory=dict)
    memory: Tensors | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)  # e.g. {"loss": mean of the last epoch, "seconds": ...}
    bytes_sent: Mapping[str, int] | None = None
    encoded: Mapping[str, int] = field(default_factory=dict)

    def summed(self, observed: bool) -> ClientUpdate:
        """What is left of it once it is in a sum; an observed client keeps its trained tensors."""
        return replace(self, params=self.params if observed else {}, statistics={}, bytes_sent=bytes_up(self))


@dataclass(frozen=True)
class Bundle:
    """What became of jobs that lay side by side, the first of them at place `start` of the round's jobs.

    totals: where the job says `Reply.sums`, the sums over the clients of the bundle by part, a block of `sums.BlockSum` each;
    None when nothing was summed there: the updates are whole then. notes: lines that results and log must say (`events.Note`),
    each once per run.
    """

    start: int
    results: tuple[ClientUpdate | ClientFailed, ...]
    totals: Mapping[str, Tensors] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServerJob:
    """What the server trains by itself at a task's end, with the model at hand and no data: `Learner.made` of the learner of this
    name. params: what is deployed; state: of the learner's server half."""

    learner: str
    task: int
    params: Tensors
    state: State


@dataclass(frozen=True)
class EvalJob:
    """Predict test samples `test_tasks[task][start:stop]` with deployed parameters.

    seen: classes for the argmax over all classes seen so far; the argmax inside the task's own classes is counted too.
    """

    task: int
    start: int
    stop: int
    params: Tensors
    seen: Sequence[int]


@dataclass(frozen=True)
class EvalResult:
    """Raw counts: `correct` among the classes seen, `correct_in_task` among the task's own classes, out of `total`.

    by_class: (head row, right, predicted, total), ascending, for every class that was a label or a prediction: how often it was
    predicted rightly, predicted at all, and the label (argmax among the classes seen).
    """

    task: int
    correct: int
    correct_in_task: int
    total: int
    by_class: tuple[tuple[int, int, int, int], ...] = ()


def num_bytes(tensors: Tensors) -> int:
    """Σ numel × itemsize, in bytes."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def bytes_up(update: ClientUpdate) -> dict[str, int]:
    """Bytes that a client sends, by kind of object: its update in a deployment, whether it is summed here on the way or not.
    Statistics that are equal are sent once (see `server.ledger`), unless they are encoded."""
    if update.bytes_sent is not None:
        return dict(update.bytes_sent)
    kinds: dict[str, int] = {}
    for name, tensor in update.params.items():
        kind = name.partition(".")[0]
        kinds[kind] = kinds.get(kind, 0) + update.encoded.get(name, tensor.nbytes)
    whole = _distinct(t for name, t in update.statistics.items() if name not in update.encoded)
    encoded = sum(update.encoded[name] for name in update.statistics if name in update.encoded)
    return kinds | {"statistics": sum(t.nbytes for t in whole) + encoded}


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Each of several equal tensors once."""
    found: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        ends = tensor.reshape(-1)[:: max(1, tensor.numel() - 1)].tolist()  # a cheap look before the dear one
        alike = found.setdefault((tensor.shape, tensor.dtype, *ends), [])
        if not any(known is tensor or torch.equal(known, tensor) for known in alike):
            alike.append(tensor)
    return [tensor for alike in found.values() for tensor in alike]
