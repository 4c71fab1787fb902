"""Whether finished runs can be merged: what they must have in common, and what is said where they do not."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.core.tensors import LORA_A, LORA_B, digest, with_prefix
from fedsim.finished import OpenedRun
from fedsim.models.model import ADAPTER
from server.merging import _products

APART = "a module per client"
FREE = ("rank", "alpha", "dropout", "targets")  # options of an adapter that may differ, if layers and scale are the same


def require(runs: Sequence[OpenedRun]) -> None:
    """Raise ConfigError, with both runs, unless all of them can be merged with the first.

    They need the same backbone (its weights, bit for bit), the same images or texts into it, an adapter of the same kind on the
    same layers, the same kind of head, the same classes in the same order (or the first of them) and the same test samples of
    these. Ranks of LoRA may differ.
    """
    first = runs[0]
    for run in runs:
        if APART in run.parts.rule.traits.gives:
            raise ConfigError(f"{run.dir.path} keeps a module per client and has no merged one: it cannot be merged with others")
    for other in runs[1:]:
        for what, of in _LOOKS.items():
            a, b = of(first), of(other)
            if a != b:
                raise ConfigError(f"{_both(first, other)} {what}{_shown(a, b)}: only models that agree there can be merged")
        _require_classes(first, other)
        _require_tests(first, other)


def _both(first: OpenedRun, other: OpenedRun) -> str:
    return f"{first.dir.path} and {other.dir.path} have different"


def _shown(a: Any, b: Any) -> str:
    """What differs, if it is short enough to be read."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = [k for k in {**a, **b} if a.get(k) != b.get(k)]
        told = ", ".join(f"{k} {a.get(k)} and {b.get(k)}" for k in keys[:2])
        return f" ({told})" if len(told) < 160 else f" ({', '.join(keys[:3])})"
    return ""


def _backbone(run: OpenedRun) -> dict[str, Any]:
    told = dataclasses.asdict(run.config.model)
    told.pop("backbone"), told.pop("config")  # the weights tell, wherever they lie
    weights, _, use = run.parts.model.backbone.digest.partition(".")
    return {"weights": weights[:12], "use": use, **told}


def _inputs(run: OpenedRun) -> dict[str, Any]:
    told = dataclasses.asdict(run.config.transform)
    told.pop("augment")
    return told


def _adapter(run: OpenedRun) -> dict[str, Any]:
    fixed = {k: v for k, v in run.config.adapter.items() if k not in FREE}
    return {**fixed, "scale": getattr(run.parts.model.adapter, "scale", None)}


def _layers(run: OpenedRun) -> dict[str, Any]:
    return shapes(with_prefix(run.parts.state.params, ADAPTER))


def shapes(module: Tensors) -> dict[str, tuple[int, ...]]:
    """Of the tensors that a merging rule sees of a module: of LoRA pairs, their product's."""
    return {
        name: tuple(module[name].shape) if layer is None else (len(module[layer + LORA_B]), module[layer + LORA_A].shape[1])
        for name, layer in _products.names(module).items()
    }


def _head(run: OpenedRun) -> dict[str, Any]:
    return {**run.config.head, "fixed tensors": digest(run.parts.model.fixed)[:12]}


_LOOKS = {
    "backbones": _backbone,
    "transforms of inputs": _inputs,
    "adapters": _adapter,
    "targets of their adapters": _layers,
    "heads": _head,
}


def _require_classes(first: OpenedRun, other: OpenedRun) -> None:
    a, b = first.parts.manifest, other.parts.manifest
    for names_a, names_b in ((a.class_order, b.class_order), (a.class_names, b.class_names)):
        common = min(len(names_a), len(names_b))
        differ = [c for c in range(common) if names_a[c] != names_b[c]]
        if differ:
            c = differ[0]
            raise ConfigError(
                f"{_both(first, other)} class orders (row {c} of the head is '{a.class_names[c]}' and '{b.class_names[c]}'): "
                "rows of their heads mean different classes"
            )


def _require_tests(first: OpenedRun, other: OpenedRun) -> None:
    """The same test samples of every class that both know."""
    a, b = _tests(first), _tests(other)
    for row in sorted(a.keys() & b.keys()):
        if a[row] != b[row]:
            name = first.parts.manifest.class_names[row]
            raise ConfigError(
                f"{_both(first, other)} test data (of class '{name}'): what one was tested on, the other may have been trained on"
            )


def _tests(run: OpenedRun) -> dict[int, str]:
    """Class -> digest of its test samples, in any order."""
    spec, found = run.parts.spec, dict[int, list[bytes]]()
    for position in sorted({int(p) for t in run.tasks for p in spec.test_of(t)}):
        sample = hashlib.sha256()
        for name, array in sorted(spec.test.inputs.items()):
            sample.update(name.encode() + np.ascontiguousarray(array[position]).tobytes())
        found.setdefault(int(spec.test.labels[position]), []).append(sample.digest())
    return {row: hashlib.sha256(b"".join(sorted(digests))).hexdigest() for row, digests in found.items()}
