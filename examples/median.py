"""A merging rule of your own in one file: the coordinate-wise median, which a few hostile clients cannot pull far.

    fedsim check examples/median.py                 the laws of merging rules, and those of channels: a file may hold both
    python examples/median.py                       beside FedAvg, with honest clients and with two that send the opposite
    fedsim run configs/quickstart.yaml server.aggregator=./examples/median.py

The attack is a channel, since that is where what clients send passes by. Takes a few seconds and needs no data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedsim import Aggregator as BaseAggregator
from fedsim import Channel as BaseChannel
from fedsim.core import config as configs
from fedsim.core.contracts import Parcel, require_updates
from fedsim.core.messages import ClientUpdate, State, Tensors
from fedsim.simulation import rehearse


@dataclass(frozen=True)
class Aggregator(BaseAggregator):
    """Of every number the middle one of the clients, or the mean of the middle two (Yin et al. 2018, arXiv:1803.01498)."""

    exempt: ClassVar[Mapping[str, str]] = {"weights": "every client counts once, whatever the number of its samples"}

    def combine(
        self, state: State, params: Tensors, updates: Sequence[ClientUpdate], draw: torch.Generator
    ) -> tuple[State, Tensors]:
        held = require_updates(updates)  # those with samples: a client without sends what it was sent
        median = {n: torch.stack([u.params[n] for u in held]).quantile(0.5, dim=0) for n in held[0].params}
        return state, {**params, **median}


@dataclass(frozen=True)
class Channel(BaseChannel):
    """The first clients send `strength` times the opposite of what they have learned."""

    attackers: int = 2
    strength: float = 5.0

    def send(self, start: Tensors, parcel: Parcel, memory: Tensors, draw: torch.Generator) -> tuple[Parcel, Tensors]:
        if parcel.client_id >= self.attackers:
            return parcel, memory
        return replace(parcel, delta={n: -self.strength * t for n, t in parcel.delta.items()}), memory


BASE = {
    "name": "median",
    "data": {"source": "synthetic", "classes": 6, "train_per_class": 60, "test_per_class": 40, "image_size": 8},
    "stream": {"tasks": 2},
    "partition": {"name": "iid", "clients": 9},
    "model": {
        "backbone": "random",
        "config": {
            "model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
            "image_size": 8, "patch_size": 4, "num_channels": 1,
        },
    },
    "adapter": "none",
    "client": {"epochs": 2, "batch_size": 8, "optimizer": "sgd", "lr": 0.1},
    "server": {"rounds": 4, "consolidator": "none", "evaluate": "task", "drift": False},
    "runtime": {"pool": "serial", "device": "cpu"},
}  # fmt: skip


def accuracy(rule: str, attackers: int) -> float:
    """In percent, of each task right after it was learned, the mean of both."""
    channel = [{"name": __file__, "attackers": attackers}] if attackers else []
    results = rehearse(configs.compose([BASE, {"server": {"aggregator": rule, "channel": channel}}]))
    return float(results.accuracy.diagonal().mean())


def main() -> None:
    """A row for each rule."""
    for rule in ("fedavg", __file__):
        honest, attacked = (accuracy(rule, attackers) for attackers in (0, 2))
        print(f"{'median' if rule == __file__ else rule:8} honest {honest:5.1f}, with two attackers of nine {attacked:5.1f}")


if __name__ == "__main__":
    main()
