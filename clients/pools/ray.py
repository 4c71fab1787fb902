"""Clients on Ray: one box by default, or an existing cluster (`runtime.address`).

Each worker is an actor that loads model and data once. Data arrays lie once in Ray's object store and are read without
a copy; a round's parameters are put there once, not once per client. Nothing polls: the driver sleeps in `ray.wait`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch

from clients import cluster
from clients.cluster import last_line
from fedsim.core import contracts
from fedsim.core.errors import ClientFailed, PoolError
from fedsim.core.messages import ClientJob, ClientUpdate, EvalJob, EvalResult, RoundPlan, Tensors

IN_FLIGHT = 2  # jobs handed to a worker ahead: the next one waits there while a result travels


class Pool(contracts.Pool):
    """Longest shard first over the workers; results in the order of the jobs. A worker that dies is replaced, and its
    clients run again with the same result; after `runtime.max_restarts` deaths over one job it is a PoolError."""

    def __init__(self, spec: contracts.WorkSpec) -> None:
        runtime = spec.config.runtime
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            cluster.start(runtime.address, 0 if runtime.workers == "auto" else runtime.workers * runtime.threads)
        self._size = _num_workers(spec)
        self._max_restarts = runtime.max_restarts
        self._spec = spec
        self._spec_ref = ray.put(spec)
        self._options = {"num_cpus": runtime.threads, "num_gpus": _gpus_per_worker(spec, self._size), "max_concurrency": 1}
        self._actor_class = ray.remote(_worker_class())
        self._actors = [self._new_actor() for _ in range(self._size)]

    def train(self, jobs: Sequence[ClientJob]) -> Iterator[ClientUpdate | ClientFailed]:
        shared = _Broadcasts()
        light = [(shared.put(job.params, job.plan), replace(job, params={}, plan=RoundPlan())) for job in jobs]
        sizes = [len(self._spec.shard(job.task, job.client_id)) for job in jobs]
        yield from self._run(
            "train", light, sizes, lambda i: f"client {jobs[i].client_id}, task {jobs[i].task}, round {jobs[i].round}"
        )

    def evaluate(self, jobs: Sequence[EvalJob]) -> Iterator[EvalResult]:
        shared = _Broadcasts()
        light = [(shared.put(job.params, RoundPlan()), replace(job, params={})) for job in jobs]
        yield from self._run(
            "evaluate", light, [job.stop - job.start for job in jobs], lambda i: f"evaluation of task {jobs[i].task}"
        )

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
        return self._actor_class.options(**self._options).remote(cluster.ROOT, cluster.ours_first(), [self._spec_ref])

    def _run(self, method: str, light: Sequence[Any], sizes: Sequence[int], describe: Callable[[int], str]) -> Iterator[Any]:
        """Dispatch jobs by size, largest first, and yield results in order as soon as the order allows."""
        waiting = deque(sorted(range(len(light)), key=lambda i: (-sizes[i], i)))
        deaths = [0] * len(light)
        running: dict[Any, _Running] = {}
        load = [0] * len(self._actors)
        done: dict[int, Any] = {}
        next_out = 0
        while next_out < len(light):
            while waiting and min(load) < IN_FLIGHT:
                slot = load.index(min(load))
                job = waiting.popleft()
                ref = getattr(self._actors[slot], method).remote(*light[job])
                running[ref] = _Running(job, slot, self._actors[slot])
                load[slot] += 1
            finished, _ = ray.wait(list(running), num_returns=1)
            for ref in finished:
                task = running.pop(ref)
                load[task.slot] -= 1
                try:
                    done[task.job] = ray.get(ref)
                except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as e:
                    deaths[task.job] += 1
                    if deaths[task.job] > self._max_restarts:
                        raise PoolError(_death(describe(task.job), deaths[task.job], e)) from e
                    if self._actors[task.slot] is task.actor:  # the first of its jobs to notice replaces it
                        self._actors[task.slot] = self._new_actor()
                    waiting.appendleft(task.job)
                except ray.exceptions.RayTaskError as e:
                    raise PoolError(f"a Ray worker failed on {describe(task.job)}: {last_line(e)}") from e
            while next_out in done:
                yield done.pop(next_out)
                next_out += 1


@dataclass(frozen=True)
class _Running:
    job: int
    slot: int
    actor: Any


class _Broadcasts:
    """Puts each distinct (params, plan) into the object store once, as numpy arrays, which workers read without a copy."""

    def __init__(self) -> None:
        self._refs: dict[tuple[int, int], list[Any]] = {}

    def put(self, params: Tensors, plan: RoundPlan) -> list[Any]:
        """A list around the reference: Ray then leaves it to the worker to fetch, which does so once per round."""
        key = (id(params), id(plan))
        if key not in self._refs:
            self._refs[key] = [ray.put((_to_numpy(params), replace(plan, background={}), _to_numpy(plan.background)))]
        return self._refs[key]


def _worker_class() -> type[Any]:
    """The actor's class, made in a function so that it travels by value (see `cluster.ours_first`)."""

    class FedsimWorker:
        def __init__(self, root: str, put_first: Callable[[str], None], spec_ref: list[Any]) -> None:
            put_first(root)
            import ray
            import torch

            from clients.worker import Worker

            spec = ray.get(spec_ref[0])
            torch.set_num_threads(spec.config.runtime.threads)
            self.worker = Worker(spec)
            self.broadcast: tuple[str, Any, Any] = ("", None, None)

        def pid(self) -> int:
            import os

            return os.getpid()

        def train(self, shared: list[Any], job: Any) -> Any:
            from dataclasses import replace

            params, plan = self._fetch(shared[0])
            return self.worker.train(replace(job, params=params, plan=plan))

        def evaluate(self, shared: list[Any], job: Any) -> Any:
            from dataclasses import replace

            params, _ = self._fetch(shared[0])
            return self.worker.evaluate(replace(job, params=params))

        def _fetch(self, ref: Any) -> tuple[Any, Any]:
            if self.broadcast[0] != ref.hex():
                from dataclasses import replace

                import ray

                from clients.pools.ray import to_tensors

                params, plan, background = ray.get(ref)
                self.broadcast = (ref.hex(), to_tensors(params), replace(plan, background=to_tensors(background)))
            return self.broadcast[1], self.broadcast[2]

    return FedsimWorker


def to_tensors(arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Views of arrays in shared memory, which are read-only: nobody trains in place on what was received."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return {n: torch.from_numpy(a) for n, a in arrays.items()}


def _to_numpy(tensors: Tensors) -> dict[str, np.ndarray[Any, Any]]:
    return {n: t.numpy() for n, t in tensors.items()}


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
