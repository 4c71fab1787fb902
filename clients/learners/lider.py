"""LiDER: blocks that change little of what is replayed, beside any learner with a buffer (Bonicelli et al. 2022, "On the
effectiveness of Lipschitz-driven rehearsal in continual learning"; as in mammoth, where it works on convolutions)."""

# b replayed samples, L tokens, D features of a token, K pairs of blocks

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.core import contracts
from fedsim.core.contracts import BUFFER, ClientWork, Context, Ending, LocalState, Step, Traits
from fedsim.core.errors import ConfigError
from fedsim.core.messages import Tensors

BUDGETS = "budgets"


@dataclass(frozen=True)
class Learner(contracts.Learner):
    """Over all samples i that other learners replay in a batch, for the tokens F_k that come out of blocks k and k + 1:

        s_ik = the largest singular value of   T = F_kᵀ F_{k+1} / L,   (D, D), tokens brought to length 1
        adds   α · mean_ik s_ik + β · mean_ik |s_ik − max(c_k, 0)|

    s_ik stands for the Lipschitz constant of block k + 1 at sample i. It is found by power iteration on T Tᵀ, from the vector of
    ones; T is never made, and the gradient flows through its last product, which is that of the singular value. c_k are budgets,
    trained by the same loss with plain steps of `client.lr`. Further views (`Learner.again`) are left out. Where nothing is
    replayed nothing is added; α = β = 0: off.

    [Ours: the paper has the maps of a convolution, channels by pixels, where these are tokens of a transformer, features by
    tokens; padding of texts is left out, and the input of the first block too; both terms look at what the step replays, where
    mammoth draws from the buffer for each of them. Budgets are each client's own and start at the means of s_ik over the first
    batch that it ever trains on, with the model as it is then; the paper takes those over the whole first task before training.
    They are no part of the model, so they do not travel and are not averaged.]

    Memory: `budgets` (K,), for β > 0. Nothing travels. Blocks are looked at client by client, and none is cached.

    alpha, beta: α, β, 0 or more; 0.3 and 0.5 are mammoth's beside DER++ on CIFAR-100 with 500 samples. iterations: of the power
    iteration.
    """

    blocks: ClassVar[bool] = True
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"alpha": 0.0, "iterations": 3})
    alpha: float = 0.3
    beta: float = 0.5
    iterations: int = 10

    def __post_init__(self) -> None:
        for key in ("alpha", "beta"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"{key} must not be negative, got {getattr(self, key)}")
        if self.iterations < 1:
            raise ConfigError(f"iterations must be at least 1, got {self.iterations}")

    @property
    def traits(self) -> Traits:
        told = "works on samples that are replayed, but no learner keeps a buffer: put er, derpp, icarl or xder beside it"
        return Traits(needs={BUFFER: told})

    def begin(self, work: ClientWork, memory: Tensors, context: Context, draw: torch.Generator) -> LocalState:
        return {BUDGETS: memory.get(BUDGETS), "rate": work.config.client.lr, "slope": None}

    def loss(self, state: LocalState, step: Step) -> Tensor | None:
        require_tokens(step.blocks)
        rows = step.rehearsed
        state["slope"] = None
        if self.beta and state[BUDGETS] is None:
            with torch.no_grad():
                state[BUDGETS] = self.constants(step, step.own).mean(0)
        if rows.start == rows.stop or not (self.alpha or self.beta):
            return None
        constants_bK = self.constants(step, rows)
        if not self.beta:
            return self.alpha * constants_bK.mean()
        budgets_K: Tensor = state[BUDGETS]
        over_bK = constants_bK - budgets_K.clamp(min=0)
        state["slope"] = -self.beta / len(budgets_K) * over_bK.detach().sign().mean(0) * (budgets_K > 0)
        return self.alpha * constants_bK.mean() + self.beta * over_bK.abs().mean()

    def stepped(self, state: LocalState, params: Tensors) -> None:
        if state["slope"] is not None:
            state[BUDGETS] = state[BUDGETS] - state["rate"] * state["slope"]

    def end(self, state: LocalState, work: ClientWork, params: Tensors, draw: torch.Generator) -> Ending:
        return Ending({BUDGETS: state[BUDGETS]} if state[BUDGETS] is not None else None)

    def constants(self, step: Step, rows: slice) -> Tensor:
        """s_ik of these rows and of every pair of blocks, (b, K)."""
        mask_bL = step.inputs.get("attention_mask")
        outs = [unit_tokens(block[rows], None if mask_bL is None else mask_bL[rows]) for block in step.blocks]
        return torch.stack([largest_singular(front, back, self.iterations) for front, back in pairwise(outs)], dim=1)


def require_tokens(blocks: Sequence[Tensor]) -> None:
    """Raise ConfigError unless there are two blocks at least, whose outputs have one shape, (b, L, D)."""
    if len(blocks) < 2 or len({block.shape for block in blocks}) != 1 or blocks[0].dim() != 3:
        told = ", ".join(str(tuple(block.shape[1:])) for block in blocks)
        raise ConfigError(f"learner lider needs blocks with outputs of one shape, tokens by features, two at least; here {told}")


def unit_tokens(tokens_bLD: Tensor, mask_bL: Tensor | None) -> Tensor:
    """Tokens of length 1, over the root of their number, so that products of two such need no other factor; zeros for padding."""
    tokens_bLD = F.normalize(tokens_bLD.to(torch.promote_types(tokens_bLD.dtype, torch.float32)), dim=-1)
    if mask_bL is None:
        return tokens_bLD / math.sqrt(tokens_bLD.shape[1])
    mask_bL1 = mask_bL[:, : tokens_bLD.shape[1], None].to(tokens_bLD)
    units: Tensor = tokens_bLD * mask_bL1 / mask_bL1.sum(1, keepdim=True).clamp(min=1).sqrt()
    return units


def largest_singular(front_bLD: Tensor, back_bLD: Tensor, iterations: int) -> Tensor:
    """Of   frontᵀ back,   for every sample, (b,)."""
    front_bDL = front_bLD.mT

    def transposed(v_bD1: Tensor) -> Tensor:
        return back_bLD.mT @ (front_bLD @ v_bD1)

    with torch.no_grad():
        v_bD1 = F.normalize(torch.ones_like(front_bDL[..., :1]), dim=1)
        for _ in range(iterations):
            v_bD1 = F.normalize(front_bDL @ (back_bLD @ transposed(v_bD1)), dim=1)
    found: Tensor = torch.linalg.vector_norm(transposed(v_bD1), dim=(1, 2))
    return found
