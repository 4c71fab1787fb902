"""What the sources share: reading files with one clear line on failure, and checks of arrays."""

from __future__ import annotations

import importlib.resources
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.core.contracts import ArraySplit, IntArray
from fedsim.core.errors import ConfigError, DataError, did_you_mean

UNIT = 1.001  # the largest number of images in 0..1, with what rounding leaves above
BYTES = 32.0  # and the least that the brightest pixel of images in 0..255 has: between the two nobody can tell
Arrays = Mapping[str, NDArray[Any]]


def at_least_one(**values: int | None) -> None:
    """Raise ConfigError for an option below 1 (null is allowed)."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")


def existing(path: str, what: str) -> Path:
    """The path of a file. Raises DataError when it is not there."""
    found = Path(os.path.expanduser(path))
    if not found.is_file():
        raise DataError(f"no {what} at {found}: is the path right? (./ in a YAML is the YAML's own folder)")
    return found


def read_npz(path: Path, wanted: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
    """Arrays of a .npz file, all of them or those wanted that are there. Raises DataError when it is damaged."""
    try:
        with path.open("rb") as raw:  # numpy would leave it open when the archive is damaged
            file = np.load(raw, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(f"{path} is not an .npz archive of named arrays")
            return {key: file[key] for key in file.files if wanted is None or key in wanted}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as e:
        raise DataError(f"{path} cannot be read as .npz: {' '.join(str(e).split())} (damaged? copy or download it again)") from e


def read_embedded(name: str, file: str, wanted: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
    """Arrays of a .npz file that the package carries in assets/<name>/. Raises DataError when the installation lacks it."""
    with importlib.resources.as_file(importlib.resources.files("fedsim") / "assets" / name / file) as path:
        if not Path(path).is_file():
            raise DataError(f"the embedded {file} is missing ({path}): install fedsim again")
        return read_npz(path, wanted)


def require(arrays: Arrays, keys: Sequence[str], path: Path) -> None:
    """Raise DataError, which lists what there is, for arrays that are missing."""
    if missing := [key for key in keys if key not in arrays]:
        raise DataError(f"{path} holds no {' and no '.join(map(repr, missing))} (it holds: {', '.join(sorted(arrays))})")


def check_ids(ids: NDArray[Any], length: int, limit: int, what: str) -> IntArray:
    """Integers in 0..limit-1, one per sample (or class), as int64. Raises DataError."""
    check_one_each(ids, length, what)
    if not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"{what} must be integers, got {ids.dtype}: convert them with .astype(np.int64)")
    wrong = np.flatnonzero((ids < 0) | (ids >= limit))
    if len(wrong):
        hint = ": if they begin at 1, subtract 1" if int(ids.min()) == 1 and int(ids.max()) == limit else ""
        raise DataError(f"{what} must be in 0..{limit - 1}, got {ids[wrong[0]]} at position {wrong[0]}{hint}")
    return ids.astype(np.int64)


def check_one_each(values: NDArray[Any], length: int, what: str) -> None:
    """Raise DataError unless there is one value per sample (or class)."""
    if values.ndim == 2 and len(values) == length:
        how = "reshape(-1)" if values.shape[1] == 1 else "argmax(axis=1), if they are one-hot"
        raise DataError(f"{what} must have shape ({length},), got {values.shape}: use .{how}")
    if values.ndim != 1 or len(values) != length:
        raise DataError(f"{what} must have shape ({length},), got {values.shape}")


def strings(array: NDArray[Any]) -> tuple[str, ...]:
    """Names that a file holds as text, bytes or numbers."""
    return tuple(v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in array.tolist())


def numbered(values: Mapping[str, NDArray[Any]], names: Sequence[str] | None) -> tuple[tuple[str, ...], list[IntArray]]:
    """Names, and each array's values as positions among them.

    values: what it is called in an error -> integers or strings, (N,). names: integers index them, strings are looked up among
    them; None: the distinct values of all arrays together, sorted (numbers by size), are the names.
    Raises DataError for negative numbers (a sample without a label), other kinds of values, and what `names` does not hold.
    """
    kinds = {_kind(array, what) for what, array in values.items()}
    if len(kinds) > 1:
        raise DataError(f"{' and '.join(values)} must be of one kind, but some are integers and some are strings")
    if names is not None and kinds == {"integers"}:
        return tuple(names), [check_ids(array, len(array), len(names), what) for what, array in values.items()]
    if kinds == {"integers"}:
        known = np.unique(np.concatenate([array.astype(np.int64) for array in values.values()]))
        return strings(known), [np.searchsorted(known, array.astype(np.int64)) for array in values.values()]
    texts = {what: strings(array) for what, array in values.items()}
    found = tuple(names) if names is not None else tuple(sorted(set(chain.from_iterable(texts.values()))))
    place = {name: i for i, name in enumerate(found)}
    for what, of_array in texts.items():
        for i, text in enumerate(of_array):
            if text not in place:
                raise DataError(f"{what}: '{text}' at position {i} is none of the names in the file.{did_you_mean(text, place)}")
    return found, [np.array([place[text] for text in of_array], dtype=np.int64) for of_array in texts.values()]


def _kind(array: NDArray[Any], what: str) -> str:
    if array.dtype.kind in "US":
        return "strings"
    if array.dtype.kind not in "iub":
        raise DataError(f"{what} must be integers or strings, got {array.dtype}: convert them with .astype(np.int64)")
    wrong = np.flatnonzero(array < 0)
    if len(wrong):
        raise DataError(
            f"{what} must not be negative, got {array[wrong[0]]} at position {wrong[0]} ({len(wrong)} of {len(array)} are): "
            "leave out samples without a label; if it is a class, use strings for labels"
        )
    return "integers"


def check_images(images: NDArray[Any], what: str) -> NDArray[np.uint8]:
    """uint8 images (N, H, W) or (N, H, W, C) with 1 or 3 channels. Raises DataError, with the line that converts others."""
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise DataError(f"{what} must have shape (N, H, W) or (N, H, W, 1 or 3), got {images.shape}{_other_axes(images.shape)}")
    if images.dtype != np.uint8:
        raise DataError(f"{what} must be uint8 in 0..255, got {images.dtype}{_conversion(images)}")
    return images


def _other_axes(shape: tuple[int, ...]) -> str:
    if len(shape) == 4 and shape[1] in (1, 3):
        return ": put the channels last with .transpose(0, 2, 3, 1)"
    if len(shape) == 4 and shape[3] in (2, 4):
        return ": the last channel is transparency, put the image on a background"
    return ""


def _conversion(images: NDArray[Any]) -> str:
    """How to make bytes of other numbers, as their range tells."""
    if images.dtype.kind not in "iufb" or not images.size:
        return ""
    low, high = float(images.min()), float(images.max())
    if not np.isfinite([low, high]).all():
        return ", some of them NaN or infinite: mend these first"
    span = f" from {low:g} to {high:g}"
    if images.dtype.kind == "b":
        return ": convert them with images.astype(np.uint8) * 255"
    if images.dtype.kind == "f" and low >= 0 and high <= UNIT:
        cut = ".clip(0, 1)" if high > 1 else ""
        return f"{span}: convert them with (images{cut} * 255).round().astype(np.uint8)"
    if images.dtype.kind == "f" and low >= 0 and high < BYTES:
        return f"{span}, which is neither 0..1 nor 0..255: clip or scale them to one of these"
    if images.dtype.kind == "f" and low >= -1 and high <= 1:
        return f"{span}: if they stand for -1..1, convert them with ((images + 1) * 127.5).round().astype(np.uint8)"
    if low >= 0 and high <= 255:
        return f"{span}: convert them with images.round().astype(np.uint8)"
    white = "65535" if images.dtype == np.uint16 else "white"
    other = " (65535, or what the camera has for white)" if images.dtype == np.uint16 else ", where white is the brightest value"
    return f"{span}: convert them with (images.clip(0) * (255 / {white})).round().astype(np.uint8){other}"


def first_per_class(labels: IntArray, count: int | None, domains: IntArray | None = None) -> IntArray:
    """Positions of the first `count` samples of every class (all if null), in the order of the data; of every class in every
    domain where `domains` are given."""
    if count is None:
        return np.arange(len(labels))
    if domains is not None:
        labels = labels * (1 + int(domains.max(initial=0))) + domains
    order = np.argsort(labels, kind="stable")
    rank = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
    return np.sort(order[rank < count])


def subset(split: ArraySplit, positions: IntArray) -> ArraySplit:
    """The split with these samples only; the split itself when that is all of them."""
    if len(positions) == len(split):
        return split
    inputs = {name: array[positions] for name, array in split.inputs.items()}
    return ArraySplit(inputs, split.labels[positions], None if split.domains is None else split.domains[positions])
