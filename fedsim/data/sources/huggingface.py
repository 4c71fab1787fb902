"""Data sets that Hugging Face `datasets` can load: hub ids, local parquet, folders of images (optional extra)."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.core import contracts
from fedsim.core.contracts import ArraySplit, Dataset, IntArray
from fedsim.core.errors import ConfigError, DataError, PluginError, did_you_mean
from fedsim.data.sources import _common
from fedsim.data.tokenise import tokenise


@dataclass(frozen=True)
class Source(contracts.Source):
    """`datasets.load_dataset(path, config, data_files=..., data_dir=...)`, one split for training and one for the test.

    path: hub id, local folder, or a builder ("parquet", "json", "csv", "imagefolder") with data_files or data_dir.
    config: the variant of a hub data set that has several.
    data_files: a file, a list, or {split: file or list}; data_dir: a folder, for "imagefolder" with one sub-folder per split
        and in it one per class.
    train_split, test_split: as `datasets` writes them, e.g. "train", "validation", "train[80%:]".
    image_key, text_key, label_key: columns; null: found by their types (an image column, else a text column; the class labels).
    group_key, domain_key: columns that give a grouping of the classes (named like the column), and every sample's domain.
    image_size: side in pixels; the shorter side is resized (bicubic) and the middle is cut out. Needed when sizes differ.
    max_length: tokens per text at most. train_per_class: only the first n training samples of every class.

    Classes are in the order of the ClassLabel feature; labels of another type are sorted. Images become grey (N, H, W) when all
    are grey, else RGB (N, H, W, 3), uint8.
    """

    path: str
    config: str | None = None
    data_files: Any = None
    data_dir: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    image_key: str | None = None
    text_key: str | None = None
    label_key: str | None = None
    group_key: str | None = None
    domain_key: str | None = None
    image_size: int | None = None
    max_length: int = 64
    train_per_class: int | None = None

    def __post_init__(self) -> None:
        _common.at_least_one(image_size=self.image_size, max_length=self.max_length, train_per_class=self.train_per_class)
        if self.image_key is not None and self.text_key is not None:
            raise ConfigError("image_key and text_key do not go together: name one of them")

    def load(self, tokenizer_of: str | None = None, by_domain: bool = False) -> Dataset:
        train, test = (self._load_split(_datasets().load_dataset, split) for split in (self.train_split, self.test_split))
        label_key = self._label_key(train)
        names = _names(train, test, label_key)
        labels = [_ids(part, label_key, names) for part in (train, test)]
        kept = _common.first_per_class(labels[0], self.train_per_class)
        groups, group_names = self._groups(train, labels[0], names)
        domain_names = () if self.domain_key is None else _names(train, test, _column(train, self.domain_key))
        train, labels[0] = train.select(kept), labels[0][kept]
        domains = [_ids(part, self.domain_key, domain_names) if self.domain_key else None for part in (train, test)]
        inputs = self._inputs(train, test, label_key, tokenizer_of)
        return Dataset(
            train=ArraySplit(inputs[0], labels[0], domains[0]),
            test=ArraySplit(inputs[1], labels[1], domains[1]),
            class_names=names,
            groups=groups,
            group_names=group_names,
            domain_names=domain_names,
        )

    def _load_split(self, load_dataset: Callable[..., Any], split: str) -> Any:
        files = self.data_files
        path = os.path.expanduser(self.path)
        try:
            return load_dataset(path, self.config, data_files=files, data_dir=self.data_dir, split=split)
        except Exception as e:  # datasets, hub client, parsers and file systems each have their own
            reason = " ".join(str(e).split())
            raise DataError(f"datasets cannot load split '{split}' of {self.path}: {type(e).__name__}: {reason[:300]}") from e

    def _label_key(self, train: Any) -> str:
        if self.label_key is not None:
            return _column(train, self.label_key)
        class_labels = [name for name, feature in train.features.items() if isinstance(feature, _datasets().ClassLabel)]
        found = class_labels or [name for name in ("label", "labels") if name in train.column_names]
        if len(found) != 1:
            many = ", ".join(found or train.column_names)
            raise DataError(f"which column of {self.path} holds the label? Set data.label_key to one of: {many}")
        return str(found[0])

    def _inputs(self, train: Any, test: Any, label_key: str, tokenizer_of: str | None) -> list[dict[str, NDArray[Any]]]:
        image_key, text_key = self.image_key, self.text_key
        if image_key is None and text_key is None:
            image_key, text_key = self._input_key(train, label_key)
        if image_key is not None:
            grids = [self._images(part, _column(part, image_key)) for part in (train, test)]
            return [{"pixel_values": images} for images in _alike(grids, self.path)]
        assert text_key is not None
        texts = [[str(text) for text in part[_column(part, text_key)]] for part in (train, test)]
        return [dict(one) for one in tokenise(texts, tokenizer_of, self.max_length)]

    def _input_key(self, train: Any, label_key: str) -> tuple[str | None, str | None]:
        """The only image column, else the only text column."""
        lib = _datasets()
        taken = (label_key, self.group_key, self.domain_key)
        images = [name for name, feature in train.features.items() if isinstance(feature, lib.Image)]
        texts = [
            name for name, f in train.features.items() if isinstance(f, lib.Value) and "string" in f.dtype and name not in taken
        ]
        if len(images) == 1:
            return str(images[0]), None
        if not images and len(texts) == 1:
            return None, str(texts[0])
        many = ", ".join(images or texts or train.column_names)
        raise DataError(f"which column of {self.path} holds the inputs? Set data.image_key or data.text_key to one of: {many}")

    def _images(self, part: Any, key: str) -> list[NDArray[np.uint8]]:
        return [_to_array(image, self.image_size, f"{self.path}: {key} of sample {i}") for i, image in enumerate(part[key])]

    def _groups(
        self, train: Any, labels: IntArray, names: tuple[str, ...]
    ) -> tuple[dict[str, IntArray], dict[str, tuple[str, ...]]]:
        key = self.group_key
        if key is None:
            return {}, {}
        group_names = _names(train, train, _column(train, key))
        ids = _ids(train, key, group_names)
        group_of = np.full(len(names), -1, dtype=np.int64)
        group_of[labels] = ids
        wrong = np.flatnonzero(group_of[labels] != ids)
        if len(wrong):
            raise DataError(
                f"data.group_key '{key}' is no grouping of the classes: class '{names[labels[wrong[0]]]}' is in several groups"
            )
        if (group_of < 0).any():
            raise DataError(
                f"data.group_key '{key}': class '{names[int(np.argmin(group_of))]}' has no training sample that tells its group"
            )
        return {key: group_of}, {key: group_names}


def _datasets() -> Any:
    try:
        return importlib.import_module("datasets")  # an optional extra, and slow to import
    except ImportError as e:
        raise PluginError("data source 'huggingface' needs the package 'datasets': pip install 'fedsim[huggingface]'") from e


def _column(part: Any, key: str) -> str:
    if key not in part.column_names:
        raise DataError(f"the data has no column '{key}'.{did_you_mean(key, part.column_names)}")
    return key


def _names(train: Any, test: Any, key: str) -> tuple[str, ...]:
    """Names of a ClassLabel feature, or the sorted values of both splits."""
    feature = train.features[key]
    if isinstance(feature, _datasets().ClassLabel):
        return tuple(feature.names)
    values: set[Any] = set()
    for part in (train, test):
        values |= set(part[_column(part, key)])
    if not all(isinstance(v, (str, int)) for v in values):
        raise DataError(f"column '{key}' must hold class labels, strings or integers")
    return tuple(str(v) for v in sorted(values, key=lambda v: (isinstance(v, str), v)))


def _ids(part: Any, key: str, names: tuple[str, ...]) -> IntArray:
    """Ids of a column's values in `names`."""
    feature = part.features[_column(part, key)]
    values: Iterable[Any] = part[key]
    if isinstance(feature, _datasets().ClassLabel):
        if tuple(feature.names) != names:
            raise DataError(f"the splits name different classes in column '{key}'")
        return _common.check_ids(np.array(list(values), dtype=np.int64), len(part), len(names), f"column '{key}'")
    ids: Mapping[str, int] = {name: i for i, name in enumerate(names)}
    return np.array([ids[str(v)] for v in values], dtype=np.int64)


def _to_array(image: Any, size: int | None, what: str) -> NDArray[np.uint8]:
    """A decoded PIL image as uint8, grey (H, W) or RGB (H, W, 3)."""
    from PIL import Image, ImageOps

    if not isinstance(image, Image.Image):
        raise DataError(f"{what} is not an image")
    image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8)


def _alike(grids: list[list[NDArray[np.uint8]]], path: str) -> list[NDArray[np.uint8]]:
    """One array per split: all of one size, and RGB if any image is."""
    sizes = sorted({image.shape[:2] for images in grids for image in images})
    if len(sizes) > 1:
        raise DataError(
            f"images of {path} have {len(sizes)} sizes, from {sizes[0]} to {sizes[-1]}: "
            f"set data.image_size to the side that they are resized to"
        )
    colour = any(image.ndim == 3 for images in grids for image in images)
    return [np.stack([np.repeat(i[..., None], 3, axis=2) if colour and i.ndim == 2 else i for i in images]) for images in grids]
