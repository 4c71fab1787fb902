"""At the server: which nodes are there, and as which client."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Protocol

from clients.deployment.handshake import ANY, Answer, Offer, Refused, answer_from, to_json
from clients.flower_records import RecordDict, values_of, values_to_record
from fedsim.core.errors import shown


@dataclass(frozen=True)
class Reply:
    """What came back for the message `of`: a record, or the reason why there is none."""

    of: str
    record: RecordDict | None
    reason: str = ""


class Link(Protocol):
    """Messages to nodes and back."""

    def nodes(self) -> set[int]:
        """Those that are there. Raises PoolError when the link is broken; so do the others."""

    def send(self, node: int, record: RecordDict) -> str:
        """The message's id."""

    def replies(self, messages: Collection[str]) -> list[Reply]:
        """Those that have come, each once."""

    def close(self) -> None: ...


class Guests:
    """Offers the run to every node that comes, and holds its answer against the run."""

    def __init__(self, link: Link, offer: Offer, computes: str, tell: Callable[[str], None]) -> None:
        self._link, self._offer, self._computes, self._tell = link, offer, computes, tell
        self._node_of: dict[int, int] = {}  # by client
        self._asked: dict[str, tuple[int, int]] = {}  # offer -> node, the client that it was offered to be
        self._second: dict[int, tuple[int, Answer]] = {}  # nodes that wait for another one of their client to leave
        self._told: dict[str, int] = {}  # "the run is over" -> node
        self._away: set[int] = set()  # nodes that were refused or have refused

    def look(self) -> None:
        """Note who has left, offer the run to who is new, and take in answers. Waits for nobody."""
        there = self._link.nodes()
        for client, node in list(self._node_of.items()):
            if node not in there:
                del self._node_of[client]
                self._tell(f"client {client}: its node has left")
        self._asked = {message: (node, client) for message, (node, client) in self._asked.items() if node in there}
        for node, (client, answer) in list(self._second.items()):
            if node not in there or client not in self._node_of:
                del self._second[node]
                if node in there:
                    self._welcome(node, client, answer)
        known = {*self._node_of.values(), *(node for node, _ in self._asked.values()), *self._second, *self._away}
        for node in sorted(there - known):
            client = self._free()
            if client == ANY and len(self._node_of) < self._offer.clients:
                continue  # until those who are asked have answered
            record = values_to_record("offer", offer=to_json(replace(self._offer, client=client)))
            self._asked[self._link.send(node, record)] = node, client
        for reply in self._link.replies(list(self._asked)):
            node, client = self._asked.pop(reply.of)
            self._answered(node, client, reply)

    def node_of(self, client: int) -> int | None:
        """The node of a client; None: it has none."""
        return self._node_of.get(client)

    @property
    def clients(self) -> list[int]:
        """Those who are there."""
        return sorted(self._node_of)

    def dismiss(self) -> None:
        """Tell all nodes that the run is over."""
        self._told = {self._link.send(node, values_to_record("over")): node for node in (*self._node_of.values(), *self._second)}

    def leaving(self) -> bool:
        """Whether somebody has not heard yet that the run is over."""
        for reply in self._link.replies(list(self._told)):
            del self._told[reply.of]
        there = self._link.nodes()
        return any(node in there for node in self._told.values())

    def _free(self) -> int:
        """The first client without a node, that no other node is offered either."""
        taken = {*self._node_of, *(client for _, client in self._asked.values())}
        return next((client for client in range(self._offer.clients) if client not in taken), ANY)

    def _answered(self, node: int, offered: int, reply: Reply) -> None:
        try:
            answer = self._parsed(reply)
            client = offered if answer.client == ANY else answer.client
            self._require(answer, client)
        except Refused as e:
            self._away.add(node)
            self._tell(f"a node was refused: {shown(str(e))}")
            if reply.record is not None:
                self._link.send(node, values_to_record("refused", reason=str(e)))
            return
        if client in self._node_of and answer.any and self._free() != ANY:
            return  # it is offered another one
        if client in self._node_of:  # a node that was killed is known to have left only some seconds later
            self._second[node] = client, answer
            why = f"client {client} has its node already: a second one waits until that has left"
            self._link.send(node, values_to_record("wait", reason=why))
            self._tell(why)
            return
        self._welcome(node, client, answer)

    def _welcome(self, node: int, client: int, answer: Answer) -> None:
        self._node_of[client] = node
        other = "" if answer.computes == self._computes else f", computes on {answer.computes} (here {self._computes})"
        self._tell(shown(f"client {client} has joined: {answer.samples} samples{other}"))

    def _parsed(self, reply: Reply) -> Answer:
        if reply.record is None:
            raise Refused(reply.reason)
        try:
            return answer_from(str(values_of(reply.record)["answer"]))
        except (KeyError, ValueError, TypeError) as e:
            raise Refused(f"its answer cannot be read ({type(e).__name__})") from e

    def _require(self, answer: Answer, client: int) -> None:
        """Raise Refused for an answer that does not suit the run."""
        offer = self._offer
        if answer.refused:
            raise Refused(answer.refused)
        if client == ANY:
            raise Refused(f"all {offer.clients} clients have their nodes already")
        if not 0 <= client < offer.clients:
            raise Refused(f"there is no client {client}: the run has {offer.clients}, from 0 on (partition.clients)")
        if answer.split and answer.split != offer.split:
            raise Refused("its split is another than the server's: other data, another seed or another partition")
        if len(answer.counts) != len(offer.task_classes):
            raise Refused(f"it knows {len(answer.counts)} tasks, the run has {len(offer.task_classes)}")
