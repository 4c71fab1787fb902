"""Where samples come from, and how a task's samples are split over clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from fedsim.core.contracts.traits import Part
from fedsim.core.errors import ConfigError
from fedsim.core.numbers import IntArray
from fedsim.core.work import ArraySplit


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
class Source(Part, ABC):
    """Loads a data set. What it gives is held against `Dataset`'s promises, and its classes are looked at, in `fedsim.data.door`:
    a source need not do that itself."""

    @abstractmethod
    def load(self, tokenizer_of: str | None = None, by_domain: bool = False) -> Dataset:
        """tokenizer_of: the backbone's name or folder, for sources of text; by_domain: tasks are domains, so that an option that
        counts samples per class counts them per class and domain.

        Raises DataError (one line: which file, what is wrong, what to do)."""


@dataclass(frozen=True)
class Partition(Part, ABC):
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
