"""The laws that every source of data keeps: what comes out passes the door of all data, and is the same every time.

A source is loaded with its own options, whole: what takes long to load takes long here. One that needs a tokenizer gets a small
one, of words it has never seen.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsim.core.contracts import Dataset, Source
from fedsim.core.errors import DataError
from fedsim.data import door
from fedsim.laws.comparing import same
from fedsim.laws.frame import Law, LawBroken


def loaded(source: Source, by_domain: bool = False) -> Dataset:
    """Its data, checked by the door."""
    try:
        return door.taken(source, "data source", None, by_domain)
    except DataError:
        with _tokenizer() as folder:
            return door.taken(source, "data source", folder, by_domain)


@contextmanager
def _tokenizer() -> Iterator[str]:
    """The folder of a tokenizer to which every word is unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with tempfile.TemporaryDirectory() as folder:
        words.save(str(Path(folder) / "tokenizer.json"))
        told = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
        yield folder


def _door(source: Source) -> None:
    loaded(source)


def _domains(source: Source) -> None:
    dataset = loaded(source, by_domain=True)
    for what, split in (("training", dataset.train), ("test", dataset.test)):
        if split.domains is not None and not dataset.domain_names:
            raise LawBroken(f"{what} samples have domains, but domain_names is empty: name them")
    held = set() if dataset.train.domains is None else set(dataset.train.domains.tolist())
    for d, name in enumerate(dataset.domain_names):
        if d not in held:
            raise LawBroken(f"domain '{name}' has no training samples")


def _learnable(source: Source) -> None:
    dataset = loaded(source)
    trained, tested = (set(split.labels.tolist()) for split in (dataset.train, dataset.test))
    if not trained & tested:
        raise LawBroken("no class has both training and test samples")


def _deterministic(source: Source) -> None:
    first, again = loaded(source), loaded(source)
    for part in ("train", "test", "class_names", "groups", "group_names", "domain_names", "notes"):
        if not same(getattr(first, part), getattr(again, part)):
            raise LawBroken(f"'{part}' differs when the data is loaded again: give draws a seed of their own")


def _own_copy(source: Source) -> None:
    first = loaded(source)
    before = deepcopy(dict(first.train.inputs))
    for array in first.train.inputs.values():
        if array.flags.writeable:
            array[...] = 0
    if not same(dict(loaded(source).train.inputs), before):
        raise LawBroken("inputs that a caller has changed come back changed when the data is loaded again: hand out copies")


def _global_state(source: Source) -> None:
    original = _states()
    try:
        random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002 - away from where a seed would put them
        before = _states()
        loaded(source)
        if not same(_states(), before):
            raise LawBroken("loading seeds or draws from a generator of the whole process: use one of its own")
    finally:
        random.setstate(original[0])
        np.random.set_state(original[1])  # noqa: NPY002
        torch.set_rng_state(original[2])


def _states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()  # noqa: NPY002


LAWS: tuple[Law[Source], ...] = (
    Law("door", "what is loaded is a data set as the contract says: shapes, types, labels, names, groups", _door),
    Law("domains", "where tasks are domains, samples have them, and each has training samples", _domains),
    Law("learnable", "there is a class with both training and test samples", _learnable),
    Law("deterministic", "loading again gives the same bits", _deterministic),
    Law("own_copy", "what a caller does to the arrays does not come back", _own_copy),
    Law("global_state", "generators of the whole process are left as they are", _global_state),
)
