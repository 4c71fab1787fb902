"""From simulation to deployment: the same run with clients on machines of their own, through Flower.

`serve` runs a config as `simulation.run` does, with nodes that have joined in the place of simulated clients; `join` makes this
process such a node. Which bits come out does not depend on where clients run, as long as all compute alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedsim import simulation
from fedsim.core import config as configs
from fedsim.core.config import SimConfig
from fedsim.core.contracts import Dataset, IntArray
from fedsim.core.errors import ConfigError, PluginError, named
from fedsim.core.events import Event
from fedsim.core.work import ArraySplit, WorkSpec
from fedsim.data import door
from fedsim.models import pretrained
from fedsim.runs.directory import RunDir
from fedsim.runs.results import Results

if TYPE_CHECKING:
    from clients.deployment.handshake import Offer
    from clients.deployment.node import Holding
    from clients.deployment.superlink import Address
    from clients.deployment.supernode import Server

POOL = "runtime.pool=deployment"
TRIED = "flwr 1.41"


def require_flower() -> None:
    """Raise PluginError where Flower is not installed."""
    try:
        import clients.flower_records  # noqa: F401
    except ImportError as e:
        raise PluginError(f"a deployment needs Flower, which cannot be imported ({e}): pip install 'fedsim[flower]'") from e


@contextmanager
def known_flower() -> Iterator[None]:
    """Raise PluginError for a Flower in which parts lie elsewhere than in those that were tried: not all of them are public."""
    require_flower()
    try:
        yield
    except ImportError as e:
        if not (e.name or "").startswith("flwr"):
            raise
        raise PluginError(f"Flower {version('flwr')} is not one that fedsim can deploy with: {e} (tried: {TRIED})") from e


@dataclass(frozen=True)
class Waiting:
    """How a server waits. nodes: as many join before the first round, all clients at most; None: all. timeout: seconds that a
    client has for a job; None: as long as its node is there. Raises ConfigError for what cannot be waited for."""

    nodes: int | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.nodes is not None and self.nodes < 1:
            raise ConfigError(f"--wait must be at least 1, got {self.nodes}")
        if self.timeout is not None and not self.timeout > 0:
            raise ConfigError(f"--timeout must be positive, got {self.timeout:g}")


def serve(
    config: SimConfig,
    address: Address,
    waiting: Waiting = Waiting(),
    output: str | Path | None = None,
    progress: Callable[[Event], None] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Results:
    """Run a config with the pool `deployment` to its end; gone on with where a run of it was stopped, loaded where it has ended.

    output: run directory (default: `<runtime.output>/<name>-<identity>`). tell: is given a line about who comes and goes.
    Raises PoolError for an address that is in use, and the errors of `simulation.run`.
    """
    require_flower()
    from clients.deployment.superlink import SuperLink
    from clients.pools.deployment import Terms, served

    if config.runtime.pool != "deployment":
        config = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, pool="deployment", fused=False))
    path = Path(output) if output is not None else Path(config.runtime.output) / f"{config.name}-{config.identity()[:8]}"
    address.require_free()  # before the data are read
    nodes = config.partition["clients"] if waiting.nodes is None else waiting.nodes
    with known_flower(), served(Terms(partial(SuperLink, address), nodes, waiting.timeout, tell)):
        if not (path / "status.json").is_file():
            return simulation.run(config, output=path, progress=progress)
        found = RunDir.open(path, config)
        return Results.load(path) if found.finished else simulation.run(config, resume=path, progress=progress)


@dataclass(frozen=True)
class Own:
    """What a node brings.

    config: the config that it means to take part in; None: whatever the server runs. client: which client it is; None: any that
    is free. data: keys of the `data` section (source, path, ...) of data of its own; None: it holds this client's shard of the
    config's split. Raises ConfigError when it says neither.
    """

    config: SimConfig | None = None
    client: int | None = None
    data: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.client is None and self.data is None:
            raise ConfigError(
                "say what this node holds: --data source=npz path=... of its own, or --client 3 for that shard of the split"
            )
        if self.client is not None and self.client < 0:
            raise ConfigError(f"--client must not be negative, got {self.client}")


def join(server: Server, own: Own, memory: str | Path, patience: float, tell: Callable[[str], None]) -> None:
    """Be a node of this server until its run is over. memory: the folder of what the client remembers; patience: seconds that a
    server that cannot be reached is waited for. Raises PoolError when this node is refused."""
    require_flower()
    from clients.deployment.node import Node
    from clients.deployment.supernode import SuperNode

    with known_flower():
        Node(partial(made_ready, own), Path(memory), tell).run(partial(SuperNode, server), patience)


def made_ready(own: Own, offer: Offer) -> Holding:
    """What a node holds for an offered run. Raises Refused where the two do not go together, and what reading data raises."""
    from clients.deployment.handshake import Answer, Refused, computes, counts, require_inputs, require_same
    from clients.deployment.node import Holding

    config = _config(own, offer)
    require_same(config, offer.config)
    client = offer.client if own.client is None else own.client
    if not 0 <= client < offer.clients:
        why = f"there is no client {client}" if own.client is not None else "all have their nodes"
        raise Refused(f"{why}: the run has {offer.clients} clients, from 0 on")
    if own.data is None:
        manifest, spec, _ = simulation.prepare_data(config)
        _require_split(manifest.class_names, manifest.hash, offer)
        split = manifest.hash
    else:
        spec, split = own_spec(config, offer, client), ""
    require_inputs(spec.train, offer)
    answer = Answer(client=client, any=own.client is None, split=split, computes=computes(config))
    return Holding(spec, dataclasses.replace(answer, counts=counts(spec, client, offer.classes)))


def own_spec(config: SimConfig, offer: Offer, client: int) -> WorkSpec:
    """Work on data of a node's own: of every task, the samples of its classes (or of its domain), all of them the client's.
    Classes and domains are known by their names. Raises Refused for a class that the server does not know."""
    from clients.deployment.handshake import Refused

    for key, there in (("noise", config.stream.noise.share), ("validation", config.stream.validation)):
        if there:
            raise Refused(f"stream.{key} is for simulated splits: leave it out, or join with --client instead of --data")
    dataset = door.load(config, pretrained.tokenizer_name(config.model))
    row_of = {name: row for row, name in enumerate(offer.classes)}
    present = [dataset.class_names[c] for c in np.unique(dataset.train.labels)]
    if strange := [name for name in present if name not in row_of]:
        raise Refused(
            f"{named('class', strange)} of this node's data: the server knows {named('class', list(offer.classes))} only"
        )
    rows = np.array([row_of.get(name, -1) for name in dataset.class_names], dtype=np.int64)
    labels_N = rows[dataset.train.labels]
    held = [np.flatnonzero(_of_task(dataset, labels_N, offer, task)) for task in range(len(offer.task_classes))]
    sizes = np.zeros((len(held), offer.clients), dtype=np.int64)
    sizes[:, client] = [len(positions) for positions in held]
    nothing = np.zeros(0, dtype=np.int64)
    test = ArraySplit({n: a[:0] for n, a in dataset.test.inputs.items()}, nothing)
    return WorkSpec(
        num_clients=offer.clients,
        shard_indices=np.concatenate(held),
        shard_offsets=np.concatenate([[0], np.cumsum(sizes)]),
        test_indices=nothing,
        test_offsets=np.zeros(len(held) + 1, dtype=np.int64),
        config=config,
        train=ArraySplit(dataset.train.inputs, labels_N, dataset.train.domains),
        test=test,
        task_classes=tuple(tuple(rows) for rows in offer.task_classes),
    )


def _of_task(dataset: Dataset, labels_N: IntArray, offer: Offer, task: int) -> Any:
    """Which training samples belong to a task."""
    of_class = np.isin(labels_N, offer.task_classes[task])
    if offer.config["stream"]["name"] != "domain_incremental" or offer.config["stream"]["joint"]:
        return of_class
    assert dataset.train.domains is not None
    names = np.array(dataset.domain_names)
    return of_class & (names[dataset.train.domains] == offer.task_names[task])


def _require_split(classes: Sequence[str], split: str, offer: Offer) -> None:
    from clients.deployment.handshake import Refused

    if sorted(classes) != sorted(offer.classes):
        raise Refused(f"this node's data has {named('class', list(classes))}, the server's {named('class', list(offer.classes))}")
    if list(classes) != list(offer.classes):
        first = next(i for i, (a, b) in enumerate(zip(classes, offer.classes, strict=True)) if a != b)
        raise Refused(
            f"the order of classes differs: class {first} is '{classes[first]}' here, '{offer.classes[first]}' at the server"
        )
    if split != offer.split:
        raise Refused("this node's split is another than the server's: other data, another seed or another partition")


def _config(own: Own, offer: Offer) -> SimConfig:
    """The node's config: its own or the server's, with the node's data, and run here."""
    from clients.deployment.handshake import Refused

    if own.config is None and offer.files:
        raise Refused("the server's config names plug-in files: copy them here, and join with the same CONFIG as the server")
    plain: Mapping[str, Any] = offer.config if own.config is None else own.config.to_dict()
    runtime = plain["runtime"] if own.config is not None else _runtime(offer.config["runtime"])
    runtime = {**runtime, "pool": "serial", "fused": False, "workers": "auto", "address": None}
    layers: dict[str, Any] = {**plain, "runtime": runtime, "trackers": []}
    if own.data is not None:
        given = configs.parse_overrides([f"data.{item}" for item in own.data]).get("data", {})
        layers["data"] = given if "source" in given else configs.merge({"data": plain["data"]}, {"data": given})["data"]
        layers["manifest"] = None
    return configs.compose([layers])


def _runtime(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Where and how this node computes: as the server does, if it can."""
    kept = {k: theirs[k] for k in ("threads", "precision", "eval_batch", "cache")}
    same = theirs["device"] == "cpu" or torch.cuda.is_available()
    return kept | ({k: theirs[k] for k in ("device", "kernels")} if same else {"device": "auto", "kernels": "auto"})
