"""What a round cost: bytes by direction and kind of object, and the clients' loss.

The bytes are those of the run's own messages with clients that keep what they were sent, as a deployment would send them; that a
simulator hands out references, or sums on the way, changes nothing.

Down, to every client of a round or of a statistics pass, those that fail included: the parameters (adapter, head); where the
plan works with modules of past tasks (background), those modules, which the client weighs and stacks itself; what each merge has
left beneath the module, as factors or as their product, whichever is smaller, which the client adds up itself; and the context
that learners and rules tell (control variates, a teacher). Of these only tensors that it does not have: a client keeps the last
message that it got and the last one that works with past modules or context, and what has been in every such message since is not
sent again. So it gets what changed since it last took part, and a past module once, or never if it had it as parameters in the
pass at that task's end. It is an upper bound in three places: a fresh adapter is counted whole, where a seed would do; what was
left out of a message and comes back in a later one is sent again to those who missed both; and a calibrator's pass at a task's
end is sent the merged model that is deployed, whole.

A client with fewer ranks than the server's pair (`client.ranks`) is sent, and sends, its own part of the factors; all of it where
it looks through whole pairs: in passes for statistics, and in modules of past tasks.

What is fixed in a head (random projections) is drawn by every client from the run's seed, and does not travel.

Up: what was trained, and the statistics, of which equal ones travel once (energies of queries, keys and values, which have the
same inputs); of what a channel has encoded, the bytes of its encoded form. Client memory does not travel; neither do data, names,
and the head that an evaluation on the server uses. What devices must store is counted beside them: memory, a buffer's samples as
samples.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fedsim.core import ranks
from fedsim.core.messages import BACKGROUND, BENEATH, POSITIONS, RECEIPT, ClientJob, ClientUpdate, Tensors, bytes_up
from server.state import ServerState, Simulation

_digests: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> (version, digest): what stays is looked at once


def charged(sim: Simulation, state: ServerState, jobs: Sequence[ClientJob], updates: Sequence[ClientUpdate]) -> ServerState:
    """The state with one round's messages in its ledger. Every client of a round receives the same job."""
    total = {direction: dict(kinds) for direction, kinds in state.bytes.items()}
    plan, delivered = jobs[0].plan, state.delivered
    past: Sequence[Tensors] = state.start.past.modules if plan.background else ()
    told = {name: tensors for name, tensors in plan.context.items() if name not in (BACKGROUND, BENEATH)}
    beneath = state.beneath.parts if BENEATH in plan.context else {}
    blended = any(r.blended for r in plan.statistics)
    with_past = bool(past or told or beneath) or plan.beside or blended  # in the first task there are none yet
    unequal, whole = sim.config.client.ranks is not None, not plan.train  # a pass looks through whole pairs
    message = _message(jobs[0].params, past, tuple(told.values()), whole, unequal)
    message |= {f"{BENEATH} {name}": Content(BENEATH, size) for name, size in beneath.items()}
    kinds = ["background", *(["context"] if told else []), *([BENEATH] if beneath else [])]
    for kind in (*(name.partition(".")[0] for name in jobs[0].params), *kinds):
        total["down"].setdefault(kind, 0)
    clients = [job.client_id for job in jobs]
    had = map(tuple, sim.store.last[clients].tolist())
    receivers = Counter((last, ranks.rank_of(sim.config, client)) for client, last in zip(clients, had, strict=True))
    for name, content in message.items():
        lacking = [(rank, n) for (last, rank), n in receivers.items() if delivered.lacked(name, last)]
        total["down"][content.kind] += sum(n * content.bytes_for(rank) for rank, n in lacking)
    for update in updates:
        for kind, size in bytes_up(update).items():
            total["up"][kind] = total["up"].get(kind, 0) + size
    sim.store.sent(delivered.count, clients, with_past)
    return replace(state, bytes=total, delivered=delivered.after(list(message), with_past))


class Content(NamedTuple):
    """Something that a message is about. size: its bytes; ranks: how many it has, if it is a LoRA factor. rest: what is beyond a
    client's own rank, in the place of what is not."""

    kind: str
    size: int
    ranks: int = 0
    rest: bool = False

    def bytes_for(self, rank: int | None) -> int:
        """Of what a client of this rank is sent of it."""
        own = self.size if rank is None or rank >= self.ranks else self.size // self.ranks * rank
        return self.size - own if self.rest else own


def _message(params: Tensors, past: Sequence[Tensors], told: Sequence[Tensors], whole: bool, unequal: bool) -> dict[str, Content]:
    """All that a message is about, by name and digest; what is a parameter too counts as one. whole: of parameters too, all ranks
    are sent, where those of clients are unequal."""
    found: dict[str, Content] = {}
    groups: list[tuple[str, Tensors, bool]] = [(name.partition(".")[0], {name: t}, whole) for name, t in params.items()]
    groups += [("background", module, True) for module in past] + [("context", tensors, True) for tensors in told]
    for kind, tensors, all_ranks in groups:
        for name, tensor in tensors.items():
            axis, key = ranks.factor_axis(name), f"{name} {_digest(tensor)}"
            held = 0 if axis is None else tensor.shape[axis]
            found.setdefault(key, Content(kind, tensor.nbytes, held))
            if held and unequal and all_ranks:
                found.setdefault(f"{key} rest", Content(kind, tensor.nbytes, held, rest=True))
    return found


def _digest(tensor: Tensor) -> str:
    """Of type, shape and bytes."""
    version = None if tensor.is_inference() else tensor._version
    known = _digests.get(tensor)  # type: ignore[no-untyped-call]
    if version is None or known is None or known[0] != version:
        content = hashlib.sha1(f"{tensor.dtype} {tuple(tensor.shape)} ".encode(), usedforsecurity=False)
        content.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
        known = _digests[tensor] = version, content.hexdigest()
    digest: str = known[1]
    return digest


def device_bytes(sim: Simulation, memory: Tensors) -> int:
    """What a device stores to remember this: for positions of samples the samples themselves, and all else as it is."""
    if RECEIPT in memory:
        _, held, positions = memory[RECEIPT].tolist()
        return int(held + positions * sim.sample_bytes)
    return sum(t.numel() * sim.sample_bytes if n.endswith(POSITIONS) else t.nbytes for n, t in memory.items())


def mean_loss(updates: Sequence[ClientUpdate]) -> float:
    """Mean over clients, weighted by samples, of their last epoch's loss; NaN if nobody trained."""
    pairs = [(u.metrics["loss"], u.num_samples) for u in updates if "loss" in u.metrics]
    weight = sum(n for _, n in pairs)
    return sum(loss * n for loss, n in pairs) / weight if weight else math.nan
