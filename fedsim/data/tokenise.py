"""Text to token arrays, with the tokenizer of the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.core import hub
from fedsim.core.contracts import IntArray
from fedsim.core.errors import DataError


def tokenise(
    splits: Sequence[Sequence[str]], tokenizer_of: str | None, max_length: int
) -> tuple[list[dict[str, IntArray]], tuple[str, ...]]:
    """`input_ids` and `attention_mask` (N, L) int64 of every split; L is the longest text of all, at most `max_length` tokens.
    And lines that say how many texts were cut, or hold nothing.

    tokenizer_of: hub id or folder of the backbone. Truncation and padding that a `tokenizer.json` may ship with are not used:
    texts are cut at `max_length` (special tokens counted) and padded on the right.
    Raises DataError when there is no tokenizer or it does not load, and for a text of which no token is left.
    """
    tokenizer = _load(tokenizer_of)
    encoded = [_encode(tokenizer, texts, max_length) for texts in splits]
    notes = []
    full = [text for texts, split in zip(splits, encoded, strict=True) for text, ids in zip(texts, split, strict=True)
            if len(ids) == max_length]  # fmt: skip
    total = sum(map(len, splits))
    if cut := sum(len(ids) > max_length for ids in _encode(tokenizer, full, None)):
        notes.append(f"{cut} of {total} texts are longer than data.max_length, {max_length} tokens, and are cut there")
    if blank := sum(not text.strip() for texts in splits for text in texts):
        notes.append(f"{blank} of {total} texts are blank")
    length = max((len(ids) for split in encoded for ids in split), default=0)
    pad = tokenizer.pad_token_id
    return [_pad(split, length, 0 if pad is None else int(pad)) for split in encoded], tuple(notes)


def _load(tokenizer_of: str | None) -> Any:
    if tokenizer_of is None:
        raise DataError("data of text needs a tokenizer: set model.backbone to a text model (hub id or folder)")
    from transformers import AutoTokenizer  # takes a second, and only text needs it

    try:
        with nullcontext("") if Path(tokenizer_of).is_dir() else hub.reached() as unreachable:
            return AutoTokenizer.from_pretrained(tokenizer_of)
    except Exception as e:  # transformers raises OSError, ValueError, KeyError, or the hub client's own errors
        reason = f"it is not cached, and the hub is not there ({unreachable})" if unreachable else " ".join(str(e).split())[:300]
        raise DataError(f"no tokenizer loads from {tokenizer_of}: {reason} (set model.backbone to a text model)") from e


def _encode(tokenizer: Any, texts: Sequence[str], max_length: int | None) -> list[list[int]]:
    if not texts:
        return []
    # both said on every call: this also overrides what a tokenizer.json ships with
    cut = {"truncation": max_length is not None, "max_length": max_length, "padding": False}
    ids: list[list[int]] = tokenizer(list(texts), **cut, verbose=False)["input_ids"]
    for text, of_text in zip(texts, ids, strict=True):
        if not of_text:
            raise DataError(f"the tokenizer makes no token of the text {text[:40]!r}: leave it out of the data")
    return ids


def _pad(encoded: list[list[int]], length: int, pad: int) -> dict[str, IntArray]:
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
    mask = np.arange(length)[None, :] < lengths[:, None]
    input_ids = np.full((len(encoded), length), pad, dtype=np.int64)
    input_ids[mask] = np.fromiter((i for ids in encoded for i in ids), dtype=np.int64, count=int(lengths.sum()))
    return {"input_ids": input_ids, "attention_mask": mask.astype(np.int64)}
