"""Clients on nodes that have joined: what `fedsim serve` runs. The server itself evaluates, and trains what servers train."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from clients import flower_records as records
from clients.deployment.guests import Guests, Link, Reply
from clients.deployment.handshake import Offer, computes
from clients.pools import serial
from fedsim.core import contracts
from fedsim.core.errors import ClientFailed, PoolError, one_line
from fedsim.core.messages import Bundle, ClientJob, ClientUpdate, EvalJob, EvalResult, ServerJob, State
from fedsim.core.work import WorkSpec

STAGE = "node"  # of a client that failed because of its node
SHORTEST_S, LONGEST_S = 0.02, 0.5  # between two looks at what has come


@dataclass(frozen=True)
class Terms:
    """How clients are waited for.

    open_link: opens the line to the nodes. wait: how many nodes there must be before the first round, as far as there are
    clients. timeout: seconds that a client has for one job; None: as long as its node is there. tell: is given a line about who
    comes and goes.
    """

    open_link: Callable[[], Link]
    wait: int = 10**9
    timeout: float | None = None
    tell: Callable[[str], None] = lambda line: None


_terms: ContextVar[Terms | None] = ContextVar("deployment", default=None)


@contextmanager
def served(terms: Terms) -> Iterator[None]:
    """While open, the pool `deployment` goes by these terms."""
    token = _terms.set(terms)
    try:
        yield
    finally:
        _terms.reset(token)


class Pool(contracts.Pool):
    """One node per client. A client whose node is not there, leaves, is still busy or takes too long has failed in this round, as
    `server.on_client_failure` has it; where no node is free at all, one is waited for."""

    by_manifest = False

    @classmethod
    def check(cls, spec: WorkSpec) -> None:
        if _terms.get() is None:
            raise PoolError("runtime.pool is deployment: its clients are nodes that join, so start it with fedsim serve")

    def __init__(self, spec: WorkSpec) -> None:
        self.check(spec)
        terms = _terms.get()
        assert terms is not None
        self._terms, self._spec = terms, spec
        self._here = serial.Pool(spec)
        self._link = terms.open_link()
        self._guests = Guests(self._link, Offer.of(spec), computes(spec.config), terms.tell)
        self._late: dict[str, int] = {}  # jobs that were given up -> the node that still has them
        try:
            self._wait_for_nodes(min(terms.wait, spec.num_clients), range(spec.num_clients))
        except BaseException:  # Ctrl-C too
            self.close()
            raise

    def train(self, jobs: Sequence[ClientJob]) -> Iterator[Bundle]:
        self._wait_for_nodes(1, [job.client_id for job in jobs])
        running: dict[str, int] = {}  # message -> place
        nodes: dict[str, int] = {}
        arrays = records.shared_arrays()
        for place, job in enumerate(jobs):
            node = self._free_node(job.client_id)
            if node is None:
                busy = self._guests.node_of(job.client_id) is not None
                why = "its node is still at a job that took too long" if busy else "it has no node"
                yield Bundle(place, (failed(job, why),))
                continue
            loaded = replace(job, memory=dict(job.memory.items()))
            message = self._link.send(node, records.job_to_record(loaded, arrays))
            running[message], nodes[message] = place, node
        start = time.monotonic()
        while running:
            came = self._link.replies(list(running))
            for reply in came:
                place = running.pop(reply.of)
                yield Bundle(place, (outcome(jobs[place], reply),))
            waited = time.monotonic() - start
            for message, place in self._given_up(running, nodes, waited).items():
                del running[message]
                yield Bundle(place, (failed(jobs[place], self._why(message, nodes)),))
            if running and not came:
                time.sleep(min(LONGEST_S, SHORTEST_S + waited / 20))

    def evaluate(self, jobs: Sequence[EvalJob]) -> Iterator[EvalResult]:
        return self._here.evaluate(jobs)

    def make(self, job: ServerJob) -> State:
        return self._here.make(job)

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            self._guests.dismiss()
            self._wait_for_farewells()
        self.close()

    def close(self) -> None:
        self._link.close()

    def _wait_for_nodes(self, wanted: int, clients: Sequence[int]) -> None:
        """Until so many of these clients have nodes that are free."""
        self._look()
        said = -1
        while (there := sum(self._free_node(client) is not None for client in clients)) < wanted:
            if said != there:
                self._terms.tell(f"waiting for nodes: {there} of {wanted} are here (fedsim join)")
                said = there
            time.sleep(LONGEST_S / 5)
            self._look()

    def _free_node(self, client: int) -> int | None:
        """The node of a client, unless it is still at a job that was given up."""
        node = self._guests.node_of(client)
        return None if node in self._late.values() else node

    def _look(self) -> None:
        self._guests.look()
        for reply in self._link.replies(list(self._late)):  # too late: what it holds is dropped, and the client as it was before
            del self._late[reply.of]
        there = self._link.nodes()
        self._late = {message: node for message, node in self._late.items() if node in there}

    def _given_up(self, running: dict[str, int], nodes: dict[str, int], waited: float) -> dict[str, int]:
        """The jobs that are waited for no longer."""
        self._look()
        there, limit = self._link.nodes(), self._terms.timeout
        if limit is not None and waited > limit:
            self._late |= {message: nodes[message] for message in running if nodes[message] in there}
            return dict(running)
        return {message: place for message, place in running.items() if nodes[message] not in there}

    def _why(self, message: str, nodes: dict[str, int]) -> str:
        if message in self._late:
            return f"no answer within {self._terms.timeout:g} s (--timeout)"
        return "its node has left"

    def _wait_for_farewells(self) -> None:
        """A moment, so that nodes hear that the run is over before the link closes."""
        deadline = time.monotonic() + 5.0
        while self._guests.leaving() and time.monotonic() < deadline:
            time.sleep(SHORTEST_S)


def failed(job: ClientJob, why: str) -> ClientFailed:
    return ClientFailed(job.client_id, job.task, job.round, STAGE, why)


def outcome(job: ClientJob, reply: Reply) -> ClientUpdate | ClientFailed:
    """What a client's reply says; one that cannot be read is a failure of the client."""
    if reply.record is None:
        return failed(job, reply.reason)
    try:
        result = records.record_to_outcome(reply.record)
    except Exception as e:
        return failed(job, f"its reply cannot be read ({one_line(e)})")
    if result.client_id != job.client_id:
        return failed(job, f"its reply is of client {result.client_id}")
    return result
