"""Data that a script or notebook holds, as a data section: kept as a file that the sources `npz` and `text` read.

The file is named by what it holds (`fedsim.core.content`), so that a run of the same arrays is the same run, and one that was
stopped finds them again. Images take a byte per value and channel there, as in memory as uint8; nothing is compressed.

Shape suffixes: N samples.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.core import content
from fedsim.core.errors import ConfigError, DataError, did_you_mean
from fedsim.core.files import storage_errors, write_atomic
from fedsim.core.numbers import IntArray
from fedsim.data import held_out
from fedsim.data.sources import _common

Array = NDArray[Any]
AT_ONCE = 1024  # images that are looked at in float64
EXACT = 1e-3  # of a level of 256: how far a float may be from one to be the same


def section(
    data: Any,
    folder: Path,
    test: Any = None,
    test_share: float = 0.2,
    class_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Keep (inputs, labels) in a file in `folder`, and give the data section that reads it.

    data, test: each a pair. Inputs are images, (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels, uint8, or floats in
        0..1 or 0..255 (numpy or torch), or a list of texts. Labels are integers or strings, (N,).
    test_share: without `test`, this share of every class is kept for testing (at least one sample, of a class of two or more),
        drawn at random, the same whatever the seed.
    class_names: integers index them, strings must be among them; None: the distinct labels are the classes, sorted.
    Raises DataError, in one line, and StorageError.
    """
    pairs = {"data": _pair(data, "data")} | ({} if test is None else {"test": _pair(test, "test")})
    named = None if class_names is None else _names(class_names)
    labels = {what: _labels(pair[1], f"{what}: labels") for what, pair in pairs.items()}
    inputs = {what: _inputs(pair[0], what, len(labels[what])) for what, pair in pairs.items()}
    if len({type(one) for one in inputs.values()}) > 1:
        raise DataError("data and test must be of one kind: images are arrays, texts are lists of strings")
    names, ids = _common.numbered({f"{what}: labels": _known(of, named, what) for what, of in labels.items()}, named)
    are_texts = isinstance(inputs["data"], list)
    plain, lost = (inputs, []) if are_texts else _as_bytes(inputs)
    if test is None:
        held_N, held_out = _held_out(ids[0], test_share)
        splits = [(_some(plain["data"], place), ids[0][place]) for place in (~held_N, held_N)]
    else:
        splits, held_out = list(zip(plain.values(), ids, strict=True)), []
    notes = [*_gaps(labels, named), *lost, *held_out]
    write = _write_texts if are_texts else _write_images
    return write(folder, splits[0], splits[1], names, notes)


def _pair(pair: Any, what: str) -> tuple[Any, Any]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise DataError(f"{what} must be (images, labels) or (texts, labels), got {_kind(pair)}")
    return pair[0], pair[1]


def _plain(values: Any) -> Any:
    """What numpy can take: a torch tensor is brought to the CPU."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else values


def _labels(values: Any, what: str) -> Array:
    """Integers or strings (N,)."""
    values = _plain(values)
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise DataError(f"{what} must be a list or an array with one for each sample, got {_kind(values)}")
    found = values if isinstance(values, np.ndarray) and values.dtype != object else _listed(values, what)
    if found.ndim != 1:
        _common.check_one_each(found, len(found) if found.ndim else 0, what)
    if found.dtype.kind == "f" and np.isnan(found).any():
        raise DataError(f"{what}: none at position {int(np.isnan(found).argmax())} (NaN): leave out samples without a label")
    if not len(found):
        raise DataError(f"{what}: there are none")
    return found


def _listed(values: Any, what: str) -> Array:
    """Labels one by one, as a list or the column of a frame has them."""
    items = [label.item() if hasattr(label, "item") else label for label in values]
    for i, label in enumerate(items):
        if label is None or label != label:  # NaN
            raise DataError(f"{what}: none at position {i} ({label}): leave out samples without a label")
        if not isinstance(label, str | int):
            raise DataError(f"{what} must be integers or strings, got {_kind(label)} at position {i}")
    if len({isinstance(label, str) for label in items}) > 1:
        raise DataError(f"{what} must be of one kind, but some are integers and some are strings")
    return np.array(items)


def _names(class_names: Any) -> tuple[str, ...]:
    names = None if isinstance(class_names, str) else list(class_names)
    if names is None or not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"class_names must be a list of strings, got {class_names!r}")
    return tuple(names)


def _known(labels: Array, names: Sequence[str] | None, what: str) -> Array:
    """The labels; raises DataError for a string that is none of the names."""
    if names is not None and labels.dtype.kind in "US":
        unknown = np.flatnonzero(~np.isin(labels, names))
        if len(unknown):
            label, more = str(labels[unknown[0]]), f" ({len(unknown)} samples have such labels)" if len(unknown) > 1 else ""
            raise DataError(
                f"{what}: label '{label}' at position {unknown[0]} is not in class_names{more}.{did_you_mean(label, names)}"
            )
    return labels


def _gaps(labels: Mapping[str, Array], names: Sequence[str] | None) -> list[str]:
    """What is said of numbers that are not 0, 1, 2, …"""
    numbers = np.unique(np.concatenate(list(labels.values())))
    if names is not None or numbers.dtype.kind not in "iu" or np.array_equal(numbers, np.arange(len(numbers))):
        return []
    return [f"labels are {len(numbers)} different numbers between {numbers[0]} and {numbers[-1]}: each is a class"]


def _inputs(values: Any, what: str, count: int) -> Any:
    """Texts as a list, images as an array with the channels last; as many as there are labels."""
    plain = _plain(values)
    if isinstance(plain, str) or not hasattr(plain, "__len__"):
        raise DataError(f"{what}: images must be an array and texts a list of strings, got {_kind(values)}")
    if len(plain) != count:
        raise DataError(f"{what}: {len(plain)} images or texts for {count} labels: give a label to each")
    if any(isinstance(one, str) for one in plain[:1]):
        return _texts(list(plain), what)
    try:
        images = np.asarray(plain)
    except ValueError as e:  # of unequal sizes
        raise DataError(f"{what}: images must have one size: resize them before") from e
    if images.dtype.kind not in "uifb":
        raise DataError(f"{what}: images must be numbers and texts strings, got {images.dtype} {images.shape}")
    return _channels_last(images, f"{what}: images")


def _texts(texts: list[Any], what: str) -> list[str]:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"{what}: text {i} must be a string, got {_kind(text)}")
    return [str(text) for text in texts]


def _channels_last(images: Array, what: str) -> Array:
    if images.ndim == 4 and images.shape[1] in (1, 3):
        if images.shape[3] in (1, 3):
            raise DataError(f"{what} of shape {images.shape} may have their channels first or last: give them as (N, H, W)")
        images = images.transpose(0, 2, 3, 1)
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise DataError(f"{what} must have shape (N, H, W), (N, H, W, C) or (N, C, H, W) with C of 1 or 3, got {images.shape}")
    return images


def _as_bytes(images: Mapping[str, Array]) -> tuple[dict[str, Array], list[str]]:
    """Images as uint8, and what that changed; training and test images by the same rule."""
    if len({of.dtype for of in images.values()}) > 1:
        told = " and ".join(f"{what} {of.dtype}" for what, of in images.items())
        raise DataError(f"images of data and test must be of one type, got {told}: convert one of them")
    for what, of in images.items():
        if of.dtype.kind == "f" and not np.isfinite(of).all():
            wrong = np.flatnonzero(~np.isfinite(of).reshape(len(of), -1).all(axis=1))
            raise DataError(
                f"{what}: {len(wrong)} of {len(of)} images hold NaN or infinite values, the first at position {wrong[0]}: "
                "mend them or leave them out"
            )
    if next(iter(images.values())).dtype == np.uint8:
        return dict(images), []
    low, high = min(float(of.min()) for of in images.values()), max(float(of.max()) for of in images.values())
    kind = next(iter(images.values())).dtype.kind
    unit = kind == "b" or (kind == "f" and high <= _common.UNIT)
    if low < 0 or high > 255 or (kind == "f" and not unit and high < _common.BYTES):
        for what, of in images.items():  # says how to convert what has this range
            _common.check_images(of, f"{what}: images")
    lost, made = False, {what: np.empty(of.shape, dtype=np.uint8) for what, of in images.items()}
    for what, of in images.items():
        for start in range(0, len(of), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            levels = of[some].clip(max=1) * np.float64(255) if unit else of[some] * np.float64(1)
            made[what][some] = levels.round()
            lost = lost or bool((np.abs(levels - made[what][some]) > EXACT).any())
    return made, [f"images of {_range(low, high)} are rounded to 256 levels"] if lost else []


def _range(low: float, high: float) -> str:
    return f"numbers from {low:g} to {high:g}"


def _held_out(labels: IntArray, share: float) -> tuple[NDArray[np.bool_], list[str]]:
    """Which samples are kept for testing (N,), and the line that says so."""
    if not isinstance(share, int | float) or not 0 < share < 1:
        raise ConfigError(f"test_share must be between 0 and 1, got {share!r}")
    kept_N = held_out.of_every_group(labels, share, "test_share")
    if not kept_N.any():
        raise DataError("no class has two samples, so that none can be kept for testing: give test=(images, labels)")
    held = f"{share:.0%} of every class, {int(kept_N.sum())} of {len(labels)} samples, are held out"
    return kept_N, [f"no test data were given: {held}"]


def _some(values: Any, chosen_N: NDArray[np.bool_]) -> Any:
    return values[chosen_N] if isinstance(values, np.ndarray) else [v for v, there in zip(values, chosen_N, strict=True) if there]


def _write_images(folder: Path, train: Any, test: Any, names: Sequence[str], notes: list[str]) -> dict[str, Any]:
    arrays = {
        "train_images": np.ascontiguousarray(train[0]),
        "train_labels": train[1],
        "test_images": np.ascontiguousarray(test[0]),
        "test_labels": test[1],
        "class_names": np.array(names, dtype=np.str_),
        "notes": np.array(notes, dtype=np.str_),
    }
    path = _place(folder, content.name("arrays", _parts(arrays), ".npz"))
    if not _is_whole(path):
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_atomic(path, buffer.getbuffer(), "free some space, or choose another folder by runtime.output")
    return {"source": "npz", "path": str(path)}


def _write_texts(folder: Path, train: Any, test: Any, names: Sequence[str], notes: list[str]) -> dict[str, Any]:
    told: dict[str, Any] = {
        split: [[text, names[i]] for text, i in zip(texts, ids.tolist(), strict=True)]
        for split, (texts, ids) in (("train", train), ("test", test))
    }
    body = json.dumps({**told, "class_names": list(names), "notes": notes}, ensure_ascii=False).encode()
    path = _place(folder, content.name("texts", [body], ".json"))
    if not path.is_file() or path.read_bytes() != body:
        write_atomic(path, body, "free some space, or choose another folder by runtime.output")
    return {"source": "text", "path": str(path)}


def _parts(arrays: Mapping[str, Array]) -> Iterator[bytes | memoryview]:
    for name, array in arrays.items():
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        yield f"{name} {little.dtype.str} {little.shape}".encode()
        yield little.reshape(-1).view(np.uint8).data if array.size else b""


def _place(folder: Path, name: str) -> Path:
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder.absolute() / name


def _is_whole(path: Path) -> bool:
    """Whether the file is there and holds what its name says."""
    if not path.is_file():
        return False
    try:
        return content.name("arrays", _parts(_common.read_npz(path)), ".npz") == path.name
    except DataError:
        return False


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__}{'' if shape is None else f' of shape {tuple(shape)}'}"
