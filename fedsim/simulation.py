"""`run(config) -> Results`: wires data, model, pool and rules to the loop, and keeps the run directory. The one tested door."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clients import optim
from clients.worker import resolve_device, torch_threads
from fedsim.core import config as configs
from fedsim.core import plugins, rng
from fedsim.core.config import SimConfig
from fedsim.core.contracts import Aggregator, Consolidator, WorkSpec
from fedsim.core.errors import ConfigError
from fedsim.core.events import Event, RunDirOpened
from fedsim.core.messages import StatisticRequest, Tensors
from fedsim.data import manifest as manifests
from fedsim.data.manifest import Manifest
from fedsim.models import backbone
from fedsim.models import model as models
from fedsim.models.model import Model
from fedsim.results import Results, RunDir
from server import checkpoint, grouped, loop, sampling
from server.state import ServerState, Simulation


def run(
    config: SimConfig | None = None,
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    aggregator: Aggregator | None = None,
    progress: Callable[[Event], None] | None = None,
) -> Results:
    """Run a config to its end, in a new run directory, or go on in one that was interrupted.

    output: run directory (default: `<runtime.output>/<name>-<identity>`); resume: run directory to go on in (its own config
    is used when `config` is None); aggregator: a rule object in place of the config's; progress: is called with every event.
    Raises the errors of `fedsim.core.errors`, those that can be known beforehand before any training.
    """
    start = time.perf_counter()
    if config is None and resume is None:
        raise ConfigError("nothing to run: give a config, or the run directory to resume")
    if config is None:
        config = RunDir.open(resume).config  # type: ignore[arg-type]
    if aggregator is not None:
        config = _with_rule_object(config, aggregator)
    rule = aggregator if aggregator is not None else build_aggregator(config.server.aggregator)
    check(config)
    manifest, spec = prepare_data(config)
    with torch_threads(config.runtime.threads):  # the rules' arithmetic, too, has the same bits on every machine size
        model = models.build(config, len(manifest.class_order))
        state = first_state(config, model, rule)
        run_dir = RunDir.create(config, output) if resume is None else RunDir.open(resume, config)
        if resume is not None and run_dir.finished:
            return Results.load(run_dir.path)
        if run_dir.checkpoint.exists():
            state = checkpoint.load(run_dir.checkpoint, run_dir.identity)
        run_dir.write_start(manifest)
        if progress is not None:
            progress(RunDirOpened(str(run_dir.path)))
        with plugins.load("pools", config.runtime.pool)(spec) as pool:
            sim = Simulation(
                config=config,
                pool=pool,
                aggregator=rule,
                consolidator=configs.build("consolidators", config.server.consolidator),
                calibrator=None if config.server.calibrator is None else configs.build("calibrators", config.server.calibrator),
                fresh_adapter=lambda task: fresh_adapter(config, model, task),
                task_names=manifest.task_names,
                task_classes=manifest.task_classes,
                test_sizes=tuple(len(spec.test_of(t)) for t in range(len(manifest.task_names))),
                num_clients=manifest.num_clients,
            )
            state = dataclasses.replace(state, seconds=state.spent("start_up", time.perf_counter() - start))
            for step in loop.run(sim, state):
                if isinstance(step, ServerState):
                    state = _keep(run_dir, step)
                elif progress is not None:
                    progress(step)
    return run_dir.write_end(state.rows, _costs(state), manifest.hash, [str(f) for f in state.failures])


def check(config: SimConfig) -> None:
    """What can be known before any data is read: optimizer and schedule, participation."""
    optim.check(config.client)
    sampling.num_sampled(config.partition["clients"], config.server.participation)


def prepare_data(config: SimConfig) -> tuple[Manifest, WorkSpec]:
    """Load the source, split it over tasks and clients (or load the split from a manifest)."""
    dataset = configs.build("sources", config.data).load(backbone.tokenizer_name(config.model))
    manifest = manifests.make(config, dataset)
    sampling.num_sampled(manifest.num_clients, config.server.participation)
    device = str(resolve_device(config.runtime.device))  # workers need not see what the driver sees
    runtime = dataclasses.replace(config.runtime, device=device)
    return manifest, manifests.work_spec(manifest, dataset, dataclasses.replace(config, runtime=runtime))


def build_aggregator(section: Any) -> Aggregator:
    """The rule of a config: one for all tensors, or one per group."""
    rule: Aggregator = grouped.from_config(section) if isinstance(section, list) else configs.build("aggregators", section)
    return rule


def fresh_adapter(config: SimConfig, model: Model, task: int) -> dict[str, Any]:
    """The `adapter.*` tensors that a new module of this task starts with, the same for all clients."""
    return model.init_adapter(rng.torch_stream(config.seed, "adapter", task))


def first_state(config: SimConfig, model: Model, rule: Aggregator) -> ServerState:
    """Where every run starts: a fresh adapter, and a head of zeros."""
    params: Tensors = fresh_adapter(config, model, 0) | model.init_head()
    consolidator: Consolidator = configs.build("consolidators", config.server.consolidator)
    begun = consolidator.start_task(consolidator.init(), params, {})  # rules that do not suit these tensors say so now
    check_statistics(rule.plan(rule.init(begun), 0).statistics)
    return ServerState(task=0, round=0, params=params, consolidator=consolidator.init())


def check_statistics(requests: Sequence[StatisticRequest]) -> None:
    """Build the statistics that a rule asks for, so that a wrong name is an error before any training."""
    for request in requests:
        configs.build("statistics", {"name": request.name, **request.options})


def _keep(run_dir: RunDir, state: ServerState) -> ServerState:
    """Save after a round; the time that takes is counted in the next one."""
    clock = time.perf_counter()
    checkpoint.save(
        run_dir.checkpoint, state, run_dir.identity, f"free space, then go on with: fedsim run --resume {run_dir.path}"
    )
    run_dir.write_progress(state.rows, _costs(state), [str(f) for f in state.failures])
    return dataclasses.replace(state, seconds=state.spent("checkpoint", time.perf_counter() - clock))


def _costs(state: ServerState) -> dict[str, Any]:
    return {"bytes": state.bytes, "seconds": dict(state.seconds), "client_rounds": state.client_rounds}


def _with_rule_object(config: SimConfig, rule: Aggregator) -> SimConfig:
    """The config says which rule made the numbers, even if it came from Python."""
    described: Mapping[str, Any] = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
    section = {"name": f"python:{type(rule).__module__}.{type(rule).__qualname__}", **described}
    return dataclasses.replace(config, server=dataclasses.replace(config.server, aggregator=section))
