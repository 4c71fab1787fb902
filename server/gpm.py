"""Dual gradient projection memory: which directions of a layer's inputs old tasks have used, and which are free (Liang & Li 2023,
"Adaptive plasticity improvement for continual learning").

Shapes: D inputs of a layer, K directions that are kept for old tasks, F = D − K free ones (gram_DD = Σ x xᵀ).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core.subspace import complement, needed, orthonormal, signed

REMOVE, RETAIN = "remove", "retain"


@dataclass(frozen=True, eq=False)
class InputSpan:
    """The span of old inputs, stored as an orthonormal basis (float64) of itself (mode `remove`) or, once that takes up more than
    half of the space, of what is left beside it (mode `retain`): D/2 columns at most."""

    basis: Tensor
    mode: str = REMOVE

    @property
    def kept(self) -> Tensor:
        """A basis of the span of old inputs, (D, K)."""
        return self.basis if self.mode == REMOVE else complement(self.basis)

    @property
    def free(self) -> Tensor:
        """A basis of what is orthogonal to it, (D, F)."""
        return complement(self.basis) if self.mode == REMOVE else self.basis


def empty(inputs: int) -> InputSpan:
    """The span before the first task."""
    return InputSpan(torch.zeros(inputs, 0, dtype=torch.float64))


def free_directions(span: InputSpan, gram_DD: Tensor) -> tuple[Tensor, Tensor]:
    """The left singular vectors of P G, P the projection onto the free subspace: an orthonormal basis of all of it, (D, F), what
    new inputs use most in front; and their energies σ²/‖G‖²_F, (F,).

    Directions without energy end the list, so it has F columns even where G is of low rank. Signs: the largest entry of every
    column is positive. A Gram of zeros prefers no direction.
    """
    free_DF, gram = span.free, gram_DD.double()
    total = gram.square().sum()
    if not bool(total > 0):
        return free_DF, torch.zeros(free_DF.shape[1], dtype=torch.float64)
    # P = Q Qᵀ with Q the basis, so the singular vectors of P G are Q times those of Qᵀ G.
    left_FF, values_F, _ = torch.linalg.svd(free_DF.T @ gram, full_matrices=False)
    return signed(free_DF @ left_FF), values_F.square() / total


def updated(span: InputSpan, gram_DD: Tensor, threshold: float, guarantee: bool = True) -> InputSpan:
    """The span with as many new directions, the most energetic first, as it takes to hold the share `threshold` of ‖G‖²_F.

    Both modes take the same directions: `remove` adds them to the span, `retain` takes them out of the free subspace.
    guarantee: False takes one direction less in an empty span (one at least), which holds less than the threshold.
    """
    directions_DF, energies_F = free_directions(span, gram_DD)
    count = needed(energies_F, 1 - energies_F.sum(), threshold) if bool(energies_F.any()) else 0
    if not guarantee and count > 1 and span.mode == REMOVE and span.basis.shape[1] == 0:
        count -= 1
    new_DK, left_DF = directions_DF[:, :count], directions_DF[:, count:]
    if span.mode == REMOVE:
        basis = torch.cat([span.basis, new_DK], dim=1)
        if 2 * basis.shape[1] <= len(basis):
            return InputSpan(orthonormal(basis), REMOVE)
    return InputSpan(orthonormal(left_DF), RETAIN)
