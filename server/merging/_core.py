"""The small space that the LoRA pairs of several modules span: in it products of m × d numbers are matrices of the ranks' size.

With U (m, p) an orthonormal basis of all columns of B_0, …, B_K and V (q, d) one of all rows of A_0, …, A_K, the core of a pair
is C_i = (Uᵀ B_i)(A_i Vᵀ), and U C_i V = B_i A_i, exactly: nothing of size m × d is made (Panariello et al. 2025, "Accurate and
efficient low-rank model merging in core space").

Shapes: O outputs, I inputs of a layer, R rank of a pair (A_RI, B_OR), p and q directions, at most O, I and the sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core.messages import Tensors
from fedsim.core.tensors import LORA_A, LORA_B


@dataclass(frozen=True)
class Space:
    """What several pairs of one layer span: left_Op has orthonormal columns, right_qI orthonormal rows, float64."""

    left_Op: Tensor
    right_qI: Tensor

    @classmethod
    def of(cls, modules: Sequence[Tensors], layer: str) -> Space:
        """Of a layer's pairs in these modules, of any ranks. The bases are singular vectors of all factors side by side, the
        largest first; directions of no size are left out, so that rows of zeros change nothing."""
        rows_QI = torch.cat([m[layer + LORA_A].double() for m in modules])
        columns_OQ = torch.cat([m[layer + LORA_B].double() for m in modules], dim=1)
        return cls(_basis(columns_OQ.T).T, _basis(rows_QI))

    def core(self, module: Tensors, layer: str) -> Tensor:
        """C (p, q) of a pair that lies in the space."""
        a_RI, b_OR = module[layer + LORA_A].double(), module[layer + LORA_B].double()
        core_pq: Tensor = (self.left_Op.T @ b_OR) @ (a_RI @ self.right_qI.T)
        return core_pq

    def pair(self, core_pq: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of the product U C V, of rank min(p, q)."""
        p, q = core_pq.shape
        core_pq = core_pq.double()
        return (core_pq @ self.right_qI, self.left_Op) if p <= q else (self.right_qI, self.left_Op @ core_pq)


def _basis(rows_QI: Tensor) -> Tensor:
    """Orthonormal rows that span these, by their singular values; one at least. The largest entry of each is positive, so that
    they are the same on every machine."""
    _, sizes, directions = torch.linalg.svd(rows_QI, full_matrices=False)
    kept = directions[: max(1, int((sizes > noise(rows_QI, float(sizes[0]))).sum()))]
    largest = kept.gather(1, kept.abs().argmax(dim=1, keepdim=True))
    turned: Tensor = kept * torch.where(largest < 0, -1.0, 1.0)
    return turned


def leading(matrix: Tensor, most: int, size: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vᵀ of the largest singular triplets, at most so many, that are more than rounding. size: of the numbers that the
    matrix was computed from, where they are larger than its own."""
    u, sizes, vt = torch.linalg.svd(matrix, full_matrices=False)
    largest = max(size, float(sizes[0])) if len(sizes) else size
    kept = min(most, int((sizes > noise(matrix, largest)).sum()))
    return u[:, :kept], sizes[:kept], vt[:kept]


def noise(matrix: Tensor, size: float) -> float:
    """What a singular value may be by rounding alone, in numbers of this size."""
    return max(matrix.shape) * torch.finfo(torch.float64).eps * size
