"""The Dirichlet concentration that a split really has.

Shape suffixes: C classes, K clients, J sample counts.
"""

from __future__ import annotations

import math

import numpy as np

from fedsim.core.contracts import IntArray


def estimate_alpha(counts_CK: IntArray) -> float:
    """Maximum-likelihood α of the symmetric Dirichlet-multinomial Π_c DirMult(x_c | n_c, α·1_K) for counts x_ck (C, K).

    With Γ(α+x)/Γ(α) = Π_{j<x} (α+j), the log-likelihood is Σ_j N_j log(α+j) − Σ_j M_j log(Kα+j), where N_j counts the cells
    with x_ck > j and M_j the classes with n_c > j. Its derivative times −α is
        g(α) = Σ_{j≥1} N_j j/(α+j) − Σ_{j≥1} M_j j/(Kα+j),
    which changes sign once (Levin & Reeds 1977: compound multinomial likelihoods are unimodal) and is found by bisection.

    0.0: every class sits with one client. inf: the clients are at least as even as a multinomial with equal shares.
    nan: nothing to tell (fewer than two clients, or no class with two samples).
    Where a floor rejected draws, α comes out larger than asked: such draws are more even than the Dirichlet's.
    """
    counts_CK = np.asarray(counts_CK, dtype=np.int64)
    clients = counts_CK.shape[1] if counts_CK.ndim == 2 else 0
    sizes_C = counts_CK.sum(axis=1) if clients else np.zeros(0, dtype=np.int64)
    if clients < 2 or not (sizes_C > 1).any():
        return math.nan
    if (np.count_nonzero(counts_CK, axis=1) <= 1).all():
        return 0.0
    if (counts_CK * (counts_CK - 1)).sum() * clients <= (sizes_C * (sizes_C - 1)).sum():
        return math.inf
    cells_J, classes_J = _more_than(counts_CK.ravel()), _more_than(sizes_C)
    j_cells, j_classes = np.arange(1, len(cells_J)), np.arange(1, len(classes_J))

    def g(alpha: float) -> float:
        cells = (cells_J[1:] * (j_cells / (alpha + j_cells))).sum()
        classes = (classes_J[1:] * (j_classes / (clients * alpha + j_classes))).sum()
        return float(cells - classes)

    low, high = -50.0, 50.0  # log α
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if g(math.exp(middle)) < 0 else (low, middle)
    return math.exp((low + high) / 2)


def _more_than(values: IntArray) -> IntArray:
    """How many of the values are larger than j, for j = 0, 1, ..., max − 1."""
    at_most = np.cumsum(np.bincount(values))
    more: IntArray = len(values) - at_most[:-1]
    return more
