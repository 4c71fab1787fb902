"""CODA-Prompt: prompts as attention-weighted sums of components, some more for every task (Smith et al. 2023, "CODA-Prompt:
Continual decomposed attention-based prompting for rehearsal-free continual learning", arXiv:2211.13218)."""

# b samples, k components of a task, P length, D width, N numbers of a component, K clients

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.core.contracts import BackboneLike, Slots
from fedsim.core.errors import ConfigError, ModelError
from fedsim.core.messages import Tensors
from fedsim.core.tensors import wide
from fedsim.models.adapters import _pool, _prompts, _tasks, prefix

SMALLEST = 1e-24  # a squared norm below it is none: its direction means nothing
PROMPT, KEY, ATTENTION = ".coda_prompt", ".coda_key", ".coda_attention"
DEPENDENT = 1e-6  # what must be left of a vector of length 1 for a direction of its own


@dataclass(frozen=True)
class Adapter(_pool.Pool):
    """Prefixes (keys and values, see the adapter prefix) that every sample mixes from a pool of components, in each chosen block:

        w_k(x) = cos(q(x) ⊙ A_k, K_k),   p(x) = Σ_k w_k(x) P_k,   keys are the first half of p's P rows, values the second

    q(x), the query, are the bare backbone's features of the sample. Every task brings `components` more of A, K (k, D) and P
    (k, P, D); they are drawn on the server, so that all clients have the same, orthonormal to each other and orthogonal to all
    that are there (Gram–Schmidt, P_k as one vector). In training and in inference p(x) is the sum over the components of all
    tasks so far; those of earlier tasks stay as they are. Added to a client's loss, summed over blocks:

        μ (‖K Kᵀ − I‖² + ‖A Aᵀ − I‖² + ‖P Pᵀ − I‖²),   ‖·‖² the mean over the numbers of a matrix, over all components so far

    Tensors `<block>.coda_prompt.task3`, `.coda_key.task3`, `.coda_attention.task3`. Those of the task travel up and down,
    k (P + 2) D numbers a block; those of earlier tasks down to whoever does not have them.

    length: P, even; blocks: "all", or indices; components: k of every task (100 in all as published: 10 for 10 tasks); mu: μ, 0.1
    in the paper and 0 in its code. Published with Adam, lr 1e-3 and a cosine schedule. The published code projects on one old
    component after the other, which are not orthogonal any more once they were trained; ours are orthogonal to all that they
    span. Raises ModelError where a task finds no directions left: D components in all are the most.
    """

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"length": 2, "blocks": "all", "components": 2},
        {"length": 4, "blocks": [1], "components": 3, "mu": 0.1},
    )
    lean: ClassVar[bool] = True
    length: int = 8
    blocks: Any = field(default_factory=lambda: [0, 1, 2, 3, 4])
    components: int = 10
    mu: float = 0.0

    def __post_init__(self) -> None:
        _prompts.check_options(self.length, self.blocks, 0.0)
        if self.length % 2:
            raise ConfigError(f"length must be even, as many keys as values, got {self.length}")
        if self.components < 1:
            raise ConfigError(f"components must be at least 1, got {self.components}")
        _pool.require_not_negative(mu=self.mu)

    def init(self, backbone: BackboneLike, generator: torch.Generator) -> dict[str, Tensor]:
        """The first task's components. Raises ModelError for a backbone that is no vision transformer, or a block without an
        attention that takes prefixes."""
        _pool.require_vision_transformer("codaprompt", backbone.encoder)
        return self._brought(backbone, {}, 0, generator)

    def grown(self, backbone: BackboneLike, tensors: Tensors, generator: torch.Generator) -> dict[str, Tensor]:
        return {**tensors, **self._brought(backbone, tensors, 1 + _tasks.current(tensors), generator)}

    def frozen(self, tensors: Tensors) -> tuple[str, ...]:
        return _tasks.older(tensors)

    def _brought(self, backbone: BackboneLike, old: Tensors, task: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A task's components."""
        found: dict[str, Tensor] = {}
        if (total := (task + 1) * self.components) > backbone.width:
            raise ModelError(
                f"adapter codaprompt: with task {task} there are {total} components in directions of their own, but features "
                f"have {backbone.width}: lower adapter.components (times tasks, it is {backbone.width} at most)"
            )
        for block in _prompts.blocks("codaprompt", backbone.encoder, self.blocks):
            _, width = prefix.attention(backbone.encoder, block, "codaprompt")
            for part, shape in ((PROMPT, (self.length, width)), (KEY, (backbone.width,)), (ATTENTION, (backbone.width,))):
                old_kN = torch.cat([torch.zeros(0, math.prod(shape)), *(t.flatten(1) for t in _tasks.all_of(old, block + part))])
                new_kN = orthonormal(old_kN, self.components, generator)
                found[_tasks.of_task(block + part, task)] = new_kN.float().view(-1, *shape)
        return found

    def prompted(
        self, backbone: BackboneLike, tensors: Tensors, query_bD: Tensor, training: bool, slots: Slots | None = None
    ) -> AbstractContextManager[None]:
        """Every sample's own prefixes in every block that the tensors name."""
        prefixes: dict[str, tuple[Tensor, Tensor]] = {}
        for block in dict.fromkeys(name.partition(PROMPT)[0] for name in tensors if PROMPT in name):
            tasks = zip(*(_tasks.all_of(tensors, block + part) for part in (PROMPT, KEY, ATTENTION)), strict=True)
            parts = [mixed(weights(query_bD, attention, key), prompt) for prompt, key, attention in tasks]
            keys_bPD, values_bPD = sum(parts[1:], parts[0]).chunk(2, dim=1)
            prefixes[block] = keys_bPD, values_bPD
        return prefix.attending(backbone.encoder, prefixes)

    def loss(self, tensors: Tensors, query_bD: Tensor | None) -> Tensor | None:
        if not self.mu:
            return None
        parts = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
        terms = [off_orthonormal(torch.cat([t.flatten(1) for t in _tasks.all_of(tensors, part)])) for part in parts]
        return self.mu * torch.stack(terms).sum()


def weights(query_bD: Tensor, attention_kD: Tensor, key_kD: Tensor) -> Tensor:
    """w_k(x) = cos(q(x) ⊙ A_k, K_k) of every sample and component, (b, k); with a leading axis of clients (K, k, D), of every
    client's samples, (K, b / K, k).

    Without the products q ⊙ A_k, which are (b, k, D): (q ⊙ A_k) · K_k = q · (A_k ⊙ K_k), and ‖q ⊙ A_k‖² = q² · A_k².
    """
    query_bD = query_bD.to(attention_kD.dtype)
    q = query_bD if attention_kD.dim() == 2 else query_bD.view(len(attention_kD), -1, query_bD.shape[-1])
    squares = (q.square() @ attention_kD.square().mT).clamp_min(SMALLEST)
    lengths_k = key_kD.square().sum(-1).clamp_min(SMALLEST).sqrt()
    return q @ (attention_kD * key_kD).mT / (squares.sqrt() * lengths_k.unsqueeze(-2))


def mixed(weights_bk: Tensor, prompt_kPD: Tensor) -> Tensor:
    """Σ_k w_k P_k of every sample, (b, P, D); both may have a leading axis of clients."""
    flat = weights_bk @ prompt_kPD.flatten(-2)
    return flat.view(-1, *prompt_kPD.shape[-2:])


def off_orthonormal(rows_kN: Tensor) -> Tensor:
    """The mean square of the numbers of `R Rᵀ − I`: 0 for orthonormal rows. With a leading axis of clients, one of each, (K,)."""
    gram = rows_kN @ rows_kN.mT
    return (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).square().mean((-2, -1))


def orthonormal(old_kN: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random rows (count, N), float64, orthonormal to each other and orthogonal to all old ones: Gram–Schmidt, each row twice,
    for the digits. Raises ModelError where so many directions are not left."""
    basis_mN = old_kN.new_zeros((0, old_kN.shape[1]), dtype=torch.float64)
    for row_N in wide(old_kN):
        rest_N = _beside(basis_mN, row_N / row_N.norm().clamp_min(SMALLEST))
        if rest_N.norm() > DEPENDENT:
            basis_mN = torch.cat([basis_mN, (rest_N / rest_N.norm())[None]])
    used, width = basis_mN.shape
    if used + count > width:
        raise ModelError(f"{count} more components in directions of their own do not fit beside {used} in {width} numbers")
    for _ in range(count):
        rest_N = _beside(basis_mN, torch.randn(width, dtype=torch.float64, generator=generator))
        basis_mN = torch.cat([basis_mN, (rest_N / rest_N.norm())[None]])
    return basis_mN[used:]


def _beside(basis_mN: Tensor, row_N: Tensor) -> Tensor:
    """What of a row is orthogonal to the basis."""
    for _ in range(2):
        row_N = row_N - (basis_mN @ row_N) @ basis_mN
    return row_N
