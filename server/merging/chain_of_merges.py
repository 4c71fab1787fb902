"""Chain of Merges: one part of the network after the other, each by least squares on the inputs that the parts before it give as
they were merged (Buzzega et al. 2025, "Rethinking layer-wise model merging through chain of merges", arXiv 2508.21421).

Shapes: O outputs, I inputs of a linear map, R rank (weight_OI, a_RI, b_OR, gram_II).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import Further, Member, Traits
from fedsim.core.errors import AggregationError, require_choice
from fedsim.core.messages import StatisticRequest, Tensors
from fedsim.core.names import HEAD_WEIGHT
from fedsim.core.sums import summed
from fedsim.core.tensors import LORA_A, LORA_B, from_upper_triangle, lora_layers
from server.linalg import solve_gram
from server.merging.mean import WEIGHT, finish, lift
from server.merging.regmean import gram_request, require_in_unit

BLOCK = re.compile(r"(.*\.\d+)\.")  # of a layer's name, up to its last number: adapter.layers.0
UNSEEN = 1e-8  # of the mean energy: what a direction that no input has counts for where a rank is cut
NOTHING = 1e-8  # of the largest: singular values below it are none


@dataclass(frozen=True)
class Merging(contracts.ChainedMerging):
    """For one group of linear maps after the other, in forward order:

        X̂_i   inputs of a map when i's data run through i's own model, in which all groups before this one are merged
        Ĝ_i   = decay · X̂_i X̂_iᵀ + (1 − decay) · diag(X̂_i X̂_iᵀ)
        W⁺    = (Σ W_i Ĝ_i)(Σ Ĝ_i)⁺                                minimises Σ ‖(W − W_i) X̂_i‖² (decay 1)

    RegMean takes all X_i through i's own model; here every map is fitted to the inputs that it will be given. In directions that
    no input has, W⁺ is the mean, weighted by samples, where a pseudo-inverse would put zero. All that is no linear map (biases,
    norms, embeddings, prompts) is that mean, before the first look.

    A LoRA pair is the map ΔW_i = B_i A_i of its layer's inputs. ΔW⁺ as above is cut to the pair's rank r where it costs least,
    Σ ‖(B A − ΔW_i) X̂_i‖² being minimal: B A = U Uᵀ ΔW⁺, U (O, r) the first eigenvectors of ΔW⁺ Ĝ ΔW⁺ᵀ, Ĝ = Σ Ĝ_i. Of the
    factors of this product those are taken whose A is the clients' mean A, projected on the product's rows, so that equal clients
    get their own factors back; but no direction of A gets smaller than the mean A's smallest (or half its mean), or B would be so
    much larger, and training jump. Where the product has less than rank r, A is the mean and B the best for it. Clients' pairs
    may have ranks of their own; A is then near the server's.

    A round that merges so costs one more look at the clients' data for each group, one after the other. In each a client is sent
    the group that was merged last, and sends the Grams of the next: d(d+1)/2 numbers for a map of d inputs, of equal ones
    (queries, keys and values) one. A client that fails in a look is left out of that group.

    target: merged, as above | own, Σ ‖W X̂_i − W_i X_i‖² with X_i through i's own model: W⁺ = (Σ W_i Ĝ_i + D_i)(Σ Ĝ_i)⁺, where
    D_i = Σ (y_i − ŷ_i) x̂ᵀ is how far the merged groups move what the map gives (m·d more numbers, statistic `response_gap`).
    decay: in [0, 1], 0.9 as in RegMean's paper. With 1 the fit is exact. Where inputs hardly vary in some direction, W⁺ may be
    far larger in it than any W_i, and what clients train from there is merged larger still. On Fashion-MNIST (3 rounds a task)
    LoRA products of norm 1 are merged to 10² to 10³ by the third round, with decay 1 to 10⁶.
    granularity: layer, every map by itself, as published | block, all maps of a block at once: those behind the first in it
    still see i's own.
    rounds: last, only the last of a task, and the mean in the others: nothing is trained from what was merged, as in the paper |
        every. Three tasks of Fashion-MNIST, seed 0: 51.5 % with `last`; with `every` 18.2 at decay 0.9, 49.7 at 0.5 and 50.3 at
        0.1; the mean gets 52.2.
    The paper merges models of tasks that were trained from one network, whose data are at hand (so does `fedsim merge`; over the
    tasks of a stream they are gone). That clients are merged so, LoRA products, the cut, and blocks are ours. Its equations were
    had from summaries only: that the target is W_i X̂_i, and not what i's own model gives (W_i X_i), is one reading of two
    (`target`); it is what RegMean++ (2025, arXiv 2508.03121) is said to do as well.
    """

    pairs: ClassVar[bool] = True
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"granularity": "layer", "decay": 1.0, "target": "own"})
    decay: float = 0.9
    granularity: str = "block"
    rounds: str = "last"
    target: str = "merged"

    def __post_init__(self) -> None:
        require_in_unit("decay", self.decay)
        require_choice("granularity", self.granularity, ("layer", "block"))
        require_choice("rounds", self.rounds, ("every", "last"))
        require_choice("target", self.target, ("merged", "own"))

    @property
    def traits(self) -> Traits:
        return Traits(
            needs={"an affine head": "merges head.weight by Grams, but {head} is no linear map of its inputs: use head: linear"},
            refuses={"unlearning": "looks at clients' data again before every merge, which cannot be repeated once clients are "
                                   "gone: set server.unlearning to false"},
        )  # fmt: skip

    def further(self, members: Sequence[Member], base: Tensors, merged: Tensors | None, last: bool) -> Further:
        if self.rounds == "last" and not last:
            return Further(averaged(members, base))
        groups = self.groups(base)
        if merged is None:
            mapped = {name for group in groups for names in group for name in names}
            done = averaged(members, {n: t for n, t in base.items() if n not in mapped})
        else:
            done = dict(merged)
        waiting = [group for group in groups if any(name not in done for names in group for name in names)]
        if merged is not None and waiting:
            done |= {n: t for names in waiting.pop(0) for n, t in fitted(members, base, names).items()}
        return Further(done, self._requests([names[0] for names in waiting[0]]) if waiting else ())

    def groups(self, params: Tensors) -> list[list[tuple[str, ...]]]:
        """Groups of maps in the order of the tensors, which is that of the encoder, the head last. A map is the names of its
        tensors: (weight,) or (lora_A, lora_B); the first is the one that Grams are asked of."""
        pairs = lora_layers(params)
        weights = [n for n, t in params.items() if n.endswith(".weight") and t.dim() == 2 and n != HEAD_WEIGHT]
        layers = {p: (p + LORA_A, p + LORA_B) for p in pairs} | {n.removesuffix(".weight"): (n,) for n in weights}
        places = {name: k for k, name in enumerate(params)}
        found: dict[str, list[tuple[str, ...]]] = {}
        for layer, names in sorted(layers.items(), key=lambda item: places[item[1][0]]):
            block = BLOCK.match(f"{layer}.") if self.granularity == "block" else None
            found.setdefault(block[1] if block else layer, []).append(names)
        if HEAD_WEIGHT in params:
            found[HEAD_WEIGHT] = [(HEAD_WEIGHT,)]
        return list(found.values())

    def _requests(self, subjects: Sequence[str]) -> tuple[StatisticRequest, ...]:
        """The head's features are those that will be deployed (blended), or those of the module alone, as i's own are."""
        own = self.target == "own"
        grams = gram_request(tuple(subjects), "full", self.decay, blended=HEAD_WEIGHT in subjects and not own)
        return (grams, StatisticRequest("response_gap", tuple(subjects))) if own else (grams,)


def averaged(members: Sequence[Member], base: Tensors) -> dict[str, Tensor]:
    """The mean by weights of the tensors of these names. Raises AggregationError for tensors of several shapes."""
    for member in members:
        if odd := [n for n, t in base.items() if member.params[n].shape != t.shape]:
            raise AggregationError(
                f"{member.who} has '{odd[0]}' of another shape, or rank, than the server, of which there is no mean: use "
                "chain_of_merges with rounds: every, or equal ranks"
            )
    return finish(base, summed(lift({n: m.params[n] for n in base}, m.weight) for m in members)) if base else {}


def fitted(members: Sequence[Member], base: Tensors, names: Sequence[str]) -> dict[str, Tensor]:
    """A map's tensors, merged by the Grams of the members that sent them; the mean of all where there are none."""
    key, own = f"gram.full/{names[0]}", {n: base[n] for n in names}
    sent = [m for m in members if key in m.statistics]
    if not sent:
        return averaged(members, own)
    precision, total = base[names[0]].dtype, summed(_share(m, names, key) for m in sent)
    map_OI = solve_gram(total["product"], total["gram"], total["map"] / total[WEIGHT], precision)
    if len(names) == 1:
        return {names[0]: map_OI.to(precision)}
    alike = all(m.params[names[0]].shape == own[names[0]].shape for m in sent)
    near_RI = averaged(sent, {names[0]: own[names[0]].double()})[names[0]] if alike else own[names[0]].double()
    return {n: t.to(precision) for n, t in zip(names, low_rank(map_OI, total["gram"], near_RI), strict=True)}


def _share(member: Member, names: Sequence[str], key: str) -> dict[str, Tensor]:
    """One member's part of the sums of its map W_i, float64: `product` W_i Ĝ_i + D_i, `gram` Ĝ_i, `map` n_i W_i, `weight` n_i."""
    *left, last = [member.params[n].double() for n in reversed(names)]  # a pair is B A, with A as its first name
    gram_II, n = from_upper_triangle(member.statistics[key].double()), torch.tensor(member.weight, dtype=torch.float64)
    gap = member.statistics.get(f"response_gap.map/{names[0]}", torch.zeros((), dtype=torch.float64))
    product, whole = (left[0] @ (last @ gram_II), left[0] @ last) if left else (last @ gram_II, last)
    return {"product": product + gap.double(), "gram": gram_II, "map": n * whole, WEIGHT: n}


def low_rank(map_OI: Tensor, gram_II: Tensor, a_RI: Tensor) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) whose product differs least from a map on inputs of this Gram; of all such pairs, the one with the
    rows of the given A, as far as the product has them (see `Merging`)."""
    rank, energy = len(a_RI), gram_II.diagonal().mean()
    eye_II = torch.eye(len(gram_II), dtype=torch.float64)
    weighed_II = gram_II / energy + UNSEEN * eye_II if energy > 0 else eye_II
    u_OR = torch.linalg.eigh(map_OI @ weighed_II @ map_OI.T).eigenvectors[:, -rank:]
    turn_RR, values_R, v_RI = torch.linalg.svd(u_OR.T @ map_OI, full_matrices=False)
    if values_R[-1] <= NOTHING * values_R[0]:
        return a_RI, solve_gram(map_OI @ weighed_II @ a_RI.T, a_RI @ weighed_II @ a_RI.T)
    sizes_R = torch.linalg.svdvals(a_RI)
    left_RR, shown_R, right_RR = torch.linalg.svd(a_RI @ v_RI.T)
    kept_RR = (left_RR * shown_R.clamp(min=float(min(sizes_R[-1], sizes_R.mean() / 2)))) @ right_RR
    return kept_RR @ v_RI, torch.linalg.solve(kept_RR, (u_OR @ turn_RR) * values_R, left=False)
