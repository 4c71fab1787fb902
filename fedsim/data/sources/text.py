"""Labelled texts in JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.core import contracts
from fedsim.core.contracts import ArraySplit, Dataset
from fedsim.core.errors import DataError, did_you_mean
from fedsim.data.sources import _common
from fedsim.data.tokenise import tokenise

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Source(contracts.Source):
    """Texts and labels, tokenised by the backbone's own tokenizer (`model.backbone` must be a text model).

    path: JSON, either {"train": [...], "test": [...]}, or a list for training with `test_path` naming the other list. An item is
        [text, label] or {"text": ..., "label": ...}. A mapping may also hold "class_names", all of them in order, and "notes",
        lines that the results then say; other keys, such as val, are ignored.
    test_path: of the list of test texts.
    groups_path: JSON {group: [class names]}; the grouping is called "domain", and every class must be in one group.
    Classes are in the order of `groups_path` or "class_names" if given, else by first appearance in the training list. Texts that
        are cut or blank are said in the results.
    max_length: tokens per text at most; shorter data is padded only to its longest text.
    train_per_class: only the first n training texts of every class.
    """

    path: str
    test_path: str | None = None
    groups_path: str | None = None
    max_length: int = 64
    train_per_class: int | None = None

    def __post_init__(self) -> None:
        _common.at_least_one(max_length=self.max_length, train_per_class=self.train_per_class)

    def load(self, tokenizer_of: str | None = None, by_domain: bool = False) -> Dataset:
        train, test, more = self._read()
        grouping = _read_groups(self.groups_path) if self.groups_path is not None else None
        found = list(dict.fromkeys(label for _, label in [*train, *test]))
        names = _named(more["class_names"], found, self.path) if "class_names" in more else found
        if grouping is not None:
            names = _grouped_names(grouping, names, str(self.groups_path))
        ids = {name: i for i, name in enumerate(names)}
        labels = [np.array([ids[label] for _, label in pairs], dtype=np.int64) for pairs in (train, test)]
        kept = _common.first_per_class(labels[0], self.train_per_class)
        texts = [[train[i][0] for i in kept], [text for text, _ in test]]
        inputs, notes = tokenise(texts, tokenizer_of, self.max_length)
        groups = {} if grouping is None else {"domain": np.repeat(np.arange(len(grouping)), [len(g) for g in grouping.values()])}
        return Dataset(
            train=ArraySplit(inputs[0], labels[0][kept]),
            test=ArraySplit(inputs[1], labels[1]),
            class_names=tuple(names),
            groups=groups,
            group_names={} if grouping is None else {"domain": tuple(grouping)},
            notes=(*map(str, more.get("notes", ())), *notes),
        )

    def _read(self) -> tuple[Pairs, Pairs, Mapping[str, Any]]:
        """Both lists, and what else stands beside the training list."""
        content = _read_json(self.path)
        if self.test_path is not None:
            train = content.get("train") if isinstance(content, dict) else content
            other = _read_json(self.test_path)
            test = other.get("test") if isinstance(other, dict) else other
            more = content if isinstance(content, dict) else {}
            return _checked(train, self.path, "train"), _checked(test, self.test_path, "test"), more
        if not isinstance(content, dict):
            raise DataError(
                f"{self.path} holds one list: name the test list with data.test_path, or use {{'train': [...], 'test': [...]}}"
            )
        return _checked(content.get("train"), self.path, "train"), _checked(content.get("test"), self.path, "test"), content


def _read_json(path: str) -> Any:
    found = _common.existing(path, "JSON file")
    try:
        return json.loads(Path(found).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"{found} is not readable JSON: {' '.join(str(e).split())}") from e


def _checked(items: Any, path: str, split: str) -> Pairs:
    if not isinstance(items, list) or not items:
        raise DataError(f"{path} holds no list of '{split}' samples: expected [[text, label], ...]")
    return [_pair(item, f"{path}: {split} sample {i}") for i, item in enumerate(items)]


def _pair(item: Any, where: str) -> tuple[str, str]:
    if isinstance(item, dict) and "text" in item and "label" in item:
        item = [item["text"], item["label"]]
    if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], (str, int))):
        raise DataError(f"{where} must be [text, label] or {{'text': ..., 'label': ...}}, got {str(item)[:80]}")
    label = str(item[1])
    if label == "-1" or not label.strip():
        raise DataError(f"{where} has no label ({label!r}): leave it out")
    return item[0], label


def _named(names: Any, found: list[str], path: str) -> list[str]:
    """The class names that a file lists, each label of the samples among them."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: class_names must be a list of strings")
    for label in found:
        if label not in names:
            raise DataError(f"{path}: label '{label}' is not in its class_names.{did_you_mean(label, names)}")
    return names


def _read_groups(path: str) -> dict[str, list[str]]:
    content = _read_json(path)
    if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
        raise DataError(f"{path} must hold {{group: [class names]}}")
    return {str(group): [str(name) for name in names] for group, names in content.items()}


def _grouped_names(grouping: Mapping[str, list[str]], names: list[str], path: str) -> list[str]:
    """Class names in the order of the groups, which must hold every class exactly once."""
    ordered = [name for members in grouping.values() for name in members]
    for i, name in enumerate(ordered):
        if name not in names:
            raise DataError(f"{path} names class '{name}', which the data does not hold.{did_you_mean(name, names)}")
        if name in ordered[:i]:
            raise DataError(f"{path} names class '{name}' twice")
    for name in names:
        if name not in ordered:
            raise DataError(f"{path} has no group for class '{name}'")
    return ordered
