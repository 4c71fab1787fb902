"""How far what was merged moves what linear maps give, for rules that fit them to what each client's own model gave (Chain of
Merges, target own).

Shapes: N rows (all tokens of a batch), I inputs and O outputs of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedsim.core import contracts
from fedsim.core.contracts import ClientWork
from fedsim.core.messages import Tensors
from fedsim.core.tensors import LORA_A, LORA_B, wide


@dataclass(frozen=True)
class Statistic(contracts.WorkStatistic):
    """D = Σ (y − ŷ) x̂ᵀ (O, I) over samples and tokens: x̂ what goes into the map and ŷ what comes out of its layer where tensors
    before it are merged (`RoundPlan.merged`), y what comes out in the client's own model, as it has trained it in this round,
    both without the bias.

    Sent as `map/<subject>`, float32; sums are float64. Subjects: `head.weight`, `<layer>.weight` and `<layer>.lora_A`; of the
    latter D / s, in units of the pair's product, which counts s times in the model. Two passes, without augmentation.
    """

    additive: ClassVar[bool] = True

    def measured(self, work: ClientWork, params: Tensors, subjects: Sequence[str]) -> dict[str, torch.Tensor]:
        sums = {s: torch.zeros(work.layer_shape(s), dtype=torch.float64) for s in subjects}
        both = [work.passing(work.shard, subjects, through) for through in (params, work.own)] if subjects else ()
        for merged, own in zip(*both, strict=True):
            for s in subjects:
                x_NI, merged_NO, own_NO = (wide(t).flatten(0, -2) for t in (*merged[s], own[s][1]))
                gap_OI = (own_NO - merged_NO).T @ x_NI
                sums[s] += gap_OI.cpu() / (work.scale if s.endswith(LORA_A) else 1.0)
        return {f"map/{s}": t.float() for s, t in sums.items()}

    def synthetic(self, seen: contracts.Seen, params: Tensors, subjects: Sequence[str]) -> dict[str, torch.Tensor]:
        """Zeros: behind made-up samples there is no model in which anything could move."""
        maps = [s for s in subjects if params[s].dim() == 2 and not s.endswith(LORA_B)]
        outputs = {s: s.removesuffix(LORA_A) + LORA_B if s.endswith(LORA_A) else s for s in maps}
        return {f"map/{s}": torch.zeros(len(params[n]), params[s].shape[1], dtype=torch.float64) for s, n in outputs.items()}
