"""What a server offers and a node answers before it trains, as plain values, and what makes either say no. Knows no Flower."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsim.core.config import SimConfig
from fedsim.core.home import __version__
from fedsim.core.work import ArraySplit, WorkSpec

ANY = -1  # the client that a node is, where it leaves that to the server
MOST = 3  # keys that are named where configs differ
OF_THE_PLACE = ("name", "trackers", "runtime", "data", "manifest")  # keys of a config in which a node may differ


class Refused(Exception):
    """Why a node cannot take part, in one line."""


@dataclass(frozen=True)
class Offer:
    """What a server is about.

    config: the resolved config, with fingerprints in the place of paths of plug-in files (`files`); identity: of the run.
    classes: names in the order of the head's rows; task_classes: rows of every task; task_names.
    inputs: shape of one sample by the input's name, without the length of texts; split: hash of the manifest.
    client: what the node would be if it does not say; clients: how many there are.
    """

    fedsim: str
    config: Mapping[str, Any]
    files: Sequence[str]
    identity: str
    classes: Sequence[str]
    task_classes: Sequence[Sequence[int]]
    task_names: Sequence[str]
    inputs: Mapping[str, Sequence[int]]
    split: str
    clients: int
    client: int = ANY

    @staticmethod
    def of(spec: WorkSpec) -> Offer:
        """What the server of this run says."""
        config, files = told(spec.config)
        identity, inputs = spec.config.identity(), shapes(spec.train)
        rows = [list(map(int, rows)) for rows in spec.task_classes]
        names = list(spec.class_names), list(spec.task_names)
        return Offer(__version__, config, files, identity, names[0], rows, names[1], inputs, spec.split, spec.num_clients)


@dataclass(frozen=True)
class Answer:
    """What a node says of itself.

    refused: why it does not take part; all else counts for nothing then. client: which one it is; any: another one would do.
    split: hash of its manifest if it holds a shard of the config's split, "" if it has data of its own.
    counts: training samples per task, by class name. computes: where and with what ("cpu, onednn, torch 2.13.0").
    """

    fedsim: str = __version__
    refused: str = ""
    client: int = ANY
    any: bool = False
    split: str = ""
    counts: Sequence[Mapping[str, int]] = ()
    computes: str = ""

    @property
    def samples(self) -> int:
        """Of all tasks."""
        return sum(sum(of_task.values()) for of_task in self.counts)


def to_json(value: Offer | Answer) -> str:
    return json.dumps(dataclasses.asdict(value))


def offer_from(text: str) -> Offer:
    """Raises Refused for what another version of fedsim says."""
    said = _parsed(text)
    if said["fedsim"] != __version__:
        raise Refused(f"the server runs fedsim {said['fedsim']} and this node {__version__}: install the same on both")
    return Offer(**said)


def answer_from(text: str) -> Answer:
    """Raises Refused for what another version of fedsim says."""
    said = _parsed(text)
    if said["fedsim"] != __version__:
        raise Refused(f"the node runs fedsim {said['fedsim']} and this server {__version__}: install the same on both")
    return Answer(**said)


def _parsed(text: str) -> dict[str, Any]:
    said = json.loads(text)
    if not isinstance(said, dict) or not isinstance(said.get("fedsim"), str):
        raise Refused("what came is no message of fedsim")
    return said


def told(config: SimConfig) -> tuple[dict[str, Any], list[str]]:
    """A config as plain values with fingerprints in the place of the user's plug-in files, and those fingerprints."""
    said, files = json.dumps(config.to_dict()), config.fingerprints()
    for path, known in files.items():
        said = said.replace(json.dumps(path), json.dumps(known))
    plain: dict[str, Any] = json.loads(said)
    return plain, sorted(files.values())


def require_same(here: SimConfig, there: Mapping[str, Any]) -> None:
    """Raise Refused, naming some keys, when a node's config is another than the server's, where it matters."""
    mine, theirs = ({k: v for k, v in c.items() if k not in OF_THE_PLACE} for c in (told(here)[0], there))
    wrong = list(_differences(mine, theirs, ""))
    if wrong:
        more = f" and {len(wrong) - MOST} more" if len(wrong) > MOST else ""
        raise Refused(f"this node's config is another than the server's: {'; '.join(wrong[:MOST])}{more}")


def _differences(mine: Any, theirs: Any, where: str) -> Iterator[str]:
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        for key in dict.fromkeys([*mine, *theirs]):
            yield from _differences(mine.get(key), theirs.get(key), f"{where}.{key}" if where else str(key))
    elif mine != theirs:
        yield f"{where} is {mine!r} here, {theirs!r} at the server"


def computes(config: SimConfig) -> str:
    """What moves bits of a place: device, kernels, version of torch."""
    return f"{config.runtime.device}, {config.runtime.kernels} kernels, torch {torch.__version__}"


def shapes(split: ArraySplit) -> dict[str, list[int]]:
    """Of one sample, by the input's name: (H, W) or (H, W, channels) of images; of texts, which may have any length, only that
    they are there."""
    return {n: list(a.shape[1:]) if n == "pixel_values" else [] for n, a in sorted(split.inputs.items())}


def require_inputs(train: ArraySplit, offer: Offer) -> None:
    """Raise Refused for samples of another kind or form than the server's."""
    mine, theirs = shapes(train), {n: list(s) for n, s in offer.inputs.items()}
    if mine == theirs:
        return
    if set(mine) != set(theirs):
        raise Refused(f"this node's samples hold {', '.join(mine)}, the server's {', '.join(sorted(theirs))}")
    here, there = ("×".join(map(str, s["pixel_values"])) for s in (mine, theirs))
    raise Refused(f"this node's images are {here}, the server's {there} (height × width × channels): convert them")


def counts(spec: WorkSpec, client: int, classes: Sequence[str]) -> list[dict[str, int]]:
    """Training samples of a client per task, by class name."""
    found = []
    for task in range(len(spec.task_classes)):
        rows, numbers = np.unique(spec.train.labels[spec.shard(task, client)], return_counts=True)
        found.append({classes[row]: int(n) for row, n in zip(rows, numbers, strict=True)})
    return found


def memory_folder(parent: Path, offer: Offer, client: int) -> Path:
    """Where a node keeps what this client of this run remembers. Raises Refused for an identity that is none."""
    if len(offer.identity) != 64 or set(offer.identity) - set("0123456789abcdef"):
        raise Refused("the server's identity is none that a config has")
    return parent / f"{offer.identity[:16]}-client-{client}"
