"""`run(config) -> Results`: wires data, model, pool and rules to the loop, and keeps the run directory. The one tested door."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from clients import optim
from fedsim import probe, suitable
from fedsim.core import config as configs
from fedsim.core import hardware, plugins, rng
from fedsim.core.blame import blamed
from fedsim.core.config import SimConfig, splits
from fedsim.core.contracts import Adapter, Aggregator, Consolidator, TaskStart, require_finite_numbers
from fedsim.core.defaults import torch_defaults
from fedsim.core.errors import ConfigError, DataError, FedsimError, ModelError, PluginError, one_line
from fedsim.core.events import Event, Note, RunDirOpened, TensorsKept
from fedsim.core.messages import RoundPlan, StatisticRequest, Tensors
from fedsim.core.names import HEAD
from fedsim.core.tensors import with_prefix
from fedsim.core.wire import Chain
from fedsim.core.work import WorkSpec
from fedsim.data import door
from fedsim.data import manifest as manifests
from fedsim.data.manifest import Manifest
from fedsim.models import backbone as backbones
from fedsim.models import fits, pretrained
from fedsim.models import model as models
from fedsim.models.model import Model
from fedsim.notebook import experiment
from fedsim.runs.directory import Holding, RunDir
from fedsim.runs.results import Results
from fedsim.watch import tracking
from fedsim.watch.progress import showing
from server import checkpoint, loop, planning, sampling
from server.outcomes import require_plain
from server.state import PROCESSOR, ServerState, Simulation
from server.store import ClientStore


def run(
    config: SimConfig | None = None,
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    aggregator: Aggregator | None = None,
    progress: Callable[[Event], None] | bool | None = None,
    **asked: Any,
) -> Results:
    """Run a config to its end, in a new run directory, or go on in one that was interrupted.

    config: what `load` or `experiment` gives; in its place, asked: what `experiment` takes, such as data=(images, labels),
    clients=10, method="lorm". output: run directory (default: `<runtime.output>/<name>-<identity>`); resume: run directory to go
    on in (its own config is used when `config` is None; one that differs in nothing but `data` says where the same data lie now);
    aggregator: a rule object in place of the config's; progress: True shows how it goes, False does not, None does in a
    notebook; a function is called with every event.
    Raises the errors of `fedsim.core.errors`, those that can be known beforehand before any training.
    """
    start = Clocks.now()
    if asked and config is not None:
        raise ConfigError(f"give a config or the words of one, not both: a config and {', '.join(asked)}")
    if asked:
        config = experiment(**asked)
    if config is not None and not isinstance(config, SimConfig):
        raise ConfigError(
            f"config must be what load or experiment gives, got {config!r}: run(load('lorm')), or run(method='lorm')"
        )
    with showing(progress) as told:
        return _begun(config, output, resume, aggregator, told, start)


def _begun(
    config: SimConfig | None,
    output: str | Path | None,
    resume: str | Path | None,
    aggregator: Aggregator | None,
    progress: Callable[[Event], None] | None,
    start: Clocks,
) -> Results:
    """In a new run directory, or in the one to resume."""
    if config is None and resume is None:
        raise ConfigError("nothing to run: give a config, or the run directory to resume")
    if config is None:
        config = RunDir.open(resume).config  # type: ignore[arg-type]
    if aggregator is not None:
        config = _with_rule_object(config, aggregator)
    begun = None if resume is None else RunDir.open(resume, config, moved=True)
    if begun is None:
        _require_device(config)
        parts = prepare(config, aggregator)
        with RunDir.create(config, output).begun() as run_dir:
            return _run(parts, run_dir, progress, start)
    moved = begun.located(config).data != begun.located().data
    if begun.finished and not moved:
        return Results.load(begun.path)
    with begun.held():  # before anything else: whoever goes on with it now may have ended it by the time
        if begun.finished and not moved:
            return Results.load(begun.path)
        if not begun.finished:
            _require_device(config)
        parts = prepare_again(begun, config, aggregator)
        if begun.finished:  # the same data, proven by the split: those who ask again will find them
            begun.write_start(parts.manifest, parts.config.data)
            return Results.load(begun.path)
        return _run(parts, begun, progress, start)


def _run(parts: Prepared, run_dir: RunDir, progress: Callable[[Event], None] | None, start: Clocks) -> Results:
    """From the last checkpoint, if there is one, to the end. start: where the clocks stood when all began."""
    config, state = parts.config, parts.state
    if run_dir.checkpoint.exists():
        with torch_defaults(config.runtime.threads):
            state = checkpoint.load(run_dir.checkpoint, run_dir.identity)
    state = state.noting(parts.notes)
    run_dir.write_start(parts.manifest, config.data, parts.model.backbone.digest)
    if progress is not None:
        progress(RunDirOpened(str(run_dir.path)))
        for note in parts.notes:
            progress(Note(note))
    saving, before = 0.0, state.seconds.get(PROCESSOR, 0.0)  # seconds
    hardware.forget_peak()
    opened = ClientStore(parts.manifest.num_clients, run_dir.store, run_dir.identity, state.stored, run_dir.advice)
    with opened as store, tracking.tracked(config, run_dir) as record:
        with _wired(parts, store) as sim:
            state = dataclasses.replace(state, seconds=state.spent("start_up", time.perf_counter() - start.wall))
            for step in _steps(sim, state):
                if isinstance(step, TensorsKept):
                    run_dir.keep(step)
                    continue
                if isinstance(step, ServerState):
                    state, saving = _keep(run_dir, store, step, saving, before - start.processor)
                elif progress is not None:
                    progress(step)
                record(step)
        results = _results(config, state, parts.manifest.hash).write_end(run_dir)
        record(results)
    return results


def once(config: SimConfig, path: Path, progress: Callable[[Event], None] | None = None) -> Results:
    """The results of a config in a run directory of its own: loaded if it is finished, gone on with if it was stopped, else made.

    Raises RunDirError when the folder is damaged or belongs to another config.
    """
    if not (path / "status.json").is_file():
        return run(config, output=path, progress=progress)
    found = RunDir.open(path, config)
    return Results.load(path) if found.finished else run(config, resume=path, progress=progress)


class Clocks(NamedTuple):
    """In seconds: of the wall, and of the processors that worked for this process."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> Clocks:
        return cls(time.perf_counter(), time.process_time())


def rehearse(config: SimConfig, rounds: int | None = None) -> Results:
    """Play a run, or its first rounds only, and keep nothing: what a round costs, or whether it works. No run directory."""
    start = time.perf_counter()
    _require_device(config)
    parts = prepare(config)
    with ClientStore(parts.manifest.num_clients) as store, _wired(parts, store) as sim:
        state = dataclasses.replace(parts.state.noting(parts.notes), seconds={"start_up": time.perf_counter() - start})
        states = (step for step in _steps(sim, state) if isinstance(step, ServerState))
        *_, state = itertools.islice(states, rounds)
        state = dataclasses.replace(state, stored=store.stored)
    holdings = tuple(Holding(*h) for h in parts.manifest.holdings())
    return dataclasses.replace(_results(parts.config, state, parts.manifest.hash), holdings=holdings)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run before its first round: all that can be wrong with config, data and model has been found by now.

    notes: lines that whoever reads the numbers has to know (`events.Note`)."""

    config: SimConfig
    rule: Aggregator
    manifest: Manifest
    spec: WorkSpec
    model: Model
    state: ServerState
    notes: tuple[str, ...] = ()


def prepare(config: SimConfig, aggregator: Aggregator | None = None) -> Prepared:
    """Read the data, split it, build the model and the rules (or take this one). Raises what can be known before training."""
    splits.require(config)
    # the rules' arithmetic, too, has the same bits whatever the caller has set
    with torch_defaults(config.runtime.threads), blamed("before any training"):
        return _prepared(config, aggregator)


def prepare_again(run_dir: RunDir, config: SimConfig | None = None, aggregator: Aggregator | None = None) -> Prepared:
    """`prepare` of a run that was begun, with its data where they lie now. Raises RunDirError for another backbone."""
    try:
        with torch_defaults(run_dir.config.runtime.threads), blamed("before any training"):
            parts = _prepared(run_dir.located(config), aggregator)
    except DataError as e:
        raise DataError(f"{e} (have the data moved? fedsim run --resume {run_dir.path} data.path=NEW)") from e
    run_dir.require_backbone(parts.model.backbone.digest)
    return parts


def _prepared(config: SimConfig, aggregator: Aggregator | None) -> Prepared:
    rule: Aggregator = configs.build_aggregator(config.server.aggregator) if aggregator is None else aggregator
    check(config)
    suitable.require(config, rule)
    manifest, spec, notes = prepare_data(config)
    suitable.require(config, rule, spec)
    suitable.require_clients(config, manifest)
    suitable.require_members(config, rule, manifest)
    model = models.build(config, len(manifest.class_order), backbone=backbones.load(config.model, hashed=True))
    fits.require(model.backbone, f"'{config.model.backbone}'", spec, manifest.task_names)
    state, trained, plan = first_state(config, model, rule)
    suitable.require_ranks(config, rule, state.params, manifest.num_clients)
    require_room(config, model, state.params, manifest.num_tasks)
    suitable.require_room(config, state.params)
    optim.check_groups(config.client, trained)
    optim.check(config.client, {n: state.params[n].dim() for n in trained}, most_steps(config, manifest))
    learners = configs.build_learners(config.client.learners)
    told = [note for learner in learners.values() for note in learner.suits(config, manifest.sizes)]
    told += on_the_wire(config, rule, state.params, trained, manifest)
    probe.require(config, model, spec, state.params, trained)
    probe.require_learners(config, model, spec, state.params, plan, learners)
    told += hardware.too_many_threads(config.runtime.threads)
    notes = (
        *notes,
        *suitable.notes(config, rule, manifest),
        *pretrained.notes(config.model, config.transform),
        *model.adapter.notes(model.backbone),
        *told,
    )
    weights = sum(t.nbytes for t in model.backbone.encoder.state_dict().values())
    spec = dataclasses.replace(spec, weights=weights, class_names=manifest.class_names, task_names=manifest.task_names)
    spec = dataclasses.replace(spec, split=manifest.hash)
    plugins.load("pools", config.runtime.pool).check(spec)
    return Prepared(config, rule, manifest, spec, model, state, notes)


@contextmanager
def _wired(parts: Prepared, store: ClientStore) -> Iterator[Simulation]:
    """The parts with a pool that runs."""
    config, manifest, spec = parts.config, parts.manifest, parts.spec
    calibrator = config.server.calibrator
    with plugins.load("pools", config.runtime.pool)(spec) as pool:
        yield Simulation(
            config=config,
            pool=pool,
            aggregator=parts.rule,
            consolidator=configs.build("consolidators", config.server.consolidator),
            calibrator=None if calibrator is None else configs.build("calibrators", calibrator),
            chain=Chain.of(config),
            fresh_adapter=lambda task: fresh_adapter(config, parts.model, task),
            grown=lambda task, start: grown(config, parts.model, task, start),
            task_names=manifest.task_names,
            task_classes=manifest.task_classes,
            test_sizes=tuple(len(spec.test_of(t)) for t in range(len(manifest.task_names))),
            shard_sizes=manifest.sizes if pool.by_manifest else np.maximum(2 * manifest.sizes, 1),  # the same order, nobody has 0
            num_clients=manifest.num_clients,
            store=store,
            learners=configs.build_learners(config.client.learners),
            sample_bytes=spec.train.sample_bytes,
        )


def _steps(sim: Simulation, state: ServerState) -> Iterator[Event | ServerState]:
    """The loop, under torch's defaults; between two steps the caller's own work goes by the caller's settings."""
    steps = loop.run(sim, state)
    while True:
        with torch_defaults(sim.config.runtime.threads), blamed(sim.when(state)):
            step = next(steps, None)
        if step is None:
            return
        if isinstance(step, ServerState):
            state = step
            checkpoint.require_kept(sim, state)
        yield step


def _require_device(config: SimConfig) -> None:
    """Before anything: the device is there, where it is this machine that trains."""
    ray = sys.modules.get("ray")
    joined = config.runtime.address is not None or (config.runtime.pool == "ray" and ray is not None and ray.is_initialized())
    if not joined:
        hardware.require_device(config.runtime.device)


def check(config: SimConfig) -> None:
    """What can be known before any data is read: finite numbers, trackers' packages, optimizer and schedule, participation."""
    for name in configs.SECTIONS:  # those that Python made by hand have not come by the door
        require_finite_numbers(getattr(config, name), name)
    tracking.check(config)
    optim.check(config.client)
    sampling.num_sampled(config.partition["clients"], config.server.participation)


def prepare_data(config: SimConfig) -> tuple[Manifest, WorkSpec, tuple[str, ...]]:
    """Load the source, split it over tasks and clients (or load the split from a manifest); and what must be said of the data."""
    dataset = door.load(config, pretrained.tokenizer_name(config.model))
    manifest = manifests.make(config, dataset)
    sampling.num_sampled(manifest.num_clients, config.server.participation)
    files = tuple((path, plugins.fingerprint(path)) for path in config.user_files())
    spec = dataclasses.replace(manifests.work_spec(manifest, dataset, config), user_files=files)
    return manifest, spec, door.notes(dataset, manifest)


def most_steps(config: SimConfig, manifest: Manifest) -> int:
    """Optimizer steps of the longest round: of the client that holds most of a task."""
    server, client = config.server, config.client
    held = math.ceil(int(manifest.sizes.max()) / (server.rounds if config.stream.online else 1))
    return client.epochs * math.ceil(held / client.batch_size) * (server.rounds if server.unlearning else 1)


def fresh_adapter(config: SimConfig, model: Model, task: int) -> dict[str, Any]:
    """The `adapter.*` tensors that a new module of this task starts with, the same for all clients."""
    return _made(config, lambda: model.init_adapter(rng.torch_stream(config.seed, "adapter", task)))


def grown(config: SimConfig, model: Model, task: int, start: TaskStart) -> TaskStart:
    """A task's start with the tensors that the task brings to the adapter, and without training those that it freezes."""
    params = start.params
    if task and type(model.adapter).grown is not Adapter.grown:
        params = _made(config, lambda: model.grown(params, rng.torch_stream(config.seed, "grown", task)))
    return dataclasses.replace(start, params=params, frozen=(*start.frozen, *model.frozen(params)))


def require_room(config: SimConfig, model: Model, params: Tensors, tasks: int) -> None:
    """Raise ModelError for an adapter that cannot grow by what all tasks bring, before any is trained."""
    start = TaskStart(params)
    for task in range(1, tasks):
        start = grown(config, model, task, start)


def _made(config: SimConfig, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the adapter makes. Raises a FedsimError of one line."""
    try:
        return make()
    except FedsimError:
        raise
    except Exception as e:  # sizes beyond memory, or a fault of an adapter of the user's own
        raise ModelError(f"adapter {config.adapter['name']} cannot be made: {one_line(e)}") from e


def first_state(config: SimConfig, model: Model, rule: Aggregator) -> tuple[ServerState, list[str], RoundPlan]:
    """Where every run starts, a fresh adapter and a fresh head; the tensors that clients train in some round of a task; and the
    rule's plan for the first."""
    params: Tensors = fresh_adapter(config, model, 0) | model.init_head()
    consolidator: Consolidator = configs.build("consolidators", config.server.consolidator)
    start: Any = consolidator.start_task(consolidator.init(), params, {}, {})  # rules that do not suit these tensors say so now
    if not isinstance(start, TaskStart):
        wrong = f"start_task must give a fedsim.core.contracts.TaskStart, got {type(start).__name__}"
        raise PluginError(f"consolidator {config.server.consolidator['name']}: {wrong}")
    start = grown(config, model, 0, start)
    state, kept = rule.init(start.params), consolidator.init()
    require_plain(rule, state)
    require_plain(consolidator, kept)
    plans = [rule.plan(state, r) for r in range(min(config.server.rounds, 4))]
    suitable.require_trained(config, rule, start, plans)
    suitable.require_linear_map(config, start.params, plans[0])
    check_statistics(plans[0].statistics)
    trained = {n for plan in plans for n in planning.trained(start.frozen, params, plan)}
    head = with_prefix(params, HEAD) if config.server.calibrator is not None else {}
    first = ServerState(task=0, round=0, params=params, consolidator=kept, first_head=head)
    return first, [n for n in params if n in trained], plans[0]


def on_the_wire(
    config: SimConfig, rule: Aggregator, params: Tensors, trained: Sequence[str], manifest: Manifest
) -> tuple[str, ...]:
    """What the channels say beforehand of all that clients will send. Raises ConfigError if they cannot take it."""
    chain, server = Chain.of(config), config.server
    if not chain.channels:
        return ()
    consolidator = configs.build("consolidators", server.consolidator)
    calibrator = None if server.calibrator is None else configs.build("calibrators", server.calibrator)
    methods = configs.build_learners(config.client.learners)
    statistics = planning.asked(rule, consolidator, calibrator, methods, params, server.rounds, manifest.task_classes[:1])
    return chain.suits(trained, statistics, server.rounds * manifest.num_tasks, manifest.num_clients, rule.additive)


def check_statistics(requests: Sequence[StatisticRequest]) -> None:
    """Build the statistics that a rule asks for, so that a wrong name is an error before any training."""
    for request in requests:
        configs.build("statistics", {"name": request.name, **request.options})


def _keep(run_dir: RunDir, store: ClientStore, state: ServerState, saving: float, before: float) -> tuple[ServerState, float]:
    """Save after a round: first what clients remember, then the checkpoint that says so. What was saved, and the seconds that all
    saving of this process has taken, of which the loop knows nothing (`saving`: before this). before: what is to be added to the
    processor time of this process, so that it is the run's."""
    clock = time.perf_counter()

    def spent() -> dict[str, float]:
        alone = run_dir.config.runtime.pool == "serial"
        processor = {PROCESSOR: before + time.process_time()} if alone else {}
        return {**state.spent("checkpoint", saving), **processor}

    saved = dataclasses.replace(state, stored=store.commit(), seconds=spent())
    checkpoint.save(run_dir.checkpoint, saved, run_dir.identity, run_dir.advice)
    store.prune()
    _results(run_dir.config, saved).write_progress(run_dir, lasting=False)
    saving += time.perf_counter() - clock
    return dataclasses.replace(saved, seconds=spent()), saving


def _results(config: SimConfig, state: ServerState, manifest_hash: str = "") -> Results:
    """What is known so far, in the form that is written."""
    return Results(
        config,
        state.rows,
        _costs(config, state),
        manifest_hash=manifest_hash,
        failures=tuple(map(str, state.failures)),
        notes=state.notes,
        finished=False,
        classes=state.classes,
        drifts=state.drifts,
    )


def _costs(config: SimConfig, state: ServerState) -> dict[str, Any]:
    """Bytes, seconds by phase, and what devices must store beside the model: how many of them, bytes of one on average, and the
    most of any at any time. Where all happens in this process also its processor seconds, and the most memory that it held."""
    seconds = dict(state.seconds)
    processor = seconds.pop(PROCESSOR, None)
    costs = {"bytes": state.bytes, "seconds": seconds, "client_rounds": state.client_rounds}
    stored = state.stored
    if stored.most:
        costs["stored"] = {"clients": stored.clients, "mean": stored.bytes / max(1, stored.clients), "max": stored.most}
    if processor is not None:
        costs |= {"processor_seconds": processor, "peak_memory": hardware.peak_memory()}
    return costs


def _with_rule_object(config: SimConfig, rule: Aggregator) -> SimConfig:
    """The config says which rule made the numbers, even if it came from Python."""
    require_finite_numbers(rule, "aggregator")
    described: Mapping[str, Any] = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
    section = {"name": f"python:{type(rule).__module__}.{type(rule).__qualname__}", **described}
    return dataclasses.replace(config, server=dataclasses.replace(config.server, aggregator=section))
