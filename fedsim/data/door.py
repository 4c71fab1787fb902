"""The door that every data set passes, a user's own too: what a source promises, and what must be said of its classes."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.core import config as configs
from fedsim.core.config import SimConfig
from fedsim.core.contracts import ArraySplit, Dataset, Source
from fedsim.core.errors import DataError, PluginError, named
from fedsim.data import held_out, streams
from fedsim.data.manifest import Manifest
from fedsim.data.sources import _common


def load(config: SimConfig, tokenizer_of: str | None = None) -> Dataset:
    """The data of a config, checked, its test samples held-out ones where `stream.validation` asks for that. Raises PluginError
    for a source that breaks its contract, DataError for data that do."""
    source: Source = configs.build("sources", config.data)
    name, by_domain = f"data source '{config.data['source']}'", config.stream.name == "domain_incremental"
    return held_out.validation(taken(source, name, tokenizer_of, by_domain), config.stream.validation)


def taken(source: Source, name: str, tokenizer_of: str | None, by_domain: bool) -> Dataset:
    """What a source loads, checked. name: how errors call it."""
    if "by_domain" not in inspect.signature(source.load).parameters:
        raise PluginError(f"{name}: its load must take (tokenizer_of, by_domain), see fedsim.core.contracts.Source")
    dataset = source.load(tokenizer_of, by_domain=by_domain)
    if not isinstance(dataset, Dataset):
        raise PluginError(f"{name}: its load gave a {type(dataset).__name__}, it must give a Dataset")
    return checked(dataset, name)


def checked(dataset: Dataset, source: str) -> Dataset:
    """The data set, its labels and domains int64. Raises DataError where it is not what `Dataset` promises."""
    _check_names("class", dataset.class_names, source)
    _check_names("domain", dataset.domain_names, source)
    splits = {
        what: _checked_split(split, dataset, f"{source}: {what}")
        for what, split in (("training", dataset.train), ("test", dataset.test))
    }
    train, test = ({n: a.shape[1:] for n, a in split.inputs.items()} for split in splits.values())
    if train != test:
        raise DataError(
            f"{source}: training inputs are {_shapes(train)} and test inputs {_shapes(test)}: both splits need one size"
        )
    groups = {
        name: _common.check_ids(
            ids, len(dataset.class_names), len(dataset.group_names.get(name, ())), f"{source}: groups '{name}'"
        )
        for name, ids in dataset.groups.items()
    }
    return replace(dataset, train=splits["training"], test=splits["test"], groups=groups)


def notes(dataset: Dataset, manifest: Manifest) -> tuple[str, ...]:
    """What whoever reads the numbers has to know of the data: what its source says, classes that are left out because there is
    nothing of them, classes that are never tested, and names that are nearly the same."""
    trained, tested = (streams.occurring(split.labels, dataset) for split in (dataset.train, dataset.test))
    names = dataset.class_names
    said = list(dataset.notes)
    if empty := [names[c] for c in np.flatnonzero(~trained & ~tested)]:
        said.append(f"{named('class', empty)}: no samples, left out of head and averages")
    if untested := [names[c] for c in manifest.class_order if trained[c] and not tested[c]]:
        said.append(f"{named('class', untested)}: training samples but no test samples, learned and never tested")
    folded: dict[str, str] = {}
    for name in names:
        if (other := folded.setdefault(name.casefold(), name)) != name:
            said.append(f"classes '{other}' and '{name}' differ in case only, and are two classes")
            break
    if flipped := len(manifest.flips.positions):
        said.append(
            f"label noise: {flipped} of {len(manifest.shard_indices)} training labels are wrong on purpose, no test label is"
        )
    return tuple(said)


def _check_names(what: str, names: tuple[str, ...], source: str) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str):
            raise DataError(f"{source}: {what} names must be strings, got {name!r}")
        plain = " ".join(name.split())
        if plain in seen:
            how = "are the same" if seen[plain] == name else "differ in blanks only"
            raise DataError(f"{source}: {named(what, [seen[plain], name])} {how}: make them one")
        seen[plain] = name


def _checked_split(split: ArraySplit, dataset: Dataset, what: str) -> ArraySplit:
    if not len(split):
        raise DataError(f"{what} split: it holds no samples")
    labels = _common.check_ids(np.asarray(split.labels), len(split), len(dataset.class_names), f"{what} labels")
    domains = split.domains
    if dataset.domain_names:
        if domains is None:
            raise DataError(f"{what} samples have no domains, but the data names some: give the domain of every sample")
        domains = _common.check_ids(np.asarray(domains), len(split), len(dataset.domain_names), f"{what} domains")
    for name, array in split.inputs.items():
        if len(array) != len(split):
            raise DataError(f"{what}: {len(array)} {name} for {len(split)} labels")
        _check_input(name, array, f"{what} {name}")
    return ArraySplit(split.inputs, labels, domains)


def _check_input(name: str, array: NDArray[Any], what: str) -> None:
    if name == "pixel_values":
        _common.check_images(array, what)
    elif array.dtype.kind not in "iu" or array.ndim != 2:
        raise DataError(f"{what} must be integers of shape (N, L), got {array.dtype} {array.shape}")


def _shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
