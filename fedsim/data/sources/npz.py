"""Images in .npz files of the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fedsim.core import contracts
from fedsim.core.contracts import ArraySplit, Dataset, IntArray
from fedsim.core.errors import DataError
from fedsim.data.sources import _common


@dataclass(frozen=True)
class Source(contracts.Source):
    """Images and labels from one .npz file, or one per split.

    path, test_path: `train_images`, `train_labels` are read from the first, `test_images`, `test_labels` from the second
        (null: the first too). Images are uint8 (N, H, W) or (N, H, W, 3). Labels are integers that index `class_names`, or
        strings that are among them; without `class_names` the distinct labels are the classes, sorted.
    train_per_class, test_per_class: only the first n samples of every class (of every class and domain, where tasks are domains).
    Groupings: every pair `class_<x>` (group id per class), `<x>_names`; "coarse" is also called "superclass".
    Domains: `train_domain`, `test_domain` (per sample, as labels are), `domain_names`. `notes`: lines that the results then say.
    """

    path: str
    test_path: str | None = None
    train_per_class: int | None = None
    test_per_class: int | None = None

    def __post_init__(self) -> None:
        _common.at_least_one(train_per_class=self.train_per_class, test_per_class=self.test_per_class)

    def load(self, tokenizer_of: str | None = None, by_domain: bool = False) -> Dataset:
        train_path = _common.existing(self.path, ".npz file")
        test_path = train_path if self.test_path is None else _common.existing(self.test_path, ".npz file")
        train = _common.read_npz(train_path)
        test = train if test_path == train_path else _common.read_npz(test_path)
        files = {"train": (train, train_path), "test": (test, test_path)}
        for split, (arrays, path) in files.items():
            _common.require(arrays, (f"{split}_images", f"{split}_labels"), path)
        images = {s: _common.check_images(a[f"{s}_images"], f"{p}: {s}_images") for s, (a, p) in files.items()}
        names, labels = _per_sample(files, images, "labels", "class_names")
        has_domains = "domain_names" in train or "train_domain" in train
        domain_names: tuple[str, ...] = ()
        domains: Sequence[IntArray | None] = (None, None)
        if has_domains:
            domain_names, domains = _per_sample(files, images, "domain", "domain_names")
        groups, group_names = _groups(train, len(names), train_path)
        counts = {"train": self.train_per_class, "test": self.test_per_class}
        splits = {}
        for split, labels_N, domain_N in zip(images, labels, domains, strict=True):
            kept = _common.first_per_class(labels_N, counts[split], domain_N if by_domain else None)
            splits[split] = _common.subset(ArraySplit({"pixel_values": images[split]}, labels_N, domain_N), kept)
        return Dataset(
            train=splits["train"],
            test=splits["test"],
            class_names=names,
            groups=groups,
            group_names=group_names,
            domain_names=domain_names,
            notes=_common.strings(train["notes"]) if "notes" in train else (),
        )


def _per_sample(
    files: Mapping[str, tuple[_common.Arrays, Path]], images: Mapping[str, NDArray[Any]], what: str, names: str
) -> tuple[tuple[str, ...], list[IntArray]]:
    """Names, and what both splits say of every sample as positions among them."""
    values = {}
    for split, (arrays, path) in files.items():
        key = f"{path}: {split}_{what}"
        _common.require(arrays, (f"{split}_{what}",), path)
        values[key] = arrays[f"{split}_{what}"]
        _common.check_one_each(values[key], len(images[split]), key)
    given = {path: _common.strings(arrays[names]) for arrays, path in files.values() if names in arrays}
    if len(set(given.values())) > 1:
        raise DataError(f"{names} of {' and '.join(map(str, given))} differ: what is a number there would mean different things")
    return _common.numbered(values, next(iter(given.values()), None))


def _groups(arrays: _common.Arrays, classes: int, path: Path) -> tuple[dict[str, IntArray], dict[str, tuple[str, ...]]]:
    groups: dict[str, NDArray[Any]] = {}
    names: dict[str, tuple[str, ...]] = {}
    for key in arrays:
        name = key.removeprefix("class_")
        if name == key or f"{name}_names" not in arrays:
            continue
        names[name] = _common.strings(arrays[f"{name}_names"])
        groups[name] = _common.check_ids(arrays[key], classes, len(names[name]), f"{path}: {key}")
    if "coarse" in groups:
        groups["superclass"], names["superclass"] = groups["coarse"], names["coarse"]
    return groups, names
