"""Subspaces of a layer's inputs: projections onto what is free of them, and bases of what holds a share of their energy.

Shapes: D inputs of a layer, U (D, K) an orthonormal basis of the directions that are kept for old tasks, F directions beside it,
N samples, q columns of a sketch.
"""

from __future__ import annotations

import torch
from torch import Tensor

PARTS = 16  # of a sketch's columns, each of which is left out once


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


def extended(basis_DK: Tensor, columns_DN: Tensor, share: float, energy: Tensor | None = None) -> Tensor:
    """U with as many new orthonormal directions as it takes to hold `share` of ‖X‖²_F, X the columns, the most energetic of
    (I − U Uᵀ) X first; float64.

    What U holds already counts: with r the residual's part of the energy, the new directions hold 1 − (1 − share) / r of it.
    Directions without energy, up to rounding, are never taken. Columns of zeros leave U as it is.

    energy: ‖X‖²_F where the columns are a sketch Y = X Ω, whose leading directions hold less of X than of Y: their part is then
    estimated (`left_over`). All q directions are taken where fewer are not known to hold the share.
    """
    basis, x_DN = basis_DK.double(), columns_DN.double()
    total = x_DN.square().sum()
    if not bool(total > 0):
        return basis
    rest_DN = x_DN - basis @ (basis.T @ x_DN)
    left_DF, values_F, _ = torch.linalg.svd(rest_DN, full_matrices=False)
    shares_F = values_F.square() / total
    shares_F = shares_F[shares_F > len(basis) ** 2 * torch.finfo(torch.float64).eps ** 2]
    if energy is None:
        count = needed(shares_F, (basis.T @ x_DN).square().sum() / total, share)
    else:
        held_F = 1 - left_over(rest_DN) / energy
        count = int((held_F.clamp_min(0) < share).sum())
    return orthonormal(torch.cat([basis, signed(left_DF[:, : min(count, len(shares_F))])], dim=1))


def left_over(sketch_Dq: Tensor) -> Tensor:
    """Of a sketch Y = X Ω: an estimate of ‖X − U_k U_kᵀ X‖²_F, U_k the k leading left singular vectors of Y, for k = 0 … q − 1.

    Part by part of the columns, U_k is taken from the others, so that it does not know the part: E ‖y − U_k U_kᵀ y‖² is what
    these U_k leave of X for every column y = X ω, ω standard normal. Those of a few columns less hold no more than those of all.
    For the last k, of which the others have too few columns, it is what the largest k before left. [ours]
    """
    triangle_qq = torch.linalg.qr(sketch_Dq, mode="r")[1]
    count = triangle_qq.shape[1]
    left_q = sketch_Dq.new_zeros(count)
    for part in torch.arange(count).chunk(PARTS):
        others = torch.ones(count, dtype=torch.bool).index_fill(0, part, False)
        own = triangle_qq[:, part]
        directions = torch.linalg.svd(triangle_qq[:, others], full_matrices=False)[0]
        taken = (directions.T @ own).square().sum(1)
        taken = torch.cat([taken.new_zeros(1), taken.cumsum(0)])[:count]
        left_q += own.square().sum() - torch.cat([taken, taken[-1:].expand(count - len(taken))])
    mean_q: Tensor = left_q / count
    return mean_q


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
