"""Whether the data of a run fit its backbone: every sample that is trained on or tested, before any is."""

# N samples, L tokens, C channels

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.core.contracts import ArraySplit, IntArray
from fedsim.core.errors import DataError
from fedsim.core.work import WorkSpec
from fedsim.models.backbone import Backbone


def require(backbone: Backbone, name: str, spec: WorkSpec, task_names: Sequence[str]) -> None:
    """Raise DataError if there is a sample that the backbone `name` cannot read: of another kind, of other channels, with more
    tokens than it has positions, or with a token that it does not know. Names the first such sample and its task."""
    splits = (
        ("training", spec.train, spec.shard_indices, spec.shard_offsets[:: spec.num_clients]),
        ("test", spec.test, spec.test_indices, spec.test_offsets),
    )
    for split, data, used, offsets in splits:
        _require_kind(backbone, name, data)
        if backbone.kind == "image":
            _require_channels(backbone, name, data.inputs["pixel_values"], split)
        elif (found := _wrong_tokens(backbone, data.inputs, used)) is not None:
            place, what = found
            task = int(np.searchsorted(offsets, place, side="right")) - 1
            raise DataError(f"{what.format(name=name)} ({split} sample {used[place]}, of task {task} '{task_names[task]}')")


def _require_kind(backbone: Backbone, name: str, data: ArraySplit) -> None:
    wanted, other = ("pixel_values", "input_ids") if backbone.kind == "image" else ("input_ids", "pixel_values")
    if wanted in data.inputs:
        return
    kinds = {"pixel_values": "images", "input_ids": "texts"}
    held = kinds[other] if other in data.inputs else ", ".join(data.inputs) or "nothing"
    raise DataError(
        f"the data hold {held}, but model.backbone {name} reads {kinds[wanted]}: choose another backbone, or other data"
    )


def _require_channels(backbone: Backbone, name: str, pixels: NDArray[Any], split: str) -> None:
    channels, shape = backbone.num_channels, pixels.shape[1:]
    if min(shape, default=0) > 0 and (len(shape) == 2 or (len(shape) == 3 and shape[-1] in (1, channels))):
        return
    got = f"{shape[-1]} channels" if len(shape) == 3 else f"shape {shape}"
    raise DataError(
        f"images of {got} do not fit model.backbone {name} of {channels} channel(s) ({split} split): expected uint8 "
        f"(N, H, W), grey, or (N, H, W, {channels}); convert them, or choose another backbone"
    )


def _wrong_tokens(backbone: Backbone, inputs: Mapping[str, NDArray[Any]], used: IntArray) -> tuple[int, str] | None:
    """The place among `used` of a text, and what is wrong with it."""
    ids_NL = inputs["input_ids"]
    mask_NL = inputs["attention_mask"] if "attention_mask" in inputs else np.ones_like(ids_NL, dtype=np.bool_)
    positions, vocabulary = backbone.positions, backbone.vocabulary
    if positions is not None and mask_NL[:, positions:].any():
        long_N = _rows_with(mask_NL[:, positions:])
        if long_N[used].any():
            tokens = 1 + int(np.flatnonzero(mask_NL[used][long_N[used]].any(axis=0)).max())
            return _first(long_N, used), (
                f"texts of up to {tokens} tokens do not fit the {positions} positions of model.backbone {{name}}: "
                f"cut them (data.max_length: {positions}), or choose another backbone"
            )
    read_NL = ids_NL[:, : 1 + int(np.flatnonzero(mask_NL.any(axis=0)).max(initial=0))]  # beyond is padding, which is left out
    if read_NL.min(initial=0) < 0 or (vocabulary is not None and read_NL.max(initial=0) >= vocabulary):
        wrong_NL = (read_NL < 0) | (read_NL >= (vocabulary or np.inf))
        wrong_N = _rows_with(wrong_NL)
        if wrong_N[used].any():
            place = _first(wrong_N, used)
            token = int(read_NL[used[place]][wrong_NL[used[place]]][0])
            known = "is negative" if vocabulary is None else f"is not among the {vocabulary} (0 to {vocabulary - 1})"
            return place, f"token id {token} {known} of model.backbone {{name}}: make the token ids with its own tokenizer"
    return None


def _rows_with(x_NL: NDArray[Any]) -> NDArray[np.bool_]:
    found_N: NDArray[np.bool_] = np.asarray(x_NL.any(axis=1))
    return found_N


def _first(wrong_N: NDArray[np.bool_], used: IntArray) -> int:
    return int(np.flatnonzero(wrong_N[used])[0])
