"""How far the clients of a round drift from what they received, and from each other. Observes; never moves a number of the run.

With Δ_k = w_k − w the change of client k (over all tensors of a group that it trained, as one vector, float64), K clients:

    relative_norm   1/K Σ_k ‖Δ_k‖ / ‖w‖                              (None where w is zero, as a new head is)
    cosine          mean of cos(Δ_i, Δ_j) over pairs i ≠ j
    cosine_min      the least of them
    cosine_to_mean  1/K Σ_k cos(Δ_k, Δ̄), Δ̄ = 1/K Σ_k Δ_k
    diversity       Σ_k ‖Δ_k‖² / ‖Σ_k Δ_k‖² ≥ 1/K, equal when all agree  (Yin et al. 2018, "Gradient diversity")
    effective_rank  exp of the entropy of σ_k / Σσ, σ the singular values of the stacked Δ_k   (Roy & Vetterli 2007)
    product_error   of LoRA, where A and B are both trained, p_k = n_k / Σn the clients' shares of the samples, over all layers:
                    ‖(Σ_k p_k B_k)(Σ_k p_k A_k) − Σ_k p_k B_k A_k‖_F / ‖Σ_k p_k B_k A_k‖_F: what averaging the factors loses

All but the last follow from the K×K matrix of inner products. A client that did not move has no direction, so it is left out
of the cosines; what is undefined (one client, nobody moved) is None. Of many or large clients, some are looked at, evenly
spaced by client id (`gather.observed`); the product error is left out beyond `MOST_PRODUCTS`, where it would cost more than
the round.
"""

# K clients, P numbers of a group; LoRA: R rank, O out, I in, Q = K·R stacked ranks

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fedsim.core.events import DriftRow
from fedsim.core.messages import ClientUpdate, Tensors
from fedsim.core.ranks import cut

MOST_PRODUCTS = 16
A, B = ".lora_A", ".lora_B"
RankOf = Callable[[int], int | None]


def measure_drift(
    task: int, round: int, params: Tensors, updates: Sequence[ClientUpdate], rank_of: RankOf = lambda client: None
) -> tuple[DriftRow, ...]:
    """One row per group of tensors that was trained ("adapter", "head"), from the updates that hold their tensors. rank_of: of a
    client's LoRA pairs; what is beyond it has not moved."""
    chosen = [u for u in updates if u.params and u.num_samples]
    if not chosen:
        return ()
    groups = dict.fromkeys(name.partition(".")[0] for name in chosen[0].params)
    rows = []
    for group in groups:
        names = [n for n in chosen[0].params if n.startswith(f"{group}.")]
        error = product_error(names, chosen) if len(chosen) <= MOST_PRODUCTS else None
        rows.append(DriftRow(task, round, group, len(chosen), **_of_group(names, params, chosen, rank_of), product_error=error))
    return tuple(rows)


def product_error(names: Sequence[str], updates: Sequence[ClientUpdate]) -> float | None:
    """What averaging the factors of LoRA loses against averaging their products; None where A and B are not trained together.

    No O×I matrix is formed: ‖P Q‖² = tr((PᵀP)(Q Qᵀ)) for the stacked factors.
    """
    layers = [n.removesuffix(A) for n in names if n.endswith(A) and n.removesuffix(A) + B in names]
    samples = sum(u.num_samples for u in updates)
    lost = kept = 0.0
    for layer in layers:
        shares = [u.num_samples / samples for u in updates]
        A_RI = [u.params[layer + A].double() for u in updates]
        B_OR = [u.params[layer + B].double() for u in updates]
        A_QI, B_OQ = torch.cat(A_RI), torch.cat([p * b for p, b in zip(shares, B_OR, strict=True)], dim=1)
        meanA_RI = torch.stack([p * a for p, a in zip(shares, A_RI, strict=True)]).sum(dim=0)
        meanB_OR = torch.stack([p * b for p, b in zip(shares, B_OR, strict=True)]).sum(dim=0)
        kept += _squared_norm(B_OQ, A_QI)
        lost += _squared_norm(torch.cat([B_OQ, -meanB_OR], dim=1), torch.cat([A_QI, meanA_RI]))
    return (max(0.0, lost) / kept) ** 0.5 if kept else None


def _squared_norm(P_OQ: Tensor, Q_QI: Tensor) -> float:
    return float(((P_OQ.T @ P_OQ) * (Q_QI @ Q_QI.T)).sum())


def _of_group(
    names: Sequence[str], params: Tensors, updates: Sequence[ClientUpdate], rank_of: RankOf
) -> Mapping[str, float | None]:
    gram_KK = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    norm2 = 0.0
    for name in names:  # one tensor at a time: no second copy of all updates
        base = params[name].double()
        starts = [cut({name: base}, rank_of(u.client_id)).get(name, base) for u in updates]
        change_KP = torch.stack([(u.params[name].double() - b).flatten() for u, b in zip(updates, starts, strict=True)])
        gram_KK += change_KP @ change_KP.T
        norm2 += float(base.square().sum())
    return of_gram(gram_KK, norm2**0.5)


def of_gram(gram_KK: Tensor, norm: float) -> dict[str, float | None]:
    """The measures from the inner products ⟨Δ_i, Δ_j⟩ (float64) and ‖w‖."""
    K = len(gram_KK)
    length_K = gram_KK.diagonal().clamp(min=0).sqrt()
    total2 = float(gram_KK.sum())
    if total2 <= 1e-14 * float(gram_KK.trace()):  # the changes cancel, up to rounding
        total2 = 0.0
    moved = length_K > 0
    cosine_KK = gram_KK[moved][:, moved] / (length_K[moved, None] * length_K[moved])
    pairs = cosine_KK[~torch.eye(len(cosine_KK), dtype=torch.bool)]
    to_mean_K = gram_KK[moved].sum(dim=1) / (length_K[moved] * total2**0.5) if total2 else torch.zeros(0)
    sigma_K = torch.linalg.eigvalsh(gram_KK).clamp(min=0).sqrt()
    share_K = sigma_K[sigma_K > sigma_K.max() * 1e-7] / sigma_K.sum() if bool(moved.any()) else torch.zeros(0)
    return {
        "relative_norm": float(length_K.mean()) / norm if norm else None,
        "cosine": float(pairs.mean()) if len(pairs) else None,
        "cosine_min": float(pairs.min()) if len(pairs) else None,
        "cosine_to_mean": float(to_mean_K.mean()) if len(to_mean_K) else None,
        "diversity": float(length_K.square().sum()) / total2 if K > 1 and total2 else None,
        "effective_rank": float(torch.exp(-(share_K * share_K.log()).sum())) if len(share_K) else None,
    }
