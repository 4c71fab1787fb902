"""Sketches of the inputs of linear maps: what is known of the span of a client's inputs without a matrix of the layer's width.

Shapes: N rows (all tokens of a batch), I inputs of a layer, q columns (x_NI, Y_Iq), energy a single number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from clients.statistics._inputs import WEIGHT, Inputs, feeding, has_inputs, layer_of
from fedsim.core import contracts
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.core.rng import torch_stream
from fedsim.core.subspace import sketched
from fedsim.core.tensors import LORA_A, LORA_B, wide

SUBJECTS = (LORA_A, LORA_B, WEIGHT)


@dataclass(frozen=True)
class Statistic(contracts.Statistic):
    """Y = Σ_n x_n ω_nᵀ, (I, q), over the inputs x of the map whose weight is the subject, ω standard normal, and Σ_n ‖x_n‖².

    Subjects, and their inputs, are those of `gram`, but for the head: `<layer>.lora_A`, `<layer>.lora_B`, `<layer>.weight` of a
    linear layer. Sent as `range/<subject>` and `energy/<subject>` (one number), float32; sums are float64. q: `columns`, or I
    where that is smaller.

    Every client draws its own Ω, for every layer, so that the sum over clients is a sketch of all their inputs side by side
    (FOT's secure estimate of principal subspaces, Bakman et al. 2024): it tells their leading directions, and of a single client
    only a random mixture. Every token counts.

    columns: q. seed: of Ω; in a run every client's pass has one of its own.
    """

    additive: ClassVar[bool] = True
    _drawn: ClassVar[str] = (
        "every row of the inputs meets a row of Ω by its place in the pass: sums are sketches of the same data"
    )
    exempt: ClassVar[Mapping[str, str]] = {"synthetic": _drawn, "batches": _drawn, "additive": _drawn}
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"columns": 3},)
    columns: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.columns < 1:
            raise ConfigError(f"columns must be at least 1, got {self.columns}")

    def for_client(self, draw: torch.Generator) -> Statistic:
        return replace(self, seed=int(torch.randint(2**62, (), generator=draw)))

    @contextmanager
    def collect(self, model: contracts.ModelLike, params: Tensors, subjects: Sequence[str]) -> Iterator[_Accumulator]:
        """Raises ConfigError for a subject that is no linear map."""
        sums = {s: self._sum(params, s) for s in subjects if self._required(s) and has_inputs(model, s)}
        with ExitStack() as hooks:
            for subject, one in sums.items():
                hooks.callback(model.layer(subject).register_forward_pre_hook(feeding(one)).remove)
            yield _Accumulator(sums)

    def synthetic(self, seen: contracts.Seen, params: Tensors, subjects: Sequence[str]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for subject in subjects:
            if self._required(subject) and layer_of(subject) in seen.inputs:
                one = self._sum(params, subject)
                one.add(Inputs(seen.inputs[layer_of(subject)]))
                out |= {f"{form}/{subject}": total for form, total in one.totals()}
        return out

    def _required(self, subject: str) -> bool:
        if not subject.endswith(SUBJECTS) or subject.startswith("head."):
            raise ConfigError(f"there is no sketch for '{subject}': it is for {' and '.join(SUBJECTS)} of layers")
        return True

    def _sum(self, params: Tensors, subject: str) -> _Sketch:
        a_RI = params[layer_of(subject) + LORA_A].detach() if subject.endswith(LORA_B) else None
        size = params[subject].shape[1]
        return _Sketch(size, min(self.columns, size), a_RI, torch_stream(self.seed, "sketch", subject))


class _Sketch:
    """Y and the energy of one map, over batches. through: a matrix that every input is multiplied with first."""

    def __init__(self, size: int, columns: int, through: Tensor | None, draw: torch.Generator) -> None:
        self.through, self.draw = through, draw
        self.total_Iq = torch.zeros(size, columns, dtype=torch.float64)
        self.energy = torch.zeros((), dtype=torch.float64)

    def add(self, inputs: Inputs) -> None:
        if self.through is not None:
            inputs = Inputs(inputs.wide @ wide(self.through).to(inputs.wide.device).T)
        found_Iq = sketched(inputs.wide, self.total_Iq.shape[1], self.draw)
        self.total_Iq = self.total_Iq.to(found_Iq.device) + found_Iq
        self.energy = self.energy.to(found_Iq.device) + inputs.energies.sum()

    def totals(self) -> Iterator[tuple[str, Tensor]]:
        """By form, float64."""
        yield from (("range", self.total_Iq), ("energy", self.energy))


@dataclass(frozen=True)
class _Accumulator:
    sums: Mapping[str, _Sketch]

    def update(self, features: Tensor, labels: Tensor) -> None:
        return

    def result(self) -> dict[str, Tensor]:
        return {f"{form}/{s}": total.float().cpu() for s, one in self.sums.items() for form, total in one.totals()}
