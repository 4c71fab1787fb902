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
from clients.pools import _bundles
from fedsim.core import contracts
from fedsim.core.errors import ClientFailed, PoolError
from fedsim.core.messages import Bundle, ClientJob, ClientUpdate, EvalJob, EvalResult, RoundPlan, Tensors, num_bytes

IN_FLIGHT = 2  # messages handed to a worker ahead: the next one waits there while a result travels
START_S = 60.0  # that the workers are waited for; those that are later get their first message all the same
INLINE = 1 << 16  # bytes up to which a broadcast travels in messages: the object store has a price per object
NO_PLAN = RoundPlan()
_numbers = itertools.count(1)


class Pool(contracts.Pool):
    """Bundles of clients over the workers, in the order of the jobs (longest first). A worker that dies is replaced, and its
    clients run again with the same result; after `runtime.max_restarts` deaths over one bundle it is a PoolError."""

    worker: ClassVar[str] = "clients.worker:Worker"  # module:class that does the work, imported in the worker processes

    def __init__(self, spec: contracts.WorkSpec) -> None:
        runtime = spec.config.runtime
        self._owns_ray, self._actors = not ray.is_initialized(), list[Any]()
        if self._owns_ray:
            cluster.start(runtime.address, 0 if runtime.workers == "auto" else runtime.workers * runtime.threads)
        try:
            self._start(spec)
        except BaseException:  # Ctrl-C too: Ray must not be left behind in a session that goes on
            self.close()
            raise

    def _start(self, spec: contracts.WorkSpec) -> None:
        """Start the workers and wait until they have loaded, side by side."""
        runtime = spec.config.runtime
        self._size = _num_workers(spec)
        self._max_restarts = runtime.max_restarts
        self._spec = spec
        self._spec_ref = ray.put(spec)
        self._options = {"num_cpus": runtime.threads, "num_gpus": _gpus_per_worker(spec, self._size), "max_concurrency": 1}
        self._actor_class = ray.remote(_worker_class())
        self._actors = [self._new_actor() for _ in range(self._size)]
        self._told = [0] * self._size  # the broadcast that each worker was sent last
        ray.wait([actor.pid.remote() for actor in self._actors], num_returns=self._size, timeout=START_S)

    def train(self, jobs: Sequence[ClientJob]) -> Iterator[Bundle]:
        shared = _Broadcasts()
        cut = list(_bundles.bundles(jobs, self._size, self._spec.config.runtime.fused))
        messages = []
        for start, bundle in cut:
            light = [replace(job, params={}, plan=NO_PLAN) for job in bundle]
            messages.append((shared.put(bundle[0].params, bundle[0].plan), start, light))
        for bundle in self._run("train", messages, lambda i: _describe(cut[i][1])):
            yield with_tensors(bundle, to_tensors, lasting=copied)

    def evaluate(self, jobs: Sequence[EvalJob]) -> Iterator[EvalResult]:
        shared = _Broadcasts()
        messages = [(shared.put(job.params, NO_PLAN), replace(job, params={})) for job in jobs]
        yield from self._run("evaluate", messages, lambda i: f"evaluation of task {jobs[i].task}")

    def close(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(Exception):  # it may be dead already
                ray.kill(actor)
        self._actors = []
        if self._owns_ray and ray.is_initialized():
            ray.shutdown()
        self._owns_ray = False

    def worker_pids(self) -> list[int]:
        """Process ids of the workers (for tests that kill one)."""
        return [ray.get(actor.pid.remote()) for actor in self._actors]

    def _new_actor(self) -> Any:
        return self._actor_class.options(**self._options).remote(
            cluster.ROOT, cluster.ours_first(), self.worker, [self._spec_ref]
        )

    def _run(self, method: str, messages: Sequence[Any], describe: Callable[[int], str]) -> Iterator[Any]:
        """Hand out messages in order, `IN_FLIGHT` to a worker, and yield what comes back as it comes."""
        waiting = deque(range(len(messages)))
        deaths = [0] * len(messages)
        running: dict[Any, _Running] = {}
        load = [0] * len(self._actors)
        while waiting or running:
            while waiting and min(load) < IN_FLIGHT:
                slot = load.index(min(load))
                number = waiting.popleft()
                shared, *rest = messages[number]
                content = None if self._told[slot] == shared.number else shared.content  # once per worker and round
                self._told[slot] = shared.number
                ref = getattr(self._actors[slot], method).remote(shared.number, content, *rest)
                running[ref] = _Running(number, slot, self._actors[slot])
                load[slot] += 1
            finished, _ = ray.wait(list(running), num_returns=1)
            for ref in finished:
                task = running.pop(ref)
                load[task.slot] -= 1
                try:
                    yield ray.get(ref)
                except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as e:
                    deaths[task.number] += 1
                    if deaths[task.number] > self._max_restarts:
                        raise PoolError(_death(describe(task.number), deaths[task.number], e)) from e
                    if self._actors[task.slot] is task.actor:  # the first of its messages to notice replaces it
                        self._actors[task.slot], self._told[task.slot] = self._new_actor(), 0
                    waiting.appendleft(task.number)
                except ray.exceptions.RayTaskError as e:
                    raise PoolError(f"a Ray worker failed on {describe(task.number)}: {last_line(e)}") from e


@dataclass(frozen=True)
class _Running:
    number: int
    slot: int
    actor: Any


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
            value = to_numpy(params), replace(plan, background={}), to_numpy(plan.background)
            large = num_bytes(params) + num_bytes(plan.background) > INLINE
            self._known[key] = _Broadcast(next(_numbers), [ray.put(value) if large else value])
        return self._known[key]


def _worker_class() -> type[Any]:
    """The actor's class, made in a function so that it travels by value (see `cluster.ours_first`)."""

    class FedsimWorker:
        def __init__(self, root: str, put_first: Callable[[str], None], worker: str, spec_ref: list[Any]) -> None:
            put_first(root)
            import importlib
            from functools import partial

            import ray

            from fedsim.core.defaults import torch_defaults

            module, _, name = worker.partition(":")
            spec = ray.get(spec_ref[0])
            self.defaults = partial(torch_defaults, spec.config.runtime.threads)
            with self.defaults():
                self.worker = getattr(importlib.import_module(module), name)(spec)
            self.broadcast: tuple[int, Any, Any] = (0, None, None)

        def pid(self) -> int:
            import os

            return os.getpid()

        def train(self, number: int, content: list[Any] | None, start: int, jobs: list[Any]) -> Any:
            from dataclasses import replace

            from clients.pools.ray import to_numpy, with_tensors

            params, plan = self._fetch(number, content)
            with self.defaults():
                bundle = self.worker.train(start, [replace(job, params=params, plan=plan) for job in jobs])
            return with_tensors(bundle, to_numpy)

        def evaluate(self, number: int, content: list[Any] | None, job: Any) -> Any:
            from dataclasses import replace

            params, _ = self._fetch(number, content)
            with self.defaults():
                return self.worker.evaluate(replace(job, params=params))

        def _fetch(self, number: int, content: list[Any] | None) -> tuple[Any, Any]:
            if self.broadcast[0] != number:
                from dataclasses import replace

                import ray

                from clients.pools.ray import to_tensors

                assert content is not None, "messages arrive in the order in which they were sent"
                value = ray.get(content[0]) if isinstance(content[0], ray.ObjectRef) else content[0]
                params, plan, background = value
                self.broadcast = (number, to_tensors(params), replace(plan, background=to_tensors(background)))
            return self.broadcast[1], self.broadcast[2]

    return FedsimWorker


def to_tensors(arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Views of arrays in shared memory, which are read-only: nobody trains in place on what was received."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return {n: torch.from_numpy(a) for n, a in arrays.items()}


def to_numpy(tensors: Tensors) -> dict[str, np.ndarray[Any, Any]]:
    """Views of tensors, which Ray moves as they lie, where it would take a tensor apart."""
    return {n: t.numpy() for n, t in tensors.items()}


def with_tensors(bundle: Bundle, form: Callable[[Any], Any], lasting: Callable[[Any], Any] | None = None) -> Bundle:
    """The bundle with all of its mappings of tensors in another form; in the form `lasting` what is kept when a sum is done."""
    lasting = lasting or form
    summed = bundle.total is not None

    def changed(r: ClientUpdate | ClientFailed) -> ClientUpdate | ClientFailed:
        if isinstance(r, ClientFailed):
            return r
        params = lasting(r.params) if summed else form(r.params)
        return replace(r, params=params, statistics=form(r.statistics), memory=lasting(r.memory))

    total = None if bundle.total is None else form(bundle.total)
    return replace(bundle, results=tuple(map(changed, bundle.results)), total=total)


def copied(arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Copies: a view would hold all of a message in Ray's store."""
    return {n: torch.from_numpy(a.copy()) for n, a in arrays.items()}


def _describe(jobs: Sequence[ClientJob]) -> str:
    clients = ", ".join(str(job.client_id) for job in jobs)
    return f"client{'s' * (len(jobs) > 1)} {clients}, task {jobs[0].task}, round {jobs[0].round}"


def _num_workers(spec: contracts.WorkSpec) -> int:
    """As asked, or one per `threads` cores of the cluster (one per GPU when there are GPUs), at most one per client."""
    runtime = spec.config.runtime
    if runtime.workers != "auto":
        return int(runtime.workers)
    resources = cluster.resources()
    gpus = int(resources.get("GPU", 0)) if runtime.device != "cpu" else 0
    if gpus:
        return max(1, min(spec.num_clients, int(gpus / runtime.gpus_per_worker) if runtime.gpus_per_worker else gpus))
    return max(1, min(spec.num_clients, int(resources.get("CPU", 1)) // runtime.threads))


def _gpus_per_worker(spec: contracts.WorkSpec, workers: int) -> float:
    runtime = spec.config.runtime
    if runtime.gpus_per_worker or runtime.device == "cpu":
        return runtime.gpus_per_worker
    gpus = cluster.resources().get("GPU", 0.0)
    return gpus / workers if gpus < workers else float(gpus // workers)


def _death(what: str, times: int, error: Exception) -> str:
    advice = "out of memory? fewer runtime.workers or a smaller client.batch_size"
    return f"Ray workers died {times} times over {what}: {last_line(error)} ({advice})"
