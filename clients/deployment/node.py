"""At a node: answer offers, train, and keep what the client remembers."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from clients.deployment import handshake
from clients.deployment.handshake import Answer, Offer, Refused
from clients.deployment.memory import NodeMemory
from clients.deployment.supernode import Gone
from clients.flower_records import (
    Message,
    RecordDict,
    kind_of,
    outcome_to_record,
    record_to_job,
    unpacked,
    values_of,
    values_to_record,
)
from clients.worker import Worker
from fedsim.core.defaults import torch_defaults
from fedsim.core.errors import ClientFailed, FedsimError, PoolError, one_line
from fedsim.core.files import held
from fedsim.core.messages import ClientJob, ClientUpdate
from fedsim.core.work import WorkSpec

IDLE_S = (0.05, 1.0)  # between two looks for a message: at first, and after a while without one
AGAIN_S = 2.0  # between two attempts to reach the server


class Line(Protocol):
    """A node's line to the server while open. All raise Gone when the server cannot be reached."""

    def receive(self) -> Message | None: ...
    def reply(self, message: Message, record: RecordDict) -> None: ...
    def __enter__(self) -> Line: ...
    def __exit__(self, *exc: object) -> None: ...


@dataclass(frozen=True)
class Holding:
    """What a node has made ready for a run: the client's data and the model's config, and what it says of them."""

    spec: WorkSpec
    answer: Answer


class Node:
    """One client of one run at a time.

    make_ready: what this node holds, as this client of the offered run; raises Refused or a FedsimError for a run that does not
    suit it. memory: folder of what clients remember. tell: is given a line about what happens.
    """

    def __init__(self, make_ready: Callable[[Offer], Holding], memory: Path, tell: Callable[[str], None]) -> None:
        self._make_ready, self._parent, self._tell = make_ready, memory, tell
        self._known: tuple[Offer, Holding, Worker] | None = None  # what was offered last, with the client that this node is
        self._memory: NodeMemory | None = None
        self._stack = ExitStack()
        self._first = True  # the next offer is the first on this line
        self.refused = ""  # why, in one line

    def run(self, open_line: Callable[[], Line], patience: float) -> None:
        """Until the server says that the run is over. patience: seconds that a server that cannot be reached is waited for.

        Raises PoolError when that was in vain, or when this node is refused."""
        lost: float | None = None
        with self._stack:
            while True:
                try:
                    with open_line() as line:
                        if lost is not None:
                            self._tell("the server is there again")
                        lost, self._first = None, True
                        self._serve(line)
                        return
                except Gone as e:
                    if lost is None:
                        lost = time.monotonic()
                        self._tell(f"the server cannot be reached, waiting for it ({e})")
                    if time.monotonic() - lost > patience:
                        raise PoolError(f"the server has not been reached for {patience:.0f} s: {e} (--patience)") from e
                    time.sleep(AGAIN_S)

    def _serve(self, line: Line) -> None:
        idle = IDLE_S[0]
        while True:
            message = line.receive()
            if message is None:
                time.sleep(idle)
                idle = min(idle * 1.3, IDLE_S[1])
                continue
            idle, content = IDLE_S[0], unpacked(message.content)
            line.reply(message, self.handle(content))
            kind = kind_of(content)
            if kind == "over":
                return
            if self.refused:
                raise PoolError(self.refused)

    def handle(self, content: RecordDict) -> RecordDict:
        """What this node answers to a message. `refused` says so then, if that was the end."""
        kind = kind_of(content)
        if kind == "train":
            return outcome_to_record(self._trained(record_to_job(content)))
        if kind == "offer":
            answer = self._answered(str(values_of(content)["offer"]))
            self.refused = answer.refused and f"this node takes no part: {answer.refused}"
            return values_to_record("answer", answer=handshake.to_json(answer))
        reason = str(values_of(content).get("reason", ""))
        if kind == "refused":
            self.refused = f"the server refused this node: {reason}"
        elif kind == "over" and self._memory is not None:
            self._memory.forget()
        self._tell("the run is over" if kind == "over" else reason)
        return values_to_record("heard")

    def _answered(self, text: str) -> Answer:
        """What this node says to an offer, made ready for it."""
        try:
            offer = handshake.offer_from(text)
            known = self._known
            if known is not None and offer.identity == known[0].identity and self._first:
                offer = replace(offer, client=known[0].client)  # whoever was client 3 of a run remembers what client 3 does
            self._first = False
            if known is None or offer != known[0]:
                known = self._made_ready(offer)
            offer, holding, _ = self._known = known
            client = holding.answer.client
            folder = handshake.memory_folder(self._parent, offer, client)
            if self._memory is None or self._memory.folder != folder:
                self._stack.close()
                self._stack.enter_context(held(folder, "fedsim join", file=True))
                self._memory = NodeMemory(folder)
        except (Refused, FedsimError) as e:
            return Answer(refused=str(e))
        except (ValueError, TypeError, KeyError) as e:
            return Answer(refused=f"the server's offer cannot be read ({one_line(e)})")
        self._tell(f"this node is client {client}: {holding.answer.samples} training samples")
        return holding.answer

    def _made_ready(self, offer: Offer) -> tuple[Offer, Holding, Worker]:
        holding = self._make_ready(offer)
        with torch_defaults(holding.spec.config.runtime.threads):
            return replace(offer, client=holding.answer.client), holding, Worker(holding.spec)

    def _trained(self, job: ClientJob) -> ClientUpdate | ClientFailed:
        """What becomes of a job."""
        start = time.perf_counter()
        try:
            result = self._result(job)
        except ClientFailed as e:
            result = e
        except Exception as e:
            result = ClientFailed(job.client_id, job.task, job.round, "worker", one_line(e))
        what = f"task {job.task}, {f'round {job.round}' if job.plan.train else 'statistics'}"
        said = f"failed in stage {result.stage}: {result.reason}" if isinstance(result, ClientFailed) else "done"
        self._tell(f"{what}: {said} in {time.perf_counter() - start:.1f} s")
        return result

    def _result(self, job: ClientJob) -> ClientUpdate | ClientFailed:
        if self._known is None or self._memory is None:
            raise ClientFailed(job.client_id, job.task, job.round, "node", "this node has not joined")
        _, holding, worker = self._known
        if job.client_id != holding.answer.client:
            raise ClientFailed(job.client_id, job.task, job.round, "node", f"this node is client {holding.answer.client}")
        loaded = self._memory.given(job)
        with torch_defaults(holding.spec.config.runtime.threads):
            result = worker.train_client(loaded)
        return result if isinstance(result, ClientFailed) else self._memory.kept(job, result)
