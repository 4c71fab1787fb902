"""Clients on Ray: one box by default, or an existing cluster (`runtime.address`).

Each worker is an actor that loads model and data once. Data arrays lie once in Ray's object store and are read without
a copy; a round's parameters are put there once, not once per client. Nothing polls: the driver sleeps in `ray.wait`.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import ray
import torch

from clients import cluster
from clients.cluster import last_line
from clients.pools import _bundles, _workers
from fedsim.core import contracts
from fedsim.core.errors import ClientFailed, PoolError
from fedsim.core.home import ROOT, ours_first
from fedsim.core.messages import (
    Bundle,
    ClientJob,
    ClientUpdate,
    EvalJob,
    EvalResult,
    RoundPlan,
    ServerJob,
    State,
    Tensors,
    num_bytes,
)
from fedsim.core.work import WorkSpec

BFLOAT16 = np.dtype([("bfloat16", np.int16)])  # what numpy has not, as its 16 bits
IN_FLIGHT = 2  # messages handed to a worker ahead: the next one waits there while a result travels
START_S = 60.0  # that Ray is given to find a place for a worker, and that loading is waited for before the first round
PATIENCE = 10  # times as long, where there is room for all: then it is the processes that are slow to start
LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,  # the result was on a machine that died
)
INLINE = 1 << 16  # bytes up to which a broadcast travels in messages: the object store has a price per object
NO_PLAN = RoundPlan()
_numbers = itertools.count(1)


class Pool(contracts.Pool):
    """Bundles of clients over the workers, in the order of the jobs (longest first). A worker that dies is replaced, and its
    clients run again with the same result; after `runtime.max_restarts` deaths over one bundle it is a PoolError. A replacement
    for which there is no place any more, since its machine died too, gets no work: the others go on."""

    worker: ClassVar[str] = "clients.worker:Worker"  # module:class that does the work, imported in the worker processes

    @classmethod
    def check(cls, spec: WorkSpec) -> None:
        runtime = spec.config.runtime
        if runtime.address is None and runtime.workers != "auto" and not ray.is_initialized():
            _workers.require_room(spec, runtime.workers)

    def __init__(self, spec: WorkSpec) -> None:
        runtime = spec.config.runtime
        self._owns_ray, self._slots = not ray.is_initialized(), list[_Slot]()
        if self._owns_ray:
            cluster.start(runtime.address, 0 if runtime.workers == "auto" else runtime.workers * runtime.threads)
        try:
            self._start(spec)
        except BaseException:  # Ctrl-C too: Ray must not be left behind in a session that goes on
            self.close()
            raise

    def _start(self, spec: WorkSpec) -> None:
        """Start the workers and wait until they have loaded, side by side."""
        runtime = spec.config.runtime
        if runtime.device.startswith("cuda") and not cluster.resources().get("GPU"):
            raise PoolError(f"runtime.device is {runtime.device}, and no machine of this Ray has a GPU: set it to cpu or auto")
        self._size = _num_workers(spec)
        self._max_restarts, self._starts_failed = runtime.max_restarts, 0
        self._spec = spec
        self._spec_ref = ray.put(spec)
        self._needs = {"CPU": float(runtime.threads), "GPU": _gpus_per_worker(spec, self._size)}
        self._actor_class = ray.remote(_worker_class())
        room = min(cluster.room(self._needs, *cluster.machines()), cluster.room(self._needs, cluster.free()))
        self._slots = [self._new_slot() for _ in range(self._size)]
        self._wait_for_places(START_S if room < self._size else START_S * PATIENCE)
        ray.wait([slot.loaded for slot in self._slots], num_returns=len(self._slots), timeout=START_S)

    def _wait_for_places(self, seconds: float) -> None:
        """Until Ray has placed every worker. Raises PoolError when it cannot; as many as there is place for are enough where
        their number is "auto"."""
        placed, missing = ray.wait([slot.placed for slot in self._slots], num_returns=self._size, timeout=seconds)
        if missing and not (placed and self._spec.config.runtime.workers == "auto"):
            raise PoolError(self._no_place(len(missing), seconds))
        for slot in list(self._slots):
            slot.is_placed = slot.placed in placed
            if not slot.is_placed:
                ray.kill(slot.actor)
                self._slots.remove(slot)

    def _no_place(self, missing: int, seconds: float) -> str:
        """One line that says what was asked for, and what there is."""
        needs = {name: amount for name, amount in self._needs.items() if amount}
        total, free = cluster.resources(), cluster.free()
        there = ", ".join(f"{name} {total.get(name, 0):g} ({free.get(name, 0):g} free)" for name in needs)
        return (
            f"Ray has had no place for {missing} of {len(self._slots)} workers in {seconds:.0f} s: each asks for "
            f"{', '.join(f'{name} {amount:g}' for name, amount in needs.items())}, and Ray has {there}: "
            "lower runtime.workers or runtime.threads, or end what else runs there"
        )

    def train(self, jobs: Sequence[ClientJob]) -> Iterator[Bundle]:
        shared = _Broadcasts()
        cut = list(_bundles.bundles(jobs, self._size, self._spec.config.runtime.fused))

        def message(number: int) -> tuple[Any, ...]:
            start, bundle = cut[number]
            light = [replace(job, params={}, plan=NO_PLAN, memory=to_numpy(job.memory)) for job in bundle]  # type: ignore[arg-type]
            return shared.put(bundle[0].params, bundle[0].plan), start, light

        for bundle in self._run("train", len(cut), message, lambda i: _describe(cut[i][1])):
            yield with_tensors(bundle, to_tensors, lasting=copied)

    def evaluate(self, jobs: Sequence[EvalJob]) -> Iterator[EvalResult]:
        shared = _Broadcasts()

        def message(number: int) -> tuple[Any, ...]:
            return shared.put(jobs[number].params, NO_PLAN), replace(jobs[number], params={})

        yield from self._run("evaluate", len(jobs), message, lambda i: f"evaluation of task {jobs[i].task}")

    def make(self, job: ServerJob) -> State:
        light = _Broadcasts().put(job.params, NO_PLAN), replace(job, params={})
        (state,) = self._run("make", 1, lambda _: light, lambda _: f"what the server trains for learner {job.learner}")
        return state

    def close(self) -> None:
        for slot in self._slots:
            with contextlib.suppress(Exception):  # it may be dead already
                ray.kill(slot.actor)
        self._slots = []
        if self._owns_ray and ray.is_initialized():
            ray.shutdown()
        self._owns_ray = False

    def worker_pids(self) -> list[int]:
        """Process ids of the workers (for tests that kill one)."""
        return [ray.get(slot.actor.pid.remote()) for slot in self._slots]

    def _new_slot(self) -> _Slot:
        options = {"num_cpus": self._needs["CPU"], "num_gpus": self._needs["GPU"], "max_concurrency": 1}
        actor = self._actor_class.options(**options).remote(ROOT, ours_first(), self.worker, [self._spec_ref])
        return _Slot(actor, actor.pid.remote(), actor.load.remote())

    def _run(
        self, method: str, count: int, message: Callable[[int], tuple[Any, ...]], describe: Callable[[int], str]
    ) -> Iterator[Any]:
        """Hand out so many messages in order, `IN_FLIGHT` to a worker, and yield what comes back as it comes. A message is made
        when it goes out: what clients remember is read no sooner."""
        waiting = deque(range(count))
        deaths = [0] * count
        running: dict[Any, _Running] = {}
        while waiting or running:
            while waiting and (free := self._free_slot()):
                number = waiting.popleft()
                shared, *rest = message(number)
                content = None if free.told == shared.number else shared.content  # once per worker and round
                free.told = shared.number
                ref = getattr(free.actor, method).remote(shared.number, content, *rest)
                running[ref] = _Running(number, free)
                free.load += 1
            for ref in self._next(list(running)):
                task = running.pop(ref)
                task.slot.load -= 1
                try:
                    yield ray.get(ref)
                except LOST as e:
                    deaths[task.number] += 1
                    if deaths[task.number] > self._max_restarts:
                        raise PoolError(_death(describe(task.number), deaths[task.number], e)) from e
                    self._replace(task.slot)
                    waiting.appendleft(task.number)
                except ray.exceptions.RayTaskError as e:
                    raise PoolError(f"a Ray worker failed on {describe(task.number)}: {last_line(e)}") from e

    def _free_slot(self) -> _Slot | None:
        """The placed worker that has least to do, if it takes one more message."""
        slot = min((slot for slot in self._slots if slot.is_placed), key=lambda slot: slot.load, default=None)
        return slot if slot and slot.load < IN_FLIGHT else None

    def _next(self, running: list[Any]) -> list[Any]:
        """What has come back, waiting for it; or nothing, when a worker was placed that was not before.

        Raises PoolError when nobody works, and nobody is placed in a bounded time.
        """
        coming = {slot.placed: slot for slot in self._slots if not slot.is_placed}
        seconds = None if running else START_S * (PATIENCE if cluster.room(self._needs, *cluster.machines()) else 1)
        finished, _ = ray.wait([*running, *coming], num_returns=1, timeout=seconds)
        if not finished:
            raise PoolError(self._no_place(len(coming), seconds or 0.0))
        for ref in [ref for ref in finished if ref in coming]:
            try:
                ray.get(ref)
                coming[ref].is_placed = True
            except LOST as e:
                self._starts_failed += 1
                if self._starts_failed > self._max_restarts:
                    raise PoolError(_death("their start", self._starts_failed, e)) from e
                self._replace(coming[ref])
        return [ref for ref in finished if ref not in coming]

    def _replace(self, slot: _Slot) -> None:
        """Start another worker in the place of one that died; the first of its messages to notice does."""
        if slot in self._slots:
            with contextlib.suppress(Exception):
                ray.kill(slot.actor)
            self._slots[self._slots.index(slot)] = self._new_slot()


@dataclass(eq=False)
class _Slot:
    """A worker. placed: is ready when Ray has found a place for it and its process runs; loaded: when it has model and data;
    told: the broadcast that it was sent last; load: how many messages it has."""

    actor: Any
    placed: Any
    loaded: Any
    is_placed: bool = False
    told: int = 0
    load: int = 0


@dataclass(frozen=True)
class _Running:
    number: int
    slot: _Slot


@dataclass(frozen=True)
class _Broadcast:
    """What all messages of a round share. content: a list around a reference, which Ray leaves to the worker to fetch, or around
    the thing itself if it is small."""

    number: int
    content: list[Any]


class _Broadcasts:
    """Puts each distinct (params, plan) into the object store once, as numpy arrays, which workers read without a copy."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], _Broadcast] = {}

    def put(self, params: Tensors, plan: RoundPlan) -> _Broadcast:
        key = (id(params), id(plan))
        if key not in self._known:
            context = {name: to_numpy(tensors) for name, tensors in plan.context.items()}
            value = to_numpy(params), replace(plan, context={}), context
            large = num_bytes(params) + sum(map(num_bytes, plan.context.values())) > INLINE
            self._known[key] = _Broadcast(next(_numbers), [ray.put(value) if large else value])
        return self._known[key]


def _worker_class() -> type[Any]:
    """The actor's class, made in a function so that it travels by value (see `fedsim.core.home.ours_first`)."""

    class FedsimWorker:
        def __init__(self, root: str, put_first: Callable[[str], None], worker: str, spec_ref: list[Any]) -> None:
            put_first(root)  # and nothing else: whoever waits wants to know first that there is a place
            self.named, self.spec_ref = worker, spec_ref
            self.worker: Any = None
            self.broadcast: tuple[int, Any, Any] = (0, None, None)

        def load(self) -> None:
            import importlib
            from functools import partial

            import ray

            from fedsim.core.defaults import torch_defaults

            module, _, name = self.named.partition(":")
            spec = ray.get(self.spec_ref[0])
            self.defaults = partial(torch_defaults, spec.config.runtime.threads)
            with self.defaults():
                self.worker = getattr(importlib.import_module(module), name)(spec)

        def pid(self) -> int:
            import os

            return os.getpid()

        def train(self, number: int, content: list[Any] | None, start: int, jobs: list[Any]) -> Any:
            from dataclasses import replace

            from clients.pools.ray import copied, to_numpy, with_tensors

            params, plan = self._fetch(number, content)
            with self.defaults():
                given = [replace(job, params=params, plan=plan, memory=copied(job.memory)) for job in jobs]
                bundle = self.worker.train(start, given)
            return with_tensors(bundle, to_numpy)

        def evaluate(self, number: int, content: list[Any] | None, job: Any) -> Any:
            from dataclasses import replace

            params, _ = self._fetch(number, content)
            with self.defaults():
                return self.worker.evaluate(replace(job, params=params))

        def make(self, number: int, content: list[Any] | None, job: Any) -> Any:
            from dataclasses import replace

            params, _ = self._fetch(number, content)
            with self.defaults():
                return self.worker.make(replace(job, params=params))

        def _fetch(self, number: int, content: list[Any] | None) -> tuple[Any, Any]:
            if self.worker is None:  # it could not load: whoever waits for this message is told why
                self.load()
            if self.broadcast[0] != number:
                from dataclasses import replace

                import ray

                from clients.pools.ray import to_tensors

                assert content is not None, "messages arrive in the order in which they were sent"
                value = ray.get(content[0]) if isinstance(content[0], ray.ObjectRef) else content[0]
                params, plan, arrays = value
                context = {name: to_tensors(told) for name, told in arrays.items()}
                self.broadcast = (number, to_tensors(params), replace(plan, context=context))
            return self.broadcast[1], self.broadcast[2]

    return FedsimWorker


def to_tensors(arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Views of arrays in shared memory, which are read-only: nobody trains in place on what was received."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return {n: _tensor(a) for n, a in arrays.items()}


def to_numpy(tensors: Tensors) -> dict[str, np.ndarray[Any, Any]]:
    """Views of tensors, which Ray moves as they lie, where it would take a tensor apart; bfloat16, which numpy has not, as a
    field of that name."""
    return {n: t.numpy() if t.dtype != torch.bfloat16 else t.view(torch.int16).numpy().view(BFLOAT16) for n, t in tensors.items()}


def _tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(array) if array.dtype != BFLOAT16 else torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def with_tensors(bundle: Bundle, form: Callable[[Any], Any], lasting: Callable[[Any], Any] | None = None) -> Bundle:
    """The bundle with all of its mappings of tensors in another form; in the form `lasting` what is kept when a sum is done."""
    lasting = lasting or form
    summed = bundle.totals is not None

    def changed(r: ClientUpdate | ClientFailed) -> ClientUpdate | ClientFailed:
        if isinstance(r, ClientFailed):
            return r
        params = lasting(r.params) if summed else form(r.params)
        return replace(r, params=params, statistics=form(r.statistics), memory=None if r.memory is None else lasting(r.memory))

    totals = None if bundle.totals is None else {part: form(total) for part, total in bundle.totals.items()}
    return replace(bundle, results=tuple(map(changed, bundle.results)), totals=totals)


def copied(arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Copies: a view would hold all of a message in Ray's store."""
    return {n: _tensor(a.copy()) for n, a in arrays.items()}


def _describe(jobs: Sequence[ClientJob]) -> str:
    clients = ", ".join(str(job.client_id) for job in jobs)
    return f"client{'s' * (len(jobs) > 1)} {clients}, task {jobs[0].task}, round {jobs[0].round}"


def _num_workers(spec: WorkSpec) -> int:
    """As asked, or one per `threads` cores of the cluster (one per GPU when there are GPUs), at most one per client."""
    runtime = spec.config.runtime
    if runtime.workers != "auto":
        return int(runtime.workers)
    resources = cluster.resources()
    gpus = int(resources.get("GPU", 0)) if runtime.device != "cpu" else 0
    if gpus:
        return max(1, min(spec.num_clients, int(gpus / runtime.gpus_per_worker) if runtime.gpus_per_worker else gpus))
    fits = _workers.by_memory(spec) if len(cluster.machines()) == 1 else spec.num_clients  # of others nothing is known
    return max(1, min(spec.num_clients, fits, int(resources.get("CPU", 1)) // runtime.threads))


def _gpus_per_worker(spec: WorkSpec, workers: int) -> float:
    runtime = spec.config.runtime
    if runtime.gpus_per_worker or runtime.device == "cpu":
        return runtime.gpus_per_worker
    gpus = cluster.resources().get("GPU", 0.0)
    return gpus / workers if gpus < workers else float(gpus // workers)


def _death(what: str, times: int, error: Exception) -> str:
    advice = "out of memory? fewer runtime.workers or a smaller client.batch_size"
    return f"Ray workers died {times} times over {what}: {last_line(error)} ({advice})"
