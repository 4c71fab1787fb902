"""Right division by Grams against numpy's least squares.

Shapes: O outputs, I inputs, N rows.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim.core.rng import torch_stream
from server.linalg import ridged, solve_energies, solve_gram


def draw(*shape: int, address: str = "x") -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch_stream(1, "linalg", address))


def lstsq(x_NI: Tensor, y_NO: Tensor) -> Tensor:
    """W (O, I) of minimal norm that minimises ‖x Wᵀ − y‖²."""
    return torch.from_numpy(np.linalg.lstsq(x_NI.numpy(), y_NO.numpy(), rcond=1e-10)[0].T)


@pytest.mark.parametrize("rows", [40, 4], ids=["regular", "rank_deficient"])
def test_least_squares_solution_of_minimal_norm(rows: int) -> None:
    x, y = draw(rows, 7), draw(rows, 3, address="y")
    torch.testing.assert_close(solve_gram(y.T @ x, x.T @ x), lstsq(x, y), rtol=0, atol=1e-9)


def test_keep_changes_nothing_for_a_regular_gram() -> None:
    x, y = draw(40, 7), draw(40, 3, address="y")
    kept = solve_gram(y.T @ x, x.T @ x, keep_OI=draw(3, 7, address="w"))
    torch.testing.assert_close(kept, lstsq(x, y), rtol=0, atol=1e-9)


def test_keep_holds_directions_that_no_input_has() -> None:
    x, w0, w1 = draw(4, 7), draw(3, 7, address="w0"), draw(3, 7, address="w1")
    got = solve_gram(w1 @ x.T @ x, x.T @ x, keep_OI=w0)
    unseen_IN = torch.linalg.svd(x)[2][4:].T  # an orthonormal basis of what x does not span
    torch.testing.assert_close(got @ unseen_IN, w0 @ unseen_IN, rtol=0, atol=1e-9)
    torch.testing.assert_close(got @ x.T, w1 @ x.T, rtol=0, atol=1e-9)


def test_inputs_of_very_different_scale_are_solved_exactly() -> None:
    """Energies over 16 decades: a pseudo-inverse with a relative cut-off would drop the small ones."""
    x = draw(60, 5) * torch.logspace(-4, 4, 5, dtype=torch.float64)
    w = draw(2, 5, address="w")
    torch.testing.assert_close(solve_gram(w @ x.T @ x, x.T @ x, precision=torch.float32), w, rtol=1e-6, atol=1e-6)


def test_rounding_noise_of_float32_grams_is_not_inverted() -> None:
    """Two clients with 3 samples each in 12 dimensions: the float32 Grams have noise eigenvalues of either sign."""
    xs = [draw(3, 12, address=f"x{k}") + 3.0 for k in range(2)]
    ws = [draw(2, 12, address=f"w{k}") for k in range(2)]
    grams = [(x.T @ x).float().double() for x in xs]
    product, total = (torch.stack(t).sum(0) for t in ([w @ g for w, g in zip(ws, grams, strict=True)], grams))
    got = solve_gram(product, total, precision=torch.float32)
    want = lstsq(torch.cat(xs), torch.cat([x @ w.T for x, w in zip(xs, ws, strict=True)]))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@settings(max_examples=25)
@given(rows=st.integers(1, 12), inputs=st.integers(1, 8), seed=st.integers(0, 1000))
def test_normal_equations_hold_for_any_rank(rows: int, inputs: int, seed: int) -> None:
    x, w = draw(rows, inputs, address=f"x{seed}"), draw(3, inputs, address=f"w{seed}")
    gram = x.T @ x
    torch.testing.assert_close(solve_gram(w @ gram, gram) @ gram, w @ gram, rtol=1e-7, atol=1e-7)


def test_energies_divide_column_by_column_and_keep_silent_ones() -> None:
    product, energy = torch.tensor([[2.0, 9.0, 5.0]]), torch.tensor([4.0, 3.0, 0.0])
    got = solve_energies(product, energy, keep_OI=torch.tensor([[7.0, 7.0, 7.0]]))
    assert got.tolist() == [[0.5, 3.0, 7.0]]


def test_ridge_is_relative_to_the_mean_energy() -> None:
    gram = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    assert ridged(gram, 0.5).tolist() == [[3.5, 1.0], [1.0, 5.5]]
    assert ridged(gram.diagonal(), 0.5).tolist() == [3.5, 5.5]
    assert ridged(gram, 0.0) is gram
