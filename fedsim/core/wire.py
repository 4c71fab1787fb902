"""What happens between clients and server: the channels of `server.channel`, up and, in reverse, down the same chain.

Every pool sends through `Chain.sent`, beside the client and before any sum; the server takes sums in through `Chain.received`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsim.core import config as configs
from fedsim.core import plugins, rng
from fedsim.core.config import SimConfig
from fedsim.core.contracts import RULE, Channel, Parcel, require_covered
from fedsim.core.errors import ClientFailed, ConfigError, FedsimError, PluginError, one_line
from fedsim.core.messages import ClientJob, ClientUpdate, Tensors
from fedsim.core.tensors import require_finite, same_layout, without_prefix

MEMORY = "channel."  # before the names of what channels remember


@dataclass(frozen=True)
class Chain:
    """The channels of a run by name, in the order in which they act."""

    seed: int
    channels: Mapping[str, Channel]

    def __post_init__(self) -> None:
        """Raise ConfigError for channels that cannot stand in this order."""
        last, why, grid = "", "", ""  # who is to be the last, and who has put numbers on a grid
        for name, channel in self.channels.items():
            if why:
                raise ConfigError(f"server.channel: {name} cannot come after {last}: {why}")
            if grid and not channel.scales:
                raise ConfigError(
                    f"server.channel: {name} cannot come after {grid}, which has encoded the numbers: put it before"
                )
            last, why, grid = name, channel.last, name if channel.encodes else grid

    @classmethod
    def of(cls, config: SimConfig) -> Chain:
        return cls(config.seed, {str(s["name"]): configs.build("channels", s) for s in config.server.channel})

    def sent(self, job: ClientJob, update: ClientUpdate) -> ClientUpdate | ClientFailed:
        """What the server sees of an update, with the bytes of its encoded form and the client's new memory.

        What a channel made of w − w₀ is added to w₀, the parameters as received, and rounded to float32 towards w₀: no number is
        further from it than the channel let it be. A tensor that no channel changed keeps its bits. A client without samples
        sends that nothing has changed, and its channels remember what they did.
        """
        if not self.channels:
            return update
        try:
            return self._sent(job, update)
        except Exception as e:
            reason = str(e) if isinstance(e, FedsimError) else one_line(e)
            return ClientFailed(job.client_id, job.task, job.round, "channel", reason)

    def _sent(self, job: ClientJob, update: ClientUpdate) -> ClientUpdate:
        start = {name: job.params[name] for name in update.params}
        delta = {name: trained - start[name] for name, trained in update.params.items()}
        parcel = Parcel(job.client_id, job.task, job.round, delta, update.statistics)
        memory, moved = dict[str, Tensor](), False
        for place, (name, channel) in enumerate(self.channels.items()):
            require_covered(name, channel, update.statistics)
            prefix = f"{MEMORY}{place}.{plugins.short_name(name)}/"
            own = without_prefix(job.memory, prefix)
            draw = rng.torch_stream(self.seed, "channel", place, job.client_id, job.task, job.round, *_passing(job))
            before = parcel
            parcel, new = channel.send(start, before, own if update.num_samples else {}, draw)
            _require_alike(name, before, parcel)
            if update.num_samples and new is not own:
                own, moved = dict(new), True
            memory |= {f"{prefix}{n}": t for n, t in own.items()}
        params = {n: t if parcel.delta[n] is delta[n] else _moved(start[n], parcel.delta[n]) for n, t in update.params.items()}
        require_finite(params | dict(parcel.statistics), "on the wire, tensor")
        learned = job.memory if update.memory is None else update.memory
        others = {n: t for n, t in learned.items() if not n.startswith(MEMORY)}
        return replace(
            update,
            params=params,
            statistics=parcel.statistics,
            memory=None if update.memory is None and not moved else others | memory,
            encoded={n: code.num_bytes for n, code in parcel.codes.items()},
        )

    @property
    def receives(self) -> bool:
        """Whether a channel does anything on the server's side."""
        return any(channel.receives for channel in self.channels.values())

    def suits(
        self, trained: Sequence[str], statistics: Sequence[str], rounds: int, clients: int, additive: bool
    ) -> tuple[str, ...]:
        """Before any training: raise ConfigError for what cannot work; lines that whoever reads the numbers has to know.

        trained: names of tensors; statistics: names of those that clients send, as far as that is known; rounds: of the run;
        clients: how many there are; additive: whether the rule merges from a sum."""
        notes: list[str] = []
        for name, channel in self.channels.items():
            require_covered(name, channel, statistics)
            if channel.receives and not additive:
                raise ConfigError(
                    f"server.channel: {name} changes the sum over clients, but the rule merges from their updates one by one: "
                    "use a rule that merges from a sum, such as fedavg or fairavg"
                )
            notes += channel.suits(trained, rounds, clients)
        return tuple(notes)

    def received(
        self, start: Tensors, totals: Mapping[str, Tensors], updates: Sequence[ClientUpdate], task: int, round: int
    ) -> dict[str, Tensors]:
        """The sums over clients, by part of the run, as the server sees them. start: what the clients were sent."""
        clients, received = sum(u.num_samples > 0 for u in updates), dict(totals)
        for place, channel in reversed([*enumerate(self.channels.values())]):
            for part, total in received.items() if channel.receives else ():
                draw = rng.torch_stream(self.seed, "channel", place, task, round, part)
                received[part] = channel.receive(start if part == RULE else {}, total, clients, draw)
        return received


def _passing(job: ClientJob) -> tuple[str, ...]:
    """What tells the passes for statistics of one round from its training, and from each other."""
    looked = () if job.plan.merged is None else (f"{len(job.plan.merged)} merged",)
    return () if job.plan.train else ("pass", *job.reply.sums, *looked)


def _moved(start: Tensor, delta: Tensor) -> Tensor:
    """`start + delta`, rounded towards `start`."""
    moved = start + delta
    beyond = (moved.double() - start.double()).abs() > delta.double().abs()
    return torch.where(beyond, torch.nextafter(moved, start), moved)


def _require_alike(name: str, before: Parcel, after: Parcel) -> None:
    if not (same_layout(before.delta, after.delta) and same_layout(before.statistics, after.statistics)):
        raise PluginError(f"channel {name} gives other tensors than it was given: names, shapes and types must stay as they are")
