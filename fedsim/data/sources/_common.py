"""What the sources share: reading files with one clear line on failure, and checks of arrays."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.core.contracts import ArraySplit, IntArray
from fedsim.core.errors import ConfigError, DataError

Arrays = Mapping[str, NDArray[Any]]


def at_least_one(**values: int | None) -> None:
    """Raise ConfigError for an option below 1 (null is allowed)."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")


def existing(path: str, what: str) -> Path:
    """The path of a file. Raises DataError when it is not there."""
    found = Path(path).expanduser()
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


def take(arrays: Arrays, key: str, path: Path) -> NDArray[Any]:
    """One array. Raises DataError that lists what there is."""
    if key not in arrays:
        raise DataError(f"{path} holds no '{key}' (it holds: {', '.join(sorted(arrays))})")
    return arrays[key]


def check_ids(ids: NDArray[Any], length: int, limit: int, what: str) -> IntArray:
    """Integers in 0..limit-1, one per sample (or class), as int64. Raises DataError."""
    if ids.ndim != 1 or len(ids) != length:
        raise DataError(f"{what} must have shape ({length},), got {ids.shape}")
    if not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"{what} must be integers, got {ids.dtype}")
    wrong = np.flatnonzero((ids < 0) | (ids.astype(np.int64) >= limit))
    if len(wrong):
        raise DataError(f"{what} must be in 0..{limit - 1}, got {ids[wrong[0]]} at position {wrong[0]}")
    return ids.astype(np.int64)


def check_images(images: NDArray[Any], what: str) -> NDArray[np.uint8]:
    """uint8 images (N, H, W) or (N, H, W, C) with 1 or 3 channels. Raises DataError."""
    if images.dtype != np.uint8:
        raise DataError(f"{what} must be uint8 in 0..255, got {images.dtype}")
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise DataError(f"{what} must have shape (N, H, W) or (N, H, W, 1 or 3), got {images.shape}")
    return images


def first_per_class(labels: IntArray, count: int | None) -> IntArray:
    """Positions of the first `count` samples of every class (all if null), in the order of the data."""
    if count is None:
        return np.arange(len(labels))
    order = np.argsort(labels, kind="stable")
    rank = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
    return np.sort(order[rank < count])


def subset(split: ArraySplit, positions: IntArray) -> ArraySplit:
    """The split with these samples only; the split itself when that is all of them."""
    if len(positions) == len(split):
        return split
    inputs = {name: array[positions] for name, array in split.inputs.items()}
    return ArraySplit(inputs, split.labels[positions], None if split.domains is None else split.domains[positions])
