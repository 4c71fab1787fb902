"""TSV-Merge: task singular vectors that get out of each other's way (Gargiulo et al. 2025, "Task singular vectors: reducing task
interference in model merging").

Shapes: O outputs, I inputs of a matrix, R rank of a pair, T members, k singular triplets of each, K of all together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import Member
from fedsim.core.messages import Tensors
from fedsim.core.tensors import LORA_A, LORA_B, lora_layers, sum_in_order
from server.merging._core import leading
from server.merging._rule import require_scale


@dataclass(frozen=True)
class Merging(contracts.Merging):
    """ΔW = λ Û S V̂ᵀ from the leading singular triplets of every task vector, τ_i = U_i S_i V_iᵀ, side by side.

    Each member keeps k = ⌊min(m, d) / T⌋ triplets (one at least). Û and V̂ are the orthonormal matrices nearest to [U_1 … U_T] and
    [V_1 … V_T] (polar factors X Yᵀ of their decompositions X D Yᵀ), S holds all singular values. Other tensors than matrices and
    LoRA pairs: λ times the mean of task vectors. Every member has one vote, whatever it weighs.

    LoRA pairs are merged as products, exactly as the (m, d) matrices would be, in low rank: a pair's decomposition comes from
    those of its factors, and what comes out is a pair of rank T·k at most. Triplets without size are left out, whose vectors mean
    nothing, and so are directions that [U_1 … U_T] has not [ours: published for full-rank task vectors].

    scale: λ, published 1.
    """

    pairs: ClassVar[bool] = True
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"scale": 0.5})
    exempt: ClassVar[Mapping[str, str]] = {
        "weights": "every member has one vote, whatever it weighs",
        "fixed_point": "of T members each keeps a T-th of the singular values",
    }
    scale: float = 1.0

    def __post_init__(self) -> None:
        require_scale(self.scale)
        if self.scale != 1:
            kept = {**type(self).exempt, "one_member": "what is added to the base is scaled"}
            object.__setattr__(self, "exempt", kept)  # of this object: which laws hold depends on the options

    def merge(self, members: Sequence[Member], base: Tensors, draw: torch.Generator) -> Tensors:
        out: dict[str, Tensor] = {}
        pairs = lora_layers(base)
        for p in pairs:
            out[p + LORA_A], out[p + LORA_B] = self._pair([m.params for m in members], base, p)
        for name in base:
            if name not in out:
                out[name] = self._tensor([m.params[name].double() for m in members], base[name].double())
        return out

    def _pair(self, modules: Sequence[Tensors], base: Tensors, layer: str) -> tuple[Tensor, Tensor]:
        """A and B of θ_0 and of what is added to it, side by side."""
        a0_RI, b0_OR = base[layer + LORA_A].double(), base[layer + LORA_B].double()
        most = max(1, min(len(b0_OR), a0_RI.shape[1]) // len(modules))
        parts = []
        for m in modules:
            b_OR, a_RI = torch.cat([m[layer + LORA_B].double(), -b0_OR], 1), torch.cat([m[layer + LORA_A].double(), a0_RI])
            left, square_b = torch.linalg.qr(b_OR)
            right, square_a = torch.linalg.qr(a_RI.T)
            u, sizes, vt = leading(square_b @ square_a.T, most, float(b_OR.norm() * a_RI.norm()))
            parts.append((left @ u, sizes, right @ vt.T))
        b_OK, a_KI = self._apart(parts)
        return torch.cat([a0_RI, a_KI]), torch.cat([b0_OR, b_OK], dim=1)

    def _tensor(self, tensors: Sequence[Tensor], start: Tensor) -> Tensor:
        vectors = [t - start for t in tensors]
        if start.dim() != 2:
            return start + self.scale * sum_in_order(vectors) / len(vectors)
        most = max(1, min(start.shape) // len(vectors))
        found = [leading(v, most, float(start.norm())) for v in vectors]
        b_OK, a_KI = self._apart([(u, sizes, vt.T) for u, sizes, vt in found])
        return start + b_OK @ a_KI

    def _apart(self, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """λ Û S and V̂ᵀ of every member's U (O, k), S (k,) and V (I, k)."""
        u_OK, s_K, v_IK = (torch.cat(several, dim=-1) for several in zip(*parts, strict=True))
        return self.scale * orthonormal(u_OK) * s_K, orthonormal(v_IK).T


def orthonormal(columns_NK: Tensor) -> Tensor:
    """The polar factor X Yᵀ of X D Yᵀ, of directions that there are."""
    x, _, yt = leading(columns_NK, min(columns_NK.shape))
    return x @ yt
