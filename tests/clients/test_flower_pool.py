"""Jobs as Flower messages: exact there and back, and on Flower's own engine the bits of the serial pool."""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("flwr")

from clients import flower_records as records
from clients.pools import flower, serial
from clients.worker import Worker
from fedsim.core import contracts
from fedsim.core.errors import ClientFailed, ModelError, PoolError
from fedsim.core.messages import ClientJob, ClientUpdate, EvalJob, EvalResult, Reply, RoundPlan, ServerJob, StatisticRequest
from fedsim.core.work import WorkSpec
from fedsim.simulation import prepare, prepare_data, run
from tests.test_simulation import METHODS, ON_FLOWERS_ENGINE
from tests.tiny import final_state, kept, plain_vit, same_bits, tiny
from tests.tiny import learned as learned_by_run

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
SHAPES = ((), (1,), (3,), (2, 3), (0,), (0, 4), (2, 0, 3))
CHANNELS = "server.channel=[{name: topk, share: 0.2}, quantise]"
RANK_TOO_LARGE, BUG, DEATH, FAILURE, SLOW = range(90, 95)  # rounds in which `Scripted` misbehaves


class Scripted(Worker):
    """The real worker, with trouble in some rounds. Imported by name in the worker processes."""

    def train_client(self, job: ClientJob) -> ClientUpdate | ClientFailed:
        if job.round == RANK_TOO_LARGE:
            raise ModelError("rank 9 is larger than the layer")
        if job.round == BUG:
            raise ValueError("two\nlines")
        if job.round == DEATH:
            died = Path(self.spec.config.runtime.output) / f"died-{job.client_id}"
            if job.client_id == 1 and not died.exists():
                died.touch()
                os._exit(1)
        if job.round == FAILURE and job.client_id == 1:
            return ClientFailed(1, job.task, job.round, "training", "the loss is nan")
        if job.round == SLOW and job.client_id == 1:
            time.sleep(600)
        update = super().train_client(job)
        assert isinstance(update, ClientUpdate)
        here = {"threads": float(torch.get_num_threads()), "pid": float(os.getpid())}
        return replace(update, metrics={**update.metrics, **here})


class Pool(flower.Pool):
    worker = f"{__name__}:Scripted"


# ---------------------------------------------------------------- converters


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    """A few tensors of any bits: NaN, infinities and signed zeros are among them."""
    out = {}
    for name in draw(st.lists(st.text(min_size=1, max_size=20), max_size=3, unique=True)):
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SHAPES))
        raw = np.random.default_rng(draw(st.integers(0, 99))).bytes(int(np.prod(shape)) * dtype.itemsize)
        bits = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
        out[name] = (bits.bool() if dtype is torch.bool else bits.view(dtype))[: int(np.prod(shape))].reshape(shape)
    return out


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
requests = st.builds(
    StatisticRequest,
    name=st.text(max_size=8),
    match=st.lists(st.text(max_size=8), max_size=2).map(tuple),
    options=st.dictionaries(st.text(max_size=5), plain, max_size=2),
    blended=st.booleans(),
)
plans = st.builds(
    RoundPlan,
    train=st.lists(st.text(max_size=8), max_size=2).map(tuple),
    statistics=st.lists(requests, max_size=2).map(tuple),
    context=st.dictionaries(st.text(max_size=8), tensors(), max_size=2),
    share=st.floats(0, 1),
)
small = st.integers(0, 10_000)
replies = st.builds(
    Reply, sums=st.lists(st.text(max_size=8), max_size=2).map(tuple), observed=st.lists(small, max_size=2).map(tuple)
)
jobs = st.builds(
    ClientJob, client_id=small, task=small, round=small, params=tensors(), plan=plans, memory=tensors(), reply=replies
)
updates = st.builds(
    ClientUpdate,
    client_id=small,
    num_samples=small,
    params=tensors(),
    statistics=tensors(),
    memory=st.none() | tensors(),
    metrics=st.dictionaries(st.text(max_size=8), st.floats(), max_size=3),
    encoded=st.dictionaries(st.text(min_size=1, max_size=8), small, max_size=3),
)


def same(a: Any, b: Any) -> bool:
    """Equality of nested values by type, order and bits."""
    if isinstance(a, Tensor):
        if not (isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape):
            return False
        flat = [t.clone(memory_format=torch.contiguous_format).reshape(-1) for t in (a, b)]
        return torch.equal(*(t.view(torch.uint8) for t in flat))
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return isinstance(b, float) and np.float64(a).tobytes() == np.float64(b).tobytes()
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    return type(a) is type(b) and bool(a == b)


def travelled(record: Any) -> Any:
    """A record after Ray's way of sending it, and then Flower's own way over a network."""
    from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

    sent = recorddict_to_proto(pickle.loads(pickle.dumps(record))).SerializeToString()
    return recorddict_from_proto(type(recorddict_to_proto(record)).FromString(sent))


@settings(max_examples=40)
@given(job=jobs)
def test_a_job_comes_back(job: ClientJob) -> None:
    assert same(records.record_to_job(travelled(records.job_to_record(job))), job)


@settings(max_examples=40)
@given(update=updates)
def test_an_update_comes_back(update: ClientUpdate) -> None:
    assert same(records.record_to_update(travelled(records.update_to_record(update))), update)


@settings(max_examples=20)
@given(job=st.builds(EvalJob, task=small, start=small, stop=small, params=tensors(), seen=st.lists(small, max_size=4)))
def test_an_evaluation_comes_back(job: EvalJob) -> None:
    assert same(records.record_to_eval_job(travelled(records.eval_job_to_record(job))), job)
    result = EvalResult(job.task, job.start, job.stop, len(job.seen), tuple((c, 0, c, 2) for c in job.seen))
    assert same(records.record_to_result(travelled(records.result_to_record(result))), result)


def test_a_failure_comes_back() -> None:
    failed = ClientFailed(3, 1, 2, "statistics", "statistic 'gram' holds NaN")
    assert same(records.failure_from_record(travelled(records.failure_to_record(failed))), failed)


def test_what_the_server_trains_comes_back() -> None:
    state = {
        "images": torch.arange(6, dtype=torch.uint8).view(2, 3),
        "nested": [{"x": torch.ones(2).double()}, (1, 2.5, None, "a")],
    }
    job = ServerJob("target", 3, {"head.bias": torch.ones(2)}, state)
    back = records.record_to_server_job(travelled(records.server_job_to_record(job)))
    assert (back.learner, back.task) == ("target", 3) and same_bits(dict(back.params), dict(job.params))
    assert same_bits(back.state, state) and isinstance(back.state["nested"][1], tuple)
    assert same_bits(records.record_to_state(travelled(records.state_to_record(None))), None)


def test_a_column_major_tensor_keeps_its_strides() -> None:
    """Strides decide which kernel a matrix product takes, and so its bits."""
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).T
    (back,) = records.arrays_to_tensors(records.tensors_to_arrays({"a": tensor})).values()
    assert back.stride() == tensor.stride()
    assert torch.equal(back, tensor)


def test_every_word_of_a_plan_comes_back() -> None:
    told = {"beneath": {"x": torch.ones(2)}}
    plan = RoundPlan(
        ("a",), (StatisticRequest("gram", blended=True),), told, 0.5, beside=True, keeps=("b",), since=2, hand_in=True, repeat=3,
        review="er", merged=("c", "d"),
    )  # fmt: skip
    assert all(getattr(plan, f.name) != getattr(RoundPlan(), f.name) for f in fields(RoundPlan))
    job = ClientJob(1, 2, 3, {"head.bias": torch.ones(2)}, plan)
    assert same(records.record_to_job(travelled(records.job_to_record(job))).plan, plan)


def test_options_that_are_no_plain_values_are_refused() -> None:
    plan = RoundPlan(statistics=(StatisticRequest("gram", options={"mask": torch.ones(2)}),))
    with pytest.raises(TypeError, match="must be plain values, got Tensor"):
        records.job_to_record(ClientJob(0, 0, 0, {}, plan))


def test_what_is_shared_by_a_round_is_converted_once() -> None:
    params = {"head.bias": torch.ones(2)}
    arrays = records.shared_arrays()
    first, second = (records.job_to_record(ClientJob(k, 0, 0, params, RoundPlan()), arrays) for k in range(2))
    assert first["params"] is second["params"]


# ---------------------------------------------------------------- the spec's file


def test_the_spec_comes_back_and_its_arrays_map_one_file(tmp_path: Path) -> None:
    _, spec, _ = prepare_data(tiny())
    flower.write_spec(spec, tmp_path)
    back = flower.read_spec(tmp_path)
    assert back.config == spec.config
    assert back.task_classes == spec.task_classes
    for name in ("shard_indices", "shard_offsets", "test_indices", "test_offsets"):
        np.testing.assert_array_equal(getattr(back, name), getattr(spec, name))
    np.testing.assert_array_equal(back.train.inputs["pixel_values"], spec.train.inputs["pixel_values"])
    assert (tmp_path / "arrays").stat().st_size >= spec.train.inputs["pixel_values"].nbytes
    assert (tmp_path / "spec").stat().st_size < 20_000
    back.train.inputs["pixel_values"][:] = 0  # a private page: neither the file nor another reader sees it
    np.testing.assert_array_equal(flower.read_spec(tmp_path).train.inputs["pixel_values"], spec.train.inputs["pixel_values"])


class Wire:
    """In the place of the engine: each message travels, is worked on in this process, and the answer travels back."""

    def __init__(self, spec: WorkSpec, worker: str) -> None:
        self.grid, self.nodes = self, [1]
        self._folder, self._worker = tempfile.mkdtemp(prefix="wire", dir=spec.config.runtime.output), worker
        self._answers: list[Any] = []
        flower.write_spec(spec, Path(self._folder))

    def push_messages(self, messages: list[Any]) -> list[str]:
        for message in messages:
            message.content = travelled(message.content)
            answer = flower.serve(message, self._folder, self._worker)
            answer.content = travelled(answer.content)
            self._answers.append(answer)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, _: Any) -> list[Any]:
        answers, self._answers = self._answers, []
        return answers

    def close(self) -> None:
        flower._worker.cache_clear()


@pytest.mark.parametrize("method", [m for m in METHODS if m != ON_FLOWERS_ENGINE])
def test_flowers_messages_carry_whole_runs(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of the serial pool, for the methods that tests/test_simulation.py does not run on Flower's own engine."""
    from flwr.supercore.task_identity import TaskIdentity

    monkeypatch.setattr(flower, "_Engine", Wire)
    for name in ("_task_id", "_run_id", "_node_id"):  # which the engine sets, and messages bear
        monkeypatch.setattr(TaskIdentity, name, 1)
    served, real = set[str](), flower.serve

    def serve(message: Any, folder: str, worker: str) -> Any:
        served.add(message.metadata.message_type)
        return real(message, folder, worker)

    monkeypatch.setattr(flower, "serve", serve)
    runs = []
    for pool in ("serial", "flower"):
        config = tiny(f"runtime.pool={pool}", output=tmp_path / pool, model=plain_vit(), **METHODS[method])
        path = run(config).path
        assert path is not None
        runs.append((learned_by_run(final_state(path, config)), kept(path)))
    assert served == {"train", "evaluate"}
    assert same_bits(*runs)


# ---------------------------------------------------------------- the engine


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> WorkSpec:
    """Three clients, two tasks, dropout and augmentation, two workers with one thread each."""
    adapter = {"name": "lora", "rank": 2, "targets": "all-linear", "dropout": 0.2}
    overrides = ("runtime.pool=flower", "runtime.workers=2", "transform.augment=affine", "runtime.max_restarts=1", CHANNELS)
    return prepare_data(tiny(*overrides, output=tmp_path_factory.mktemp("runs"), adapter=adapter))[1]


@pytest.fixture(scope="module")
def pool(spec: WorkSpec, tmp_path_factory: pytest.TempPathFactory, rays: Callable[[bool, bool], None]) -> Iterator[Pool]:
    """One engine for the tests below, started as by a user whose folder holds a clients.py, a server.py and a fedsim.py."""
    rays(False, False)
    folder = tmp_path_factory.mktemp("user")
    for decoy in ("clients.py", "server.py", "fedsim.py"):
        (folder / decoy).write_text("raise RuntimeError('the decoy was imported')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [str(folder), *sys.path])  # what Python does for a script of theirs, and Ray's workers with it
        opened = Pool(spec)
        list(opened.train(make_jobs(spec, 0)[:1]))
    yield opened
    opened.close()


def make_params(spec: WorkSpec) -> dict[str, Tensor]:
    worker = Worker(spec)
    return {**worker.model.init_adapter(torch.Generator().manual_seed(0)), **worker.model.init_head()}


def make_jobs(spec: WorkSpec, round: int, task: int = 0) -> list[ClientJob]:
    params = make_params(spec)
    gram = StatisticRequest("gram", ("adapter.*.lora_A",), {"form": "diagonal"}, blended=True)
    background = {n: 0.5 * t for n, t in params.items() if n.startswith("adapter.")}
    plan = RoundPlan(statistics=(gram,), context={"background": background}, share=0.5)
    return [ClientJob(k, task, round, params, plan) for k in (2, 0, 1)]


def trained(pool: contracts.Pool, jobs: list[ClientJob]) -> list[Any]:
    """The clients' results in the order of the jobs."""
    return [result for bundle in sorted(pool.train(jobs), key=lambda b: b.start) for result in bundle.results]


def learned(results: list[Any]) -> list[Any]:
    """Updates without what depends on where and when they were computed."""
    return [replace(r, metrics={"loss": r.metrics["loss"]}) if isinstance(r, ClientUpdate) else r for r in results]


def test_training_has_the_bits_and_the_order_of_the_serial_pool(pool: Pool, spec: WorkSpec) -> None:
    for round, task in ((0, 0), (1, 1)):
        jobs = make_jobs(spec, round, task)
        here, there = trained(serial.Pool(spec), jobs), trained(pool, jobs)
        assert [u.client_id for u in there if isinstance(u, ClientUpdate)] == [2, 0, 1]
        assert all(isinstance(u, ClientUpdate) and u.statistics and u.encoded and u.memory for u in there)
        assert same(learned(there), learned(here))


def test_evaluation_has_the_counts_of_the_serial_pool(pool: Pool, spec: WorkSpec) -> None:
    params = make_params(spec)
    jobs = [EvalJob(task, start, start + 5, params, [0, 1, 2, 3, 4, 5]) for task in (1, 0) for start in (5, 0)]
    there = list(pool.evaluate(jobs))
    assert there == list(serial.Pool(spec).evaluate(jobs))
    assert [r.total for r in there] == [5] * 4


def test_workers_have_the_threads_of_the_config_and_load_once(pool: Pool, spec: WorkSpec) -> None:
    found = [u.metrics for round in (0, 1) for u in trained(pool, make_jobs(spec, round)) if isinstance(u, ClientUpdate)]
    assert {m["threads"] for m in found} == {1.0}
    assert len({m["pid"] for m in found}) <= 2
    assert os.getpid() not in {m["pid"] for m in found}


def test_a_clients_failure_is_a_value(pool: Pool, spec: WorkSpec) -> None:
    results = trained(pool, make_jobs(spec, FAILURE))
    assert [type(r).__name__ for r in results] == ["ClientUpdate", "ClientUpdate", "ClientFailed"]
    assert same(results[2], ClientFailed(1, 0, FAILURE, "training", "the loss is nan"))


def test_a_workers_error_keeps_its_class_and_is_one_line(pool: Pool, spec: WorkSpec) -> None:
    with pytest.raises(ModelError, match=r"^rank 9 is larger than the layer$"):
        trained(pool, make_jobs(spec, RANK_TOO_LARGE))
    with pytest.raises(PoolError, match=rf"^a Flower worker failed on client \d, task 0, round {BUG}: ValueError: two lines$"):
        trained(pool, make_jobs(spec, BUG))


def test_a_worker_that_dies_is_replaced_and_its_client_runs_again(pool: Pool, spec: WorkSpec) -> None:
    jobs = make_jobs(spec, DEATH)
    there = trained(pool, jobs)
    assert (Path(spec.config.runtime.output) / "died-1").exists()
    assert same(learned(there), learned(trained(serial.Pool(spec), jobs)))


def test_no_jobs(pool: Pool) -> None:
    assert trained(pool, []) == []
    assert list(pool.evaluate([])) == []


def test_a_second_engine_in_one_process_is_refused(pool: Pool, spec: WorkSpec) -> None:
    with pytest.raises(PoolError, match="Ray is in use in this process"):
        trained(Pool(spec), make_jobs(spec, 0))
    assert len(trained(pool, make_jobs(spec, 0))) == 3


def test_closing_in_the_middle_of_a_round_ends_it_and_leaves_no_trace(pool: Pool, spec: WorkSpec) -> None:
    """The last test of this engine. A client that would sleep for ten minutes is not waited for."""
    results = pool.train(make_jobs(spec, SLOW))
    assert isinstance(next(iter(results)).results[0], ClientUpdate)
    engine = pool._engine
    assert engine is not None
    folder = engine._folder
    logger = logging.getLogger("flwr")
    assert logger.filters
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 30
    pool.close()
    assert not engine._thread.is_alive()
    assert not folder.exists()
    assert not logger.filters
    assert "FLWR_HOME" not in os.environ
    assert not sys.modules["ray"].is_initialized()


# ---------------------------------------------------------------- without an engine


def test_a_pool_that_never_worked_starts_and_stops_nothing(spec: WorkSpec) -> None:
    pool = Pool(spec)
    assert pool._engine is None
    pool.close()
    pool.close()


def test_a_cluster_elsewhere_is_refused() -> None:
    with pytest.raises(PoolError, match=r"cannot join runtime\.address: use runtime\.pool=ray"):
        prepare(tiny("runtime.pool=flower", "runtime.address=10.0.0.1:6379"))


def test_an_engine_that_breaks_is_a_pool_error(spec: WorkSpec, monkeypatch: pytest.MonkeyPatch, no_ray: None) -> None:
    def broken(*args: object) -> None:
        try:
            raise ValueError("ActorPool is empty.\nStopping.")
        except ValueError as e:
            raise RuntimeError("Simulation Runtime crashed.") from e

    monkeypatch.setattr(flower, "_run_simulation", broken)
    with pytest.raises(PoolError, match=r"has stopped: ValueError: ActorPool is empty\. Stopping\. \(runtime\.pool=serial"):
        trained(Pool(spec), make_jobs(spec, 0))
    assert not logging.getLogger("flwr").filters


def test_a_folder_that_takes_no_data_is_a_pool_error(
    spec: WorkSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_ray: None
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(flower, "write_spec", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(PoolError, match=r"No space left on device \(set TMPDIR\)"):
        trained(Pool(spec), make_jobs(spec, 0))
    assert list(tmp_path.iterdir()) == []


def test_losses_are_counted_per_job() -> None:
    died = "<class 'ray.exceptions.ActorDiedError'>:<'The actor died unexpectedly'>"
    waiting = "<class 'ray.exceptions.ActorUnavailableError'>:<'The actor is restarting.'>"
    losses = flower._Losses("client 3, task 0, round 1", max_restarts=1)
    losses.add(died)
    losses.add(waiting)  # the job never ran
    with pytest.raises(PoolError, match=r"died 2 times over client 3, task 0, round 1: ActorDiedError \(out of memory"):
        losses.add(died)
    traceback = "<class 'ray.exceptions.RayTaskError(E)'>:<'\x1b[36mray::run()\x1b[39m\n  File x\nE: the module is broken'>"
    with pytest.raises(PoolError, match=r"^a Flower worker failed on evaluation: E: the module is broken$"):
        flower._Losses("evaluation", max_restarts=5).add(traceback)


@pytest.mark.parametrize(
    ("clients", "workers", "gpus", "device", "expected"),
    [
        (10, 2, 0, "cpu", (2, 10, 2, 0.0)),
        (1000, 2, 0, "cpu", (2, 32, 2, 0.0)),
        (1000, 64, 0, "cpu", (64, 64, 64, 0.0)),
        (10, 3, 1, "cuda", (3, 10, 3, 0.3333)),
        (10, "auto", 4, "cuda", (4, 10, 4, 1.0)),
    ],
)
def test_workers_nodes_and_resources(
    clients: int, workers: Any, gpus: int, device: str, expected: tuple[int, int, int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers, nodes, cores that Ray starts with, GPUs per worker."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    runtime = SimpleNamespace(workers=workers, threads=1, device=device, gpus_per_worker=0.0)
    spec: Any = SimpleNamespace(num_clients=clients, config=SimpleNamespace(runtime=runtime))
    backend = flower._backend_config(spec)
    cores, share = backend["init_args"]["num_cpus"], backend["client_resources"]["num_gpus"]
    assert (flower._num_workers(spec), flower._num_nodes(spec), cores, share) == expected
    json.dumps(backend)  # Flower hands it on as JSON
