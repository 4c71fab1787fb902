"""Kronecker factors of how features depend on the weights of linear layers (K-FAC; Martens & Grosse 2015, "Optimizing neural
networks with Kronecker-factored approximate curvature"), as task arithmetic is regularised with.

Shapes: N samples, b of a batch, t rows (all tokens of a batch), I inputs and O outputs of a layer, D features, K directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from clients.statistics._inputs import of
from fedsim.core import contracts
from fedsim.core.contracts import ClientWork
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.core.names import HEAD
from fedsim.core.tensors import upper_triangle


@dataclass(frozen=True)
class Statistic(contracts.WorkStatistic):
    """Sums over samples and their tokens, of the bare backbone (no adapter, no augmentation), for the linear layer of a subject:

        inputs    Σ a aᵀ    a (I,) what goes into the layer        upper triangle, I(I+1)/2 numbers
        outputs   Σ g gᵀ    g (O,) = ∂⟨f, v⟩ / ∂ (its output)      upper triangle, O(O+1)/2 numbers
        rows      how many a were summed                           one number

    f are a sample's features and v ~ N(0, I_D) is drawn for it: E g gᵀ = J Jᵀ, J = ∂f / ∂ output, so that the square of how
    features change with a small ΔW is about tr(Q ΔW P ΔWᵀ), P = inputs / rows and Q = outputs / samples. Tokens are taken as if
    each were a sample of its own.

    Subjects: any tensor of a linear layer's (`<layer>.lora_A`); several of one layer send the same. One forward and one backward
    pass. Sums are float64, sent as float32.

    exact: v = every unit vector in turn, D backward passes: J Jᵀ itself. seed: of v; in a run every client's pass has its own.
    Raises ConfigError for a tensor that belongs to no linear layer.
    """

    additive: ClassVar[bool] = True
    _drawn: ClassVar[str] = "every sample meets a direction by its place in the pass: sums estimate the same expectation"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"exact": True}, {})
    exact: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.exact:
            object.__setattr__(self, "exempt", dict.fromkeys(("synthetic", "batches", "additive"), self._drawn))

    def for_client(self, draw: torch.Generator) -> Statistic:
        return replace(self, seed=int(torch.randint(2**62, (), generator=draw)))

    def measured(self, work: ClientWork, params: Tensors, subjects: Sequence[str]) -> dict[str, Tensor]:
        sums = {s: _Sums(*work.layer_shape(s)) for s in subjects}
        generator = torch.Generator().manual_seed(self.seed)

        def directions(features_bD: Tensor) -> Tensor:
            b, d = features_bD.shape
            if self.exact:
                return torch.eye(d).to(features_bD)[:, None].expand(d, b, d)
            return torch.stack([torch.randn(d, generator=generator) for _ in range(b)])[None].to(features_bD)

        for found in work.traced(work.shard, list(subjects), directions) if subjects else ():
            for subject, (x, gradients) in found.items():
                sums[subject].add(x, gradients)
        return {f"{form}/{s}": t for s, one in sums.items() for form, t in one.sent().items()}

    def synthetic(self, seen: contracts.Seen, params: Tensors, subjects: Sequence[str]) -> dict[str, Tensor]:
        """Of a model whose features are the first outputs of the layer, for samples of one token."""
        out: dict[str, Tensor] = {}
        for subject in subjects:
            layer = subject.rpartition(".")[0]
            if subject.startswith(HEAD) or layer not in seen.inputs:
                raise ConfigError(f"'{subject}' belongs to no linear layer")
            a_NI, outputs = seen.inputs[layer].double(), _outputs(params, layer)
            energy_O = torch.zeros(outputs, dtype=torch.float64)
            energy_O[: seen.features.shape[1]] = len(a_NI)
            rows = torch.tensor(float(len(a_NI)), dtype=torch.float64)
            told = {"inputs": upper_triangle(a_NI.T @ a_NI), "outputs": upper_triangle(energy_O.diag()), "rows": rows}
            out |= {f"{form}/{subject}": t for form, t in told.items()}
        return out


class _Sums:
    """Of one layer, float64."""

    def __init__(self, outputs: int, inputs: int) -> None:
        self.inputs_II, self.outputs_OO, self.rows = _square(inputs), _square(outputs), 0

    def add(self, x: Tensor, gradients: Sequence[Tensor]) -> None:
        """What went into the layer in a batch, (…, I), and the gradients of its output, (…, O), along every direction."""
        seen = of(x)
        self.inputs_II = self.inputs_II.to(seen.gram.device) + seen.gram
        self.rows += x.numel() // x.shape[-1]
        for gradient in gradients:
            gram_OO = of(gradient).gram
            self.outputs_OO = self.outputs_OO.to(gram_OO.device) + gram_OO

    def sent(self) -> dict[str, Tensor]:
        triangles = {"inputs": upper_triangle(self.inputs_II), "outputs": upper_triangle(self.outputs_OO)}
        return {form: t.float().cpu() for form, t in triangles.items()} | {"rows": torch.tensor(float(self.rows))}


def _square(size: int) -> Tensor:
    return torch.zeros(size, size, dtype=torch.float64)


def _outputs(params: Tensors, layer: str) -> int:
    """Outputs of a layer, from its tensors."""
    return max(len(t) for n, t in params.items() if n.rpartition(".")[0] == layer and not n.endswith("lora_A"))
