"""A deployment without its processes: what server and nodes say to each other, over a line that only passes messages on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from clients import flower_records as records
from clients.deployment import handshake
from clients.deployment.guests import Guests, Reply
from clients.deployment.handshake import Answer, Offer, Refused
from clients.deployment.memory import NodeMemory, receipt
from clients.deployment.node import Node
from clients.deployment.superlink import Address, _replies, is_loopback
from clients.deployment.supernode import Server
from clients.pools import serial
from clients.pools.deployment import Pool, Terms, served
from fedsim import deployment
from fedsim.core.config import SimConfig
from fedsim.core.errors import ClientFailed, ConfigError, FedsimError, PoolError
from fedsim.core.messages import RECEIPT, Bundle, ClientJob, ClientUpdate, RoundPlan
from fedsim.core.messages import Reply as HowToReply
from fedsim.deployment import Own, Waiting, made_ready
from fedsim.runs.results import Results
from fedsim.simulation import prepare, run
from server.ledger import device_bytes
from tests.test_simulation import METHODS
from tests.tiny import final_state, kept, learned, plain_vit, same_bits, tiny

SCAFFOLD = ("client.learners=[scaffold]",)
SKIP = "server.on_client_failure=skip"


class Loop:
    """A link to nodes in this process: whatever is sent is packed, handled and unpacked at once, or when a node has been away.

    nodes: by id. absent: of (client, task, round), the jobs that nobody answers; lost: with them the node is gone."""

    def __init__(self, nodes: Mapping[int, Node]) -> None:
        self.there = dict(nodes)
        self.done: dict[str, Reply] = {}
        self.sent: list[tuple[int, str]] = []
        self.before_job: Callable[[Loop, int, ClientJob], bool] = lambda loop, node, job: True
        self.closed = False

    def nodes(self) -> set[int]:
        return set(self.there)

    def send(self, node: int, record: records.RecordDict) -> str:
        message = str(len(self.sent))
        self.sent.append((node, records.kind_of(record)))
        travelled = records.unpacked(records.packed(record))
        if records.kind_of(record) == "train" and not self.before_job(self, node, records.record_to_job(travelled)):
            return message
        self.done[message] = Reply(message, records.unpacked(records.packed(self.there[node].handle(travelled))))
        return message

    def replies(self, messages: Collection[str]) -> list[Reply]:
        return [self.done.pop(message) for message in messages if message in self.done]

    def close(self) -> None:
        self.closed = True


def node(own: Own, folder: Path, told: list[str] | None = None) -> Node:
    return Node(partial(made_ready, own), folder, (told if told is not None else []).append)


def shards(folder: Path, clients: Sequence[int] = range(3)) -> dict[int, Node]:
    return {100 + k: node(Own(client=k), folder / f"node-{k}") for k in clients}


def deployed(config: SimConfig, loop: Loop, timeout: float | None = None, wait: int = 3, told: Any = ()) -> Results:
    with served(Terms(lambda: loop, wait, timeout, getattr(told, "append", lambda line: None))):
        return run(replace(config, runtime=replace(config.runtime, pool="deployment")))


def state_of(results: Results, config: SimConfig) -> dict[str, Any]:
    assert results.path is not None
    return learned(final_state(results.path, config))


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("method", ["scaffold", "learners", "looks", "pairs"])
def test_nodes_give_the_bits_of_the_simulation(method: str, tmp_path: Path) -> None:
    """All of the state: parameters, rules, bytes, what clients store. Memory stays at the node, the run has receipts."""
    chosen = {} if method == "scaffold" else METHODS[method]
    words = SCAFFOLD if method == "scaffold" else ()
    config = tiny(*words, output=tmp_path / "simulation", model=plain_vit(), **chosen)
    simulated = run(config)
    loop = Loop(shards(tmp_path))
    results = deployed(tiny(*words, output=tmp_path / "deployed", model=plain_vit(), **chosen), loop)
    assert same_bits(state_of(results, config), state_of(simulated, config))
    assert results.config.identity() == config.identity()
    assert results.config.runtime.pool == "deployment"
    assert loop.closed and loop.sent[-1][1] == "over"
    memories = kept(results.path)["memory"]  # type: ignore[arg-type]
    assert set(memories) == set(kept(simulated.path)["memory"])  # type: ignore[arg-type]
    assert all(set(memory) == {RECEIPT} for memory in memories.values())
    assert not list(tmp_path.glob("node-*/*/*.safetensors"))  # the run is over, and what was remembered forgotten


def test_a_node_that_vanishes_or_comes_late_is_a_client_that_failed(tmp_path: Path) -> None:
    """Client 2 joins after the first round; client 1 is gone for good in the middle of its third job. A simulation in which
    these jobs fail gives the same bits."""
    words = (*SCAFFOLD, SKIP)
    nodes = shards(tmp_path)
    late = nodes.pop(102)
    loop, told = Loop(nodes), list[str]()

    def before_job(loop: Loop, node: int, job: ClientJob) -> bool:
        if (job.task, job.round) == (0, 1):
            loop.there.setdefault(102, late)
        if node == 101 and (job.task, job.round) == (1, 0):
            del loop.there[101]
            return False
        return True

    loop.before_job = before_job
    config = tiny(*words, output=tmp_path / "deployed", model=plain_vit())
    results = deployed(config, loop, wait=2, told=told)
    failed = [(f.client_id, f.task, f.round) for f in final_state(results.path, config).failures]  # type: ignore[arg-type]
    assert failed == [(2, 0, 0), (2, 0, 1), (1, 1, 0), (1, 1, 1), (1, 1, 2)]
    assert same_bits(state_of(results, config)["params"], with_failures(tiny(*words, model=plain_vit()), failed, tmp_path))
    assert "client 1: its node has left" in told


def with_failures(config: SimConfig, failed: Sequence[tuple[int, int, int]], folder: Path) -> Mapping[str, torch.Tensor]:
    """The final parameters of a simulation in which these jobs (client, task, round) fail."""

    class Failing(serial.Pool):
        def train(self, jobs: Sequence[ClientJob]) -> Iterator[Bundle]:
            for place, job in enumerate(jobs):
                if (job.client_id, job.task, job.round) in failed:
                    yield Bundle(place, (ClientFailed(job.client_id, job.task, job.round, "node", "gone"),))
                else:
                    (bundle,) = super().train([job])
                    yield replace(bundle, start=place)

    config = replace(config, runtime=replace(config.runtime, output=str(folder / "twin")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serial, "Pool", Failing)
        return final_state(run(config).path, config).params  # type: ignore[arg-type]


def test_a_job_that_takes_too_long_is_given_up_and_its_memory_dropped(tmp_path: Path) -> None:
    """Client 1 answers its second job only after the server has given it up, and must then remember what it did before."""
    words = (*SCAFFOLD, SKIP)
    loop = Loop(shards(tmp_path))

    def before_job(loop: Loop, node: int, job: ClientJob) -> bool:
        if node == 101 and (job.task, job.round) == (0, 1):
            late = loop.there[101].handle(records.job_to_record(job))  # trained, and remembered, but answered too late
            message = str(len(loop.sent) - 1)
            answers[message] = Reply(message, late)
            return False
        loop.done |= {m: answers.pop(m) for m in list(answers) if job.task == 1}
        return True

    answers: dict[str, Reply] = {}
    loop.before_job = before_job
    config = tiny(*words, output=tmp_path / "deployed", model=plain_vit())
    results = deployed(config, loop, timeout=0.2)
    failures = final_state(results.path, config).failures  # type: ignore[arg-type]
    failed = [(f.client_id, f.task, f.round) for f in failures]
    assert "no answer within 0.2 s (--timeout)" in str(failures[0]) and "still at a job" in str(failures[1])
    assert failed[0] == (1, 0, 1)
    assert same_bits(state_of(results, config)["params"], with_failures(tiny(*words, model=plain_vit()), failed, tmp_path))


def test_a_client_that_fails_is_an_error_unless_it_is_skipped(tmp_path: Path) -> None:
    config = tiny(output=tmp_path / "runs", model=plain_vit())
    with pytest.raises(ClientFailed, match=r"client 2 failed in task 0, round 0, stage node: it has no node"):
        deployed(config, Loop(shards(tmp_path, [0, 1])), wait=2)


def test_the_pool_is_for_serve_alone(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="start it with fedsim serve"):
        run(tiny("runtime.pool=deployment", output=tmp_path, model=plain_vit()))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="sends every client by itself"):
        tiny("runtime.pool=deployment", "runtime.fused=true")


# ---------------------------------------------------------------- messages


def test_a_packed_record_is_the_record(tmp_path: Path) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    tensors = {f"head.{i}": torch.arange(6).reshape(2, 3).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(0.1), "empty": torch.zeros(0, 4)}
    plan = RoundPlan(context={"teacher": tensors})
    job = ClientJob(1, 2, 3, tensors, plan, {"own/positions": torch.tensor([4, 5])}, HowToReply(("rule",), (1,)))
    update = ClientUpdate(1, 7, tensors, {"s": torch.ones(2)}, {}, {"loss": 0.1, "steps": 2.0}, encoded={"s": 3})
    there = records.record_to_job(records.unpacked(records.packed(records.job_to_record(job))))
    back = records.record_to_update(records.unpacked(records.packed(records.update_to_record(update))))
    for before, after in ((job, there), (update, back)):
        for name in ("params", "memory"):
            assert same_bits(dict(getattr(before, name)), dict(getattr(after, name)))
    assert same_bits(dict(job.plan.context["teacher"]), dict(there.plan.context["teacher"]))
    assert (there.reply, back.metrics, back.encoded, back.statistics.keys()) == (job.reply, update.metrics, update.encoded, {"s"})


def test_what_all_clients_are_sent_is_one_part() -> None:
    """So that it travels to the SuperLink once; it goes by content."""
    params = {f"t{i}": torch.full((3,), float(i)) for i in range(20)}
    parts = [
        records.packed(records.job_to_record(ClientJob(k, 0, 0, params, RoundPlan(), {"m": torch.tensor([k])}))) for k in range(2)
    ]
    shared, own = ([part["arrays"][name].object_id for part in parts] for name in ("shared", "own"))
    assert shared[0] == shared[1] and own[0] != own[1]
    assert len(parts[0]["arrays"]) == 2


# ---------------------------------------------------------------- memory


def job_of(task: int, round: int, number: int | None = None) -> ClientJob:
    memory = {} if number is None else {RECEIPT: torch.tensor([number, 0, 0])}
    return ClientJob(3, task, round, {}, RoundPlan(), memory)


def update_of(value: float) -> ClientUpdate:
    return ClientUpdate(3, 5, {}, memory={"a/positions": torch.tensor([1, 2, 3]), "b": torch.tensor([value])})


def number_of(update: ClientUpdate) -> int:
    assert update.memory is not None
    return int(update.memory[RECEIPT][0])


def test_memory_stays_and_a_receipt_goes(tmp_path: Path) -> None:
    memory = NodeMemory(tmp_path)
    first = memory.kept(job_of(0, 0), update_of(1.0))
    given = NodeMemory(tmp_path).given(job_of(0, 1, number_of(first)))  # a node that was started again
    assert same_bits(dict(given.memory), dict(update_of(1.0).memory or {}))
    assert first.memory is not None and first.memory[RECEIPT].tolist()[1:] == [4, 3]
    assert memory.given(job_of(0, 2)).memory == {}


def test_a_server_that_goes_back_finds_what_it_knew(tmp_path: Path) -> None:
    """Round 1 is done twice, since the server was killed before it was saved: both times from what round 0 left."""
    memory = NodeMemory(tmp_path)
    old = number_of(memory.kept(job_of(0, 0), update_of(1.0)))
    for value in (2.0, 3.0):
        job = memory.given(job_of(0, 1, old))
        assert job.memory["b"] == 1.0
        new = number_of(memory.kept(job, update_of(value)))
    assert memory.given(job_of(0, 2, new)).memory["b"] == 3.0
    assert len(list(tmp_path.iterdir())) == 1  # a job of a later round: what it did not ask for is gone


def test_a_memory_that_is_not_here_is_a_failure_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ClientFailed, match="join with the --memory folder of the node that had it"):
        NodeMemory(tmp_path).given(job_of(0, 1, 7))
    (tmp_path / "0.0.7.safetensors").write_bytes(b"damaged")
    with pytest.raises(ClientFailed, match="cannot be read"):
        NodeMemory(tmp_path).given(job_of(0, 1, 7))


def test_a_pass_for_statistics_changes_no_memory(tmp_path: Path) -> None:
    job = replace(job_of(0, 0), plan=RoundPlan(train=()))
    assert NodeMemory(tmp_path).kept(job, update_of(1.0)).memory is None
    assert not list(tmp_path.iterdir())


def test_the_ledger_counts_what_the_device_stores() -> None:
    memory = update_of(1.0).memory
    sim = type("Sim", (), {"sample_bytes": 65})
    assert device_bytes(sim, receipt(1, memory or {})) == device_bytes(sim, memory or {}) == 4 + 3 * 65  # type: ignore[arg-type]


# ---------------------------------------------------------------- handshake


@pytest.fixture(scope="module")
def offer() -> Offer:
    return handshake.offer_from(handshake.to_json(replace(Offer.of(prepare(tiny(model=plain_vit())).spec), client=0)))


def test_an_offer_says_what_the_run_is_about(offer: Offer) -> None:
    assert (offer.clients, len(offer.classes), offer.task_classes) == (3, 6, [[0, 1, 2], [3, 4, 5]])
    assert offer.inputs == {"pixel_values": [8, 8]}


def test_an_answer_counts_the_shard(offer: Offer) -> None:
    answers = [made_ready(Own(client=k), offer).answer for k in range(3)]
    assert sum(answer.samples for answer in answers) == 6 * 12
    assert all(set(counts) <= set(offer.classes[:3]) for counts in (answer.counts[0] for answer in answers))
    assert {answer.split for answer in answers} == {offer.split}


def lines(own: Own, offer: Offer) -> str:
    with pytest.raises((Refused, FedsimError)) as e:
        made_ready(own, offer)
    text = str(e.value)
    assert "\n" not in text
    return text


def test_another_config_is_refused_by_its_keys(offer: Offer) -> None:
    other = tiny("client.lr=0.5", "server.rounds=3", "runtime.threads=2", "data.classes=7", model=plain_vit())
    text = lines(Own(other, client=0), offer)
    assert "client.lr is 0.5 here, 0.01 at the server" in text and "server.rounds is 3 here, 2 at the server" in text
    assert "threads" not in text and "data" not in text  # a node may differ in where it runs, and where its data lie


def test_another_split_or_order_of_classes_is_refused(offer: Offer) -> None:
    assert "split is another" in lines(Own(client=0), replace(offer, split="0" * 64))
    turned = replace(offer, classes=[*reversed(offer.classes)])
    assert "the order of classes differs: class 0 is" in lines(Own(client=0), turned)
    assert "the server's classes" in lines(Own(client=0), replace(offer, classes=["a", "b"]))


def test_another_version_is_refused_on_both_sides(offer: Offer) -> None:
    with pytest.raises(Refused, match=r"the server runs fedsim 0\.0\.1 and this node"):
        handshake.offer_from(handshake.to_json(replace(offer, fedsim="0.0.1")))
    with pytest.raises(Refused, match=r"the node runs fedsim 0\.0\.1 and this server"):
        handshake.answer_from(handshake.to_json(Answer(fedsim="0.0.1")))
    with pytest.raises(Refused, match="no message of fedsim"):
        handshake.answer_from(json.dumps([1]))


def test_plug_in_files_of_the_server_are_not_guessed_at(offer: Offer) -> None:
    assert "join with the same CONFIG" in lines(Own(client=0), replace(offer, files=["0" * 64]))


def test_a_client_that_there_is_not(offer: Offer) -> None:
    assert "there is no client 3: the run has 3 clients" in lines(Own(client=3), offer)
    assert "all have their nodes" in lines(Own(data=["source=npz", "path=x"]), replace(offer, client=handshake.ANY))


# ---------------------------------------------------------------- data of a node's own


def mine(path: Path, names: Sequence[str], shape: tuple[int, ...] = (8, 8)) -> list[str]:
    """An .npz of two samples a class, and the --data that names it."""
    labels = np.repeat(names, 2)
    images = np.arange(len(labels) * int(np.prod(shape)), dtype=np.uint8).reshape(len(labels), *shape)
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return ["source=npz", f"path={path}"]


def test_own_samples_go_to_the_tasks_of_their_classes(offer: Offer, tmp_path: Path) -> None:
    names = [offer.classes[c] for c in (4, 1, 2)]  # in an order of their own, and not all of them
    holding = made_ready(Own(client=2, data=mine(tmp_path / "a.npz", names)), offer)
    spec = holding.spec
    assert holding.answer.counts == [{offer.classes[1]: 2, offer.classes[2]: 2}, {offer.classes[4]: 2}]
    for task, rows in ((0, {1, 2}), (1, {4})):
        positions = spec.shard(task, 2)
        assert set(spec.train.labels[positions].tolist()) == rows
        assert not len(spec.shard(task, 0)) and not len(spec.test_of(task))
    assert holding.answer.split == "" and holding.answer.client == 2


def test_own_samples_that_do_not_fit_are_refused(offer: Offer, tmp_path: Path) -> None:
    fine, strange = offer.classes[:2], [offer.classes[0], "unicorn"]
    assert "8×8×3, the server's 8×8" in lines(Own(data=mine(tmp_path / "a.npz", fine, (8, 8, 3))), offer)
    assert "class 'unicorn' of this node's data" in lines(Own(data=mine(tmp_path / "b.npz", strange)), offer)
    assert "no.npz" in lines(Own(data=["source=npz", f"path={tmp_path}/no.npz"]), offer)
    stream = {**offer.config["stream"], "noise": {"kind": "symmetric", "share": 0.2}}
    noisy = replace(offer, config={**offer.config, "stream": stream})
    assert "stream.noise" in lines(Own(data=mine(tmp_path / "c.npz", fine)), noisy)


def test_own_samples_go_to_the_tasks_of_their_domains(tmp_path: Path) -> None:
    names, domains = np.repeat(["a", "b"], 4), np.tile(["x", "y", "x", "z"], 2)

    def npz(path: Path, kept: np.ndarray[Any, Any]) -> Path:
        images = np.zeros((int(kept.sum()), 8, 8), dtype=np.uint8)
        told = {"images": images, "labels": names[kept], "domain": domains[kept]}
        np.savez(path, **{f"{split}_{key}": value for split in ("train", "test") for key, value in told.items()})
        return path

    whole = npz(tmp_path / "whole.npz", domains != "")
    stream = {"name": "domain_incremental", "tasks": 2, "order": ["y", "x"]}
    partition = {"name": "iid", "clients": 1, "min_samples": 1}
    config = tiny(model=plain_vit(), data={"source": "npz", "path": str(whole)}, stream=stream, partition=partition)
    offered = replace(Offer.of(prepare(config).spec), client=0)
    own = ["source=npz", f"path={npz(tmp_path / 'own.npz', (names == 'b') & (domains != 'y'))}"]
    assert made_ready(Own(data=own), offered).answer.counts == [{}, {"b": 2}]  # of z the server knows no task


def test_plug_in_files_are_known_by_what_is_in_them(offer: Offer, tmp_path: Path) -> None:
    rules = [tmp_path / "a" / "rule.py", tmp_path / "b" / "mine.py", tmp_path / "c" / "rule.py"]
    for path, more in zip(rules, ("", "", "# other"), strict=True):
        path.parent.mkdir()
        path.write_text(Path("server/aggregators/fairavg.py").read_text() + more)
    here, same, other = (tiny("server.aggregator.name=" + str(path), model=plain_vit()) for path in rules)
    handshake.require_same(same, handshake.told(here)[0])
    with pytest.raises(Refused, match=r"server\.aggregator\.name is"):
        handshake.require_same(other, handshake.told(here)[0])


def test_nodes_with_data_of_their_own_train(tmp_path: Path) -> None:
    """Whatever the server's own split says: client 0 holds task 0 alone here, client 1 both."""
    config = tiny(*SCAFFOLD, SKIP, "partition.name=iid", "partition.clients=2", output=tmp_path / "runs", model=plain_vit())
    names = prepare(config).manifest.class_names
    told = list[str]()
    nodes = {
        k: node(Own(client=k, data=mine(tmp_path / f"{k}.npz", held)), tmp_path / str(k), told)
        for k, held in enumerate((names[:3], names))
    }
    results = deployed(config, Loop(nodes), wait=2)
    assert results.finished and not results.failures
    assert "this node is client 0: 6 training samples" in told and "this node is client 1: 12 training samples" in told
    assert len(kept(results.path)["memory"]) == 2  # type: ignore[arg-type]


# ---------------------------------------------------------------- who is there


class Saying:
    """A node that gives this answer."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.heard = answer, list[str]()

    def handle(self, record: records.RecordDict) -> records.RecordDict:
        values = records.values_of(record)
        self.heard.append(f"{values['kind']} {values.get('reason', '')}".strip())
        return records.values_to_record("answer", answer=handshake.to_json(self.answer))


def guests(offer: Offer, *answers: Answer) -> tuple[Guests, Loop, list[str], list[Saying]]:
    saying, told = [Saying(a) for a in answers], list[str]()
    loop = Loop({10 + i: s for i, s in enumerate(saying)})  # type: ignore[misc]
    found = Guests(loop, offer, "cpu", told.append)
    found.look()
    return found, loop, told, saying


def test_nodes_that_do_not_say_who_they_are_get_what_is_free(offer: Offer) -> None:
    fine = Answer(client=0, any=True, counts=[{}, {}], computes="cpu")
    found, _, told, saying = guests(offer, replace(fine, any=False), fine)
    assert [found.node_of(k) for k in range(3)] == [10, None, None]
    saying[1].answer = replace(fine, client=1)
    found.look()  # it is offered another one
    assert [found.node_of(k) for k in range(3)] == [10, 11, None]
    assert len(told) == 2 and saying[1].heard == ["offer", "offer"]


def test_who_answers_wrongly_is_refused_and_the_others_go_on(offer: Offer) -> None:
    fine = Answer(counts=[{}, {}], computes="cuda")
    wrong = [replace(fine, client=9), replace(fine, split="1"), replace(fine, counts=[{}]), Answer(refused="no\nthanks")]
    found, loop, told, saying = guests(offer, *wrong, fine)
    found.look()  # for the last there was no client left, until the others were refused
    assert found.clients == [found.clients[0]] and found.node_of(found.clients[0]) == 14
    assert [line for line in told if "\n" in line] == []
    assert "a node was refused: there is no client 9: the run has 3, from 0 on (partition.clients)" in told
    assert "refused there is no client 9: the run has 3, from 0 on (partition.clients)" in saying[0].heard
    assert sum("a node was refused" in line for line in told) == 4
    assert any("computes on cuda (here cpu)" in line for line in told)
    sent = len(loop.sent)
    found.look()
    assert len(loop.sent) == sent  # nobody is asked twice


def test_a_second_node_takes_over_when_the_first_has_left(offer: Offer) -> None:
    fine = Answer(client=1, counts=[{}, {}], computes="cpu")
    found, loop, told, saying = guests(offer, fine, fine)
    assert found.node_of(1) == 10 and saying[1].heard[-1].startswith("wait client 1 has its node already")
    del loop.there[10]
    found.look()
    assert found.node_of(1) == 11 and "client 1: its node has left" in told
    found.dismiss()
    assert not found.leaving() and saying[1].heard[-1] == "over"


class Halfway:
    """What the SuperLink says of a reply whose last part the node has not sent yet, or never will."""

    def __init__(self, answer: records.RecordDict) -> None:
        from flwr.app import Metadata
        from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

        metadata = Metadata(1, "", 5, 1, "asked", "", 0.0, 60.0, "train")
        message = records.Message(content=records.packed(answer), metadata=metadata)  # type: ignore[call-overload]
        self.tree = get_object_tree(message)
        self.objects = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
        self.missing, self.lost, self.confirmed = {next(iter(self.objects))}, False, list[str]()

    def PullMessages(self, request: Any) -> Any:
        head = SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id="asked"))
        return SimpleNamespace(messages_list=[head], message_object_trees=[self.tree])

    def PullObject(self, request: Any) -> Any:
        there = request.object_id not in self.missing
        return SimpleNamespace(
            object_found=not self.lost, object_available=there, object_content=self.objects[request.object_id] if there else b""
        )

    def ConfirmMessageReceived(self, request: Any) -> None:
        self.confirmed.append(request.message_object_id)


def test_a_reply_that_is_not_there_as_a_whole_is_not_waited_for() -> None:
    answer = records.values_to_record("answer", answer="yes")
    superlink = Halfway(answer)
    from flwr.proto.node_pb2 import Node as FlowersNode

    grid = SimpleNamespace(_runtime_client=superlink, run=SimpleNamespace(run_id=1), node=FlowersNode(node_id=1))
    coming: dict[str, Any] = {}
    start = time.monotonic()
    assert _replies(grid, ["asked", "other"], coming) == [] and list(coming) == ["asked"]
    superlink.missing.clear()
    (reply,) = _replies(grid, ["asked", "other"], coming)
    assert reply.of == "asked" and reply.record is not None and records.values_of(reply.record)["answer"] == "yes"
    assert superlink.confirmed == [superlink.tree.object_id] and not coming
    assert time.monotonic() - start < 1.0  # one try of Flower's is followed by a pause of a second
    superlink.lost = True
    assert [r.reason for r in _replies(grid, ["asked"], coming)] == ["its reply did not come as a whole"]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"host": "0.0.0.0"}, "--host 0.0.0.0 without TLS is open to all who can reach it"),
        ({"ssl_certfile": "a"}, "TLS needs three files: --ssl-keyfile, --ssl-ca-certfile are missing"),
        ({"node_keys": ["a.pub"]}, "--node-keys needs TLS"),
        ({"ssl_certfile": "a", "ssl_keyfile": "b", "ssl_ca_certfile": "c"}, "--ssl-certfile: there is no file a"),
        ({"port": 0}, "--port must be in 1..65535"),
    ],
)
def test_an_address_that_does_not_go_together(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as e:
        Address(**given)
    assert said in str(e.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Server("nowhere"), "--server must be host:port"),
        (lambda: Server("a:1", insecure=True, key="k"), "--insecure goes with neither"),
        (lambda: Server("a:1", root_certificates="none.crt"), "--root-certificates: there is no file none.crt"),
        (lambda: Own(), "say what this node holds"),
        (lambda: Own(client=-1), "--client must not be negative"),
        (lambda: Waiting(nodes=0), "--wait must be at least 1"),
        (lambda: Waiting(timeout=float("nan")), "--timeout must be positive"),
    ],
)
def test_options_that_make_no_sense(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError) as e:
        make()
    assert said in str(e.value)


def test_a_port_in_use_is_one_line_before_anything_else() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PoolError, match=rf"127\.0\.0\.1:{port} cannot be listened on: Address already in use"):
            deployment.serve(tiny(), Address(port=port))


def test_loopback() -> None:
    here, beyond = ("127.0.0.1", "localhost", "::1", "[::1]"), ("0.0.0.0", "::", "example.org", "10.0.0.1")
    assert all(map(is_loopback, here)) and not any(map(is_loopback, beyond))


def test_without_flower_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith(("clients.deployment", "clients.flower_records"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flwr", None)
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    with pytest.raises(FedsimError, match=r"a deployment needs Flower.*pip install 'fedsim\[flower\]'"):
        deployment.require_flower()


def test_another_flower_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Parts that are not public may lie elsewhere in the next release."""
    monkeypatch.setitem(sys.modules, "flwr.supernode.fleet_http_client", None)
    with pytest.raises(FedsimError, match=r"Flower \d.* is not one that fedsim can deploy with: .*fleet_http_client"):
        deployment.join(Server("127.0.0.1:1", insecure=True), Own(client=0), tmp_path, 0.0, print)


def test_the_pool_is_a_pool() -> None:
    assert not Pool.by_manifest and serial.Pool.by_manifest
