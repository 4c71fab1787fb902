"""What benchmarks of the engine have in common: clients without model and data, and a loop of one task over them."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from clients.worker import Worker
from fedsim.core import config as configs
from fedsim.core.config import SimConfig
from fedsim.core.contracts import ArraySplit, Pool
from fedsim.core.wire import Chain
from fedsim.core.work import WorkSpec
from server.state import Simulation
from server.store import ClientStore


class Idle(Worker):
    """A worker that loads nothing. What its clients send is for a subclass to say (`train_client`)."""

    def __init__(self, spec: WorkSpec) -> None:
        self.spec, self._rule = spec, None
        self._source, self._deployed, self._merged = None, None, ExitStack()


def work(config: SimConfig, registered: int) -> WorkSpec:
    """A sample that is not there for every registered client, in one task."""
    empty, none = ArraySplit({}, np.zeros(0, np.int64)), np.zeros(0, np.int64)
    one_each = np.arange(registered), np.arange(registered + 1)
    return WorkSpec(registered, *one_each, none, np.zeros(2, np.int64), config, empty, empty, ((0,),))


def simulation(config: SimConfig, pool: Pool, registered: int, store: ClientStore | None = None) -> Simulation:
    """The loop's parts, with the rules of the config."""
    return Simulation(
        config=config,
        pool=pool,
        aggregator=configs.build_aggregator(config.server.aggregator),
        consolidator=configs.build("consolidators", config.server.consolidator),
        calibrator=None,
        chain=Chain.of(config),
        fresh_adapter=lambda task: {},
        grown=lambda task, start: start,
        task_names=("task",),
        task_classes=((0,),),
        test_sizes=(0,),
        shard_sizes=np.ones((1, registered), np.int64),
        num_clients=registered,
        store=store or ClientStore(registered),
    )
