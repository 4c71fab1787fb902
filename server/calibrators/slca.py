"""Classifier alignment of SLCA: at a task's end the head is trained on features drawn from class Gaussians (Zhang, Wang, Kang,
Chen, Wei 2023, "SLCA: slow learner with classifier alignment for continual learning on a pre-trained model", ICCV)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fedsim.core.errors import ConfigError
from server.calibrators._gaussians import PooledCalibrator


@dataclass(frozen=True)
class Calibrator(PooledCalibrator):
    """After task t, over all classes c seen, each known from its own task t_c: SGD of the head's rows on cross-entropy(z̃, c),

        x ~ N(a_c μ_c, Σ_c),  a_c = 1 − fade + fade (t_c + 1) / (t + 1),   z = W x + b,   z̃ = z / m / temperature,
        m = 1/(t + 1) Σ_s ‖z_s‖₂,  z_s the logits of the classes that task s brought

    Means of old tasks are drawn a little shorter, since the model has moved since they were measured, and logits are normed by
    task. The aligned head is what is deployed and evaluated at the task's end; the next task trains on from the head as it was
    (the reference's backup and recall of the classifier).

    The other half of SLCA is the slow learner: the backbone, or what adapts it, at a hundredth of the head's learning rate, by
    `client.groups` (see the preset).

    One machine computes μ_c and Σ_c in the paper. Here clients send them in a pass at the task's end through the model that is
    then deployed, `class_moments` with the upper triangle of the covariance, D(D+1)/2 numbers of every class that a client holds
    (with covariance diagonal the variance, D numbers); they are pooled to the moments of the concatenated data, exactly, where
    clients run [ours]. Down travels nothing beside the model, and a device stores nothing.

    fade: 0.1 is the reference's; 0 draws from the means as they were measured. samples_per_class: drawn anew in every
    epoch; epochs: passes over as many; batch_size: of them (the reference's is 256 too). covariance: full | diagonal.
    normalise: divide logits as above; else the plain cross-entropy. temperature: with normalise. lr, momentum: of SGD;
    schedule: of lr over the epochs.
    clip_norm: of a batch's gradient, null: none, as in the reference (20 here, as in HGP, since very short logits make very long
    steps).
    Unlike the reference: no weight decay of the head in the alignment (5e-4 there), no 1e-4 on the diagonal of every covariance
    (the smallest ridge that will do, where one is singular), classes are drawn for every sample by themselves. Where tasks share
    classes (domains) a class keeps the Gaussians of every task that it came in, each with its own a, and the norm is over all of
    them [ours]. A class with fewer than two samples is left out.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"epochs": 1}, {"epochs": 2, "covariance": "diagonal", "fade": 0.0})
    covariance: str = "full"
    fade: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.fade <= 1:
            raise ConfigError(f"fade must be in [0, 1], got {self.fade}")

    def mean_scale(self, task: int, now: int) -> float:
        return 1 - self.fade + self.fade * (task + 1) / (now + 1)

    def normed_together(self, rows: Sequence[int], classes: Sequence[Sequence[int]]) -> list[int]:
        first = {c: task for task in reversed(range(len(classes))) for c in classes[task]}
        return list(Counter(first[c] for c in rows).values())
