"""TEEN: prototypes of new classes calibrated by those of the first task's, without training (Wang et al. 2023, "Few-shot
class-incremental learning via training-free prototype calibration")."""

# C classes of the stream, R of which somebody told, B base classes, N new ones, D features

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.core.contracts import Traits
from fedsim.core.errors import ConfigError
from fedsim.core.messages import State, Tensors
from fedsim.core.names import HEAD_BIAS, HEAD_WEIGHT
from server.calibrators._class_sums import SumsCalibrator


@dataclass(frozen=True)
class Calibrator(SumsCalibrator):
    """At a task's end, with all prototypes (class means) brought to length 1, for every class that is none of the first task's:

        a = softmax_b(τ cos(μ_c, μ_b)),   δ_c = normalised Σ_b a_b μ_b,   μ̂_c = (1 − α) μ_c + α δ_c

    over the base classes b, those of the first task. Deployed is argmax_c cos(x, μ̂_c): w_c = μ̂_c / ‖μ̂_c‖, b_c = 0, which every
    head without a scale of its own per class turns into the same comparison. Base prototypes stay as they are. What is asked of
    clients, and kept, is that of `nearest_mean`: the calibration is the server's, from prototypes that it has anyway.

    Made for new classes with few samples, whose means are uncertain; where they have many, α moves a good mean away from its own
    class. α = 0 is the nearest mean by cosine (SimpleCIL). Features should not move after the first task: `consolidator:
    first_session`, or `aggregator: frozen`.

    temperature: τ of the softmax. The reference divides the logits by the same number, which moves no prediction. alpha: α
    (0.5 by default, 0.1 in the reference's script for CIFAR-100).
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"alpha": 0.1, "temperature": 1.0})
    temperature: float = 16.0
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be positive, got {self.temperature}")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha must be in [0, 1], got {self.alpha}")

    @property
    def traits(self) -> Traits:
        return Traits()

    def end_task(
        self, state: State, params: Tensors, total: Tensors, classes: Sequence[Sequence[int]], draw: torch.Generator
    ) -> State:
        """`base`: rows of the first task's classes."""
        return {**super().end_task(state, params, total, classes, draw), "base": torch.tensor(classes[0])}

    def head(self, state: State, rows_R: Tensor, mean_RD: Tensor) -> Tensors:
        calibrated_RD = self.calibrated(F.normalize(mean_RD), torch.isin(rows_R, state["base"]))
        return {HEAD_WEIGHT: calibrated_RD, HEAD_BIAS: calibrated_RD.new_zeros(len(rows_R))}

    def calibrated(self, unit_RD: Tensor, base_R: Tensor) -> Tensor:
        """Prototypes of length 1, those of classes that are no base (R,) pulled towards bases that they are like."""
        base_BD, new_ND = unit_RD[base_R], unit_RD[~base_R]
        share_NB = (self.temperature * new_ND @ base_BD.T).softmax(dim=1)
        pulled_ND = (1 - self.alpha) * new_ND + self.alpha * F.normalize(share_NB @ base_BD)
        out_RD = unit_RD.clone()
        out_RD[~base_R] = F.normalize(pulled_ND)
        return out_RD
