"""Gram matrices of the inputs of linear maps, for rules that merge in closed form (RegMean, LoRM).

Shapes: N rows (all tokens of a batch), I inputs of a layer, R rank (x_NI, A_RI, gram_II = Σ x xᵀ).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from clients.statistics._inputs import WEIGHT, Inputs, feeding, has_inputs, layer_of
from fedsim.core import contracts
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import Tensors
from fedsim.core.names import HEAD_WEIGHT
from fedsim.core.tensors import LORA_A, LORA_B, upper_triangle, wide

FORMS = {  # form -> what its subjects may be
    "diagonal": (HEAD_WEIGHT, LORA_A, LORA_B, WEIGHT),
    "full": (HEAD_WEIGHT, LORA_A, LORA_B, WEIGHT),
    "projected": (LORA_B,),
    "cross": (LORA_B,),
}


@dataclass(frozen=True)
class Statistic(contracts.Statistic):
    """Ĝ = decay·G + (1 − decay)·diag(G), G = Σ x xᵀ over the inputs x of the map whose weight is the subject.

    Subjects: `head.weight` (x = what the head's last map is given: features, for a linear head); `<layer>.lora_A` (x = inputs of
    the layer); `<layer>.lora_B` (x = its own inputs, A times those of the layer with the client's own A, so d = r there);
    `<layer>.weight` of a linear layer that is trained as a whole (x = inputs of the layer), where weights of other layers (norms,
    embeddings) are passed over. Forms:
        diagonal   g = diag(G), (d,)
        full       upper triangle of Ĝ, (d(d+1)/2,)
        projected  A Ĝ Aᵀ, (r, r), Ĝ of the layer's inputs    for lora_B
        cross      A Ĝ, (r, d), Ĝ of the layer's inputs       for lora_B
    The decay thus falls on A x in the first two forms (as in RegMean, where B is a linear map like any other), and on x, before
    A, in the last two (as in LoRM, where B is fitted on the layer's inputs). No form of a lora_B makes a matrix of the layer's
    width: A Ĝ Aᵀ = decay·Σ (Ax)(Ax)ᵀ + (1 − decay)·A diag(g) Aᵀ.

    form: diagonal | full | projected | cross. decay: of what is off the diagonal, in [0, 1].
    A sum, not a mean: clients with more samples weigh more. Every token counts, padding too (as in the code of LoRM).
    Inputs are cast to float64 before any product (half precision would overflow); the result is float32 on the CPU.
    """

    additive: ClassVar[bool] = True
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = tuple({"form": f, "decay": d} for f in FORMS for d in (0.0, 0.5, 1.0))
    form: str = "diagonal"
    decay: float = 1.0

    def __post_init__(self) -> None:
        require_choice("form", self.form, tuple(FORMS))
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"decay must be in [0, 1], got {self.decay}")

    @contextmanager
    def collect(self, model: contracts.ModelLike, params: Tensors, subjects: Sequence[str]) -> Iterator[_Accumulator]:
        """Raises ConfigError for a subject that has no Gram of this form."""
        sums = {subject: self._sum(params, subject) for subject in subjects if has_inputs(model, subject)}
        with ExitStack() as hooks:
            for subject, one in sums.items():
                if subject != HEAD_WEIGHT:
                    hooks.callback(model.layer(subject).register_forward_pre_hook(feeding(one)).remove)
            yield _Accumulator(self.form, sums)

    def synthetic(self, seen: contracts.Seen, params: Tensors, subjects: Sequence[str]) -> dict[str, Tensor]:
        fed = [s for s in subjects if s == HEAD_WEIGHT or not s.endswith(WEIGHT) or layer_of(s) in seen.inputs]
        return {f"{self.form}/{s}": self._of(seen, params, s) for s in fed}

    def _of(self, seen: contracts.Seen, params: Tensors, subject: str) -> Tensor:
        """The form of all samples at once."""
        self._require_form(subject)
        if subject != HEAD_WEIGHT and layer_of(subject) not in seen.inputs:
            raise ConfigError(f"'{subject}' belongs to no layer that has inputs")
        x_NI = seen.features if subject == HEAD_WEIGHT else seen.inputs[layer_of(subject)]
        a_RI = params[layer_of(subject) + LORA_A].double() if subject.endswith(LORA_B) else None
        if a_RI is not None and self.form in ("diagonal", "full"):
            x_NI = x_NI @ a_RI.T
        gram_II = self.decay * x_NI.T @ x_NI + (1 - self.decay) * torch.diag(x_NI.square().sum(0))
        if self.form == "diagonal":
            return gram_II.diagonal().clone()
        if a_RI is None or self.form == "full":
            return upper_triangle(gram_II)
        return a_RI @ gram_II if self.form == "cross" else a_RI @ gram_II @ a_RI.T

    def _require_form(self, subject: str) -> None:
        if not subject.endswith(FORMS[self.form]):
            raise ConfigError(
                f"there is no gram of form '{self.form}' for '{subject}': it is for {' and '.join(FORMS[self.form])}"
            )

    def _sum(self, params: Tensors, subject: str) -> _DecayedSum:
        self._require_form(subject)
        a_RI = params[subject.removesuffix(LORA_B) + LORA_A].detach() if subject.endswith(LORA_B) else None
        if a_RI is None or self.form in ("diagonal", "full"):
            decay = 0.0 if self.form == "diagonal" else self.decay
            return _DecayedSum(params[subject].shape[1], None, None, decay, through=a_RI)
        return _DecayedSum(a_RI.shape[1], a_RI, a_RI if self.form == "projected" else None, self.decay)


class _DecayedSum:
    """L Ĝ Rᵀ over batches, L and R being a matrix (·, I) or, for None, the identity. Sums only what the decay leaves.

    through: a matrix that every input is multiplied with first; size: I, after it.
    """

    def __init__(self, size: int, left: Tensor | None, right: Tensor | None, decay: float, through: Tensor | None = None) -> None:
        self.left, self.right, self.decay, self.through = left, right, decay, through
        self.energy_I = torch.zeros(size, dtype=torch.float64)
        self.shape = tuple(size if side is None else len(side) for side in (left, right))
        self._products: Tensor | None = None
        self._owned = False  # a single batch's Gram is looked at by others too

    @property
    def products(self) -> Tensor:
        """L G Rᵀ so far."""
        return torch.zeros(self.shape, dtype=torch.float64) if self._products is None else self._products

    def add(self, inputs: Inputs) -> None:
        if self.through is not None:
            inputs = Inputs(inputs.wide @ wide(self.through).to(inputs.wide.device).T)
        if self.decay < 1:
            self.energy_I = self.energy_I.to(inputs.energies.device) + inputs.energies
        if self.decay > 0:
            product = self._product(inputs)
            if self._owned and self._products is not None:
                self._products += product
            else:
                self._owned = self._products is not None
                self._products = product if self._products is None else self._products + product

    def _product(self, inputs: Inputs) -> Tensor:
        """L (Σ x xᵀ) Rᵀ of one batch."""
        if self.left is None and self.right is None:
            return inputs.gram
        x_NI = inputs.wide
        left = x_NI if self.left is None else x_NI @ wide(self.left).to(x_NI.device).T
        if self.right is self.left:
            return left.T @ left
        return left.T @ (x_NI if self.right is None else x_NI @ wide(self.right).to(x_NI.device).T)

    def energies(self) -> Tensor:
        """diag(G), (I,)."""
        return self.energy_I

    def total(self) -> Tensor:
        """L Ĝ Rᵀ, float64."""
        if self.decay == 1:
            return self.products
        g = self.energy_I
        left = None if self.left is None else wide(self.left).to(g.device)
        right = left if self.right is self.left else None if self.right is None else wide(self.right).to(g.device)
        diagonal = torch.diag(g) if left is None else left * g
        diagonal = diagonal if right is None else diagonal @ right.T
        return diagonal if self.decay == 0 else self.decay * self.products.to(g.device) + (1 - self.decay) * diagonal


@dataclass(frozen=True)
class _Accumulator:
    form: str
    sums: Mapping[str, _DecayedSum]

    def update(self, features: Tensor, labels: Tensor) -> None:
        if HEAD_WEIGHT in self.sums:
            self.sums[HEAD_WEIGHT].add(Inputs(features))

    def result(self) -> dict[str, Tensor]:
        return {f"{self.form}/{subject}": self._value(one).float().cpu() for subject, one in self.sums.items()}

    def _value(self, one: _DecayedSum) -> Tensor:
        if self.form == "diagonal":
            return one.energies()
        return upper_triangle(one.total()) if self.form == "full" else one.total()
