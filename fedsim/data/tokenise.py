"""Text to token arrays, with the tokenizer of the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedsim.core.contracts import IntArray
from fedsim.core.errors import DataError


def tokenise(splits: Sequence[Sequence[str]], tokenizer_of: str | None, max_length: int) -> list[dict[str, IntArray]]:
    """`input_ids` and `attention_mask` (N, L) int64 of every split; L is the longest text of all, at most `max_length` tokens.

    tokenizer_of: hub id or folder of the backbone. Truncation and padding that a `tokenizer.json` may ship with are not used:
    texts are cut at `max_length` (special tokens counted) and padded on the right.
    Raises DataError when there is no tokenizer or it does not load.
    """
    tokenizer = _load(tokenizer_of)
    encoded = [_encode(tokenizer, texts, max_length) for texts in splits]
    length = max((len(ids) for split in encoded for ids in split), default=0)
    pad = tokenizer.pad_token_id
    return [_pad(split, length, 0 if pad is None else int(pad)) for split in encoded]


def _load(tokenizer_of: str | None) -> Any:
    if tokenizer_of is None:
        raise DataError("data of text needs a tokenizer: set model.backbone to a text model (hub id or folder)")
    from transformers import AutoTokenizer  # takes a second, and only text needs it

    try:
        return AutoTokenizer.from_pretrained(tokenizer_of)
    except Exception as e:  # transformers raises OSError, ValueError, KeyError, or the hub client's own errors
        reason = " ".join(str(e).split())
        raise DataError(f"no tokenizer loads from {tokenizer_of}: {reason[:300]} (set model.backbone to a text model)") from e


def _encode(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    if not texts:
        return []
    # both said on every call: this also overrides what a tokenizer.json ships with
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length, padding=False)["input_ids"]
    return ids


def _pad(encoded: list[list[int]], length: int, pad: int) -> dict[str, IntArray]:
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
    mask = np.arange(length)[None, :] < lengths[:, None]
    input_ids = np.full((len(encoded), length), pad, dtype=np.int64)
    input_ids[mask] = np.fromiter((i for ids in encoded for i in ids), dtype=np.int64, count=int(lengths.sum()))
    return {"input_ids": input_ids, "attention_mask": mask.astype(np.int64)}
