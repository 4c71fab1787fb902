"""Rebalances the head on drawn features of all classes seen, a Gaussian for every client and class (HGP, arXiv 2406.02447).

After the code of fed-mammoth (older public commits); the paper itself could only be read in its abstract.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.core.errors import ConfigError
from server.calibrators._gaussians import GaussianCalibrator


@dataclass(frozen=True)
class Calibrator(GaussianCalibrator):
    """After every round, SGD on cross-entropy(z/‖z‖₂/temperature), z = W x + b: class c uniform, i ~ n_ic, x ~ N(μ_ic, f Σ_ic).

    The hierarchy: classes of all tasks so far are drawn equally often, and a class's clients as often as they hold samples of it
    (those with 2 or more). This takes away the bias to recent classes and to locally frequent ones. Gaussians of old tasks stay
    as their clients sent them, of a class that comes again (domains) beside those of the current task [ours]; a class of the
    current task is replaced by what this round's participants sent, and kept where none of them holds it [ours]. Goes with
    prompts (`adapter: prefix`), that move features little: old Gaussians go stale as the module moves, and the rows of old tasks'
    classes are trained on them.

    Asks for `class_moments`: n, mean and variance of every class that a client holds, under the client's own module, in a blend
    with those of past tasks where that is what is deployed; with covariance full the upper triangle, D(D+1)/2 numbers per class.
    Memory with it: D² numbers per client and class while the head is trained.

    covariance: diagonal | full. factor: f of covariances; null is the reference's 3 for diagonal ones and 1 for full ones.
    samples_per_class: drawn anew in every epoch; epochs: passes over as many; batch_size: of them. normalise: divide logits by
    their norm over the classes and by the temperature; else the plain cross-entropy. temperature: with normalise. lr,
    momentum: of SGD without weight decay; schedule: of lr over
    the epochs, cosine (to zero) | constant (0.01 and cosine are the reference's first versions; later ones take the client's lr).
    clip_norm: of a batch's gradient, null: none [ours]. Logits of few classes can come to be so short that dividing by their norm
    makes the step a thousand times as long; the default is more than twice the longest gradient of a run that goes well.

    Unlike the reference: no 1e-8 on the diagonal of covariances and no 1e-12 on norms; classes without any Gaussian are left
    out (its counts go astray there); batches are of features drawn one by one, which is the same distribution. With epochs 0
    it is the merge alone. Raises AggregationError when an update lacks the statistics.
    """

    factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor is not None and not self.factor >= 0:
            raise ConfigError(f"factor must not be negative, got {self.factor}")

    @property
    def inflation(self) -> float:
        if self.factor is not None:
            return self.factor
        return 3.0 if self.covariance == "diagonal" else 1.0
