"""Images in .npz files of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.core import contracts
from fedsim.core.contracts import ArraySplit, Dataset, IntArray
from fedsim.core.errors import DataError
from fedsim.data.sources import _common


@dataclass(frozen=True)
class Source(contracts.Source):
    """Images and labels from one .npz file, or one per split.

    path, test_path: `train_images`, `train_labels` are read from the first, `test_images`, `test_labels` from the second
        (null: the first too). Images are uint8 (N, H, W) or (N, H, W, 3); labels integers that index `class_names`
        (left out: as many classes as the largest label says, named by number).
    train_per_class, test_per_class: only the first n samples of every class.
    Groupings: every pair `class_<x>` (group id per class), `<x>_names`; "coarse" is also called "superclass".
    Domains: `train_domain`, `test_domain` (domain id per sample), `domain_names`.
    """

    path: str
    test_path: str | None = None
    train_per_class: int | None = None
    test_per_class: int | None = None

    def __post_init__(self) -> None:
        _common.at_least_one(train_per_class=self.train_per_class, test_per_class=self.test_per_class)

    def load(self, tokenizer_of: str | None = None) -> Dataset:
        train_path = _common.existing(self.path, ".npz file")
        test_path = train_path if self.test_path is None else _common.existing(self.test_path, ".npz file")
        train = _common.read_npz(train_path)
        test = train if test_path == train_path else _common.read_npz(test_path)
        names = _class_names(train, test, train_path, test_path)
        groups, group_names = _groups(train, len(names), train_path)
        domain_names = tuple(map(str, train["domain_names"].tolist())) if "domain_names" in train else ()
        train_split = _split(train, "train", len(names), len(domain_names), train_path)
        test_split = _split(test, "test", len(names), len(domain_names), test_path)
        dataset = Dataset(
            train=_common.subset(train_split, _common.first_per_class(train_split.labels, self.train_per_class)),
            test=_common.subset(test_split, _common.first_per_class(test_split.labels, self.test_per_class)),
            class_names=names,
            groups=groups,
            group_names=group_names,
            domain_names=domain_names,
        )
        a, b = (split.inputs["pixel_values"].shape[1:] for split in (dataset.train, dataset.test))
        if a != b:
            raise DataError(f"training images are {a} and test images {b}: both splits need one size ({train_path}, {test_path})")
        return dataset


def _split(arrays: _common.Arrays, split: str, classes: int, domains: int, path: Path) -> ArraySplit:
    images = _common.check_images(_common.take(arrays, f"{split}_images", path), f"{path}: {split}_images")
    labels = _common.check_ids(_common.take(arrays, f"{split}_labels", path), len(images), classes, f"{path}: {split}_labels")
    domain_of = None
    if domains:
        key = f"{split}_domain"
        domain_of = _common.check_ids(_common.take(arrays, key, path), len(images), domains, f"{path}: {key}")
    return ArraySplit({"pixel_values": images}, labels, domain_of)


def _class_names(train: _common.Arrays, test: _common.Arrays, train_path: Path, test_path: Path) -> tuple[str, ...]:
    if "class_names" not in train:
        labels = [_common.take(train, "train_labels", train_path), _common.take(test, "test_labels", test_path)]
        highest = max((int(y.max()) for y in labels if y.size and np.issubdtype(y.dtype, np.integer)), default=0)
        return tuple(map(str, range(highest + 1)))
    names = tuple(map(str, train["class_names"].tolist()))
    if "class_names" in test and tuple(map(str, test["class_names"].tolist())) != names:
        raise DataError(f"class_names of {train_path} and {test_path} differ: labels would mean different classes")
    return names


def _groups(arrays: _common.Arrays, classes: int, path: Path) -> tuple[dict[str, IntArray], dict[str, tuple[str, ...]]]:
    groups: dict[str, NDArray[Any]] = {}
    names: dict[str, tuple[str, ...]] = {}
    for key in arrays:
        name = key.removeprefix("class_")
        if name == key or f"{name}_names" not in arrays:
            continue
        names[name] = tuple(map(str, arrays[f"{name}_names"].tolist()))
        groups[name] = _common.check_ids(arrays[key], classes, len(names[name]), f"{path}: {key}")
    if "coarse" in groups:
        groups["superclass"], names["superclass"] = groups["coarse"], names["coarse"]
    return groups, names
