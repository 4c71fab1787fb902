"""Omniglot: 1,623 handwritten characters of 50 alphabets, embedded in the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.core import contracts
from fedsim.core.contracts import ArraySplit, Dataset
from fedsim.core.errors import ConfigError, did_you_mean
from fedsim.data.sources import _common
from fedsim.data.streams import rows

SUBSETS = ("evaluation", "background", "all")


@dataclass(frozen=True)
class Source(contracts.Source):
    """Grey 28 × 28 characters (ink bright), 15 training and 5 test drawings each, by other writers (Lake et al. 2015, MIT).

    alphabets: "evaluation" (20 alphabets, 659 characters, never seen by the embedded backbone) | "background" (30, 964) |
        "all" | a list of alphabet names. Classes are in the order of the file: by alphabet, then by character.
    Grouping: "alphabet".
    """

    alphabets: Any = "evaluation"

    def __post_init__(self) -> None:
        if isinstance(self.alphabets, str):
            if self.alphabets not in SUBSETS:
                raise ConfigError(
                    f"alphabets '{self.alphabets}' is unknown (a single alphabet is a list of one)."
                    f"{did_you_mean(self.alphabets, SUBSETS)}"
                )
        elif not isinstance(self.alphabets, list) or not self.alphabets:
            raise ConfigError(f"alphabets must be one of {', '.join(SUBSETS)}, or a list of names, got {self.alphabets!r}")
        else:
            _check_names(self.alphabets)

    def load(self, tokenizer_of: str | None = None, by_domain: bool = False) -> Dataset:
        arrays = _read(None)
        chosen_alphabets = self._chosen(arrays["alphabet_names"].tolist(), arrays["alphabet_is_evaluation"])
        alphabet_of = arrays["class_alphabet"].astype(np.int64)
        chosen = np.flatnonzero(np.isin(alphabet_of, chosen_alphabets))
        new_id = rows(chosen.tolist(), len(alphabet_of))
        return Dataset(
            train=_split(arrays, "train", new_id),
            test=_split(arrays, "test", new_id),
            class_names=tuple(arrays["class_names"][chosen].tolist()),
            groups={"alphabet": rows(chosen_alphabets.tolist(), len(arrays["alphabet_names"]))[alphabet_of[chosen]]},
            group_names={"alphabet": tuple(arrays["alphabet_names"][chosen_alphabets].tolist())},
        )

    def _chosen(self, names: list[str], is_evaluation: NDArray[np.bool_]) -> NDArray[np.int64]:
        if self.alphabets == "all":
            return np.arange(len(names))
        if isinstance(self.alphabets, str):
            return np.flatnonzero(is_evaluation == (self.alphabets == "evaluation"))
        return np.flatnonzero([name in self.alphabets for name in names])


def _check_names(alphabets: list[Any]) -> None:
    known = _read(["alphabet_names"])["alphabet_names"].tolist()
    for name in alphabets:
        if name not in known:
            raise ConfigError(f"alphabets: Omniglot has no alphabet '{name}'.{did_you_mean(str(name), known)}")
    if len(set(alphabets)) < len(alphabets):
        raise ConfigError("alphabets names one alphabet twice")


def _read(wanted: list[str] | None) -> dict[str, NDArray[Any]]:
    return _common.read_embedded("omniglot", "omniglot_28.npz", wanted)


def _split(arrays: dict[str, NDArray[Any]], split: str, new_id: NDArray[np.int64]) -> ArraySplit:
    labels = new_id[arrays[f"{split}_labels"].astype(np.int64)]
    kept = np.flatnonzero(labels >= 0)
    return ArraySplit({"pixel_values": arrays[f"{split}_images"][kept]}, labels[kept])
