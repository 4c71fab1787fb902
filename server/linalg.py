"""Right division by Gram matrices, in float64.

Shapes: O outputs, I inputs of a linear map (weight_OI, gram_II = Σ x xᵀ, energy_I = its diagonal).
"""

from __future__ import annotations

import torch
from torch import Tensor


def solve_gram(
    product_OI: Tensor, gram_II: Tensor, keep_OI: Tensor | None = None, precision: torch.dtype = torch.float64
) -> Tensor:
    """`P G⁺` in float64: the least-squares weight, of minimal norm where G is singular.

    With `keep_OI` (W_0): `W_0 + (P − W_0 G) G⁺`, which is the same for a regular G and keeps W_0 in directions that no input
    has (instead of zero). Cholesky of the Gram scaled to a unit diagonal where that is well conditioned, else the
    pseudo-inverse. `precision` is the type in which the Grams travelled: eigenvalues at its rounding noise count as zero.
    """
    product, gram = product_OI.double(), gram_II.double()
    if keep_OI is not None:
        keep = keep_OI.double()
        return keep + solve_gram(product - keep @ gram, gram, None, precision)
    size, noise = gram.shape[0], torch.finfo(precision).eps
    energy = gram.diagonal()
    if bool((energy > 0).all()):
        scale = energy.rsqrt()
        factor, failed = torch.linalg.cholesky_ex(gram * scale * scale[:, None])
        # A pivot is the share of an input's energy that the inputs before it do not explain.
        if int(failed) == 0 and float(factor.diagonal().square().min()) > size * noise:
            solved_IO: Tensor = torch.cholesky_solve((product * scale).T, factor)
            return solved_IO.T * scale
    cutoff = max(noise, size * torch.finfo(torch.float64).eps)
    inverse_II: Tensor = torch.linalg.pinv(gram, rtol=cutoff, hermitian=True)
    return product @ inverse_II


def solve_energies(product_OI: Tensor, energy_I: Tensor, keep_OI: Tensor) -> Tensor:
    """`P diag(g)⁻¹` in float64, column by column; a column whose energy is zero keeps that of `keep_OI`."""
    energy = energy_I.double()
    seen = energy > 0
    return torch.where(seen, product_OI.double() / torch.where(seen, energy, 1.0), keep_OI.double())


def ridged(gram: Tensor, ridge: float) -> Tensor:
    """`G + ridge · mean(diag G) · I`, for a Gram (I, I) or energies (I,).

    Given to every client's Gram before `Σ W_i G_i (Σ G_i)⁺`, it pulls towards the clients' mean and never towards zero.
    """
    if ridge == 0:
        return gram
    if gram.dim() == 1:
        return gram + ridge * gram.mean()
    return gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
