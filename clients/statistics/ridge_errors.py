"""How well ridge regression on a client's own samples predicts those that it holds out: what a penalty is chosen by.

Shapes: N samples (t of them fitted, v held out), M inputs of the head's last map, C classes, L penalties, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors
from fedsim.core.names import HEAD_WEIGHT
from fedsim.core.tensors import wide

HELD_OUT = 5  # of so many samples one


@dataclass(frozen=True)
class Statistic(contracts.Statistic):
    """Sums of squared errors on held-out samples, one for every penalty λ:

        e_λ = Σ_v ‖W_λ x_v − onehot(y_v)‖²,   W_λ = Y_tᵀ X_t (X_tᵀ X_t + λ I)⁻¹

    Sent as `squares/head.weight` (L,), zeros for a client with fewer than five samples. Targets are all head rows. Sums over
    clients tell which penalty generalises best on average, as RanPAC chooses it from 80 % and 20 % of a task's samples (McDonnell
    et al. 2023, arXiv:2307.02251).
    Held out is every fifth sample in the order of classes and, within a class, of Σ_m x_m [ours; the reference takes the last
    fifth of shuffled samples]: a systematic sample that needs no draw and does not depend on the order in which samples come.
    One singular value decomposition of X_t serves all penalties. Holds the client's inputs, N·M numbers, until the pass ends;
    float64, float32 on the wire.

    penalties: λ, positive.
    """

    penalties: list[float] = field(default_factory=lambda: [0.01, 1.0, 100.0])

    def __post_init__(self) -> None:
        if not self.penalties or not all(p > 0 for p in self.penalties):
            raise ConfigError(f"penalties must be positive numbers, one at least, got {self.penalties}")

    @contextmanager
    def collect(self, model: contracts.ModelLike, params: Tensors, subjects: Sequence[str]) -> Iterator[_Samples]:
        """Raises ConfigError for subjects other than `head.weight`."""
        _require_head(subjects)
        yield _Samples(self.penalties, model.num_classes, params[HEAD_WEIGHT].shape[1])

    def synthetic(self, seen: contracts.Seen, params: Tensors, subjects: Sequence[str]) -> dict[str, Tensor]:
        _require_head(subjects)
        return {f"squares/{HEAD_WEIGHT}": held_out_errors(seen.features, seen.labels, seen.num_classes, self.penalties)}


class _Samples:
    """The inputs and labels so far."""

    def __init__(self, penalties: Sequence[float], num_classes: int, width: int) -> None:
        self.penalties, self.num_classes = penalties, num_classes
        self.inputs, self.labels = [torch.empty(0, width)], [torch.empty(0, dtype=torch.long)]

    def update(self, features: Tensor, labels: Tensor) -> None:
        self.inputs.append(features.detach().cpu())
        self.labels.append(labels.cpu().long())

    def result(self) -> dict[str, Tensor]:
        x_NM, labels_N = wide(torch.cat(self.inputs)), torch.cat(self.labels)
        return {f"squares/{HEAD_WEIGHT}": held_out_errors(x_NM, labels_N, self.num_classes, self.penalties).float()}


def held_out_errors(x_NM: Tensor, labels_N: Tensor, num_classes: int, penalties: Sequence[float]) -> Tensor:
    """e_λ (L,), float64, of inputs in float64."""
    fitted_t, held_v = split(x_NM, labels_N)
    if not len(held_v):
        return torch.zeros(len(penalties), dtype=torch.float64)
    y_NC = F.one_hot(labels_N, num_classes).double()
    left_tr, singular_r, right_rM = torch.linalg.svd(x_NM[fitted_t], full_matrices=False)
    across_vr, along_rC = x_NM[held_v] @ right_rM.T, left_tr.T @ y_NC[fitted_t]
    shrunk_Lr = singular_r / (singular_r.square() + torch.tensor(penalties, dtype=torch.float64)[:, None])
    errors_LvC = (across_vr * shrunk_Lr[:, None]) @ along_rC - y_NC[held_v]
    squares_L: Tensor = errors_LvC.square().sum(dim=(1, 2))
    return squares_L


def split(x_NM: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the samples that are fitted and of those that are held out."""
    by_size_N = x_NM.sum(dim=1).argsort(stable=True)
    order_N = by_size_N[labels_N[by_size_N].argsort(stable=True)]
    held_N = torch.arange(len(order_N)) % HELD_OUT == HELD_OUT - 1
    return order_N[~held_N], order_N[held_N]


def _require_head(subjects: Sequence[str]) -> None:
    wrong = [s for s in subjects if s != HEAD_WEIGHT]
    if wrong:
        raise ConfigError(f"ridge_errors are of the inputs of '{HEAD_WEIGHT}', not of '{wrong[0]}': match that alone")
