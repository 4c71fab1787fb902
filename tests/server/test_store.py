"""The store of what clients remember: exact there and back, one with the checkpoint wherever a run is killed, and a round costs
what its clients cost."""

from __future__ import annotations

import copy
import io
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clients.pools import serial
from fedsim.core import contracts
from fedsim.core.config import load
from fedsim.core.errors import ClientFailed, PluginError, RunDirError, StorageError
from fedsim.core.events import TensorsKept
from fedsim.core.messages import Bundle, ClientJob, ClientUpdate, Reply, RoundPlan
from fedsim.simulation import run
from server import checkpoint, isolation, store
from server.dispatch import run_clients
from server.ledger import charged
from server.state import ServerState
from server.store import ClientStore, Stored
from tests.tiny import final_state, kept, learned, same_bits, stopping, tiny

CLIENTS = 6
NOTHING = Stored()
DTYPES = (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)


def opened(path: Path, stored: Stored = NOTHING, identity: str = "a config") -> ClientStore:
    return ClientStore(CLIENTS, path, identity, stored, "free space, then go on")


def contents(of: ClientStore) -> dict[int, dict[str, list[float]]]:
    return {client: {n: t.tolist() for n, t in of.read(client).items()} for client in range(CLIENTS)}


# ---------------------------------------------------------------- tensors


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=9), st.tuples(st.sampled_from(DTYPES), st.sampled_from(((), (3,), (0, 4), (2, 3))))
    )
)
def test_tensors_come_back_with_their_bits_in_alphabetical_order(layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    random = torch.Generator().manual_seed(0)
    memory = {n: torch.randint(-99, 99, shape, generator=random).to(dtype) for n, (dtype, shape) in layout.items()}
    with ClientStore(1) as kept_by:
        kept_by.remember(0, memory)
        found = dict(kept_by.memory(0).items())
    assert list(found) == sorted(memory)
    for name, tensor in memory.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_what_is_read_is_nobody_elses_and_may_be_written_into() -> None:
    whole = torch.arange(6.0).view(2, 3).requires_grad_()
    with ClientStore(1) as kept_by:
        kept_by.remember(0, {"turned": whole.T, "part": whole[0], "same": whole[0], "nan": torch.tensor([torch.nan, -0.0])})
        read = kept_by.read(0)
        read["part"] += 1
        again = kept_by.memory(0)
        assert torch.equal(again["part"], whole[0].detach()) and torch.equal(again["turned"], whole.T.detach())
        assert len(again) == 4 and list(again) == ["nan", "part", "same", "turned"]
        assert torch.signbit(again["nan"]).tolist()[1] and bool(torch.isnan(again["nan"][0]))


def test_what_cannot_be_kept_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LARGEST", 1000)
    with ClientStore(1) as kept_by:
        with pytest.raises(
            PluginError, match=r"client 0 cannot keep 'learner.x/w' in its memory as torch.bfloat16: make it float32"
        ):
            kept_by.remember(0, {"learner.x/w": torch.zeros(2, dtype=torch.bfloat16)})
        with pytest.raises(PluginError, match=r"client 0 cannot keep 0\.0 GB in its memory: 1 GB is the most"):
            kept_by.remember(0, {"w": torch.zeros(1000)})


# ---------------------------------------------------------------- versions


@dataclass
class Known:
    """What the store is to hold, in plain Python; and a copy of its file as a process that is killed now leaves it."""

    memories: dict[int, dict[str, list[float]]] = field(default_factory=lambda: {c: {} for c in range(CLIENTS)})
    last: dict[int, list[int]] = field(default_factory=lambda: {c: [-1, -1] for c in range(CLIENTS)})
    most: int = 0

    def stored(self, version: int) -> Stored:
        sizes = [4 * sum(map(len, m.values())) for m in self.memories.values() if m]
        return Stored(version, len(sizes), sum(sizes), self.most)


Step = tuple[list[tuple[int, dict[str, int]]], list[tuple[set[int], bool]]]


def drawn(random: Random) -> Step:
    """Memories of some clients (some of them twice, some of them emptied), and messages to some."""
    memories = [
        (random.randrange(CLIENTS), {n: random.randrange(4) for n in random.sample("ab", random.randrange(3))}) for _ in range(4)
    ]
    messages = [
        (set(random.sample(range(CLIENTS), 1 + random.randrange(3))), random.random() < 0.5) for _ in range(random.randrange(3))
    ]
    return memories, messages


def play(of: ClientStore, known: Known, step: Step, number: int) -> int:
    """One step of a run: what clients remember from now on, and messages. The number of the next message."""
    for client, memory in step[0]:
        value = {n: [float(number + i) for i in range(size)] for n, size in memory.items()}
        of.remember(client, {n: torch.tensor(v, dtype=torch.float32) for n, v in value.items()})
        known.memories[client] = dict(sorted(value.items()))
        known.most = max(known.most, 4 * sum(map(len, value.values())))
    for clients, with_past in step[1]:
        of.sent(number, sorted(clients, reverse=True), with_past)
        for client in clients:
            known.last[client] = [number, number if with_past else known.last[client][1]]
        number += 1
    return number


def same(of: ClientStore, known: Known, version: int) -> None:
    assert contents(of) == known.memories
    assert of.last.tolist() == [known.last[c] for c in range(CLIENTS)]
    assert of.stored == known.stored(version)
    rows, clients = of._db.execute("SELECT count(*), count(DISTINCT client) FROM memory").fetchone()
    assert rows == clients, "nothing that was replaced is left"


@pytest.mark.parametrize("seed", range(4))
def test_killed_anywhere_it_is_what_the_checkpoint_says(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every step: before the rows are written, before the checkpoint, before the pruning, and after; then to the end again."""
    monkeypatch.setattr(store, "CACHE_KB", 1)  # what is not committed, too, goes to the disk
    folder, random = tmp_path, Random(seed)
    run_of = [drawn(random) for _ in range(5)]
    known, number, copies = Known(), 0, list[tuple[Path, Known, Stored, int, int]]()

    def killed(now: Known, stored: Stored, done: int, next_number: int) -> None:
        target = folder / f"killed-{len(copies)}"
        target.mkdir()
        for file in (folder / "whole").iterdir():
            shutil.copy(file, target / file.name)
        copies.append((target / "x", copy.deepcopy(now), stored, done, next_number))

    (folder / "whole").mkdir()
    said, numbers = Stored(), [0]
    with opened(folder / "whole" / "x") as whole:
        for version, step in enumerate(run_of):
            before = copy.deepcopy(known)
            number = play(whole, known, step, number)
            if version:
                killed(before, said, version, numbers[-1])
            committed = whole.commit()
            if version:
                killed(before, said, version, numbers[-1])
            said = committed
            numbers.append(number)
            killed(known, said, version + 1, number)
            whole.prune()
            killed(known, said, version + 1, number)
        same(whole, known, len(run_of))
    for path, then, stored, done, next_number in copies:
        with opened(path, stored) as again:
            same(again, then, done)
            for version, step in enumerate(run_of[done:], done):
                next_number = play(again, then, step, next_number)
                assert again.commit().version == version + 1
                again.prune()
            same(again, known, len(run_of))


def test_what_was_not_committed_is_gone(tmp_path: Path) -> None:
    with opened(tmp_path / "x") as first:
        first.remember(0, {"a": torch.ones(3)})
        said = first.commit()
        first.remember(0, {"a": torch.zeros(3)})
        first.remember(1, {"a": torch.zeros(3)})
    with opened(tmp_path / "x", said) as second:
        assert contents(second)[0] == {"a": [1.0, 1.0, 1.0]} and contents(second)[1] == {}
    with opened(tmp_path / "x") as third:  # of a run that has no checkpoint: begun anew
        assert contents(third)[0] == {} and third.stored == Stored()


# ---------------------------------------------------------------- what a round costs


def test_a_round_writes_rows_of_its_clients_only_however_many_are_registered(tmp_path: Path) -> None:
    changed = {}
    for registered in (100, 4_000):
        with ClientStore(registered, tmp_path / str(registered)) as kept_by:
            for client in range(registered):
                kept_by.remember(client, {"a": torch.zeros(1)})
            kept_by.sent(0, range(registered), False)
            kept_by.commit()
            kept_by.prune()
            before = kept_by._db.total_changes
            for client in range(5, 15):
                kept_by.remember(client, {"a": torch.ones(1)})
            kept_by.sent(1, range(5, 15), False)
            kept_by.commit()
            kept_by.prune()
            changed[registered] = kept_by._db.total_changes - before
    assert changed[100] == changed[4_000] <= 2 * 10 + 3


def test_a_checkpoint_does_not_grow_with_the_clients_that_took_part() -> None:
    sizes, state = [], ServerState(0, 0, {"adapter.a": torch.zeros(3)}, None)
    with ClientStore(10_000) as kept_by:
        sim: Any = SimpleNamespace(store=kept_by, config=tiny())
        for round in range(3):
            jobs = [ClientJob(c, 0, round, state.params, RoundPlan()) for c in range(round * 1000, (round + 1) * 1000)]
            state = charged(sim, state, jobs, [])
            buffer = io.BytesIO()
            torch.save(state.to_plain(), buffer)
            sizes.append(len(buffer.getvalue()))
    assert max(sizes) - min(sizes) < 100


# ---------------------------------------------------------------- bad input


def flipped(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(torch.ones(9).numpy().tobytes(), (-torch.ones(9)).numpy().tobytes()))


def of_nobody(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.executescript("DELETE FROM meta")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (Path.unlink, r"x is missing, and the run cannot go on without it: copy it back, or start the run again"),
    "no database": (lambda p: p.write_bytes(b"not SQLite at all" * 999), r"x is damaged \(file is not a database\): start the"),
    "empty": (lambda p: p.write_bytes(b""), r"x is damaged \(no such table: meta\)"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-4096]), r"x is damaged \(database disk image is malformed\)"),
    "some bits": (flipped, r"x is damaged \(what client 0 remembers is not what was written\)"),
    "of nobody": (of_nobody, r"x is damaged \(it does not say whose it is\)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_line(damage: str, tmp_path: Path) -> None:
    said = written(tmp_path / "x")
    spoil, line = DAMAGES[damage]
    spoil(tmp_path / "x")
    with pytest.raises(RunDirError, match=line) as caught, opened(tmp_path / "x", said) as again:
        again.read(0)
    assert "\n" not in str(caught.value)


def test_a_store_of_another_config_or_of_another_time_is_refused(tmp_path: Path) -> None:
    said = written(tmp_path / "x")
    with pytest.raises(RunDirError, match="x belongs to another config or version of fedsim: copy the right one back, or start"):
        opened(tmp_path / "x", said, "another config")
    for version in (said.version - 2, said.version + 1):
        with pytest.raises(RunDirError, match=rf"of different times \(after 3 and {version} steps of the run\): copy both back"):
            opened(tmp_path / "x", replace(said, version=version))
    opened(tmp_path / "x", said).close()


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("max_page_count = 20", "disk full, .*x could not be written: free space, then go on$"),
        ("query_only = ON", "x could not be written: attempt to write a readonly database$"),
    ],
)
def test_a_disk_that_cannot_be_written_loses_nothing(setting: str, line: str, tmp_path: Path) -> None:
    said = written(tmp_path / "x")
    with opened(tmp_path / "x", said) as kept_by:
        before = contents(kept_by)
        kept_by._db.execute(f"PRAGMA {setting}")
        with pytest.raises(StorageError, match=line):
            fill(kept_by)
    with opened(tmp_path / "x", said) as again:
        assert contents(again) == before


def fill(kept_by: ClientStore) -> None:
    for client in range(CLIENTS):
        kept_by.remember(client, {"a": torch.zeros(10_000)})
        kept_by.commit()


def written(path: Path) -> Stored:
    """A store of three steps."""
    with opened(path) as kept_by:
        for number in range(3):
            kept_by.remember(0, {"a": torch.ones(3000)})
            kept_by.sent(number, [0], False)
            said = kept_by.commit()
            kept_by.prune()
    return said


# ---------------------------------------------------------------- in a round


class Scripted(contracts.Pool):
    """Clients that count in memory how often they have trained, after what `does` says of each."""

    def __init__(self, does: Callable[[ClientJob], ClientUpdate | ClientFailed]) -> None:
        self.does = does

    def train(self, jobs: Sequence[ClientJob]) -> Iterator[Bundle]:
        for place, job in enumerate(jobs):
            yield Bundle(place, (self.does(replace(job, memory=dict(job.memory.items()))),))

    def evaluate(self, jobs: Sequence[Any]) -> Iterator[Any]:
        raise NotImplementedError

    def make(self, job: Any) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        return


def counted(job: ClientJob) -> ClientUpdate:
    """What a client sends that counts its rounds."""
    count = job.memory.get("count", torch.zeros(1)) + 1
    return ClientUpdate(job.client_id, 5, {}, memory={"count": count})


def parts(pool: contracts.Pool, kept_by: ClientStore, sizes: Sequence[int], **server: Any) -> Any:
    """What the server's functions look at of a simulation."""
    config = tiny(
        "server.aggregator=fedavg", "server.consolidator=none", server={"on_client_failure": "skip", "drift": False, **server}
    )
    chain = SimpleNamespace(received=lambda start, totals, *_: totals)
    rule = contracts_rule(config)
    return SimpleNamespace(
        config=config, pool=pool, store=kept_by, shard_sizes=np.array([sizes]), aggregator=rule, calibrator=None,
        consolidator=None, learners={}, chain=chain, num_clients=len(sizes),
    )  # fmt: skip


def contracts_rule(config: Any) -> Any:
    from fedsim.core.config import build_aggregator

    return build_aggregator(config.server.aggregator)


def drained(steps: Any) -> Any:
    """What a generator returns, and what it yields."""
    yielded = []
    while True:
        try:
            yielded.append(next(steps))
        except StopIteration as stop:
            return stop.value, yielded


def test_clients_that_fail_hold_nothing_or_only_look_remember_what_they_did() -> None:
    odd: Mapping[int, Callable[[ClientJob], ClientUpdate | ClientFailed]] = {
        1: lambda job: ClientFailed(1, 0, job.round, "training", "poisoned"),
        2: lambda job: replace(counted(job), num_samples=0, memory={}),
        3: lambda job: replace(counted(job), memory=None),
        4: lambda job: replace(counted(job), memory={}),
    }
    told = list[dict[str, Tensor]]()

    def does(job: ClientJob) -> ClientUpdate | ClientFailed:
        if job.client_id == 0:
            told.append(dict(job.memory))
        return odd.get(job.client_id, counted)(job) if job.round == 1 else counted(job)

    with ClientStore(CLIENTS) as kept_by:
        sim, state = parts(Scripted(does), kept_by, [5] * CLIENTS), ServerState(0, 0, {"head.bias": torch.zeros(1)}, None)
        for round in range(3):
            plan = RoundPlan() if round < 2 else RoundPlan(train=())  # the last is a pass for statistics
            state = replace(state, round=round)
            (found, state), _ = drained(run_clients(sim, state, range(CLIENTS), plan, state.params, Reply()))
            assert all(u.memory is None for u in found.updates), "nothing of it is held"
        counts = {c: dict(kept_by.memory(c)) for c in range(CLIENTS)}
    assert {c: float(m["count"]) for c, m in counts.items() if m} == {0: 2, 1: 1, 2: 1, 3: 1, 5: 2}
    assert counts[4] == {}
    assert kept_by.stored == Stored(0, 5, 20, 4)
    assert [m.get("count") for m in told] == [None, torch.ones(1), None], "a pass for statistics is told nothing of it"


def test_a_memory_is_read_when_its_client_goes_out() -> None:
    order = list[str]()
    with ClientStore(CLIENTS) as kept_by:
        real = kept_by.read
        kept_by.read = lambda client: (order.append(f"read {client}"), real(client))[1]  # type: ignore[method-assign]

        def does(job: ClientJob) -> ClientUpdate:
            order.append(f"train {job.client_id}")
            return counted(job)

        class InProcess(serial.Pool):
            def __init__(self) -> None:
                self._threads, self._fused = 1, False
                train = lambda start, jobs: Bundle(start, tuple(map(does, jobs)))  # noqa: E731
                self._worker = SimpleNamespace(train=train)  # type: ignore[assignment]

        sim, state = parts(InProcess(), kept_by, [5] * 3), ServerState(0, 0, {"head.bias": torch.zeros(1)}, None)
        for _ in range(2):
            (_, state), _ = drained(run_clients(sim, state, range(3), RoundPlan(), state.params, Reply()))
    assert order == [f"train {c}" for c in range(3)] + [f"{do} {c}" for c in range(3) for do in ("read", "train")]


def test_isolated_runs_read_the_memory_and_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "isolated_plan", lambda sim, state: RoundPlan())
    told = dict[int, float]()

    def does(job: ClientJob) -> ClientUpdate:
        told[job.client_id] = float(job.memory["count"])
        return counted(job)

    with ClientStore(2) as kept_by:
        for client in range(2):
            kept_by.remember(client, {"count": torch.full((1,), 7.0 + client)})
        sim, state = parts(Scripted(does), kept_by, [5, 5], unlearning=True), ServerState(0, 0, {}, None)
        _, events = drained(isolation.isolated_clients(sim, state))
        assert told == {0: 7.0, 1: 8.0}
        assert {c: float(kept_by.read(c)["count"]) for c in range(2)} == told
    assert [e.name for e in events if isinstance(e, TensorsKept)] == ["start", "client-0", "client-1"]


# ---------------------------------------------------------------- in a run


COUNTING = """
from dataclasses import dataclass
import torch
from fedsim.core import contracts
from fedsim.core.contracts import Ending

@dataclass(frozen=True)
class Learner(contracts.Learner):
    def begin(self, work, memory, context, draw):
        return {"count": memory.get("count", torch.zeros(1)) + 1}

    def corrected(self, state, gradients, params):
        return {n: g / state["count"] for n, g in gradients.items()}

    def end(self, state, work, params, draw):
        return Ending({"count": state["count"], f"round {work.task}.{work.round}": torch.ones(2)})
"""

KILLED = """
import os, sys
from pathlib import Path
from fedsim.core.config import load
from fedsim.simulation import prepare, run
from server import checkpoint
from server.store import ClientStore

def killed(real, at):
    calls = []
    def call(*args):
        calls.append(1)
        if len(calls) == at:
            os._exit(9)
        return real(*args)
    return call

# a store that is opened is pruned, too
config, folder = load(sys.argv[1]), Path(sys.argv[1]).parent / "killed"
prepare(config)  # what is imported is imported once
for where, what, at in ((ClientStore, "commit", 2), (checkpoint, "save", 2), (ClientStore, "prune", 3)):
    if os.fork() == 0:
        setattr(where, what, killed(getattr(where, what), at))
        run(config, **({"resume": folder} if folder.exists() else {"output": folder}))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
    print(checkpoint.load(folder / "checkpoint.pt", config.identity()).stored.version)
"""


@pytest.mark.processes
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Before a round's rows are written; then after them and before the checkpoint; then after that and before the pruning.
    Clients count their rounds, and make smaller steps in each."""
    (tmp_path / "counting.py").write_text(COUNTING)
    server = {"aggregator": "fedavg", "consolidator": "none", "participation": 0.67, "evaluate": "task"}
    config = tiny(output=tmp_path, server=server, client={"learners": [str(tmp_path / "counting.py")]})
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    whole = run(load(tmp_path / "run.yaml"), output=tmp_path / "whole")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    words = [sys.executable, "-c", KILLED, tmp_path / "run.yaml"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.split() == ["1", "2", "4"], f"versions of the checkpoints that were left: {done.stderr}"
    resumed = run(resume=tmp_path / "killed")
    assert same_bits(learned(final_state(tmp_path / "killed", config)), learned(final_state(tmp_path / "whole", config)))
    assert same_bits(kept(tmp_path / "killed"), kept(tmp_path / "whole"))
    np.testing.assert_array_equal(resumed.accuracy, whole.accuracy)
    counts = [float(memory["learner.counting/count"]) for memory in kept(tmp_path / "whole")["memory"].values()]
    assert sum(counts) == 2 * 2 * 2, "tasks, rounds, clients of a round"
    assert whole.costs["stored"] == {"clients": len(counts), "mean": 12.0, "max": 12}


def test_resume_without_its_store_is_one_line_and_with_it_all_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, folder = tiny("server.channel=[topk]", "server.aggregator=fedavg", "server.consolidator=none"), tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", stopping(1))
        with pytest.raises(KeyboardInterrupt):
            run(config, output=folder)
    (folder / "clients.sqlite").rename(tmp_path / "away")
    with pytest.raises(RunDirError, match=r"run/clients.sqlite is missing, and the run cannot go on without it: copy it back"):
        run(resume=folder)
    (tmp_path / "away").rename(folder / "clients.sqlite")
    shutil.copytree(folder, tmp_path / "copied")
    assert run(resume=folder).rows == run(resume=tmp_path / "copied").rows
