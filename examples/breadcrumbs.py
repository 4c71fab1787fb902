"""A merging rule of your own in one file: Model Breadcrumbs, which leaves out a task vector's largest and smallest numbers.

    fedsim check examples/breadcrumbs.py            the laws of merging rules, over clients and over tasks
    python examples/breadcrumbs.py                  beside the mean and task arithmetic, over the tasks of a small stream
    fedsim run configs/ties.yaml server.consolidator.rule=./examples/breadcrumbs.py

The same file merges clients, as `server.aggregator: {name: merged, rule: ...}`, and finished runs, by `fedsim merge --rule`.
Takes a few seconds and needs no data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import config as configs
from fedsim.core.contracts import Member
from fedsim.core.contracts import Merging as BaseMerging
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.simulation import rehearse


@dataclass(frozen=True)
class Merging(BaseMerging):
    """θ⁺ = θ_0 + λ Σ_i m_i ⊙ τ_i, τ_i = θ_i − θ_0: of every tensor m_i leaves out the share `small` of the numbers that are
    smallest in size and the share `large` of those that are largest (Davari & Belilovsky 2023, "Model breadcrumbs")."""

    exempt: ClassVar[Mapping[str, str]] = {
        "weights": "every member has one vote, whatever it weighs",
        "fixed_point": "numbers are left out, and the others are added up",
        "one_member": "numbers are left out, and the others are scaled",
    }
    small: float = 0.85
    large: float = 0.01
    scale: float = 0.3

    def __post_init__(self) -> None:
        if not (self.small >= 0 and self.large >= 0 and self.small + self.large < 1):
            raise ConfigError(f"small and large must leave something, got {self.small} and {self.large}")

    def merge(self, members: Sequence[Member], base: Tensors, draw: torch.Generator) -> Tensors:
        return {name: self._tensor([m.params[name] for m in members], start) for name, start in base.items()}

    def _tensor(self, tensors: Sequence[Tensor], start: Tensor) -> Tensor:
        """One tensor at a time, in float64."""
        start, total = start.double(), torch.zeros_like(start, dtype=torch.float64)
        for tensor in tensors:
            vector = tensor.double() - start
            smallest, largest = self._bounds(vector.abs().flatten().sort().values)
            total += vector * ((vector.abs() >= smallest) & (vector.abs() <= largest))
        return start + self.scale * total

    def _bounds(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Between which sizes a number is kept, of sorted ones; one number at least is."""
        first = min(int(self.small * len(sizes)), len(sizes) - 1)
        return sizes[first], sizes[max(first, len(sizes) - 1 - int(self.large * len(sizes)))]


BASE: dict[str, Any] = {
    "name": "breadcrumbs",
    "data": {"source": "synthetic", "classes": 6, "train_per_class": 40, "test_per_class": 40, "image_size": 8},
    "stream": {"tasks": 3},
    "partition": {"name": "iid", "clients": 4},
    "model": {
        "backbone": "random",
        "config": {
            "model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
            "image_size": 8, "patch_size": 4, "num_channels": 1,
        },
    },
    "adapter": {"name": "lora", "rank": 4, "targets": "all-linear"},
    "client": {"epochs": 2, "batch_size": 8, "lr": 0.01},
    "server": {"rounds": 2, "aggregator": "fedavg", "evaluate": "task", "drift": False},
    "runtime": {"pool": "serial", "device": "cpu"},
}  # fmt: skip


def accuracy(rule: str) -> float:
    """In percent, of all classes after the last task."""
    layer = {"server": {"consolidator": {"name": "merged", "rule": rule}}}
    return float(rehearse(configs.compose([BASE, layer])).metrics["final_average_accuracy"])


def main() -> None:
    """A row for each rule."""
    for rule in ("mean", "task_arithmetic", __file__):
        print(f"{'breadcrumbs' if rule == __file__ else rule:16} {accuracy(rule):5.1f} % of all classes")


if __name__ == "__main__":
    main()
