"""The diagonal of the Fisher information of a client's samples: how much each number matters to what the model says of them.

Shapes: N samples, b of a chunk, C classes; O outputs, I inputs of a layer, R rank (A_RI, B_OR).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import ClientWork
from fedsim.core.errors import require_choice
from fedsim.core.messages import Tensors
from fedsim.core.names import HEAD_BIAS, HEAD_WEIGHT
from fedsim.core.tensors import LORA_A, LORA_B, lora_layers

FORMS = ("likelihood", "empirical", "expected")
CLASSES = ("seen", "task")


@dataclass(frozen=True)
class Statistic(contracts.WorkStatistic):
    """Sums over samples (x, y), for every number w of the subjects; q = softmax of the logits over some classes:

        likelihood   Σ_n q_y (∂ log q_y / ∂w)²        as in mammoth and fed-mammoth: the label's own term of `expected`
        empirical    Σ_n (∂ log q_y / ∂w)²
        expected     Σ_n Σ_c q_c (∂ log q_c / ∂w)²    the Fisher information; as many backward passes as there are classes

    Each sample's gradient is squared by itself (a batch's squared mean is something else). Sent as `<form>/<subject>`, of the
    subject's shape, float32; sums are float64. Divide by the number of samples for the mean. In evaluation: no augmentation and
    no dropout, through the tensors of the pass.

    form: likelihood | empirical | expected.
    classes: of the softmax, those of all tasks so far ("seen") or of the current one ("task").
    products: a subject `<layer>.lora_A` means the product B A of the pair, W + s B A being the layer's weight: sent is the
    information of the product's numbers, (m, d), Σ_n (s Σ_tokens δ xᵀ)² from inputs x and slopes δ of the layer's outputs.
    Source: Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks".
    """

    additive: ClassVar[bool] = True
    of_trained: ClassVar[bool] = True
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = tuple({"form": form} for form in FORMS)
    form: str = "likelihood"
    classes: str = "seen"
    products: bool = False

    def __post_init__(self) -> None:
        require_choice("form", self.form, FORMS)
        require_choice("classes", self.classes, CLASSES)

    def measured(self, work: ClientWork, params: Tensors, subjects: Sequence[str]) -> dict[str, Tensor]:
        rows = list(work.seen if self.classes == "seen" else work.classes)
        places, through = self._places(params, subjects), dict(params)
        for s in subjects:
            if places[s] != s:
                through |= _as_product(params, s)
        sums = {s: torch.zeros(through[place].shape, dtype=torch.float64) for s, place in places.items()}
        for loss in self._losses(rows) if subjects else ():
            for _, gradients in work.gradients(work.shard, through, list(places.values()), loss):
                for s, place in places.items():
                    sums[s] += gradients[place].cpu().double().square().sum(0)
        return {f"{self.form}/{s}": total.float() for s, total in sums.items()}

    def _places(self, params: Tensors, subjects: Sequence[str]) -> dict[str, str]:
        """Subject -> the tensor whose gradient it is of: of a product, the factor that holds it (`_as_product`)."""
        pairs = {p + LORA_A: p + LORA_B for p in lora_layers(params)} if self.products else {}
        return {s: pairs.get(s, s) for s in subjects}

    def _losses(self, rows: Sequence[int]) -> list[Callable[[Tensor, Tensor], Tensor]]:
        """Losses whose squared gradients add up to the form: the weight goes in as its root, which no gradient goes through."""
        if self.form == "expected":
            return [partial(_of_class, rows, place) for place in range(len(rows))]

        def of_label(logits_bC: Tensor, labels_b: Tensor) -> Tensor:
            own_bC = torch.isin(torch.arange(logits_bC.shape[1], device=logits_bC.device), torch.tensor(rows).to(labels_b))
            log_q_b = logits_bC.masked_fill(~own_bC, -torch.inf).log_softmax(1).gather(1, labels_b[:, None])[:, 0]
            return _weighted(log_q_b) if self.form == "likelihood" else log_q_b

        return [of_label]

    def synthetic(self, seen: contracts.Seen, params: Tensors, subjects: Sequence[str]) -> dict[str, Tensor]:
        """The formula for a linear head over all its rows. What gradients other tensors would have nobody knows without a model:
        for these, made-up sums of the right shape and sign, the larger the more samples there are."""
        return {f"{self.form}/{s}": self._made_up(seen, params, s) for s in subjects}

    def _made_up(self, seen: contracts.Seen, params: Tensors, subject: str) -> Tensor:
        if subject not in (HEAD_WEIGHT, HEAD_BIAS) or HEAD_WEIGHT not in params:
            energy_N = seen.features.double().square().mean(1)
            place = self._places(params, [subject])[subject]
            shape = params[subject].shape if place == subject else (len(params[place]), params[subject].shape[1])
            spread = torch.linspace(0.5, 1.5, math.prod(shape), dtype=torch.float64).view(shape)
            return energy_N.sum() * spread
        x_ND, labels_N = seen.features.double(), seen.labels
        bias = params[HEAD_BIAS].double() if HEAD_BIAS in params else 0.0
        q_NC = (x_ND @ params[HEAD_WEIGHT].double().T + bias).softmax(1)
        every = range(q_NC.shape[1]) if self.form == "expected" else [None]
        total = torch.zeros(params[subject].shape, dtype=torch.float64)
        for c in every:
            label_N = labels_N if c is None else torch.full_like(labels_N, c)
            slope_NC = torch.nn.functional.one_hot(label_N, q_NC.shape[1]) - q_NC
            weight_N = (
                torch.ones(len(x_ND), dtype=torch.float64) if self.form == "empirical" else q_NC.gather(1, label_N[:, None])[:, 0]
            )
            squares_NC = weight_N[:, None] * slope_NC.square()
            total += squares_NC.T @ x_ND.square() if subject == HEAD_WEIGHT else squares_NC.sum(0)
        return total


def _as_product(params: Tensors, lora_a: str) -> dict[str, Tensor]:
    """The same module with a layer's product as `lora_B` and the identity as `lora_A`: what the model makes is the same."""
    lora_b = lora_a.removesuffix(LORA_A) + LORA_B
    a_RI, b_OR = params[lora_a], params[lora_b]
    return {lora_a: torch.eye(a_RI.shape[1], dtype=a_RI.dtype, device=a_RI.device), lora_b: b_OR @ a_RI}


def _of_class(rows: Sequence[int], place: int, logits_bC: Tensor, labels_b: Tensor) -> Tensor:
    return _weighted(logits_bC[:, list(rows)].log_softmax(1)[:, place])


def _weighted(log_q_b: Tensor) -> Tensor:
    return (log_q_b / 2).exp().detach() * log_q_b
