"""What adapters have in common that give each sample prompts of its own, by its query."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from fedsim.core import contracts
from fedsim.core.contracts import BackboneLike, Slots, Traits
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.models.adapters import _prompts

OPEN = "_fedsim_pool"  # attribute of an encoder: what a pool that is applied to it does for samples with these queries
Prompting: TypeAlias = Callable[[Tensor], AbstractContextManager[None]]


@dataclass(frozen=True)
class Pool(contracts.Adapter):
    """A pool of prompts. `applied` and `stacked` train, `merged` is inference, which chooses among all that was learned."""

    exempt: ClassVar[Mapping[str, str]] = {"fresh": "prompts take part in the softmax, whatever their values are"}
    queries: ClassVar[bool] = True

    @property
    def traits(self) -> Traits:
        other = (
            "keeps what it learned of earlier tasks beside what it learns now, but {consolidator} begins every task with a new "
            "module or merges modules: use consolidator: none"
        )
        return Traits(needs={"one module goes on": other})

    @abstractmethod
    def prompted(
        self, backbone: BackboneLike, tensors: Tensors, query_bD: Tensor, training: bool, slots: Slots | None = None
    ) -> AbstractContextManager[None]:
        """While open, the encoder's forward is of samples with these queries, with their prompts. slots: of K clients' samples,
        whose tensors have a leading axis of clients or are common to all."""

    def applied(
        self, backbone: BackboneLike, tensors: Tensors, dropout: torch.Generator | None = None
    ) -> AbstractContextManager[None]:
        """Prompts for the samples that are asked for, as in training, while open."""
        return _opened(backbone.encoder, lambda query_bD: self.prompted(backbone, tensors, query_bD, training=True))

    def merged(self, backbone: BackboneLike, tensors: Tensors) -> AbstractContextManager[None]:
        """As in inference."""
        return _opened(backbone.encoder, lambda query_bD: self.prompted(backbone, tensors, query_bD, training=False))

    def stacked(self, backbone: BackboneLike, tensors: Tensors, slots: Slots) -> AbstractContextManager[None]:
        """As in training, every client's samples with its own tensors."""
        return _opened(backbone.encoder, lambda query_bD: self.prompted(backbone, tensors, query_bD, True, slots))

    def as_trained(self, backbone: BackboneLike, tensors: Tensors, slots: Slots | None = None) -> AbstractContextManager[None]:
        """As in training, of tensors that nobody trains."""
        return _opened(backbone.encoder, lambda query_bD: self.prompted(backbone, tensors, query_bD, True, slots))

    def asked(self, backbone: BackboneLike, query_bD: Tensor) -> AbstractContextManager[None]:
        """What the pool that is open does for samples with these queries; nothing where none is."""
        prompting: Prompting | None = backbone.encoder.__dict__.get(OPEN)
        return nullcontext() if prompting is None else prompting(query_bD)


def require_vision_transformer(adapter: str, encoder: nn.Module) -> None:
    """Raise ModelError for an encoder of anything but images as tokens."""
    if getattr(encoder, "main_input_name", None) != "pixel_values":
        raise _prompts.refuse(adapter, encoder, "it is no vision transformer")


def require_not_negative(**options: float) -> None:
    """Raise ConfigError for an option below 0."""
    for name, value in options.items():
        if value < 0:
            raise ConfigError(f"{name} must not be negative, got {value}")


def uniform(generator: torch.Generator, bound: float, *shape: int) -> Tensor:
    """Fresh prompts or keys, uniform in ±bound."""
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@contextmanager
def _opened(encoder: nn.Module, prompting: Prompting) -> Iterator[None]:
    before = encoder.__dict__.get(OPEN)
    encoder.__dict__[OPEN] = prompting
    try:
        yield
    finally:
        if before is None:
            del encoder.__dict__[OPEN]
        else:
            encoder.__dict__[OPEN] = before
