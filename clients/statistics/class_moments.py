"""Count, mean and (co)variance of the features of every class, for rules and calibrators that look at the head class by class.

Shapes: N samples of a batch (or of the pass), C classes, H classes that this client holds, P of them with 2 samples or more, D
features: numbers that the head's last map is given, r directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import Tensors
from fedsim.core.names import HEAD_WEIGHT
from fedsim.core.tensors import upper_triangle

FORMS = ("full", "mean", "scalar", "covariance", "within")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Statistic(contracts.Statistic):
    """Moments of the features f(x), class by class: n_c, μ_c = mean, Σ_c = Σ (f − μ_c)(f − μ_c)ᵀ / (n_c − 1), σ²_c = diag Σ_c.

    All forms send `count/head.weight`, (C,) of all head rows, or of those in `classes`, in that order. What follows has rows only
    for classes that it is known of, in the order of the count, which says which: classes that a client does not hold cost no
    bytes.
        mean         `mean/head.weight` (H, D), for the H classes with n_c ≥ 1
        full         `mean/head.weight` (H, D) and `variance/head.weight` (H, D), for the H classes with n_c ≥ 1;
                     the variance of a single sample is zero
        covariance   `mean/head.weight` (H, D) as above, and `covariance/head.weight` (P, D(D+1)/2), upper triangles of Σ_c
                     (see `fedsim.core.tensors`), for the P classes with n_c ≥ 2
        within       `mean/head.weight` (H, D) as above, and `within/head.weight` (D(D+1)/2,), the upper triangle of the scatter
                     within these classes, S = Σ_c Σ (f − μ_c)(f − μ_c)ᵀ, one for all: zeros with fewer than 2 samples of any.
                     With a rank, in its place: `directions/head.weight` (r, D), the r = min(rank, D, N − H) largest eigenpairs
                     of S as rows √λ v, and `rest/head.weight` (D,), the diagonal of what they leave of it
        scalar       `spread/head.weight` (C,), v_c = mean over the D features of σ²_c, zero with fewer than 2 samples
    With held = count > 0, `full_CD[held] = mean` puts a row where its class is.

    Batches are merged by the update of Chan, Golub & LeVeque (1979) in float64, so that features far from zero lose no digits;
    float32 on the CPU. The form covariance holds a D×D matrix for every class that the client holds, within a single one; with a
    rank, the client's features, N·D numbers, until the pass ends.

    form: mean | full | covariance | within | scalar. classes: head rows that are told of; null: all.
    precision: float32 | bfloat16, for what within sends of S (half the bytes, 8 bits of significand); means stay float32. rank:
    of S as it is sent (null: whole).
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        *({"form": form} for form in FORMS),
        {"form": "full", "classes": [3, 0]},
        {"form": "within", "precision": "bfloat16"},
        {"form": "within", "rank": 2},
    )
    form: str = "full"
    classes: list[int] | None = None
    precision: str = "float32"
    rank: int | None = None

    def __post_init__(self) -> None:
        require_choice("form", self.form, tuple(FORMS))
        require_choice("precision", self.precision, tuple(PRECISIONS))
        if self.rank is not None and self.rank < 0:
            raise ConfigError(f"rank must be at least 0, got {self.rank}")
        if self.form != "within" and (self.rank is not None or self.precision != "float32"):
            raise ConfigError(f"rank and precision are for the form within, not for {self.form}")

    @contextmanager
    def collect(self, model: contracts.ModelLike, params: Tensors, subjects: Sequence[str]) -> Iterator[contracts.Accumulator]:
        """Raises ConfigError for subjects other than `head.weight`."""
        _require_head(subjects)
        rows = list(range(model.num_classes)) if self.classes is None else self.classes
        moments = _Moments(self.form, rows, model.num_classes, params[HEAD_WEIGHT].shape[1])
        if self.form == "within":
            dtype = PRECISIONS[self.precision]
            yield _Within(moments, dtype) if self.rank is None else _Directions(moments, dtype, self.rank)
        else:
            yield _Scatter(moments) if self.form == "covariance" else moments

    def synthetic(self, seen: contracts.Seen, params: Tensors, subjects: Sequence[str]) -> dict[str, Tensor]:
        _require_head(subjects)
        chosen = range(seen.num_classes) if self.classes is None else self.classes
        rows = [seen.features[seen.labels == c] for c in chosen]
        count_C = torch.tensor([len(x) for x in rows], dtype=torch.float64)
        held = [x for x in rows if len(x)]
        variance_CD = _stacked([_variance(x) for x in rows], seen.features)
        if self.form == "scalar":
            return _named(count=count_C, spread=variance_CD.mean(1))
        mean_HD = _stacked([x.mean(0) for x in held], seen.features)
        if self.form == "mean":
            return _named(count=count_C, mean=mean_HD)
        if self.form == "full":
            return _named(count=count_C, mean=mean_HD, variance=variance_CD[count_C > 0])
        if self.form == "within":
            centred_ND = torch.cat([x - x.mean(0) for x in held]) if held else seen.features[:0]
            if self.rank is None:
                return _named(count=count_C, mean=mean_HD, within=upper_triangle(centred_ND.T @ centred_ND))
            directions_rD, rest_D = low_rank(centred_ND, self.rank, len(held))
            return _named(count=count_C, mean=mean_HD, directions=directions_rD, rest=rest_D)
        triangle = upper_triangle(torch.zeros(seen.features.shape[1], seen.features.shape[1], dtype=torch.float64))
        covariance_PT = _stacked([upper_triangle(x.T.cov()) for x in held if len(x) > 1], triangle[None])
        return _named(count=count_C, mean=mean_HD, covariance=covariance_PT)


class _Moments:
    """n_c, μ_c and Σ (f − μ_c)² of every feature, batch by batch."""

    def __init__(self, form: str, rows: Sequence[int], num_classes: int, width: int) -> None:
        self.form, self.rows = form, rows
        self.count_C = torch.zeros(num_classes, dtype=torch.float64)
        self.mean_CD = torch.zeros(num_classes, width, dtype=torch.float64)
        self.squares_CD = torch.zeros(num_classes, width, dtype=torch.float64)

    def update(self, features: Tensor, labels: Tensor) -> None:
        x_ND, labels = features.detach().cpu().double(), labels.cpu()
        count_C = torch.zeros_like(self.count_C).index_add(0, labels, torch.ones(len(labels), dtype=torch.float64))
        mean_CD = torch.zeros_like(self.mean_CD).index_add(0, labels, x_ND) / count_C.clamp_min(1)[:, None]
        squares_CD = torch.zeros_like(self.squares_CD).index_add(0, labels, (x_ND - mean_CD[labels]).square())
        total_C = self.count_C + count_C
        share_C1 = (count_C / total_C.clamp_min(1))[:, None]
        shift_CD = mean_CD - self.mean_CD
        self.squares_CD += squares_CD + shift_CD.square() * self.count_C[:, None] * share_C1
        self.mean_CD += shift_CD * share_C1
        self.count_C = total_C

    def result(self) -> dict[str, Tensor]:
        # One sample has squares of exactly zero, so the clamp gives zero there.
        variance_CD = self.squares_CD / (self.count_C - 1).clamp_min(1)[:, None]
        held = [c for c in self.rows if self.count_C[c] > 0]
        count = self.count_C[self.rows]
        if self.form == "scalar":
            return _sent(count=count, spread=variance_CD.mean(1)[self.rows])
        if self.form == "mean":
            return _sent(count=count, mean=self.mean_CD[held])
        return _sent(count=count, mean=self.mean_CD[held], variance=variance_CD[held])


class _Scatter:
    """Beside them Σ (f − μ_c)(f − μ_c)ᵀ of every class that comes up."""

    def __init__(self, moments: _Moments) -> None:
        self.moments = moments
        self.products: dict[int, Tensor] = {}  # class -> (D, D)

    def update(self, features: Tensor, labels: Tensor) -> None:
        x_ND, labels = features.detach().cpu().double(), labels.cpu()
        for c in sorted(set(labels.tolist()) & set(self.moments.rows)):
            rows_ND = x_ND[labels == c]
            mean_D, before, new = rows_ND.mean(0), float(self.moments.count_C[c]), len(rows_ND)
            centred_ND, shift_D = rows_ND - mean_D, mean_D - self.moments.mean_CD[c]
            product_DD = centred_ND.T @ centred_ND
            if before:
                product_DD += self.products[c].addr(shift_D, shift_D, alpha=before * new / (before + new))
            self.products[c] = product_DD
        self.moments.update(x_ND, labels)

    def result(self) -> dict[str, Tensor]:
        count_C, mean_CD, rows = self.moments.count_C, self.moments.mean_CD, self.moments.rows
        held = [c for c in rows if count_C[c] > 0]
        told = [c for c in held if count_C[c] >= 2]
        width = mean_CD.shape[1]
        covariance_PT = torch.empty(len(told), width * (width + 1) // 2)
        for row, c in enumerate(told):
            covariance_PT[row] = upper_triangle(self.products[c] / (count_C[c] - 1))
        return _sent(count=count_C[rows], mean=mean_CD[held], covariance=covariance_PT)


class _Within:
    """Beside them S, the scatter within the classes that are asked for: a product a batch, and one for how their means moved."""

    def __init__(self, moments: _Moments, dtype: torch.dtype) -> None:
        self.moments, self.dtype = moments, dtype
        width = moments.mean_CD.shape[1]
        self.scatter_DD = torch.zeros(width, width, dtype=torch.float64)

    def update(self, features: Tensor, labels: Tensor) -> None:
        x_ND, labels = features.detach().cpu().double(), labels.cpu()
        asked = torch.isin(labels, torch.tensor(self.moments.rows))
        count_K, mean_KD, centred_ND = centred(x_ND[asked], classes := labels[asked])
        self.scatter_DD.addmm_(centred_ND.T, centred_ND)
        rows = torch.unique(classes)
        before_K = self.moments.count_C[rows]
        shift_KD = mean_KD - self.moments.mean_CD[rows]
        self.scatter_DD.addmm_((shift_KD * (before_K * count_K / (before_K + count_K))[:, None]).T, shift_KD)
        self.moments.update(x_ND, labels)

    def result(self) -> dict[str, Tensor]:
        return _held(self.moments) | _named(within=upper_triangle(self.scatter_DD).to(self.dtype))


class _Directions:
    """Beside them the features so far, of the classes that are asked for."""

    def __init__(self, moments: _Moments, dtype: torch.dtype, rank: int) -> None:
        self.moments, self.dtype, self.rank = moments, dtype, rank
        self.features, self.labels = [torch.empty(0, moments.mean_CD.shape[1])], [torch.empty(0, dtype=torch.long)]

    def update(self, features: Tensor, labels: Tensor) -> None:
        x_ND, labels = features.detach().cpu(), labels.cpu().long()
        asked = torch.isin(labels, torch.tensor(self.moments.rows))
        self.features.append(x_ND[asked])
        self.labels.append(labels[asked])
        self.moments.update(x_ND, labels)

    def result(self) -> dict[str, Tensor]:
        count_K, _, centred_ND = centred(torch.cat(self.features).double(), torch.cat(self.labels))
        directions_rD, rest_D = low_rank(centred_ND, self.rank, len(count_K), self.dtype)
        return _held(self.moments) | _named(directions=directions_rD.to(self.dtype), rest=rest_D.float())


def centred(x_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count (K,) and mean (K, D) of the classes that come up, ascending, and the samples less the means of their classes."""
    _, place_N, count_K = torch.unique(labels_N, return_inverse=True, return_counts=True)
    sum_KD = x_ND.new_zeros(len(count_K), x_ND.shape[1]).index_add_(0, place_N, x_ND)
    mean_KD = sum_KD / count_K[:, None]
    return count_K.double(), mean_KD, x_ND - mean_KD[place_N]


def low_rank(centred_ND: Tensor, rank: int, classes: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Directions (r, D) and the diagonal of the rest (D,) of S = Xᵀ X, from the smaller of X Xᵀ and Xᵀ X.

    A row √λ v is uᵀ X for the eigenvector u of X Xᵀ: nothing is divided. Its largest number is positive. Centred samples of K
    classes span N − K dimensions at most: with a rank as large, nothing is left but rounding. dtype: what directions are rounded
    to before they are taken off, so that diagonals of sums are right.
    """
    samples, width = centred_ND.shape
    kept = max(0, min(rank, width, samples - classes))
    if samples <= width:
        vectors_NN = torch.linalg.eigh(centred_ND @ centred_ND.T).eigenvectors if kept else centred_ND.new_zeros(samples, 0)
        directions_rD = vectors_NN[:, samples - kept :].flip(1).T @ centred_ND
    else:
        values_D, vectors_DD = torch.linalg.eigh(centred_ND.T @ centred_ND)
        directions_rD = (vectors_DD * values_D.clamp_min(0).sqrt())[:, width - kept :].flip(1).T
    if kept:
        largest_r1 = directions_rD.gather(1, directions_rD.abs().argmax(dim=1, keepdim=True))
        directions_rD = (directions_rD * largest_r1.sign()).to(dtype).double()
    return directions_rD, (centred_ND.square().sum(0) - directions_rD.square().sum(0)).clamp_min(0)


def _held(moments: _Moments) -> dict[str, Tensor]:
    """Count and mean, as all forms send them."""
    held = [c for c in moments.rows if moments.count_C[c] > 0]
    return _sent(count=moments.count_C[moments.rows], mean=moments.mean_CD[held])


def _require_head(subjects: Sequence[str]) -> None:
    wrong = [s for s in subjects if s != HEAD_WEIGHT]
    if wrong:
        raise ConfigError(
            f"class_moments describes the inputs of '{HEAD_WEIGHT}', not of '{wrong[0]}': request it with match "
            f"('{HEAD_WEIGHT}',)"
        )


def _variance(x_nD: Tensor) -> Tensor:
    """Of one class, zero with fewer than 2 samples."""
    return x_nD.var(0) if len(x_nD) > 1 else x_nD.new_zeros(x_nD.shape[1])


def _stacked(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """Rows as a matrix, none of the width of `like`."""
    return torch.stack(list(rows)) if rows else like[:0]


def _sent(**forms: Tensor) -> dict[str, Tensor]:
    return _named(**{form: t.float() for form, t in forms.items()})


def _named(**forms: Tensor) -> dict[str, Tensor]:
    return {f"{form}/{HEAD_WEIGHT}": t for form, t in forms.items()}
