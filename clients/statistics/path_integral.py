"""How much the training pulled at each tensor: the path integral of the loss along a client's steps, one number per tensor.

Shapes: P numbers of all subjects, side by side; S subjects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from clients.statistics._inputs import wide
from fedsim.core import contracts
from fedsim.core.errors import require_choice
from fedsim.core.messages import Tensors

FORMS = ("movement", "gradient")
OF_A_PASS = ("subjects", "synthetic", "wire", "batches", "nobody", "deterministic", "no_mutation")  # laws


@dataclass(frozen=True)
class Statistic(contracts.TrainingStatistic):
    """A sum over a round's steps, for every subject w with gradient g (before clipping):

        movement   s = Σ_steps | Σ_entries g · (w_before − w_after) |    (how much of the loss's fall the step accounts for)
        gradient   s = Σ_steps | Σ_entries g |

    The absolute value is of the sum over the tensor, once per step. Sent as `movement/<subject>` or `gradient/<subject>`, a
    scalar; zero for subjects that are not trained and for clients without samples. Products and sums are float64 (float32 on
    the wire). Keeps one copy of the subjects' gradients and values, from each step's backward to its end.

    After the path integral of synaptic intelligence (Zenke, Poole & Ganguli 2017), in the form of LIVAR's code
    (arXiv 2507.06813: `si_withmomentum` true is movement, false is gradient). The code keeps its sums from round to round; here
    they are a round's own, and a rule that wants the former adds them up.
    """

    exempt: ClassVar[Mapping[str, str]] = dict.fromkeys(OF_A_PASS, "it follows the training, of which a pass sees nothing")
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = tuple({"form": f} for f in FORMS)
    form: str = "movement"

    def __post_init__(self) -> None:
        require_choice("form", self.form, tuple(FORMS))

    def synthetic(self, seen: contracts.Seen, params: Tensors, subjects: Sequence[str]) -> dict[str, Tensor]:
        """No step is taken: numbers that differ by client and tensor and grow with the samples, as the real ones do."""
        return {f"{self.form}/{s}": self._made_up(seen, params, s) for s in subjects}

    def _made_up(self, seen: contracts.Seen, params: Tensors, subject: str) -> Tensor:
        x_NI = seen.inputs.get(subject.rpartition(".")[0], seen.features)
        return x_NI.abs().sum() * params[subject].double().abs().mean()

    def follow(self, params: Tensors, subjects: Sequence[str]) -> _Sums:
        return _Sums(self.form, {s: params[s] for s in subjects})


class _Sums:
    """The sums so far. Nothing looks at a number before the end, which would wait for a GPU at every step."""

    def __init__(self, form: str, tensors: Tensors) -> None:
        self.form, self.tensors = form, tensors
        self.total_S: Tensor | None = None
        self.moving: list[str] = []
        self.gradient_P = self.before_P = torch.empty(0)

    def before_step(self) -> None:
        gradients = {s: t.grad for s, t in self.tensors.items() if t.grad is not None}
        self.moving = list(gradients)
        if not gradients:
            return
        gradient_P = torch.cat([g.detach().flatten() for g in gradients.values()])  # a copy: clipping writes into the gradients
        if self.form == "gradient":
            self._add(wide(gradient_P))
        else:
            self.gradient_P, self.before_P = gradient_P, self._values()

    def after_step(self) -> None:
        if self.form == "movement" and self.moving:
            self._add(wide(self.gradient_P) * (wide(self.before_P) - wide(self._values())))

    def result(self) -> dict[str, Tensor]:
        total_S = torch.zeros(len(self.tensors)) if self.total_S is None else self.total_S.float().cpu()
        return {f"{self.form}/{s}": total.clone() for s, total in zip(self.tensors, total_S, strict=True)}

    def _values(self) -> Tensor:
        return torch.cat([self.tensors[s].detach().flatten() for s in self.moving])

    def _add(self, terms_P: Tensor) -> None:
        parts = torch.split(terms_P, [self.tensors[s].numel() for s in self.moving])
        sums = {s: part.sum().abs() for s, part in zip(self.moving, parts, strict=True)}
        none = terms_P.new_zeros(())
        step_S = torch.stack([sums.get(s, none) for s in self.tensors])
        self.total_S = step_S if self.total_S is None else self.total_S + step_S
