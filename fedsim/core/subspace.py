"""Subspaces of a layer's inputs: projections onto what is free of them, and bases of what holds a share of their energy.

Shapes: D inputs of a layer, U (D, K) an orthonormal basis of the directions that are kept for old tasks, F directions beside it,
N samples, q columns of a sketch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def outside(x_nD: Tensor, basis_DK: Tensor) -> Tensor:
    """x (I − U Uᵀ), row by row: what of a weight's rows does not answer to inputs in span(U)."""
    return x_nD - (x_nD @ basis_DK) @ basis_DK.T


def complement(basis_DK: Tensor) -> Tensor:
    """An orthonormal basis of what is orthogonal to the columns of an orthonormal one, (D, D − K)."""
    if basis_DK.shape[1] == 0:
        return torch.eye(len(basis_DK), dtype=basis_DK.dtype)
    q_DD: Tensor = torch.linalg.qr(basis_DK, mode="complete")[0]
    return q_DD[:, basis_DK.shape[1] :]


def orthonormal(basis_DK: Tensor) -> Tensor:
    """A basis that is orthonormal but for rounding, without the rounding: errors of many tasks would add up."""
    q_DK, r_KK = torch.linalg.qr(basis_DK)
    basis: Tensor = torch.where(r_KK.diagonal() < 0, -q_DK, q_DK)
    return basis


def signed(vectors_DF: Tensor) -> Tensor:
    """The largest entry of every column positive."""
    if vectors_DF.shape[1] == 0:
        return vectors_DF
    largest_F = vectors_DF.gather(0, vectors_DF.abs().argmax(dim=0, keepdim=True))
    return torch.where(largest_F < 0, -vectors_DF, vectors_DF)


def needed(shares_F: Tensor, held: Tensor, share: float) -> int:
    """How many directions it takes to hold `share` of the energy. shares_F: theirs, the largest first; held: without any."""
    before_F = held + shares_F.cumsum(0) - shares_F  # before each direction is taken
    return int((before_F < share).sum())


def extended(basis_DK: Tensor, columns_DN: Tensor, share: float) -> Tensor:
    """U with as many new orthonormal directions as it takes to hold `share` of ‖X‖²_F, X the columns, the most energetic of
    (I − U Uᵀ) X first; float64.

    What U holds already counts: with r the residual's part of the energy, the new directions hold 1 − (1 − share) / r of it.
    Directions without energy, up to rounding, are never taken. Columns of zeros leave U as it is.
    """
    basis, x_DN = basis_DK.double(), columns_DN.double()
    total = x_DN.square().sum()
    if not bool(total > 0):
        return basis
    rest_DN = x_DN - basis @ (basis.T @ x_DN)
    left_DF, values_F, _ = torch.linalg.svd(rest_DN, full_matrices=False)
    shares_F = values_F.square() / total
    shares_F = shares_F[shares_F > len(basis) ** 2 * torch.finfo(torch.float64).eps ** 2]
    count = needed(shares_F, (basis.T @ x_DN).square().sum() / total, share)
    return orthonormal(torch.cat([basis, signed(left_DF[:, :count])], dim=1))


def root(gram_DD: Tensor) -> Tensor:
    """R with R Rᵀ = G, float64: columns of the same span and the same singular values as the samples of G = Σ x xᵀ."""
    values_D, vectors_DD = torch.linalg.eigh(gram_DD.double())
    floor = values_D[-1].clamp_min(0) * len(gram_DD) * torch.finfo(torch.float32).eps  # Grams travel in float32
    columns_DD: Tensor = vectors_DD * values_D.where(values_D > floor, 0.0).sqrt()
    return columns_DD


def sketched(x_ND: Tensor, columns: int, draw: torch.Generator) -> Tensor:
    """Y = Xᵀ Ω, (D, q), Ω standard normal and drawn row by row (randomized range finder, Halko, Martinsson & Tropp 2011): the
    span of X's leading directions, and E ‖Y‖² = q ‖X‖². Sketches with independent Ω add up to that of all samples."""
    omega_Nq = torch.randn(len(x_ND), columns, dtype=x_ND.dtype, generator=draw)
    return x_ND.T @ omega_Nq.to(x_ND.device)
