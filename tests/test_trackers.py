"""Trackers: what each library's own reader finds is what the run found; and no tracker, working or broken, moves a bit.

No network: the whole file runs with every connection but local ones refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from fedsim.cli import main
from fedsim.core.config import SimConfig, build
from fedsim.core.contracts import TrackedRun
from fedsim.core.errors import ConfigError, PluginError, RunDirError
from fedsim.core.events import Event, RoundDone, TaskDone
from fedsim.runs.results import Results
from fedsim.simulation import run
from server import checkpoint
from tests.tiny import final_state, learned, same_bits, tiny

ROUNDS = 2  # of the tiny config, as are the 2 tasks
Points = dict[str, list[tuple[int, float]]]  # name -> (step, value), as logged

FILE_TRACKER = textwrap.dedent(
    '''
    """Writes JSON lines into the run directory; troubles on demand."""
    import json
    import random
    from dataclasses import dataclass
    from pathlib import Path

    import numpy as np
    import torch

    from fedsim.core import contracts


    @dataclass(frozen=True)
    class Recording:
        file: Path
        fail_at: int | None
        fail_close: bool
        reseed: bool

        def log(self, step, values):
            if self.reseed:
                random.seed(step), np.random.seed(step), torch.manual_seed(step)
            if step == self.fail_at:
                raise OSError("the disk is gone")
            self._write({"step": step, "values": dict(values)})

        def close(self, outcome):
            if self.fail_close:
                raise ValueError("two\\nlines")
            self._write({"outcome": outcome})

        def _write(self, line):
            with open(self.file, "a") as f:
                f.write(json.dumps(line) + "\\n")


    @dataclass(frozen=True)
    class Tracker(contracts.Tracker):
        file: str = "lines.jsonl"
        fail_at: int | None = None
        fail_open: bool = False
        fail_close: bool = False
        reseed: bool = False

        def open(self, run):
            if self.fail_open:
                raise ConnectionError("nobody there")
            path = run.path / self.file
            with open(path, "a") as f:
                f.write(json.dumps({"id": run.id, "resumed": run.resumed, "options": run.options()}) + "\\n")
            return Recording(path, self.fail_at, self.fail_close, self.reseed)
    '''
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections and look-ups of hosts raise."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX, f"connection to {address}"
        connect(self, address)

    def no_hosts(*arguments: Any, **options: Any) -> Any:
        raise AssertionError(f"look-up of {arguments}")

    monkeypatch.setattr(socket.socket, "connect", local_only)
    monkeypatch.setattr(socket, "getaddrinfo", no_hosts)


@pytest.fixture(scope="module", autouse=True)
def wandb_service_ends() -> Iterator[None]:
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run learns without any tracker."""
    results = run(tiny(output=tmp_path_factory.mktemp("untracked")))
    return learned(final_state(results.path, results.config))


@pytest.fixture
def file_tracker(tmp_path: Path) -> str:
    path = tmp_path / "my_tracker.py"
    path.write_text(FILE_TRACKER)
    return str(path)


# ---------------------------------------------------------------- readers


def read_tensorboard(path: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def read_mlflow(path: Path) -> Points:
    client, found = mlflow_run(path)
    return {name: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, name)] for name in found.data.metrics}


def mlflow_run(path: Path) -> tuple[Any, Any]:
    """The one run that the store beside the run directory holds of it."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient((path.parent / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("fedsim")
    run_id = json.loads((path / "tracking.json").read_text())["id"]
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`fedsim.run` = '{run_id}'")
    return client, found


def read_wandb(path: Path) -> Points:
    points: Points = {}
    for record in (r for part in wandb_parts(path) for r in part if r.HasField("history")):
        values = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        step = values.pop("round")
        for name, value in values.items():
            if not name.startswith("_"):
                points.setdefault(name, []).append((step, value))
    return points


def wandb_parts(path: Path) -> list[list[Any]]:
    """The records of every part of an offline run, in order of their start, once wandb's own process has written them out."""
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted((path / "wandb").glob("offline-run-*/*.wandb"))
    for _ in range(100):
        parts = [[Record.FromString(body) for body in wandb_bodies(file.read_bytes())] for file in files]
        if all(any(r.HasField("exit") for r in part) for part in parts):
            return parts
        time.sleep(0.1)
    raise AssertionError("a part without its end")


def wandb_bodies(data: bytes) -> Iterator[bytes]:
    """The format is LevelDB's log after 7 bytes: blocks of 32 KiB, chunks of (checksum, length, full | first | middle | last)."""
    at, body = 7, b""
    assert data[:4] in (b":W&B", b"")
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):  # not written out yet
            return
        body += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield body
            body = b""


READERS: dict[str, Callable[[Path], Points]] = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What the tracker of this file wrote."""
    return [json.loads(line) for line in (path / "lines.jsonl").read_text().splitlines()]


def read_file_tracker(path: Path) -> Points:
    points: Points = {}
    for line in read_lines(path):
        for name, value in line.get("values", {}).items():
            points.setdefault(name, []).append((line["step"], value))
    return points


def expected(results: Results) -> Points:
    """What a tracker must hold, from the run's results alone (the clients' loss and the clock are not among them)."""
    points: Points = {}
    for row in results.frame().itertuples():
        prefix, step = ("task_end/", row.task * ROUNDS + 1) if row.stage == "task_end" else ("", row.task * ROUNDS + row.round)
        points.setdefault(f"{prefix}accuracy/task_{row.tested}", []).append((step, row.accuracy))
    for group in results.frame().groupby(["task", "round", "stage"]):
        (task, round, stage), rows = group
        prefix, step = ("task_end/", task * ROUNDS + 1) if stage == "task_end" else ("", task * ROUNDS + round)
        points.setdefault(f"{prefix}accuracy/mean", []).append((step, rows["accuracy"].mean()))
    points["task_end/forgetting"] = [(3, results.metrics["forgetting"])]
    for drift in results.drifts:
        for field in dataclasses.fields(drift)[4:]:
            if (value := getattr(drift, field.name)) is not None:
                name = f"drift/{field.name}/{drift.group}"
                points.setdefault(name, []).append((drift.task * ROUNDS + drift.round, value))
    at_end = {f"metrics/{k}": v for k, v in results.metrics.items() if v is not None}
    for direction, kinds in results.costs["bytes"].items():
        at_end |= {f"bytes/{direction}/{kind}": n for kind, n in kinds.items()}
    at_end |= {f"seconds/{phase}": s for phase, s in results.costs["seconds"].items()}
    return points | {name: [(3, value)] for name, value in at_end.items()}


def assert_holds(points: Points, results: Results, rel: float = 1e-6) -> None:
    """The points of a whole run, each once: float32 is the least exact of the libraries."""
    wanted = expected(results)
    for name, pairs in wanted.items():
        assert [s for s, _ in points[name]] == [s for s, _ in pairs], name
        assert [v for _, v in points[name]] == pytest.approx([v for _, v in pairs], rel=rel), name
    rest = {name: [step for step, _ in pairs] for name, pairs in points.items() if name not in wanted}
    rounds = {name: [0, 1, 2, 3] for name in ("round/loss", "round/seconds", "traffic/down", "traffic/up")}
    assert rest == rounds | {f"task_end/{name}": [1, 3] for name in ("seconds", "traffic/down", "traffic/up")}


def interrupted_run(config: SimConfig, at: int) -> Path:
    """The directory of a run that gets a Ctrl-C before it keeps its n-th state (0-based): the round has been shown by then."""
    left = [at]
    save = checkpoint.save

    def stop(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        save(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    (status,) = Path(config.runtime.output).glob("*/status.json")
    return status.parent


# ---------------------------------------------------------------- every tracker


@pytest.mark.parametrize("name", READERS)
def test_a_tracker_holds_what_the_run_found_and_moves_no_bit(name: str, tmp_path: Path, untracked: dict[str, Any]) -> None:
    losses: list[float] = []
    results = run(
        tiny(output=tmp_path, trackers=[name]), progress=lambda e: losses.append(e.loss) if isinstance(e, RoundDone) else None
    )
    points = READERS[name](results.path)
    assert_holds(points, results)
    assert [v for _, v in points["round/loss"]] == pytest.approx(losses, rel=1e-6)
    assert points["task_end/traffic/up"][-1] == (3, sum(results.costs["bytes"]["up"].values()))
    assert same_bits(learned(final_state(results.path, results.config)), untracked)


@pytest.mark.parametrize("name", READERS)
def test_a_resumed_run_goes_on_in_the_same_tracker_run_and_says_nothing_twice(
    name: str, tmp_path: Path, untracked: dict[str, Any]
) -> None:
    path = interrupted_run(tiny(output=tmp_path, trackers=[name]), at=3)  # in task 1, round 0
    before = READERS[name](path)
    assert [step for step, _ in before["round/loss"]] == [0, 1]
    time.sleep(1.1)  # wandb names the folders of an offline run's parts by the second
    results = run(resume=path)
    assert_holds(READERS[name](path), results)
    assert same_bits(learned(final_state(path, results.config)), untracked)


def test_wandb_knows_the_config_and_what_became_of_the_run(tmp_path: Path) -> None:
    tracker = {"name": "wandb", "project": "fcl", "group": "g", "tags": ["a", "b"]}
    path = interrupted_run(tiny(output=tmp_path, trackers=[tracker]), at=1)
    time.sleep(1.1)
    run(resume=path)
    parts = wandb_parts(path)
    assert len(parts) == 2
    begun = [next(r.run for r in part if r.HasField("run")) for part in parts]
    assert [r.run_id for r in begun] == [json.loads((path / "tracking.json").read_text())["id"]] * 2
    assert [(r.project, r.run_group, r.display_name, list(r.tags)) for r in begun] == [("fcl", "g", path.name, ["a", "b"])] * 2
    config = {item.key: json.loads(item.value_json) for item in begun[0].config.update}
    assert config["client"]["lr"] == 1e-2
    assert config["identity"] == json.loads((path / "status.json").read_text())["identity"]
    assert "trackers" not in config
    assert [next(r.exit.exit_code for r in part if r.HasField("exit")) for part in parts] == [255, 0]
    for log in (path / "wandb").glob("offline-run-*/logs/debug-core.log"):
        assert '"disable-analytics":true' in log.read_text()  # else wandb's own process looks up a host


def test_mlflow_knows_the_config_and_what_became_of_the_run(tmp_path: Path) -> None:
    tracker = {"name": "mlflow", "tags": {"team": "fcl"}}
    rules = [{"match": "head.*", "name": "variance_weighted"}, {"match": "*", "name": "fedavg"}]
    config = tiny(output=tmp_path, trackers=[tracker], server={"aggregator": rules})
    path = interrupted_run(config, at=1)
    found = mlflow_run(path)[1]
    assert (found.info.status, found.info.run_name, found.data.tags["team"]) == ("KILLED", path.name, "fcl")
    assert found.data.params["client.lr"] == "0.01"
    assert found.data.params["server.aggregator.1.match"] == "*"
    assert found.data.params["server.aggregator.0.match"] == "head.*"
    assert found.data.params["stream.group"] == "null"
    run(resume=path)
    again = mlflow_run(path)[1]
    assert (again.info.run_id, again.info.status) == (found.info.run_id, "FINISHED")


def test_what_is_too_long_for_mlflow_is_cut(tmp_path: Path) -> None:
    path = run(tiny(name="n" * 7000, trackers=["mlflow"]), output=tmp_path / "r").path
    assert mlflow_run(path)[1].data.params["name"] == "n" * 6000


def test_two_runs_of_one_config_are_two_runs_of_one_experiment(tmp_path: Path) -> None:
    paths = [run(tiny(output=tmp_path, trackers=["mlflow"])).path for _ in range(2)]
    found = [mlflow_run(p)[1] for p in paths]
    assert found[0].info.run_id != found[1].info.run_id
    assert found[0].info.experiment_id == found[1].info.experiment_id
    assert found[0].data.tags["fedsim.identity"] == found[1].data.tags["fedsim.identity"]


def test_runs_that_start_at_once_share_one_experiment(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    start = Barrier(6)

    def begin(k: int) -> None:
        start.wait()
        build("trackers", {"name": "mlflow"}).open(TrackedRun(f"r{k}", f"r{k}", "x", tmp_path / f"r{k}", {}, False))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(begin, range(6)))
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "fedsim"]
    assert {r.info.run_name for r in client.search_runs([experiment.experiment_id])} == {f"r{k}" for k in range(6)}


def test_mlflow_goes_where_it_is_told(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    store = tmp_path / "store"
    run(tiny(output=tmp_path / "runs", trackers=[{"name": "mlflow", "tracking_uri": str(store), "experiment": "e"}]))
    assert MlflowClient(store.as_uri()).get_experiment_by_name("e") is not None
    assert not (tmp_path / "runs" / "mlruns").exists()


def test_tensorboard_knows_the_config_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    def session(folder: Path, tag: str) -> Any:
        events = EventAccumulator(str(folder)).Reload()
        content = events.SummaryMetadata(tag).plugin_data.content
        return plugin_data_pb2.HParamsPluginData.FromString(content)

    tracker = {"name": "tensorboard", "dir": str(tmp_path / "board")}
    path = interrupted_run(tiny(output=tmp_path / "runs", trackers=[tracker]), at=1)
    folder = tmp_path / "board" / path.name
    begun = session(folder, "_hparams_/session_start_info").session_start_info.hparams
    assert begun["client.lr"].number_value == 1e-2
    assert begun["server.aggregator.name"].string_value == "lorm"
    with pytest.raises(KeyError):  # not while it is stopped
        session(folder, "_hparams_/session_end_info")
    run(resume=path)
    assert session(folder, "_hparams_/session_end_info").HasField("session_end_info")


# ---------------------------------------------------------------- the user's own, and what can go wrong


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Points, Results]:
    """What the tracker of this file writes of a run that is never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "my_tracker.py").write_text(FILE_TRACKER)
    results = run(tiny(output=folder / "runs", trackers=[str(folder / "my_tracker.py")]))
    return read_file_tracker(results.path), results


@pytest.mark.parametrize("at", range(6))
def test_stopped_anywhere_is_never_stopped(at: int, tmp_path: Path, file_tracker: str, whole_run: tuple[Points, Results]) -> None:
    """4 rounds and 2 tasks' ends; every number and step but the clock's is there once. The copy in the run directory is used."""
    path = interrupted_run(tiny(output=tmp_path / "runs", trackers=[file_tracker]), at)
    Path(file_tracker).unlink()
    run(resume=path)
    clock = ("round/seconds", "task_end/seconds")
    plain = {k: v for k, v in read_file_tracker(path).items() if k not in clock and not k.startswith("seconds/")}
    wanted = {k: v for k, v in whole_run[0].items() if k not in clock and not k.startswith("seconds/")}
    assert plain == wanted
    lines = read_lines(path)
    opened = [line for line in lines if "id" in line]
    assert [line["resumed"] for line in opened] == [False, True]
    assert opened[0]["id"] == opened[1]["id"]
    assert [line["outcome"] for line in lines if "outcome" in line] == ["interrupted", "finished"]


def test_a_users_tracker_sees_results_to_the_last_bit(whole_run: tuple[Points, Results]) -> None:
    assert_holds(*whole_run, rel=1e-15)


def test_traffic_adds_up(tmp_path: Path, file_tracker: str) -> None:
    """FedAvg: 3 clients send all parameters of 4 bytes in every round. What is not evaluated is left out."""
    rules = ["server.aggregator=fedavg", "server.consolidator=none", "server.evaluate=task"]
    config = tiny(*rules, output=tmp_path, trackers=[file_tracker])
    results = run(config)
    one_round = 3 * 4 * sum(t.numel() for t in final_state(results.path, config).params.values())
    points = read_file_tracker(results.path)
    assert points["traffic/up"] == points["traffic/down"] == [(s, one_round * (s + 1)) for s in range(4)]
    assert points["task_end/traffic/up"] == [(1, one_round * 2), (3, one_round * 4)]
    assert {"accuracy/mean", "accuracy/task_0"}.isdisjoint(points)
    assert [step for step, _ in points["task_end/accuracy/mean"]] == [1, 3]


def test_a_failed_run_is_said_to_have_failed(tmp_path: Path, file_tracker: str) -> None:
    def fail(event: Event) -> None:
        if isinstance(event, TaskDone):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        run(tiny(trackers=[file_tracker]), output=tmp_path / "r", progress=fail)
    assert read_lines(tmp_path / "r")[-1] == {"outcome": "failed"}


@pytest.mark.parametrize("trouble", [{"fail_at": 1}, {"fail_close": True}, {"fail_at": 2, "fail_close": True}, {"reseed": True}])
def test_a_broken_tracker_never_harms_the_run(
    trouble: dict[str, Any], tmp_path: Path, file_tracker: str, untracked: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    second = tmp_path / "second.py"
    second.write_text(FILE_TRACKER)
    trackers = [{"name": file_tracker, "file": "broken.jsonl", **trouble}, str(second)]
    results = run(tiny(output=tmp_path / "runs", trackers=trackers))
    assert same_bits(learned(final_state(results.path, results.config)), untracked)
    assert_holds(read_file_tracker(results.path), results)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == (trouble != {"reseed": True})
    for line in said:
        assert "my_tracker.py' failed and is off; the run goes on: " in line
        assert line.endswith("OSError: the disk is gone" if "fail_at" in trouble else "ValueError: two lines")
    steps = [line["step"] for line in map(json.loads, (results.path / "broken.jsonl").read_text().splitlines()) if "step" in line]
    assert max(steps) == trouble.get("fail_at", 4) - 1


def test_a_tracker_that_cannot_be_opened_stops_the_run_before_training(tmp_path: Path, file_tracker: str) -> None:
    good = tmp_path / "good.py"
    good.write_text(FILE_TRACKER)
    config = tiny(trackers=[str(good), {"name": file_tracker, "fail_open": True}])
    with pytest.raises(PluginError, match=r"my_tracker.py' cannot be opened: ConnectionError: nobody there \(trackers=\[\]"):
        run(config, output=tmp_path / "r")
    assert not (tmp_path / "r" / "checkpoint.pt").exists()
    assert read_lines(tmp_path / "r")[-1] == {"outcome": "failed"}
    results = run(tiny(trackers=[]), resume=tmp_path / "r")
    assert results.finished


@pytest.mark.parametrize("name", READERS)
def test_a_missing_package_is_an_error_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = tiny(trackers=[name])  # loads: a run directory can be read where nothing is installed
    with pytest.raises(PluginError) as caught:
        run(config, output=tmp_path / "r")
    assert (
        str(caught.value) == f"tracker '{name}' needs the package '{name}', which is not installed: pip install 'fedsim[{name}]'"
    )
    assert not (tmp_path / "r").exists()


def test_a_package_that_does_not_load_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb.py").write_text("import package_that_is_not_there")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match="tracker 'wandb': the package 'wandb' does not load: ModuleNotFoundError: No module"):
        run(tiny(trackers=["wandb"]), output=tmp_path / "r")


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        (["wandbb"], "trackers.0: unknown tracker 'wandbb'. Did you mean 'wandb'?"),
        ([{"name": "mlflow", "tracking_url": "x"}], "unknown key 'trackers.0.tracking_url'. Did you mean 'tracking_uri'?"),
        ([{"name": "wandb", "mode": "ofline"}], "trackers.0.mode 'ofline' is unknown. Did you mean 'offline'?"),
        (["mlflow", {"name": "mlflow"}], "trackers.1: 'mlflow' is there already: name a tracker once"),
        ([3], "trackers.0 must be the name of one of the trackers, or a mapping with the key 'name', got 3"),
    ],
)
def test_a_wrong_section_says_what_is_wrong(trackers: list[Any], message: str) -> None:
    with pytest.raises((ConfigError, PluginError)) as caught:
        tiny(trackers=trackers)
    assert str(caught.value).startswith(message)


def test_trackers_are_no_part_of_the_identity(tmp_path: Path, file_tracker: str) -> None:
    plain = tiny().identity()
    tracked = tiny(trackers=["wandb", file_tracker])
    assert tracked.identity() == plain
    Path(file_tracker).write_text(FILE_TRACKER + "\n# edited")
    assert tracked.identity() == plain


def test_overrides_name_trackers(tmp_path: Path) -> None:
    config = tiny("trackers=[tensorboard,{name: wandb, project: x}]")
    assert [(t["name"], t.get("project")) for t in config.trackers] == [("tensorboard", None), ("wandb", "x")]


def test_a_damaged_id_is_one_line(tmp_path: Path, file_tracker: str) -> None:
    path = interrupted_run(tiny(output=tmp_path / "runs", trackers=[file_tracker]), at=1)
    (path / "tracking.json").write_text("{")
    with pytest.raises(RunDirError, match=r"tracking\.json is damaged: delete it"):
        run(resume=path)


def test_options_are_flat_and_plain() -> None:
    config = {"a": {"b": None, "c": [1, 2], "d": True}, "e": [{"f": 1.5}, "g"], "h": {}}
    options = TrackedRun("n", "i", "x", Path(), config, False).options()
    assert options == {"a.b": "null", "a.c": "[1, 2]", "a.d": True, "e.0.f": 1.5, "e.1": "g"}


def test_list_shows_trackers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "trackers"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("trackers (trackers)")
    assert [line.split()[0] for line in shown.splitlines() if line.startswith("  ") and line[2] != " "] == sorted(READERS)


# ---------------------------------------------------------------- in a process of its own

LOADED = """
import sys
from pathlib import Path
from fedsim.simulation import run
from tests.tiny import plain_vit, tiny
allowed = {allowed!r}
def hook(event, arguments):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and not isinstance(arguments[1], (str, bytes))):
        raise SystemExit(f"network: {{event}} {{arguments}}")
sys.addaudithook(hook)
run(tiny("stream.tasks=1", output=Path({output!r}), trackers={trackers!r}, model=plain_vit()))
found = sorted({{name.split(".")[0] for name in sys.modules}} & {{"tensorboard", "wandb", "mlflow"}})
assert found == allowed, found
if "mlflow" in found:
    from mlflow.telemetry import get_telemetry_client
    assert get_telemetry_client() is None
"""


@pytest.mark.processes
@pytest.mark.parametrize("trackers", [[], ["mlflow", "tensorboard", "wandb"]], ids=["none", "all"])
def test_only_what_is_asked_for_is_loaded_and_nothing_calls_home(trackers: list[str], tmp_path: Path) -> None:
    """In a process that does not look like a test or CI: MLflow's telemetry is off in those by itself."""
    code = LOADED.format(allowed=trackers, output=str(tmp_path), trackers=trackers)
    looks_like_tests = ("PYTEST", "CI", "GITHUB", "GITLAB", "MLFLOW", "WANDB")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(looks_like_tests)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=280
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert math.isfinite(next(iter(Results.load(next(tmp_path.glob("tiny-*"))).metrics.values())) or 0.0)
