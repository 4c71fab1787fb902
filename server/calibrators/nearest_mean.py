"""The nearest class mean as the head that is deployed: what features are worth without any training of a head.

Known as nearest class mean (Mensink et al. 2013) and, over a frozen backbone and by cosine, as SimpleCIL (Zhou et al. 2023,
arXiv:2303.07338).
"""

# C classes of the stream, R of which somebody told, D features

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from fedsim.core.contracts import Traits
from fedsim.core.errors import require_choice
from fedsim.core.messages import State, Tensors
from fedsim.core.names import HEAD_BIAS, HEAD_WEIGHT
from server.calibrators._class_sums import SumsCalibrator


@dataclass(frozen=True)
class Calibrator(SumsCalibrator):
    """At a task's end: w_c = μ_c, b_c = −½ ‖μ_c‖², so that argmax_c (w_c x + b_c) = argmin_c ‖x − μ_c‖; or, by cosine,
    w_c = μ_c / ‖μ_c‖, b_c = 0, so that it is argmax_c cos(x, μ_c).

    μ_c = Σ x / n over all samples of the class, see `SumsCalibrator`.

    With `adapter: none` and `aggregator: frozen` nothing is trained at all, and this is the reference of what the bare backbone
    knows, for any stream; with `consolidator: first_session` features are those of the first task's module. Sums of old tasks are
    not measured again: where a module goes on, their means go stale.

    distance: euclidean | cosine (SimpleCIL). With `head: cosine` it is the cosine in any case, to the mean of features that were
    brought to length 1 each.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"distance": "cosine"})
    distance: str = "euclidean"

    def __post_init__(self) -> None:
        require_choice("distance", self.distance, ("euclidean", "cosine"))

    @property
    def traits(self) -> Traits:
        return Traits()

    def head(self, state: State, rows_R: Tensor, mean_RD: Tensor) -> Tensors:
        if self.distance == "cosine":
            return {HEAD_WEIGHT: F.normalize(mean_RD), HEAD_BIAS: mean_RD.new_zeros(len(mean_RD))}
        return {HEAD_WEIGHT: mean_RD, HEAD_BIAS: -0.5 * mean_RD.square().sum(dim=1)}
