"""Calibrates the head on virtual features of the current task, drawn from class Gaussians (CCVR, Luo et al. 2021).

The pooled Gaussian and the single calibration are the paper's, as generally known; the loss, its constants and the mixture are
those of fed-mammoth's code.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.core.errors import require_choice
from fedsim.core.messages import RoundPlan, State
from server.calibrators._gaussians import GaussianCalibrator


@dataclass(frozen=True)
class Calibrator(GaussianCalibrator):
    """SGD on cross-entropy(z/‖z‖₂/temperature), z = W x + b: class c uniform, x ~ N(μ_c, Σ_c) of all its clients' features.

        gaussian pooled    n_c = Σ n_ic,  μ_c = Σ n_ic μ_ic / n_c,
                           Σ_c = [Σ (n_ic − 1) Σ_ic + Σ n_ic (μ_ic − μ_c)(μ_ic − μ_c)ᵀ] / (n_c − 1)
        gaussian mixture   one of clients i ~ n_ic / n_c, x ~ N(μ_ic, Σ_ic)

    Pooled moments are those of the concatenated data, exactly, clients with a single sample included; a mixture leaves these out.

    The paper calibrates once, after training: `when: task_end`, after a task's last round, with the pooled Gaussian. fed-mammoth
    does it after every round, with the mixture: `when: round`. `classes: task` trains the rows of the current task's classes
    alone, which is what both mean here; `classes: seen` those of all tasks so far [ours], older ones on the Gaussians that
    their clients sent then.

    Asks for `class_moments` in the rounds it works in: n, mean and variance of every class that a client holds, under the
    client's own model; with covariance full the upper triangle, D(D+1)/2 numbers per class.

    covariance: diagonal | full. samples_per_class: drawn anew in every one of `epochs`; batch_size: of them. normalise: divide
    logits by their norm over the classes and by `temperature`; else the plain cross-entropy, as in the paper: on one task's
    rows the normalised loss does not see their length, and so does not bring it into line with that of other tasks' rows.
    lr, momentum: of SGD without weight decay; schedule: of lr over the epochs, cosine (to zero) | constant.
    A class that nobody told of is left out. With epochs 0 it is the merge alone. Raises AggregationError when an update lacks
    the statistics.
    """

    gaussian: str = "pooled"
    classes: str = "task"
    when: str = "task_end"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("gaussian", self.gaussian, ("pooled", "mixture"))
        require_choice("classes", self.classes, ("task", "seen"))
        require_choice("when", self.when, ("round", "task_end"))

    @property
    def rewrites_old_rows(self) -> bool:
        return self.classes == "seen"

    @property
    def pools(self) -> bool:
        return self.gaussian == "pooled"

    @property
    def inflation(self) -> float:
        return 1.0

    def plan(self, state: State, round: int, last: bool) -> RoundPlan | None:
        return super().plan(state, round, last) if last or self.when == "round" else None
