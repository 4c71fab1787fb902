"""Clients as a Flower `ClientApp` on Flower's own simulation engine: the same jobs, the same bits as the serial pool.

What is notable here:
- What travels is `clients/flower_records.py`, as in a deployment on real devices; only the engine below it is another.
- Flower wants to own the loop, and so do we. Its engine therefore runs on a background thread, with a `ServerApp` that
  does nothing but hand out its `Grid` and wait; the caller's thread pushes messages to that grid and pulls the replies.
- A Flower node is a slot, not a client: a message carries the client's id and everything the client remembers, so any
  node may run any client. Nodes cost a scan every 0.1 s whether they work or not, so there are few (`_num_nodes`).
- Model and data do not travel in messages: they lie in a file that every worker process maps once.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import importlib
import logging
import math
import mmap
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from clients import flower_records as records
from clients.pools import _workers
from fedsim.core import contracts, errors
from fedsim.core.defaults import torch_defaults
from fedsim.core.errors import FedsimError, PoolError
from fedsim.core.home import ROOT, ours_first
from fedsim.core.messages import (
    Bundle,
    ClientJob,
    EvalJob,
    EvalResult,
    ServerJob,
    State,
)
from fedsim.core.work import WorkSpec

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when flwr is imported
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

with warnings.catch_warnings():  # flwr's own dependencies warn on import
    warnings.simplefilter("ignore")
    from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

MAX_NODES = 32
START_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 3.0
POLL_S = 0.005
LOSSES = ("ActorDiedError", "ActorUnavailableError", "RayActorError", "WorkerCrashedError", "NodeDiedError")


class Pool(contracts.Pool):
    """Longest shard first over the nodes; results in the order of the jobs. Starts on first use.

    A worker process that dies is replaced by Ray and its client runs again, with the same result, `runtime.max_restarts`
    times; then it is a PoolError, as is an engine that does not start. One such pool per process at a time.
    """

    worker: ClassVar[str] = "clients.worker:Worker"  # module:class that does the work, imported in the worker processes

    @classmethod
    def check(cls, spec: WorkSpec) -> None:
        if spec.config.runtime.address is not None:
            raise PoolError("runtime.pool=flower runs on this machine only and cannot join runtime.address: use runtime.pool=ray")
        if spec.config.runtime.workers != "auto":
            _workers.require_room(spec, spec.config.runtime.workers)

    def __init__(self, spec: WorkSpec) -> None:
        self._spec = spec
        self._engine: _Engine | None = None

    def train(self, jobs: Sequence[ClientJob]) -> Iterator[Bundle]:
        sizes = [len(self._spec.shard(job.task, job.client_id)) for job in jobs]
        names = [f"client {job.client_id}, task {job.task}, round {job.round}" for job in jobs]
        arrays = records.shared_arrays()
        replies = self._run(MessageType.TRAIN, lambda i: records.job_to_record(jobs[i], arrays), sizes, names)
        for place, reply in enumerate(replies):
            yield Bundle(place, (records.record_to_outcome(reply),))

    def evaluate(self, jobs: Sequence[EvalJob]) -> Iterator[EvalResult]:
        sizes = [job.stop - job.start for job in jobs]
        names = [f"evaluation of task {job.task}, samples {job.start}..{job.stop}" for job in jobs]
        arrays = records.shared_arrays()
        for reply in self._run(MessageType.EVALUATE, lambda i: records.eval_job_to_record(jobs[i], arrays), sizes, names):
            yield records.record_to_result(reply)

    def make(self, job: ServerJob) -> State:
        what = f"what the server trains for learner {job.learner}"
        (reply,) = self._run(MessageType.TRAIN, lambda _: records.server_job_to_record(job), [1], [what])
        return records.record_to_state(reply)

    def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _run(self, message_type: str, record: Any, sizes: Sequence[int], names: Sequence[str]) -> Iterator[RecordDict]:
        """One message per job, one at a time per node, largest first; replies as soon as the order of the jobs allows."""
        if not sizes:
            return
        if self._engine is None:
            self._engine = _Engine(self._spec, self.worker)
        engine = self._engine
        grid, idle = engine.grid, list(engine.nodes)
        waiting = deque(sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)))
        running: dict[str, tuple[int, int]] = {}  # message id -> job, node
        losses = [_Losses(name, self._spec.config.runtime.max_restarts) for name in names]
        done: dict[int, RecordDict] = {}
        next_out = 0
        while next_out < len(sizes):
            while waiting and idle:
                job, node = waiting.popleft(), idle.pop(0)
                sent = list(grid.push_messages([Message(record(job), node, message_type)]))
                if not sent:
                    raise PoolError(f"Flower's engine took no message for {names[job]}{engine.last_words()}")
                running[sent[0]] = job, node
            replies = list(grid.pull_messages(running.keys()))
            for reply in replies:
                job, node = running.pop(reply.metadata.reply_to_message_id)
                idle.append(node)
                if reply.has_error():
                    losses[job].add(reply.error.reason)
                    waiting.appendleft(job)
                else:
                    done[job] = _content(reply.content, names[job])
            while next_out in done:
                yield done.pop(next_out)
                next_out += 1
            if not replies:
                engine.check()
                time.sleep(POLL_S)


class _Losses:
    """How often a job's worker was lost. Raises PoolError when it is too often, or when the error is no loss at all."""

    def __init__(self, what: str, max_restarts: int) -> None:
        self._what, self._max_restarts = what, max_restarts
        self._deaths, self._first = 0, math.inf

    def add(self, reason: str | None) -> None:
        """`reason`: Flower's text, which starts with the class of Ray's exception."""
        reason = reason or "no reason given"
        found = re.match(r"<class 'ray\.exceptions\.(\w+)'", reason)
        if found is None or found[1] not in LOSSES:
            raise PoolError(f"a Flower worker failed on {self._what}: {_last_line(reason)}")
        self._first = min(self._first, time.monotonic())
        self._deaths += "restarting" not in reason  # else the job never ran: the actor was on its way back from another's death
        if self._deaths > self._max_restarts or time.monotonic() - self._first > START_TIMEOUT_S:
            hint = "out of memory? fewer runtime.workers or a smaller client.batch_size"
            raise PoolError(f"Flower workers died {self._deaths} times over {self._what}: {found[1]} ({hint})")


def _content(record: RecordDict, what: str) -> RecordDict:
    """The records of a reply; an error of the worker's own is raised here."""
    if records.kind_of(record) == "error":
        values = record.config_records["error"]
        known = getattr(errors, str(values["class"]), None)
        if isinstance(known, type) and issubclass(known, FedsimError):
            raise known(str(values["message"]))
        raise PoolError(f"a Flower worker failed on {what}: {values['class']!s}: {values['message']!s}")
    return record


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:400]


def _last_line(reason: str) -> str:
    """What Flower quotes is a whole traceback of Ray's, in colours."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", reason).splitlines()]
    return _one_line(next((line for line in reversed(lines) if line), "").removesuffix("'>"))


# ---------------------------------------------------------------- in the worker processes


def client_app(folder: str, worker: str) -> ClientApp:
    """The ClientApp. `folder` holds the work spec; `worker` is `module:class`."""
    root, put_first = ROOT, ours_first()
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        # A function inside a function travels by value: one that travels by name would make the worker process import
        # `clients` before any line of ours runs there, and find a clients.py in the user's working directory.
        import importlib

        put_first(root)
        served: Message = importlib.import_module("clients.pools.flower").serve(message, folder, worker)
        return served

    app.train()(handle)
    app.evaluate()(handle)
    return app


def serve(message: Message, folder: str, worker: str) -> Message:
    """Do what a message asks. Every error goes back as a value, with its class and message."""
    try:
        content = _work(message.content, _worker(folder, worker))
    except Exception as e:
        content = RecordDict({"error": ConfigRecord({"kind": "error", "class": type(e).__name__, "message": _one_line(e)})})
    return Message(content, reply_to=message)


def _work(record: RecordDict, worker: Any) -> RecordDict:
    with torch_defaults(worker.spec.config.runtime.threads):
        if records.kind_of(record) == "evaluate":
            return records.result_to_record(worker.evaluate(records.record_to_eval_job(record)))
        if records.kind_of(record) == "make":
            return records.state_to_record(worker.make(records.record_to_server_job(record)))
        result = worker.train_client(records.record_to_job(record))
    return records.outcome_to_record(result)


@functools.lru_cache(maxsize=1)
def _worker(folder: str, worker: str) -> Any:
    """The worker of this process: model and data are loaded once."""
    _leave_pid(Path(folder))
    spec = read_spec(Path(folder))
    module, _, name = worker.partition(":")
    with torch_defaults(spec.config.runtime.threads):
        return getattr(importlib.import_module(module), name)(spec)


def write_spec(spec: WorkSpec, folder: Path) -> None:
    """Pickle a work spec with its arrays apart, 64-byte aligned in one file, so that all workers can map the same pages."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(spec, protocol=5, buffer_callback=buffers.append)
    sizes: list[int] = []
    with open(folder / "arrays", "wb") as f:
        for buffer in buffers:
            raw = buffer.raw()
            f.write(raw)
            f.write(bytes(-raw.nbytes % 64))
            sizes.append(raw.nbytes)
    (folder / "spec").write_bytes(pickle.dumps((pickled, sizes)))


def read_spec(folder: Path) -> WorkSpec:
    """The spec that `write_spec` wrote. Its arrays map the file: a page that is written to becomes this process's own."""
    pickled, sizes = pickle.loads((folder / "spec").read_bytes())
    data = memoryview(b"")
    if (folder / "arrays").stat().st_size:
        with open(folder / "arrays", "rb") as f:
            data = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY))
    buffers, start = [], 0
    for size in sizes:
        buffers.append(data[start : start + size])
        start += size + -size % 64
    spec = pickle.loads(pickled, buffers=buffers)
    assert isinstance(spec, WorkSpec)
    return spec


def _leave_pid(folder: Path) -> None:
    """A locked file named after this process: locked for as long as the process lives, so that nobody else is killed for it."""
    handle = os.open(folder / f"{os.getpid()}.pid", os.O_CREAT | os.O_RDWR)  # closed by the process's end
    fcntl.flock(handle, fcntl.LOCK_EX)


def _kill_workers(folder: Path) -> None:
    """End the worker processes of an engine, whatever they are doing: Flower has no call for it."""
    for path in folder.glob("*.pid"):
        with open(path, encoding="utf-8") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(path.stem), signal.SIGKILL)


# ---------------------------------------------------------------- the engine


class _Engine:
    """Flower's simulation on a background thread. `grid` and `nodes` are there once the constructor returns."""

    grid: Grid
    nodes: list[int]

    def __init__(self, spec: WorkSpec, worker: str) -> None:
        _refuse_foreign_ray()
        self._environment = {key: os.environ.get(key) for key in ("PYTHONPATH", "FLWR_HOME")}
        self._ray_level = logging.getLogger("ray").level
        self._log = _FlowerLog()
        self._stop, self._over = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._grid: Grid | None = None
        self._folder = Path()
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="fedsim-flower-"))
            write_spec(spec, self._folder)
        except OSError as e:
            if self._folder.name:
                shutil.rmtree(self._folder, ignore_errors=True)
            raise PoolError(f"no data for Flower's workers through {tempfile.gettempdir()}: {e} (set TMPDIR)") from e
        os.environ["FLWR_HOME"] = str(self._folder)  # else Flower leaves a file with an id in the user's home
        self._log.install()
        OPEN_ENGINES.add(self)
        _close_engines_at_exit()
        self._thread = threading.Thread(target=self._simulate, args=(spec, worker), name="fedsim-flower", daemon=True)
        self._thread.start()
        try:
            self._wait_for_nodes(_num_nodes(spec))
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """Raise PoolError if the engine has stopped."""
        if self._over.is_set():
            cause: object = self._error
            while isinstance(cause, BaseException) and cause.__cause__ is not None:
                cause = cause.__cause__
            words = f": {type(cause).__name__}: {_one_line(cause)}" if cause is not None else self.last_words()
            raise PoolError(f"Flower's simulation engine has stopped{words} (runtime.pool=serial or ray runs without Flower)")

    def last_words(self) -> str:
        """What Flower logged last as an error, for a message."""
        return f": {_one_line(self._log.last)}" if self._log.last else ""

    def close(self) -> None:
        OPEN_ENGINES.discard(self)
        self._stop.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        for _ in range(10):
            if self._thread.is_alive():  # a client is still being trained, and Flower would wait for it
                _kill_workers(self._folder)
                self._thread.join(CLOSE_TIMEOUT_S)
        self._log.remove()
        logging.getLogger("ray").setLevel(self._ray_level)
        for key, value in self._environment.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_for_nodes(self, count: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            if self._grid is not None:
                self.grid, self.nodes = self._grid, sorted(self._grid.get_node_ids())
                if len(self.nodes) == count:
                    return
            self.check()
            if time.monotonic() > deadline:
                raise PoolError(f"Flower's simulation engine did not start within {START_TIMEOUT_S:.0f} s{self.last_words()}")
            time.sleep(POLL_S)

    def _simulate(self, spec: WorkSpec, worker: str) -> None:
        try:
            _run_simulation(self._server_app(), client_app(str(self._folder), worker), _num_nodes(spec), _backend_config(spec))
        except BaseException as e:
            self._error = e
        finally:
            self._stop.set()
            self._over.set()

    def _server_app(self) -> ServerApp:
        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            self._grid = grid
            self._stop.wait()

        return app


def _run_simulation(server: ServerApp, client: ClientApp, num_nodes: int, backend: dict[str, dict[str, Any]]) -> None:
    """The engine's only public door from Python. Flower means to drop it in favour of the command `flwr run`, which owns the
    process; `flwr.simulation.run_simulation._run_simulation`, which that command calls too, takes the same arguments."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from flwr.simulation import run_simulation
    run_simulation(server, client, num_nodes, backend_config=backend)


def _backend_config(spec: WorkSpec) -> dict[str, dict[str, Any]]:
    """Ray starts with exactly the cores that `workers` actors need, because Flower fills whatever Ray has.

    Flower hands `client_resources` to Ray as options of its actors, so restarts can be asked for there. Retries of jobs are
    ours (`_Losses`): Ray's would also "retry" the call by which Flower ends its actors, and say so on the terminal.
    """
    runtime, workers = spec.config.runtime, _num_workers(spec)
    gpus = _num_gpus(spec)
    share = runtime.gpus_per_worker or (math.floor(1e4 * gpus / workers) / 1e4 if gpus < workers else float(gpus // workers))
    return {
        "init_args": {
            "num_cpus": workers * runtime.threads,
            "address": "local",
            "include_dashboard": False,
            "log_to_driver": False,
            "logging_level": "error",
        },
        "client_resources": {
            "num_cpus": runtime.threads,
            "num_gpus": share if gpus else 0.0,
            "max_restarts": -1,
        },
    }


def _num_gpus(spec: WorkSpec) -> int:
    return torch.cuda.device_count() if spec.config.runtime.device != "cpu" else 0


def _num_workers(spec: WorkSpec) -> int:
    """As asked, or one per `threads` cores (one per GPU when there are GPUs), at most one per client."""
    runtime = spec.config.runtime
    if runtime.workers != "auto":
        return int(runtime.workers)
    gpus = _num_gpus(spec)
    if gpus:
        return max(1, min(spec.num_clients, int(gpus / runtime.gpus_per_worker) if runtime.gpus_per_worker else gpus))
    return max(1, min(spec.num_clients, _workers.by_memory(spec), (os.cpu_count() or 1) // runtime.threads))


def _num_nodes(spec: WorkSpec) -> int:
    """A node for every client up to MAX_NODES, and for every worker.

    The engine hands each node at most one message per 0.1 s, so a node per worker would starve workers on short jobs;
    every node more makes its scan (nodes x messages) dearer, so it is not a node per client of a large federation.
    """
    return max(_num_workers(spec), min(spec.num_clients, MAX_NODES))


def _refuse_foreign_ray() -> None:
    """Flower would use a Ray that is up already, whatever its size, and shut it down at the end."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        raise PoolError(
            "Ray is in use in this process, and Flower's engine would shut it down: close that pool or call ray.shutdown() first"
        )


OPEN_ENGINES: weakref.WeakSet[_Engine] = weakref.WeakSet()


@functools.cache
def _close_engines_at_exit() -> None:
    """For pools that nobody closed: Flower's threads would keep Python alive for ever.

    Python ends threads before it calls what `atexit` knows, and has no public hook that comes earlier.
    """

    def close_all() -> None:
        for engine in list(OPEN_ENGINES):
            engine.close()

    getattr(threading, "_register_atexit", atexit.register)(close_all)


class _FlowerLog(logging.Filter):
    """While installed, nothing of Flower's log is shown; the last error is kept. The user's logging is as before once removed."""

    last: str = ""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            text = record.getMessage()
            self.last = self.last if text.startswith("Traceback") else text
        return False

    def install(self) -> None:
        logging.getLogger("flwr").addFilter(self)

    def remove(self) -> None:
        logging.getLogger("flwr").removeFilter(self)
