"""Sources that are broken on purpose are caught, each by the law that it breaks; those that read files keep the laws."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim import laws
from fedsim.core import contracts
from fedsim.core.contracts import ArraySplit, Dataset
from fedsim.data.sources.synthetic import Source as Synthetic
from tests.laws.one import against

KEPT = Synthetic(classes=3, train_per_class=4, test_per_class=2).load()


@dataclass(frozen=True)
class Changed(contracts.Source):
    """Synthetic data, but for one thing."""

    what: str = ""

    def load(self, tokenizer_of: str | None = None, by_domain: bool = False) -> Dataset:
        good = Synthetic(classes=3, train_per_class=4, test_per_class=2).load()
        train, labels = good.train, good.train.labels
        domains = np.zeros(len(labels), dtype=np.int64)
        if self.what == "labels":
            return replace(good, train=replace(train, labels=labels + 7))
        if self.what == "nameless":
            return replace(good, train=replace(train, domains=domains))
        if self.what == "unseen":
            tested = replace(good.test, domains=np.zeros(len(good.test), dtype=np.int64))
            return replace(good, train=replace(train, domains=domains), test=tested, domain_names=("a", "b"))
        if self.what == "apart":
            keep = labels == 0
            return replace(good, train=ArraySplit({"pixel_values": train.inputs["pixel_values"][keep]}, labels[keep]),
                           test=replace(good.test, labels=np.full(len(good.test), 1)))  # fmt: skip
        if self.what == "noise":
            return replace(good, notes=(str(np.random.default_rng().random()),))
        if self.what == "cached":
            return KEPT
        if self.what == "seeding":
            np.random.seed(0)  # noqa: NPY002 - that is what it does wrong
        return good


def broken(source: contracts.Source) -> dict[str, str]:
    return {r.name: r.explanation for r in laws.check("sources", source) if not r.ok}


@pytest.mark.parametrize(
    ("what", "law", "says"),
    [
        ("labels", "door", "data source: training labels"),
        ("nameless", "domains", "training samples have domains, but domain_names is empty"),
        ("unseen", "domains", "domain 'b' has no training samples"),
        ("apart", "learnable", "no class has both training and test samples"),
        ("noise", "deterministic", "'notes' differs when the data is loaded again"),
        ("cached", "own_copy", "hand out copies"),
        ("seeding", "global_state", "use one of its own"),
    ],
)
def test_broken_one_is_caught_by_its_law(what: str, law: str, says: str) -> None:
    told = against("sources", Changed(what), law)
    assert re.search(says, told), told


def test_a_good_one_keeps_all() -> None:
    assert broken(Changed()) == {}


@pytest.mark.parametrize("name", ["npz", "text"])
def test_sources_of_the_users_files(name: str, tmp_path: Path) -> None:
    """Text is tokenised by a tokenizer that the laws bring along."""
    options: dict[str, Any] = {"path": str(tmp_path / "data.npz")}
    if name == "text":
        pairs = [["a word", "x"], ["two words", "y"]]
        options = {"path": str(tmp_path / "data.json")}
        (tmp_path / "data.json").write_text(json.dumps({"train": pairs, "test": pairs}))
    else:
        images, labels = np.zeros((4, 8, 8), dtype=np.uint8), np.array([0, 1, 0, 1])
        np.savez(options["path"], train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    assert [(r.name, r.explanation) for r in laws.check_named("sources", name, options) if not r.ok] == []
