"""Data sets that Hugging Face `datasets` can load: hub ids, local parquet, folders of images (optional extra)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.core import contracts, hub
from fedsim.core.contracts import ArraySplit, Dataset, IntArray
from fedsim.core.errors import ConfigError, DataError, PluginError, did_you_mean, require_choice
from fedsim.data.images import Decoder
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
    background: white | black, what transparent pixels are laid on.
    max_length: tokens per text at most. train_per_class: only the first n training samples of every class (of every class and
        domain, where tasks are domains).
    drop_unlabelled: leave out samples whose label is null, empty or -1, which are an error otherwise.

    Classes are in the order of the ClassLabel feature; labels of another type are sorted, integers by size. Images are decoded
    columns, or the bytes of image files as pandas writes them. They become grey (N, H, W) when all are grey, else RGB
    (N, H, W, 3), uint8: 16 bits are scaled to 8, transparency is laid on the background, and results say so.
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
    background: str = "white"
    max_length: int = 64
    train_per_class: int | None = None
    drop_unlabelled: bool = False

    def __post_init__(self) -> None:
        _common.at_least_one(image_size=self.image_size, max_length=self.max_length, train_per_class=self.train_per_class)
        require_choice("background", self.background, ("white", "black"))
        if self.image_key is not None and self.text_key is not None:
            raise ConfigError("image_key and text_key do not go together: name one of them")

    def load(self, tokenizer_of: str | None = None, by_domain: bool = False) -> Dataset:
        parts = self._load_splits()
        label_key = self._label_key(parts[0])
        names, labels = _coded(parts, label_key, self.path, optional=True)
        notes = []
        for i, split in enumerate((self.train_split, self.test_split)):
            if len(there := np.flatnonzero(labels[i] >= 0)) < len(labels[i]):
                notes.append(self._labelled(labels[i], label_key, split))
                parts[i], labels[i] = parts[i].select(there), labels[i][there]
        groups, group_names = self._groups(parts[0], labels[0], names)
        domain_names: tuple[str, ...] = ()
        domains: list[IntArray | None] = [None, None]
        if self.domain_key is not None:
            domain_names, found = _coded(parts, self.domain_key, self.path)
            domains = [*found]
        kept = _common.first_per_class(labels[0], self.train_per_class, domains[0] if by_domain else None)
        parts[0], labels[0] = parts[0].select(kept), labels[0][kept]
        domains[0] = None if domains[0] is None else domains[0][kept]
        inputs, said = self._inputs(parts, label_key, tokenizer_of)
        return Dataset(
            train=ArraySplit(inputs[0], labels[0], domains[0]),
            test=ArraySplit(inputs[1], labels[1], domains[1]),
            class_names=names,
            groups=groups,
            group_names=group_names,
            domain_names=domain_names,
            notes=(*notes, *said),
        )

    def _load_splits(self) -> list[Any]:
        load_dataset, where = _datasets().load_dataset, Path(self.data_dir or self.path)
        if where.is_absolute() and not where.exists():
            raise DataError(f"no folder {where}: is the path right? (./ in a YAML is the YAML's own folder)")
        local = [Path(f) for f in _flat(self.data_files) if "://" not in f] or [p for p in (where,) if p.exists()]
        with nullcontext("") if local else hub.reached() as unreachable:
            found = []
            for split in (self.train_split, self.test_split):
                try:
                    part = load_dataset(self.path, self.config, data_files=self.data_files, data_dir=self.data_dir, split=split)
                except Exception as e:  # datasets, hub client, parsers and file systems each have their own
                    raise DataError(f"datasets cannot load split '{split}' of {self.path}: {_why(e, local, unreachable)}") from e
                if not len(part):
                    raise DataError(f"split '{split}' of {self.path} holds no samples")
                found.append(part)
        return found

    def _label_key(self, train: Any) -> str:
        if self.label_key is not None:
            return _column(train, self.label_key)
        class_labels = [name for name, feature in train.features.items() if isinstance(feature, _datasets().ClassLabel)]
        found = class_labels or [name for name in ("label", "labels") if name in train.column_names]
        if len(found) != 1:
            many = ", ".join(found or train.column_names)
            raise DataError(f"which column of {self.path} holds the label? Set data.label_key to one of: {many}")
        return str(found[0])

    def _labelled(self, ids: IntArray, key: str, split: str) -> str:
        """The line that says how many samples without a label are left out. Raises DataError unless that was asked for."""
        without = np.flatnonzero(ids < 0)
        of = f"{len(without)} of {len(ids)} samples of split '{split}' of {self.path}"
        if not self.drop_unlabelled:
            raise DataError(
                f"{of} have no label in column '{key}' (null, empty or -1; the first is sample {without[0]}): set "
                "data.drop_unlabelled to true to leave them out (where -1 is a class: write labels as strings)"
            )
        if len(without) == len(ids):
            raise DataError(f"{of} have no label in column '{key}': choose another split")
        return f"{of} have no label and are left out"

    def _inputs(
        self, parts: Sequence[Any], label_key: str, tokenizer_of: str | None
    ) -> tuple[list[dict[str, NDArray[Any]]], Sequence[str]]:
        """The inputs of both splits, and what was lost on the way."""
        image_key, text_key = self.image_key, self.text_key
        if image_key is None and text_key is None:
            image_key, text_key = self._input_key(parts[0], label_key)
        if image_key is not None:
            decoder = Decoder(self.image_size, self.background, self.path)
            grids = [
                [
                    self._array(decoder, value, f"{image_key} of sample {i}")
                    for i, value in enumerate(part[_column(part, image_key)])
                ]
                for part in parts
            ]
            return [{"pixel_values": images} for images in _alike(grids, self.path)], decoder.notes()
        assert text_key is not None
        texts = [_texts(part[_column(part, text_key)][:], f"{self.path}: {text_key}") for part in parts]
        encoded, notes = tokenise(texts, tokenizer_of, self.max_length)
        return [dict(one) for one in encoded], notes

    def _array(self, decoder: Decoder, value: Any, where: str) -> NDArray[np.uint8]:
        return decoder.array(_opened(value, f"{self.path}: {where}"), where)

    def _input_key(self, train: Any, label_key: str) -> tuple[str | None, str | None]:
        """The only image column, else the only text column."""
        taken = (label_key, self.group_key, self.domain_key)
        images = [name for name, feature in train.features.items() if _holds_images(feature)]
        texts = [name for name, feature in train.features.items() if _holds_texts(feature) and name not in taken]
        if len(images) == 1:
            return str(images[0]), None
        if not images and len(texts) == 1:
            return None, str(texts[0])
        many = ", ".join(images or texts or train.column_names)
        raise DataError(f"which column of {self.path} holds the inputs? Set data.image_key or data.text_key to one of: {many}")

    def _groups(
        self, train: Any, labels: IntArray, names: tuple[str, ...]
    ) -> tuple[dict[str, IntArray], dict[str, tuple[str, ...]]]:
        key = self.group_key
        if key is None:
            return {}, {}
        group_names, (ids,) = _coded([train], key, self.path)
        group_of = np.zeros(len(names), dtype=np.int64)  # a class without samples is never used: any group will do
        group_of[labels] = ids
        wrong = np.flatnonzero(group_of[labels] != ids)
        if len(wrong):
            raise DataError(
                f"data.group_key '{key}' is no grouping of the classes: class '{names[labels[wrong[0]]]}' is in several groups"
            )
        return {key: group_of}, {key: group_names}


def _datasets() -> Any:
    try:
        return importlib.import_module("datasets")  # an optional extra, and slow to import
    except ImportError as e:
        raise PluginError("data source 'huggingface' needs the package 'datasets': pip install 'fedsim[huggingface]'") from e


def _flat(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _flat(inner)


def _why(error: Exception, local: Sequence[Path], unreachable: str) -> str:
    """Why nothing was loaded, in words that help."""
    if empty := [str(file) for path in local for file in _files(path) if _is_empty(file)]:
        return f"{empty[0]} is empty, it holds no rows"
    if unreachable:
        return f"it is not cached, and the hub is not there ({unreachable})"
    cause = f" ({error.__cause__})" if error.__cause__ else ""
    return " ".join(f"{type(error).__name__}: {error}{cause}".split())[:300]


def _files(path: Path) -> Iterable[Path]:
    return sorted(path.rglob("*.parquet")) if path.is_dir() else [path]


def _is_empty(path: Path) -> bool:
    if not path.is_file():
        return False
    if path.stat().st_size == 0:
        return True
    try:
        return path.suffix == ".parquet" and importlib.import_module("pyarrow.parquet").read_metadata(path).num_rows == 0
    except Exception:  # damaged: what datasets says of it is better
        return False


def _column(part: Any, key: str) -> str:
    if key not in part.column_names:
        raise DataError(f"the data has no column '{key}'.{did_you_mean(key, part.column_names)}")
    return key


def _holds_images(feature: Any) -> bool:
    """An image column, or what pandas makes of one: bytes of a file, alone or in a struct."""
    lib = _datasets()
    if isinstance(feature, Mapping):
        return "bytes" in feature
    return isinstance(feature, lib.Image) or (isinstance(feature, lib.Value) and "binary" in feature.dtype)


def _holds_texts(feature: Any) -> bool:
    return isinstance(feature, _datasets().Value) and "string" in feature.dtype


def _coded(parts: Sequence[Any], key: str, path: str, optional: bool = False) -> tuple[tuple[str, ...], list[IntArray]]:
    """The distinct values of a column as names, and every part's values as positions among them.

    Names of a ClassLabel feature keep their order. Where no value is -1 if it may be missing (`optional`: null, empty and -1
    then count as missing), an error otherwise.
    """
    columns = [_values(part, _column(part, key), f"{path}: column '{key}'", optional) for part in parts]
    if not optional:
        for column in columns:
            if None in column:
                raise DataError(f"{path}: column '{key}' holds nothing at sample {column.index(None)}")
    feature = parts[0].features[key]
    names = dict.fromkeys(feature.names if isinstance(feature, _datasets().ClassLabel) else ())
    distinct = {value for column in columns for value in column if value is not None}
    numbers = all(isinstance(value, int) for value in distinct)
    names |= dict.fromkeys(map(str, sorted(distinct) if numbers else sorted(map(str, distinct))))
    place: dict[str | None, int] = {name: i for i, name in enumerate(names)} | {None: -1}
    coded = [[place[None if value is None else str(value)] for value in column] for column in columns]
    return tuple(names), [np.array(ids, dtype=np.int64) for ids in coded]


def _values(part: Any, key: str, what: str, optional: bool) -> list[str | int | None]:
    """What a column holds: strings, integers, or None for nothing. Raises DataError for anything else."""
    feature, lib = part.features[key], _datasets()
    names = feature.names if isinstance(feature, lib.ClassLabel) else None
    found: list[str | int | None] = []
    for i, value in enumerate(part[key][:]):
        if isinstance(value, float) and (math.isnan(value) or value.is_integer()):  # integers beside nulls, as pandas has them
            value = None if math.isnan(value) else int(value)
        if value is not None and not isinstance(value, str | int):
            kind = "lists, where one value per sample is needed" if isinstance(value, list) else f"{type(value).__name__}s"
            raise DataError(f"{what} must hold class labels, strings or integers, and sample {i} is {str(value)[:40]!r}: {kind}")
        if optional and (value == -1 or (isinstance(value, str) and not value.strip())):
            value = None
        if names is not None and value is not None:
            value = names[value] if 0 <= value < len(names) else str(value)
        found.append(str(value) if isinstance(value, bool) else value)
    return found


def _texts(values: Sequence[Any], what: str) -> list[str]:
    for i, value in enumerate(values):
        if value is None:
            raise DataError(f"{what} of sample {i} is null: leave out samples without a text")
    return [str(value) for value in values]


def _opened(value: Any, what: str) -> Any:
    """What a column holds of one image, as Pillow's: decoded, the bytes of a file, or rows of pixels."""
    from PIL import Image

    if isinstance(value, bytes):
        value = {"bytes": value}
    try:
        if isinstance(value, Mapping):
            return _datasets().Image().decode_example({"bytes": value.get("bytes"), "path": value.get("path")})
        if isinstance(value, list | np.ndarray):
            return Image.fromarray(_pixels(np.asarray(value), f"{what}"))
    except DataError:
        raise
    except Exception as e:  # Pillow's own, of the operating system, of a format that is cut short
        raise DataError(f"{what} cannot be decoded: {' '.join(str(e).split())[:200]}") from e
    if not isinstance(value, Image.Image):
        raise DataError(f"{what} is not an image")
    return value


def _pixels(values: NDArray[Any], what: str) -> NDArray[np.uint8]:
    """Rows of pixels as a column of lists holds them: integers of any type, but of 8 bits."""
    if values.dtype.kind in "iu" and values.size and values.min() >= 0 and values.max() <= 255:
        values = values.astype(np.uint8)
    whole: NDArray[np.uint8] = _common.check_images(values[None], what)[0]
    return whole


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
