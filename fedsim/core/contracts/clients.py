"""What clients do with their samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from fedsim.core.contracts.models import ModelLike
from fedsim.core.contracts.plugin import Plugin
from fedsim.core.contracts.traits import Part, Traits
from fedsim.core.errors import ConfigError, PluginError
from fedsim.core.messages import Tensors


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
class Objective(Part, ABC):
    """An extra loss term of local training.

    replaces_cross_entropy: it stands in the place of the cross-entropy, which is left out.
    learns_one_class: it teaches something even where a task has a single class, of which the cross-entropy is 0.
    """

    replaces_cross_entropy: ClassVar[bool] = False
    learns_one_class: ClassVar[bool] = False

    @property
    def traits(self) -> Traits:
        gives = {"learns one class"} if self.learns_one_class else set()
        return Traits(gives=gives, takes={"the cross-entropy"} if self.replaces_cross_entropy else set())

    @abstractmethod
    def term(self, step: TrainStep) -> Tensor:
        """A scalar that is added to the loss."""


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
    """

    additive: ClassVar[bool] = False

    @abstractmethod
    def collect(self, model: ModelLike, params: Tensors, subjects: Sequence[str]) -> AbstractContextManager[Accumulator]:
        """Open for one pass over the client's samples. `params` are the client's own tensors; `subjects` the parameter
        names that the request matched."""

    def synthetic(self, seen: Seen, params: Tensors, subjects: Sequence[str]) -> dict[str, Tensor]:
        """What `collect` would send for these samples, float64, by its formula: the laws make up with it what clients send to a
        rule that asks for this statistic."""
        raise PluginError(
            f"statistic {type(self).__module__} has no synthetic form: write its method 'synthetic', or test it in a run"
        )


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

    def update(self, features: Tensor, labels: Tensor) -> None:
        """features: what the last linear map of the head is given (`Head.inputs`), (b, M); labels (b,), head rows."""

    def result(self) -> dict[str, Tensor]:
        """Named `<form>/<subject>`; float32 on the CPU."""
        ...
