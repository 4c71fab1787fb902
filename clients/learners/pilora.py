"""PILoRA: a LoRA per task at right angles to the old ones, and class centres that features are drawn to (Guo et al. 2024,
"PILoRA: Prototype guided incremental LoRA for federated class-incremental learning"; after the code of fed-mammoth)."""

# b rows of the client's own batch, C classes (head rows), r rank, d inputs of a layer, t task

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import BESIDE, CENTRES, CROSS_ENTROPY, ClientWork, Context, LocalState, Step, Traits
from fedsim.core.errors import ConfigError, require_choice
from fedsim.core.messages import BACKGROUND, Tensors
from fedsim.core.names import HEAD, HEAD_WEIGHT
from fedsim.core.tensors import LORA_A
from fedsim.models.logits import masked_cross_entropy


@dataclass(frozen=True)
class Learner(contracts.Learner):
    """In the place of the cross-entropy, z_c = −dist(f, c) being the logits of `head: centres`:

        CE(z / T; over) + proximity · 1/b Σ_i dist(f_i, c_{y_i}) + orthogonality · Σ_{s<t} |A_t A_sᵀ|₁ + sparsity · |A_t|₁

    A (r, d) the input sides of all LoRA pairs, |·|₁ the sum of absolute numbers. The third term is 0 exactly where the row space
    of A_t is at right angles to those of old tasks; they come with the modules of past tasks that clients train beside
    (`consolidator: sum`, each of them sent once): no statistic and no memory is needed. Only the centres of the task's own
    classes are trained; those of old tasks stay (`consolidator: {name: sum, keep_old_rows: true}`). What the server does with
    centres is the rule `centres`.

    over: classes of the softmax: all (as the reference has it, centres of classes to come among them, which stay where they were
    drawn) | seen | task. temperature: T. proximity, orthogonality, sparsity: weights, of the reference, which takes the mean over
    the batch in the first two terms. Not followed: its adding the last module to the new one when it is stored (see `sum`).
    Ours: the whole head travels, where the reference sends the task's centres alone.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"over": "seen", "temperature": 0.5, "proximity": 0.1},
        {"over": "task", "orthogonality": 0.0, "sparsity": 0.0},
    )
    over: str = "all"
    temperature: float = 1.0
    proximity: float = 0.001
    orthogonality: float = 0.5
    sparsity: float = 0.01

    def __post_init__(self) -> None:
        require_choice("over", self.over, ("all", "seen", "task"))
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be positive, got {self.temperature}")
        for name in ("proximity", "orthogonality", "sparsity"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def traits(self) -> Traits:
        needs = {
            CENTRES: "looks at distances of features to class centres, and {head} has none: use head: centres",
            BESIDE: "keeps a task's LoRA apart from frozen ones, and {consolidator} freezes none: use consolidator: sum",
        }
        return Traits(takes={CROSS_ENTROPY}, needs=needs)

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        past = context.get(BACKGROUND, {})
        fixed = sorted(set(range(len(work.params[HEAD_WEIGHT]))) - set(work.classes))
        rows = torch.tensor(fixed, dtype=torch.long, device=work.params[HEAD_WEIGHT].device)
        return {"past": {n: t for n, t in past.items() if n.endswith(LORA_A) and n in work.trained}, "fixed": rows}

    def loss(self, state: LocalState, step: Step) -> Tensor:
        logits_bC, y_b = step.logits[step.own], step.labels[step.own]
        classes = {"all": range(logits_bC.shape[1]), "seen": step.seen, "task": step.classes}[self.over]
        loss = masked_cross_entropy(logits_bC / self.temperature, y_b, classes)
        if self.proximity:
            loss = loss - self.proximity * logits_bC.gather(1, y_b.long()[:, None]).mean()
        if self.orthogonality:
            for name, old_Rd in state["past"].items():
                loss = loss + self.orthogonality * (step.params[name] @ old_Rd.T).abs().sum()
        if self.sparsity:
            for a_rd in (t for n, t in step.params.items() if n.endswith(LORA_A)):
                loss = loss + self.sparsity * a_rd.abs().sum()
        return loss

    def corrected(self, state: LocalState, gradients: Tensors, params: Tensors) -> Tensors:
        """Centres of other classes than the task's stay where they are."""
        return {n: g.index_fill(0, state["fixed"], 0.0) if n.startswith(HEAD) else g for n, g in gradients.items()}
