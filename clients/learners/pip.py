"""PIP: prototypes of classes join every batch as features, so that a client also sees classes that it does not hold (Ma'sum et
al. 2024, "PIP: Prototypes-injected prompt for federated class incremental learning", on DualPrompt)."""

# n samples of a client, b of a batch, C classes (head rows), H classes of which something is known, A augmented prototypes of all
# of them, D features

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import OWN, ClientWork, Context, Ending, LocalState, Step, Traits
from fedsim.core.errors import ConfigError
from fedsim.core.messages import State, Tensors
from fedsim.core.names import HEAD_WEIGHT
from fedsim.models.logits import masked_cross_entropy

COUNT, MEAN, VARIANCE = "count", "mean", "variance"  # (C,), (H, D), (H, D): rows of the classes with a count, in their order


@dataclass(frozen=True)
class Learner(contracts.Learner):
    """In place of the cross-entropy, over the task's classes:

        L = 1/(b + A) [ Σ_b −log softmax(h(f(x)))_y + Σ_c Σ_j −log softmax(h(p_cj))_c ],   p_cj = μ_c + β_cj ⊙ √v_c,   j = 1 … a

    h the head, f the features of the client's own batch, μ_c and v_c mean and variance of class c of the task over all clients,
    β uniform in [0, 1)^D, drawn once a round. Prototypes reach the head alone.

    After its last step a client sends n_ic, μ_ic, v_ic of the classes of which it has two samples or more, in evaluation: 4 (C +
    2 H D) bytes. The server pools them to the moments of all these samples together,

        n_c = Σ n_ic,   μ_c = Σ n_ic μ_ic / n_c,   v_c = Σ n_ic (v_ic + μ_ic²) / n_c − μ_c²   (of n, not n − 1)

    and sends them down in the task's next round, as many bytes for its H. A class that nobody sends in a round keeps what was
    known of it. As long as the server knows nothing, in a task's first round, a client goes without prototypes through its first
    epoch, and then makes those of its own classes. Nothing is stored on devices.

    fed-mammoth's code, the reference here, weighs clients by all their samples, not by the class's; it squares a variance, leaves
    out − μ_c² the first time, and multiplies β by v in the place of √v. Here they are moments and standard deviations. Its β are
    positive, and so are ours: prototypes lie above the mean in every feature.

    augmented: a, prototypes a class. Works with every adapter; published on DualPrompt, AdamW with lr 5e-3, 5 epochs.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"augmented": 1})
    augmented: int = 5

    def __post_init__(self) -> None:
        if self.augmented < 1:
            raise ConfigError(f"augmented must be at least 1, got {self.augmented}")

    @property
    def traits(self) -> Traits:
        return Traits(takes={contracts.CROSS_ENTROPY})

    # ------------------------------------------------ on the client

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        """waits: steps until a client makes prototypes of its own, if the server knows none."""
        known = context[OWN]
        waits = math.ceil(len(work.shard) / work.config.client.batch_size)
        return {"work": work, "waits": waits, "prototypes": self._drawn(known, draw) if known else None}

    def loss(self, state: LocalState, step: Step) -> Tensor:
        logits_bC, labels_b = step.logits[step.own], step.labels[step.own]
        if state["prototypes"] is None and not state["waits"]:
            state["prototypes"] = self._of_its_own(state["work"], step)
        state["waits"] -= 1
        if state["prototypes"] is not None:
            features_AD, labels_A = state["prototypes"]
            logits_bC = torch.cat([logits_bC, step.head(features_AD.to(step.features))])
            labels_b = torch.cat([labels_b, labels_A.to(labels_b)])
        return masked_cross_entropy(logits_bC, labels_b, step.classes)

    def end(self, state: LocalState, work: ClientWork, params: Tensors, draw: torch.Generator) -> Ending:
        return Ending(
            statistics=moments(work.outputs(work.shard, params).features, work.labels(work.shard), len(params[HEAD_WEIGHT]))
        )

    def _of_its_own(self, work: ClientWork, step: Step) -> tuple[Tensor, Tensor]:
        """Prototypes from the client's samples, as its model is now."""
        features_nD = step.outputs(work.shard, {**work.params, **step.params}).features
        return self._drawn(moments(features_nD, work.labels(work.shard), step.logits.shape[1]), step.draw)

    def _drawn(self, known: Tensors, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented prototypes (A, D) and their labels (A,)."""
        mean_HD, spread_HD = known[MEAN].double(), known[VARIANCE].double().sqrt()
        beta = torch.rand(len(mean_HD), self.augmented, mean_HD.shape[1], dtype=torch.float64, generator=draw).to(mean_HD)
        features = mean_HD[:, None] + beta * spread_HD[:, None]
        return features.flatten(0, 1), known[COUNT].nonzero()[:, 0].repeat_interleave(self.augmented)

    # ------------------------------------------------ on the server

    def lift(self, statistics: Tensors, num_samples: int) -> Tensors:
        """n, Σ f and Σ f² of every class, (C,) and twice (C, D); nothing in a round that trains nothing."""
        if not statistics:
            return {}
        count_C, mean_HD, variance_HD = (statistics[n].double() for n in (COUNT, MEAN, VARIANCE))
        held = count_C > 0
        sums_CD, squares_CD = (count_C.new_zeros(len(count_C), mean_HD.shape[1]) for _ in range(2))
        sums_CD[held] = count_C[held, None] * mean_HD
        squares_CD[held] = count_C[held, None] * (variance_HD + mean_HD.square())
        return {COUNT: count_C, "sums": sums_CD, "squares": squares_CD}

    def opened(self, state: State, params: Tensors, task: int) -> State:
        return {}

    def heard(self, state: State, total: Tensors, clients: int) -> State:
        if not total:
            return state
        count_C = total[COUNT]
        mean_CD = total["sums"] / count_C.clamp_min(1)[:, None]
        variance_CD = (total["squares"] / count_C.clamp_min(1)[:, None] - mean_CD.square()).clamp_min(0)
        new = {COUNT: count_C, MEAN: mean_CD, VARIANCE: variance_CD}
        told = count_C > 0
        return {n: torch.where(told.view(-1, *[1] * (t.dim() - 1)), t, state[n]) for n, t in new.items()} if state else new

    def context(self, state: State) -> Tensors:
        if not state:
            return {}
        known = state[COUNT] > 0
        return {COUNT: state[COUNT].float(), MEAN: state[MEAN][known].float(), VARIANCE: state[VARIANCE][known].float()}


def moments(features_nD: Tensor, labels_n: Tensor, classes: int) -> dict[str, Tensor]:
    """Count, mean and variance (of n) of the classes with two samples or more, float32; others count as none."""
    x_nD, labels_n = features_nD.detach().cpu().double(), labels_n.cpu().long()
    count_C = torch.bincount(labels_n, minlength=classes).double()
    count_C[count_C < 2] = 0
    each_C1 = count_C.clamp_min(1)[:, None]
    mean_CD = x_nD.new_zeros(classes, x_nD.shape[1]).index_add(0, labels_n, x_nD) / each_C1
    squares_CD = torch.zeros_like(mean_CD).index_add(0, labels_n, (x_nD - mean_CD[labels_n]).square())
    held = count_C > 0
    return {COUNT: count_C.float(), MEAN: mean_CD[held].float(), VARIANCE: (squares_CD / each_C1)[held].float()}
