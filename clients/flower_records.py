"""Our messages as Flower's records, and back: exact, with types and bits. Plain functions, for Flower's simulation and for a
deployment alike."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from fedsim.core.errors import ClientFailed
from fedsim.core.messages import (
    ClientJob,
    ClientUpdate,
    EvalJob,
    EvalResult,
    Reply,
    RoundPlan,
    ServerJob,
    State,
    StatisticRequest,
    Tensors,
)

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when flwr is imported

with warnings.catch_warnings():  # flwr's own dependencies warn on import
    warnings.simplefilter("ignore")
    from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
    from flwr.app import Message as Message
    from flwr.app import MessageType as MessageType
    from flwr.app import RecordDict as RecordDict

BFLOAT16 = "bfloat16"  # the type that an array says it has
PACKED = "packed"
CONTEXT = "context "  # before the name of who tells it: what clients are told beside the parameters


def job_to_record(job: ClientJob, arrays: Any = None) -> RecordDict:
    """Tensors as ArrayRecords in order and with their names, the plan and the numbers as ConfigRecords.

    `arrays`: tensors -> ArrayRecord (a cached one saves work: all clients of a round are sent the same parameters).
    Tensors come back with their dtype and bits.
    """
    arrays = arrays or tensors_to_arrays
    return RecordDict(
        {
            "job": ConfigRecord({"kind": "train", "client-id": job.client_id, "task": job.task, "round": job.round}),
            "reply": ConfigRecord({"sums": list(job.reply.sums), "observed": list(job.reply.observed)}),
            "plan": _plan_to_config(job.plan),
            "params": arrays(job.params),
            "memory": tensors_to_arrays(job.memory),
            **{f"{CONTEXT}{name}": arrays(tensors) for name, tensors in job.plan.context.items()},
        }
    )


def record_to_job(record: RecordDict) -> ClientJob:
    """The job that `job_to_record` was given."""
    numbers = record.config_records["job"]
    context = {k.removeprefix(CONTEXT): _tensors(record, k) for k in record.array_records if k.startswith(CONTEXT)}
    return ClientJob(
        client_id=_int(numbers["client-id"]),
        task=_int(numbers["task"]),
        round=_int(numbers["round"]),
        params=_tensors(record, "params"),
        plan=_config_to_plan(record.config_records["plan"], context),
        memory=_tensors(record, "memory"),
        reply=_config_to_reply(record.config_records["reply"]),
    )


def update_to_record(update: ClientUpdate) -> RecordDict:
    """Tensors as ArrayRecords, the client's metrics as a MetricRecord, the bytes of encoded tensors as a ConfigRecord."""
    return RecordDict(
        {
            "update": ConfigRecord({"kind": "update", "client-id": update.client_id, "num-examples": update.num_samples}),
            "params": tensors_to_arrays(update.params),
            "statistics": tensors_to_arrays(update.statistics),
            **({} if update.memory is None else {"memory": tensors_to_arrays(update.memory)}),
            "metrics": MetricRecord(dict(update.metrics)),
            "encoded": ConfigRecord(dict(update.encoded)),
        }
    )


def record_to_update(record: RecordDict) -> ClientUpdate:
    """The update that `update_to_record` was given."""
    numbers = record.config_records["update"]
    return ClientUpdate(
        client_id=_int(numbers["client-id"]),
        num_samples=_int(numbers["num-examples"]),
        params=_tensors(record, "params"),
        statistics=_tensors(record, "statistics"),
        memory=_tensors(record, "memory") if "memory" in record.array_records else None,
        metrics={name: value for name, value in record.metric_records["metrics"].items() if not isinstance(value, list)},
        encoded={name: _int(size) for name, size in record.config_records["encoded"].items()},
    )


def eval_job_to_record(job: EvalJob, arrays: Any = None) -> RecordDict:
    """`arrays` as in `job_to_record`."""
    seen = [int(c) for c in job.seen]
    numbers = ConfigRecord({"kind": "evaluate", "task": job.task, "start": job.start, "stop": job.stop, "seen": seen})
    return RecordDict({"job": numbers, "params": (arrays or tensors_to_arrays)(job.params)})


def record_to_eval_job(record: RecordDict) -> EvalJob:
    """The job that `eval_job_to_record` was given, `seen` as a list."""
    numbers = record.config_records["job"]
    seen = numbers["seen"]
    assert isinstance(seen, list)
    task, start, stop = (_int(numbers[key]) for key in ("task", "start", "stop"))
    return EvalJob(task, start, stop, _tensors(record, "params"), [int(c) for c in seen])


def result_to_record(result: EvalResult) -> RecordDict:
    """The counts as a MetricRecord."""
    counts = {"task": result.task, "correct": result.correct, "correct-in-task": result.correct_in_task, "total": result.total}
    flat = [count for row in result.by_class for count in row]
    return RecordDict({"result": ConfigRecord({"kind": "result", "by-class": flat}), "counts": MetricRecord(dict(counts))})


def record_to_result(record: RecordDict) -> EvalResult:
    """The result that `result_to_record` was given."""
    counts, flat = record.metric_records["counts"], record.config_records["result"]["by-class"]
    assert isinstance(flat, list)
    row = [int(c) for c in flat]
    by_class = tuple((row[i], row[i + 1], row[i + 2], row[i + 3]) for i in range(0, len(row), 4))
    task, correct, in_task, total = (_int(counts[key]) for key in ("task", "correct", "correct-in-task", "total"))
    return EvalResult(task, correct, in_task, total, by_class)


def server_job_to_record(job: ServerJob) -> RecordDict:
    """The deployed tensors as an ArrayRecord, the learner's state as bytes."""
    names = ConfigRecord({"kind": "make", "learner": job.learner, "task": job.task})
    return RecordDict({"job": names, "params": tensors_to_arrays(job.params), **state_to_record(job.state)})


def record_to_server_job(record: RecordDict) -> ServerJob:
    """The job that `server_job_to_record` was given."""
    names = record.config_records["job"]
    return ServerJob(str(names["learner"]), _int(names["task"]), _tensors(record, "params"), record_to_state(record))


def state_to_record(state: State) -> RecordDict:
    """As bytes in torch's own format: plain values and tensors, nested."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return RecordDict({"state": ConfigRecord({"bytes": buffer.getvalue()})})


def record_to_state(record: RecordDict) -> State:
    """The state that `state_to_record` was given."""
    content = record.config_records["state"]["bytes"]
    assert isinstance(content, bytes)
    return torch.load(io.BytesIO(content), weights_only=True)


def failure_to_record(failed: ClientFailed) -> RecordDict:
    """A client's own failure is a value like any other."""
    values = ConfigRecord({"kind": "failed", "client-id": failed.client_id, "task": failed.task, "round": failed.round})
    values["stage"], values["reason"] = failed.stage, failed.reason
    return RecordDict({"failed": values})


def failure_from_record(record: RecordDict) -> ClientFailed:
    """The failure that `failure_to_record` was given."""
    values = record.config_records["failed"]
    client_id, task, round = (_int(values[key]) for key in ("client-id", "task", "round"))
    return ClientFailed(client_id, task, round, str(values["stage"]), str(values["reason"]))


def outcome_to_record(result: ClientUpdate | ClientFailed) -> RecordDict:
    """What became of a client's job."""
    return failure_to_record(result) if isinstance(result, ClientFailed) else update_to_record(result)


def record_to_outcome(record: RecordDict) -> ClientUpdate | ClientFailed:
    """What `outcome_to_record` was given."""
    return failure_from_record(record) if kind_of(record) == "failed" else record_to_update(record)


def tensors_to_arrays(tensors: Tensors) -> ArrayRecord:
    """Each tensor in numpy's own format, under its name, in order; bfloat16, which numpy has not, as its 16 bits."""
    return ArrayRecord({name: _array(tensor.detach().cpu()) for name, tensor in tensors.items()})


def _array(tensor: torch.Tensor) -> Array:
    if tensor.dtype != torch.bfloat16:
        return Array(tensor.numpy())
    bits = Array(tensor.view(torch.int16).numpy())
    return Array(dtype=BFLOAT16, shape=bits.shape, stype=bits.stype, data=bits.data)


def _tensor(array: Array) -> torch.Tensor:
    tensor = torch.from_numpy(array.numpy())
    return tensor.view(torch.bfloat16) if array.dtype == BFLOAT16 else tensor


def arrays_to_tensors(arrays: ArrayRecord) -> dict[str, torch.Tensor]:
    """The tensors that `tensors_to_arrays` was given, in memory of their own."""
    return {name: _tensor(array) for name, array in arrays.items()}


def _tensors(record: RecordDict, key: str) -> dict[str, torch.Tensor]:
    return arrays_to_tensors(record.array_records[key])


def _plan_to_config(plan: RoundPlan) -> ConfigRecord:
    requests = [
        {"name": s.name, "match": list(s.match), "options": _to_json(s.options), "blended": s.blended} for s in plan.statistics
    ]
    told = {f.name: getattr(plan, f.name) for f in fields(plan) if f.name not in ("statistics", "context")}
    return ConfigRecord({"statistics": json.dumps(requests), "told": json.dumps(told)})


def _config_to_reply(config: ConfigRecord) -> Reply:
    sums, observed = config["sums"], config["observed"]
    assert isinstance(sums, list)
    assert isinstance(observed, list)
    return Reply(tuple(map(str, sums)), tuple(int(k) for k in observed))


def _config_to_plan(config: ConfigRecord, context: Mapping[str, Tensors]) -> RoundPlan:
    requests = (
        StatisticRequest(r["name"], tuple(r["match"]), _from_json(r["options"]), r["blended"])
        for r in json.loads(str(config["statistics"]))
    )
    told: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in json.loads(str(config["told"])).items()}
    return RoundPlan(statistics=tuple(requests), context=context, **told)


def _to_json(value: Any) -> Any:
    """JSON has no tuples and only text as keys, so both are written as tagged lists; TypeError for anything else unknown."""
    if isinstance(value, Mapping):
        return {"mapping": [[_to_json(k), _to_json(v)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_to_json(v) for v in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"an option of a statistic must be plain values, got {type(value).__name__}")


def _from_json(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((tag, items),) = value.items()
    if tag == "mapping":
        return {_from_json(k): _from_json(v) for k, v in items}
    return (tuple if tag == "tuple" else list)(_from_json(v) for v in items)


def _int(value: Any) -> int:
    assert isinstance(value, int)
    return value


def shared_arrays() -> Any:
    """`tensors_to_arrays` that converts the same mapping once: it is one object for all jobs of a round."""
    known: dict[int, tuple[Tensors, ArrayRecord]] = {}  # the mapping is kept, so that its id stays its own

    def arrays(tensors: Tensors) -> ArrayRecord:
        if id(tensors) not in known:
            known[id(tensors)] = tensors, tensors_to_arrays(tensors)
        return known[id(tensors)][1]

    return arrays


def packed(record: RecordDict) -> RecordDict:
    """The same content in few parts: every part of a message, such as an array, costs a SuperLink several requests.

    Arrays lie behind each other in one, but for those of a job's memory: what all clients of a round are sent is one part then,
    which travels to the SuperLink once.
    """
    blobs: dict[str, bytearray] = {"shared": bytearray(), "own": bytearray()}
    arrays = []
    for key, of_record in record.array_records.items():
        blob = "own" if key == "memory" else "shared"
        for name, array in of_record.items():
            arrays.append([key, name, array.dtype, list(array.shape), array.stype, blob, len(array.data)])
            blobs[blob] += array.data
    plain: dict[str, Any] = {key: dict(values.items()) for key, values in record.config_records.items()}
    plain |= {key: dict(values.items()) for key, values in record.metric_records.items()}
    kinds = {"arrays": list(record.array_records), "metrics": list(record.metric_records)}
    index = ConfigRecord({"kind": kind_of(record), "index": json.dumps({**kinds, "plain": plain, "each": arrays})})
    whole = {n: Array(np.frombuffer(b, dtype=np.uint8)) for n, b in blobs.items() if b}
    return RecordDict({PACKED: index, **({"arrays": ArrayRecord(whole)} if whole else {})})


def unpacked(record: RecordDict) -> RecordDict:
    """The record that `packed` was given."""
    index = json.loads(str(record.config_records[PACKED]["index"]))
    whole: Mapping[str, Array] = record.array_records.get("arrays") or {}
    blobs = {name: array.numpy().tobytes() for name, array in whole.items()}
    arrays: dict[str, dict[str, Array]] = {key: {} for key in index["arrays"]}
    start = dict.fromkeys(blobs, 0)
    for key, name, dtype, shape, stype, blob, size in index["each"]:
        data = blobs[blob][start[blob] : start[blob] + size]
        arrays[key][name] = Array(dtype=dtype, shape=tuple(shape), stype=stype, data=data)
        start[blob] += size
    metrics = set(index["metrics"])
    plain = {key: MetricRecord(v) if key in metrics else ConfigRecord(v) for key, v in index["plain"].items()}
    return RecordDict({**{key: ArrayRecord(v) for key, v in arrays.items()}, **plain})


def values_to_record(kind: str, **values: Any) -> RecordDict:
    """A message of plain values."""
    return RecordDict({kind: ConfigRecord({"kind": kind, **values})})


def values_of(record: RecordDict) -> dict[str, Any]:
    """The values of `values_to_record`."""
    return dict(record.config_records[kind_of(record)])


def kind_of(record: RecordDict) -> str:
    return next((str(c["kind"]) for c in record.config_records.values() if "kind" in c), "")
