"""How much the training pulled at each tensor: what rules ask for of the learner of the same name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from clients.learners.path_integral import FORMS, Learner
from fedsim.core import contracts
from fedsim.core.errors import require_choice
from fedsim.core.messages import Tensors

OF_A_PASS = ("subjects", "synthetic", "wire", "batches", "nobody", "deterministic", "no_mutation")  # laws


@dataclass(frozen=True)
class Statistic(contracts.TrainingStatistic):
    """A scalar for every subject: `movement/<subject>` or `gradient/<subject>`, see `clients.learners.path_integral`.

    form: movement | gradient.
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

    def learner(self, subjects: Sequence[str]) -> contracts.Learner:
        return Learner(self.form, list(subjects))
